"""Options that several commands share, so that they are spelled and explained alike."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

from arkinfer.amounts import size as size

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from arkinfer.artifact import Artifact
    from arkinfer.backends.tensorrt_finish import Finished

Function = TypeVar("Function", bound=Callable[..., object])
ATTENTION = click.Choice(["auto", "dense", "sparse"])
SUITES = click.Choice(["fast", "full"])


def complete_targets(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of targets, and files."""
    from click.shell_completion import CompletionItem

    from arkinfer.targets import names

    found = [CompletionItem(name) for name in names() if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="file")]


def complete_models(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Complete the names of bundled models, and folders."""
    from pathlib import Path

    from click.shell_completion import CompletionItem

    import arkinfer

    bundled = Path(arkinfer.__file__).parent / "bundled"
    names = sorted(entry.name for entry in bundled.iterdir() if entry.is_dir()) if bundled.is_dir() else []
    found = [CompletionItem(name) for name in names if name.startswith(incomplete) and not name.startswith("_")]
    return [*found, CompletionItem(incomplete, type="dir")]


def artifact_option(function: Function) -> Function:
    """Add ``--artifact``; the artifact may also be the bare argument."""
    return click.option(
        "--artifact",
        "named",
        type=click.Path(),
        metavar="OUT.ark",
        help="The artifact; also accepted as a bare argument.",
    )(function)


def json_option(function: Function) -> Function:
    """Add ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")(function)


def build_options(function: Function) -> Function:
    """Add what `build` and `plan` have in common: the target, and how weights, caches and attention are to be.

    All but the target are named as pipeline.build and planning.plan name them.
    """
    for option in reversed(
        [
            click.option(
                "--target", default="cpu", show_default=True, metavar="NAME|FILE.yaml", shell_complete=complete_targets
            ),
            click.option(
                "--weights",
                type=click.Choice(["auto", "fp32", "fp16", "int8", "int4", "ternary"]),
                default="auto",
                show_default=True,
                help="How weights are stored; auto keeps quantised and ternary checkpoints as they are.",
            ),
            click.option(
                "--kv",
                type=click.Choice(["fp32", "fp16", "int8"]),
                help="Type of the KV cache.  [default: the target's]",
            ),
            click.option("--attention", type=ATTENTION, default="auto", show_default=True),
            click.option(
                "--context",
                type=click.IntRange(1),
                help="Most tokens of a conversation.  [default: the model's limit]",
            ),
            click.option(
                "--group",
                type=click.Choice(["32", "64", "128"]),
                callback=lambda context, parameter, value: int(value) if value else None,
                help="Inputs that share a scale in int4 weights.  [default: the target's, 64]",
            ),
            click.option(
                "--head",
                type=click.Choice(["int8", "int4"]),
                help="Format of the embedding and the output head, where weights are integers.  "
                "[default: the target's, int8]",
            ),
            click.option(
                "--method",
                type=click.Choice(["search", "pgptq"]),
                help="How floats become integers: search finds the scale that loses least; pgptq also corrects the "
                "weights that are not rounded yet, by a calibration text.  [default: the target's, search]",
            ),
            click.option(
                "--rule",
                "rules",
                multiple=True,
                metavar="PATTERN=FORMAT[:GROUP]",
                help="Store weights by name as fp32, fp16, int8 or int4, whatever --weights says: "
                "'*.down_proj.*=int4:32'. Repeatable; the first that matches counts.  [default: the target's]",
            ),
        ]
    ):
        function = option(function)
    return hub_options(function)


def hub_options(function: Function) -> Function:
    """Add ``--revision`` and ``--offline``, for models of the Hugging Face hub."""
    function = click.option("--offline", is_flag=True, help="Of the hub, use only what was fetched before.")(function)
    return click.option(
        "--revision", metavar="NAME", help="Branch, tag or commit of a model OWNER/NAME of the hub.  [default: main]"
    )(function)


def engine_options(function: Function) -> Function:
    """Add ``--threads`` and ``--attention``."""
    function = click.option(
        "--attention", type=ATTENTION, help="Which attention to use.  [default: what the artifact was built for]"
    )(function)
    return click.option(
        "--threads",
        type=click.IntRange(1),
        envvar="ARKINFER_THREADS",
        help="Worker threads; also ARKINFER_THREADS.  [default: every core]",
    )(function)


def one_artifact(named: str | None, bare: tuple[str, ...] | str | None) -> str:
    """Return the artifact that was named one way or the other. Raises UsageError unless it was exactly one."""
    given = [*([named] if named else []), *((bare,) if isinstance(bare, str) else bare or ())]
    if len(given) != 1:
        what = "Missing the artifact." if not given else f"One artifact, please, not {len(given)}: {', '.join(given)}."
        raise click.UsageError(f"{what} For example: --artifact out.ark")
    return given[0]


def open_artifact(place: str, check: str = "auto") -> Artifact:
    """Open an artifact; reading every byte of a large one shows on the terminal."""
    from arkinfer.artifact import Artifact
    from arkinfer.cli.progress import Progress

    with Progress(patience=1.0) as progress:
        return Artifact.open(place, check, progress)


def finish(artifact: Artifact, force: bool = False) -> Finished | None:
    """Build on this device what is left to build of ``artifact``, saying so; None where nothing ever is."""
    from arkinfer import backends
    from arkinfer.cli.progress import Progress

    with Progress() as progress:
        return backends.finish(artifact, lambda line: click.echo(line, err=True), progress, force)


def print_json(value: object) -> None:
    """Write ``value`` to stdout."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1))


def parity_sentence(artifact: Artifact) -> str:
    """Return what is known of the artifact's faithfulness, for people."""
    parity = artifact.manifest.parity
    if parity is None:
        return f"unverified: nobody has compared it with the reference (arkinfer verify {artifact.path.name})"
    verdict = "verified" if parity.get("passed") else "FAILED verification"
    evidence = parity.get("evidence", "ran")
    return (
        f"{verdict}: mean KL {parity.get('mean_kl', float('nan')):.1e}, "
        f"top-1 {100 * parity.get('top1', float('nan')):.2f} % over {parity.get('positions')} positions"
        + ("" if evidence == "ran" else f"; {evidence}: nothing ran on the device")
    )


def quality_lines(artifact: Artifact) -> list[str]:
    """Return what is known of the cost of quantising, for people: a sentence, and a warning where it is high."""
    quality = artifact.manifest.quality
    if quality is None:
        return ["quality not measured: nobody has compared the weights with the checkpoint's (build --quality on)"]
    if quality.get("lossless"):
        return ["quality: lossless, the weights are the checkpoint's own"]

    def figures(values: object) -> str:
        found = values if isinstance(values, Mapping) else {}
        kl, top1, ratio = (
            value if isinstance(value := found.get(key), float | int) else float("nan")
            for key in ("mean_kl", "top1", "ratio")
        )
        return f"KL {kl:.4f}, top-1 {top1:.1%}, perplexity x{ratio:.3f}"

    lines = [f"quality against the checkpoint: {figures(quality)} over {quality.get('positions')} positions"]
    texts = quality.get("texts")
    if isinstance(texts, Mapping) and len(texts) > 1:
        lines += [f"  {name:<8} {figures(values)}" for name, values in sorted(texts.items())]
    if faults := quality.get("faults"):
        reasons = "; ".join(map(str, faults)) if isinstance(faults, list) else faults
        lines.append(f"WARNING: quantising cost more than {quality.get('format')} should: {reasons}")
    return lines


def artifact_size(artifact: Artifact) -> int:
    """Return the bytes of all files of the artifact."""
    return sum(entry.size for entry in artifact.manifest.files.values())
