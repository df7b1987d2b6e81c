"""`arkinfer run`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arkinfer.cli import arguments
from arkinfer.cli.progress import Progress
from arkinfer.errors import UserError

if TYPE_CHECKING:
    from arkinfer.runtime.engine import Engine
    from arkinfer.runtime.options import Prompt
    from arkinfer.runtime.result import Result


@click.command()
@click.argument("words", nargs=-1, metavar="[OUT.ark] [PROMPT | -]")
@arguments.artifact_option
@click.option("-f", "--file", "source", type=click.Path(), help="Read the prompt from a file.")
@click.option("--system", help="A system message before the prompt.")
@click.option("--raw", is_flag=True, help="Continue the prompt as it stands, without the chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True)
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: the model's]")
@click.option("--top-k", type=int, help="Sample among the K likeliest tokens; 0: all.")
@click.option("--top-p", type=float, help="Sample among the likeliest tokens that together reach P.")
@click.option("--min-p", type=float, help="Leave out tokens less likely than P times the likeliest.")
@click.option("--repetition-penalty", type=float)
@click.option("--presence-penalty", type=float)
@click.option("--frequency-penalty", type=float)
@click.option("--seed", type=int, help="The same seed gives the same answer.")
@click.option("--stop", multiple=True, help="End the answer before this text; may be repeated.")
@click.option("--think/--no-think", "thinking", default=None, help="Turn reasoning on or off.")
@arguments.engine_options
@arguments.json_option
def command(
    words: tuple[str, ...],
    named: str | None,
    source: str | None,
    system: str | None,
    raw: bool,
    stop: tuple[str, ...],
    threads: int | None,
    attention: str | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Answer one prompt: an argument, a file (-f) or standard input (-).

    The answer goes to standard output; reasoning, speed and warnings go to standard error.
    """
    place, text = _words(words, named, source)
    if system is not None and raw:
        raise click.UsageError("--system needs the chat template: leave --raw out.")
    prompt_text = _read(text, source)
    from arkinfer.runtime.engine import open_engine

    artifact = arguments.open_artifact(place)
    arguments.finish(artifact)
    with open_engine(artifact, threads, attention) as engine:
        prompt = _prompt(engine, prompt_text, system, raw)
        result = _generate(engine, prompt, {**options, "stop": list(stop)}, quiet=as_json)
        if as_json:
            arguments.print_json(
                {**result.to_dict(), "artifact": str(artifact.path), "parity": artifact.manifest.parity}
            )
            return
        _statistics(engine, result)
        click.echo(arguments.parity_sentence(artifact), err=True)


def _words(words: tuple[str, ...], named: str | None, source: str | None) -> tuple[str, str | None]:
    """Return the artifact and the prompt argument, if any."""
    rest = list(words)
    place = named or (rest.pop(0) if rest else None)
    if place is None:
        raise click.UsageError('Missing the artifact. For example: arkinfer run --artifact out.ark "Hello"')
    if len(rest) > 1:
        raise click.UsageError(f"One prompt, please, not {len(rest)}: put quotation marks around it.")
    if rest and source is not None:
        raise click.UsageError("Either a prompt or -f, not both.")
    return place, rest[0] if rest else None


def _read(text: str | None, source: str | None) -> str:
    if source is not None and source != "-":
        try:
            return Path(source).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError("the prompt file cannot be read", facts={"file": source, "reason": error}) from error
    if text is not None and text != "-":
        return text
    if text is None and source is None and sys.stdin.isatty():
        raise click.UsageError("Missing the prompt: an argument, -f FILE, or standard input.")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError("standard input is not UTF-8 text", facts={"reason": error}) from error


def _prompt(engine: Engine, text: str, system: str | None, raw: bool) -> Prompt:
    if not text.strip():
        raise UserError("the prompt is empty", hint="write something to answer", code="ARK-E222")
    if raw or (engine.template is None and system is None):
        return text
    opening = [] if system is None else [{"role": "system", "content": system}]
    return [*opening, {"role": "user", "content": text}]


def _generate(engine: Engine, prompt: Prompt, options: dict[str, Any], quiet: bool) -> Result:
    """Show the answer on stdout as it comes, and reasoning on stderr where that is a terminal."""
    shown = "text"
    with Progress() as progress:
        stream = engine.stream(prompt, **options, progress=lambda done, total: progress("prompt", done, total))
        first = next(stream, None)
    pieces = [] if first is None else [first]
    reasoning = sys.stderr.isatty() and not quiet
    while pieces:
        piece = pieces.pop()
        if piece.kind == "text" and not quiet:
            if shown == "reasoning" and reasoning:
                click.echo("", err=True)
            click.echo(piece.text, nl=False)
        elif reasoning:
            click.secho(piece.text, nl=False, err=True, dim=True)
        shown = piece.kind
        pieces = [following] if (following := next(stream, None)) is not None else []
    result = stream.finish()
    if not quiet:
        click.echo()
    return result


def _statistics(engine: Engine, result: Result) -> None:
    from arkinfer.cli.speed import decode_sentence

    usage, speed = result.usage, result.tokens_per_second
    read = usage.prompt_tokens / result.timing.prefill if result.timing.prefill else 0
    parts = [f"prompt {usage.prompt_tokens} tokens, {read:,.0f} tok/s", f"answer {usage.completion_tokens} tokens"]
    if speed is not None:
        depth = usage.prompt_tokens + usage.completion_tokens // 2
        parts.append(decode_sentence(engine.executor, depth, speed))
    if result.finish_reason == "length":
        parts.append("cut at the limit (--max-tokens or the context)")
    if result.reasoning and not result.text:
        parts.append("all of it reasoning: --no-think asks for the answer alone")
    click.echo("; ".join(parts), err=True)
