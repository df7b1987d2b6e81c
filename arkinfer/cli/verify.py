"""`arkinfer verify`."""

from __future__ import annotations

import click

from arkinfer.cli import arguments
from arkinfer.cli.progress import Progress


@click.command()
@click.argument("bare", required=False, type=click.Path(), metavar="[OUT.ark]")
@arguments.artifact_option
@click.option("--suite", type=arguments.SUITES, default="fast", show_default=True)
@arguments.json_option
@click.pass_context
def command(context: click.Context, bare: str | None, named: str | None, suite: str, as_json: bool) -> None:
    """Compare an artifact, token by token, with the torch reference.

    Every file is checked against its digest first. Exit status 4 says that the artifact computes something else.
    """
    from arkinfer import parity, pipeline

    artifact = arguments.open_artifact(arguments.one_artifact(named, bare), check="full")
    with Progress() as progress:
        report = pipeline.verify_artifact(artifact, suite, progress)
    if as_json:
        arguments.print_json(report.to_dict())
        context.exit(0 if report.passed else 4)
    parity.require(report)
    click.echo(report.summary())
