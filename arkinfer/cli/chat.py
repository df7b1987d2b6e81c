"""`arkinfer chat`."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from arkinfer.cli import arguments
from arkinfer.errors import ArkError, nearest

if TYPE_CHECKING:
    from arkinfer.runtime.engine import Engine
    from arkinfer.runtime.session import Session
    from arkinfer.runtime.stream import Stream

HELP = {
    "/reset": "forget the conversation",
    "/stats": "show sizes and speeds so far",
    "/think": "think before answering",
    "/no_think": "answer at once",
    "/help": "show this list",
    "/quit": "leave; so does Ctrl-D",
}


@click.command()
@click.argument("bare", required=False, type=click.Path(), metavar="[OUT.ark]")
@arguments.artifact_option
@click.option("--system", help="A system message for the conversation.")
@click.option("--max-tokens", type=click.IntRange(1), default=1024, show_default=True, help="Most tokens of an answer.")
@click.option("--temperature", type=float, help="0 always takes the likeliest token.  [default: the model's]")
@click.option("--top-k", type=int)
@click.option("--top-p", type=float)
@click.option("--seed", type=int)
@click.option("--think/--no-think", "thinking", default=None, help="Turn reasoning on or off.")
@arguments.engine_options
def command(
    bare: str | None,
    named: str | None,
    system: str | None,
    threads: int | None,
    attention: str | None,
    **options: Any,
) -> None:
    """Talk with a model. Ctrl-C ends an answer, Ctrl-D the conversation; /help lists what else there is."""
    place = arguments.one_artifact(named, bare)
    from arkinfer.runtime.engine import open_engine

    artifact = arguments.open_artifact(place)
    arguments.finish(artifact)
    with open_engine(artifact, threads, attention) as engine:
        click.echo(f"{artifact.manifest.name}: {arguments.parity_sentence(artifact)}", err=True)
        click.echo("/help shows the commands.", err=True)
        _Conversation(engine, system, options).run()


class _Conversation:
    def __init__(self, engine: Engine, system: str | None, options: dict[str, Any]) -> None:
        self._engine = engine
        self._session: Session = engine.session(system)
        self._options = options
        self._speeds: list[float] = []

    def run(self) -> None:
        while True:
            line = self._line()
            if line is None:
                return
            if line.startswith("/") and len(line.split()) == 1:
                if not self._obey(line.strip()):
                    return
            elif line.strip():
                self._answer(line)

    def _line(self) -> str | None:
        """Return what the user types, or None at the end of input."""
        while True:
            try:
                if sys.stdin.isatty():
                    import readline  # noqa: F401  (its import gives input() history and editing)

                    return input("> ")
                line = sys.stdin.readline()
                return line.rstrip("\n") if line else None
            except EOFError:
                click.echo(err=True)
                return None
            except KeyboardInterrupt:
                click.echo("\n(Ctrl-D or /quit leaves)", err=True)

    def _obey(self, word: str) -> bool:
        """Carry out a command; False ends the conversation."""
        if word == "/quit":
            return False
        if word == "/reset":
            self._session.reset()
            click.echo("a new conversation", err=True)
        elif word in ("/think", "/no_think"):
            if self._engine.generation.thinking is None:
                click.echo("this model has no thinking mode", err=True)
            else:
                self._options["thinking"] = word == "/think"
                click.echo(f"thinking is {'on' if word == '/think' else 'off'}", err=True)
        elif word == "/stats":
            self._statistics()
        elif word == "/help":
            for name, text in HELP.items():
                click.echo(f"  {name:<10} {text}", err=True)
        else:
            click.echo(f"unknown command {word}; {nearest(word, list(HELP))}", err=True)
        return True

    def _answer(self, line: str) -> None:
        try:
            with self._session.chat_stream(line, **self._options) as stream, _cancelled_by_interrupt(stream):
                self._show(stream)
        except ArkError as error:
            click.echo(error.render(), err=True)
            return
        result = stream.result
        assert result is not None
        if result.finish_reason == "cancelled":
            click.echo("(cancelled)", err=True)
        if result.tokens_per_second is not None:
            self._speeds.append(result.tokens_per_second)

    def _show(self, stream: Stream) -> None:
        kind = "text"
        for piece in stream:
            if piece.kind != kind and kind == "reasoning":
                click.echo("\n")
            kind = piece.kind
            click.secho(piece.text, nl=False, dim=True if kind == "reasoning" else None)
            sys.stdout.flush()
        click.echo()

    def _statistics(self) -> None:
        metrics, session = self._engine.metrics, self._session
        click.echo(f"context   {session.length:,} of {session.capacity:,} tokens", err=True)
        click.echo(
            f"prompts   {metrics.prompt_tokens:,} tokens, {metrics.cached_tokens:,} of them kept from earlier turns",
            err=True,
        )
        click.echo(f"answers   {metrics.completion_tokens:,} tokens, {metrics.requests} so far", err=True)
        if self._speeds:
            from arkinfer.cli.speed import decode_sentence

            click.echo(
                f"speed     {decode_sentence(self._engine.executor, session.length, self._speeds[-1])}", err=True
            )


@contextmanager
def _cancelled_by_interrupt(stream: Stream) -> Iterator[None]:
    """Let Ctrl-C end the answer and not the program; a second one, while the first is at work, ends the program."""

    def cancel(number: int, frame: object) -> None:
        stream.cancel()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        before = signal.signal(signal.SIGINT, cancel)
    except ValueError:  # not the main thread: no signal arrives here
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
