"""`arkinfer targets`."""

from __future__ import annotations

import click

from arkinfer.cli import arguments


@click.command()
@click.argument("name", required=False, shell_complete=arguments.complete_targets)
@arguments.json_option
def command(name: str | None, as_json: bool) -> None:
    """List the targets that a model can be built for, or show one (a NAME or a YAML file)."""
    from arkinfer import exporters, targets
    from arkinfer.targets import probe

    chosen = [targets.load(each) for each in ([name] if name else targets.names())]
    facts = [
        {
            **target.to_dict(),
            "can_build": target.backend in exporters.EXPORTERS,
            "runs_here": probe.level_for(target),
        }
        for target in chosen
    ]
    if as_json:
        arguments.print_json(facts[0] if name else facts)
        return
    if name:
        for key, value in facts[0].items():
            click.echo(f"{key:<13}  {_shown(value)}")
        return
    width = max(len(target.name) for target in chosen)
    for target, fact in zip(chosen, facts, strict=True):
        build = "builds" if fact["can_build"] else "no exporter in this version"
        here = f"runs here ({fact['runs_here']})" if fact["runs_here"] else "does not run here"
        click.echo(f"{target.name:<{width}}  {target.backend:<8}  {build}, {here}  {target.description}")


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {item}" for key, item in value.items() if item is not None) or "-"
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)
