"""`arkinfer build`."""

from __future__ import annotations

from typing import Any

import click

from arkinfer.cli import arguments
from arkinfer.cli.progress import Progress


@click.command()
@click.argument("model", shell_complete=arguments.complete_models)
@click.option("-o", "--out", type=click.Path(), metavar="OUT.ark", help="[default: MODEL-TARGET.ark]")
@arguments.build_options
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
@arguments.json_option
def command(
    model: str,
    target: str,
    out: str | None,
    verify: str,
    quality: str,
    force: bool,
    adapter: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Compile MODEL for a target into an artifact.

    MODEL is a checkpoint folder, a GGUF file, a bundled model, or OWNER/NAME of the Hugging Face hub.

    Ends with a comparison of the artifact with the reference; an artifact that differs is not kept.
    """
    from arkinfer import pipeline

    with Progress() as progress:
        artifact = pipeline.build(
            model,
            target,
            out=out,
            verify=verify,
            quality=quality,
            force=force,
            adapter=adapter,
            progress=progress,
            say=lambda line: click.echo(line, err=True),
            **choices,
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
