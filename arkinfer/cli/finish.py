"""`arkinfer finish`."""

from __future__ import annotations

import click

from arkinfer.cli import arguments


@click.command()
@click.argument("bare", required=False, type=click.Path(), metavar="[OUT.ark]")
@arguments.artifact_option
@click.option("--force", is_flag=True, help="Build the engine even if it is there.")
@arguments.json_option
def command(bare: str | None, named: str | None, force: bool, as_json: bool) -> None:
    """Do on this device what is left to do: build the engine of a TensorRT artifact.

    The engine is kept in this user's cache folder, beside a record of its digest; the artifact stays as it is. `run`,
    `chat` and `bench` do the same at first. Other artifacts need no finishing.
    """
    artifact = arguments.open_artifact(arguments.one_artifact(named, bare))
    finished = arguments.finish(artifact, force)
    if as_json:
        facts = {} if finished is None else {**finished.record, "file": str(finished.engine), "built": finished.built}
        arguments.print_json({"artifact": str(artifact.path), "digest": artifact.manifest.digest, "finished": facts})
        return
    if finished is None:
        click.echo(f"{artifact.path.name} needs no finishing: it runs as it is")
        return
    record = finished.record
    how = f"built in {record['seconds']} s" if finished.built else "there already"
    click.echo(f"{artifact.path.name}: engine {how}, {arguments.size(record['engine']['size'])}")
    click.echo(f"  {record['gpu']} ({record['level']}), {record['library']} {record['version']}, CUDA {record['cuda']}")
    click.echo(f"  {finished.engine}")
