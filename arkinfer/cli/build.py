"""`arkinfer build`."""

from __future__ import annotations

import click

from arkinfer.cli import arguments
from arkinfer.cli.progress import Progress


@click.command()
@click.argument("model", shell_complete=arguments.complete_models)
@click.option(
    "--target", default="cpu", show_default=True, metavar="NAME|FILE.yaml", shell_complete=arguments.complete_targets
)
@click.option("-o", "--out", type=click.Path(), metavar="OUT.ark", help="[default: MODEL-TARGET.ark]")
@click.option(
    "--weights",
    type=click.Choice(["auto", "fp32", "fp16", "int8", "int4", "ternary"]),
    default="auto",
    show_default=True,
    help="How weights are stored; auto keeps quantised and ternary checkpoints as they are.",
)
@click.option(
    "--kv", type=click.Choice(["fp32", "fp16", "int8"]), help="Type of the KV cache.  [default: the target's]"
)
@click.option("--attention", type=arguments.ATTENTION, default="auto", show_default=True)
@click.option("--context", type=click.IntRange(1), help="Most tokens of a conversation.  [default: the model's limit]")
@click.option(
    "--group",
    type=click.Choice(["32", "64", "128"]),
    help="Inputs that share a scale in int4 weights.  [default: the target's, 64]",
)
@click.option(
    "--head",
    type=click.Choice(["int8", "int4"]),
    help="Format of the embedding and the output head, where weights are integers.  [default: the target's, int8]",
)
@click.option(
    "--method",
    type=click.Choice(["search", "pgptq"]),
    help="How floats become integers: search finds the scale that loses least; pgptq also corrects the weights that "
    "are not rounded yet, by a calibration text.  [default: the target's, search]",
)
@click.option(
    "--rule",
    "rules",
    multiple=True,
    metavar="PATTERN=FORMAT[:GROUP]",
    help="Store weights by name as fp32, fp16, int8 or int4, whatever --weights says: '*.down_proj.*=int4:32'. "
    "Repeatable; the first that matches counts.  [default: the target's]",
)
@click.option("--verify", type=click.Choice(["fast", "full", "none"]), default="fast", show_default=True)
@click.option(
    "--quality",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Measure what quantising costs against the checkpoint's own weights; auto: up to 0.6 billion parameters.",
)
@click.option("--force", is_flag=True, help="Replace an artifact that is there already.")
@click.option("--adapter", type=click.Path(), metavar="FOLDER", help="LoRA adapter (PEFT) to merge into the weights.")
@arguments.hub_options
@arguments.json_option
def command(
    model: str,
    target: str,
    out: str | None,
    weights: str,
    kv: str | None,
    attention: str,
    context: int | None,
    group: str | None,
    head: str | None,
    method: str | None,
    rules: tuple[str, ...],
    verify: str,
    quality: str,
    force: bool,
    adapter: str | None,
    revision: str | None,
    offline: bool,
    as_json: bool,
) -> None:
    """Compile MODEL for a target into an artifact.

    MODEL is a checkpoint folder, a bundled model, or OWNER/NAME of the Hugging Face hub.

    Ends with a comparison of the artifact with the reference; an artifact that differs is not kept.
    """
    from arkinfer import pipeline

    with Progress() as progress:
        artifact = pipeline.build(
            model,
            target,
            out=out,
            weights=weights,
            kv=kv,
            attention=attention,
            context=context,
            group=int(group) if group else None,
            head=head,
            method=method,
            rules=rules,
            verify=verify,
            quality=quality,
            force=force,
            revision=revision,
            offline=offline,
            adapter=adapter,
            progress=progress,
        )
    manifest, total = artifact.manifest, arguments.artifact_size(artifact)
    if as_json:
        arguments.print_json(
            {
                "artifact": str(artifact.path),
                "digest": manifest.digest,
                "bytes": total,
                "target": manifest.target.get("name"),
                "backend": manifest.backend,
                "weights": manifest.weights,
                "kv": manifest.kv,
                "attention": manifest.attention,
                "context": manifest.context,
                "parity": manifest.parity,
                "quality": manifest.quality,
            }
        )
        return
    click.echo(f"{artifact.path}  {arguments.size(total)}")
    click.echo(
        f"  weights {manifest.weights}, kv {manifest.kv}, attention {manifest.attention}, "
        f"context {manifest.context:,}, target {manifest.target.get('name')}"
    )
    click.echo(f"  {arguments.parity_sentence(artifact)}")
    for line in arguments.quality_lines(artifact):
        click.echo(f"  {line}")
