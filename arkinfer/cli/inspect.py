"""`arkinfer inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arkinfer.cli import arguments

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact


@click.command()
@click.argument("subject", required=False, metavar="ARTIFACT|MODEL", shell_complete=arguments.complete_models)
@arguments.artifact_option
@click.option("--graph", is_flag=True, help="Print the model graph instead.")
@arguments.hub_options
@arguments.json_option
def command(
    subject: str | None, named: str | None, graph: bool, revision: str | None, offline: bool, as_json: bool
) -> None:
    """Show what an artifact, or a model that is not built yet, is made of.

    Of a model only the configuration and the headers are read, or fetched.
    """
    place = arguments.one_artifact(named, subject)
    if graph and as_json:
        raise click.UsageError("--graph prints text: leave --json out.")
    if named or (Path(place) / "manifest.json").is_file() or place.rstrip("/").endswith(".ark"):
        artifact = arguments.open_artifact(place)
        if graph:
            click.echo(artifact.file("payload/graph.txt").read_text(encoding="utf-8"), nl=False)
        elif as_json:
            arguments.print_json(_plain(artifact))
        else:
            _show(artifact)
        return
    from arkinfer import pipeline

    if graph:
        from arkinfer import graph as graphs
        from arkinfer.checkpoint import open_checkpoint

        config = open_checkpoint(place, revision, offline, headers_only=True).config
        click.echo(graphs.capture(config, config.max_context).dump())
        return
    facts = pipeline.describe(place, revision, offline)
    if as_json:
        arguments.print_json(facts)
        return
    stored = facts.pop("bytes_by_dtype", {})
    rows = dict(facts.pop("config", {}))
    facts["stored"] = ", ".join(f"{name} {arguments.size(count)}" for name, count in sorted(stored.items()))
    _rows(facts)
    click.echo("config")
    _rows(rows, "  ")


def _plain(artifact: Artifact) -> dict[str, object]:
    from dataclasses import fields

    manifest = artifact.manifest
    values = {item.name: getattr(manifest, item.name) for item in fields(manifest)}
    files = {name: {"size": entry.size, "sha256": entry.sha256} for name, entry in manifest.files.items()}
    return {"artifact": str(artifact.path), **values, "files": files}


def _show(artifact: Artifact) -> None:
    manifest = artifact.manifest
    model = manifest.model
    _rows(
        {
            "artifact": artifact.path,
            "model": f"{manifest.provenance.get('model', manifest.name)} ({model.get('family')})",
            "parameters": model.get("parameters"),
            "target": f"{manifest.target.get('name')} (backend {manifest.backend})",
            "weights": f"{manifest.weights}, activations {manifest.activations}",
            **_rounding(manifest.model.get("recipe", {})),
            "kv": manifest.kv,
            "attention": manifest.attention,
            "context": manifest.context,
            "parity": arguments.parity_sentence(artifact),
            "quality": "\n               ".join(arguments.quality_lines(artifact)).removeprefix("quality: "),
            "toolchain": ", ".join(f"{name} {version}" for name, version in sorted(manifest.toolchain.items())),
            "arkinfer": manifest.arkinfer,
            "graph digest": manifest.graph_digest,
            "digest": manifest.digest,
        }
    )
    for name, value in manifest.limits.items():
        click.echo(f"limit          {name} = {value}")
    for note in manifest.provenance.get("notes", ()):
        click.echo(f"note           {note}")
    click.echo(f"files          {len(manifest.files)}, {arguments.size(arguments.artifact_size(artifact))}")
    for name, entry in sorted(manifest.files.items()):
        click.echo(f"  {arguments.size(entry.size):>9}  {entry.sha256[:12]}  {name}")


def _rounding(recipe: Mapping[str, Any]) -> dict[str, str]:
    """Return how weights were rounded where that is not the plain search."""
    rules = [
        f"{pattern}={weights}" + (f":{group}" if group else "") for pattern, weights, group in recipe.get("rules", ())
    ]
    return {
        **({"method": str(recipe["method"])} if recipe.get("method", "search") != "search" else {}),
        **({"rules": ", ".join(rules)} if rules else {}),
    }


def _rows(values: Mapping[str, object], indent: str = "") -> None:
    width = max([13, *(len(name) for name in values)])
    for name, value in values.items():
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000 else value
        click.echo(f"{indent}{name:<{width}}  {shown}")
