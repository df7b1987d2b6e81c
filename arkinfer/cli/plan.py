"""`arkinfer plan`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from arkinfer.cli import arguments

if TYPE_CHECKING:
    from arkinfer.planning import Plan


@click.command()
@click.argument("model", shell_complete=arguments.complete_models)
@arguments.build_options
@arguments.json_option
@click.pass_context
def command(
    context_: click.Context,
    /,
    model: str,
    target: str,
    as_json: bool,
    **choices: Any,
) -> None:
    """Say what a build of MODEL would take, whether it fits the target and how fast it would be, before it is made.

    Only the configuration, the headers and a few rows are read. Exit status: 0 it fits, 1 it does not or nobody knows
    the target's memory, 3 the target cannot run it.
    """
    from arkinfer import planning

    plan = planning.plan(model, target, **choices)
    if as_json:
        arguments.print_json(plan.to_dict())
    else:
        _show(plan)
    context_.exit(3 if plan.refused else 0 if plan.fits else 1)


def _show(plan: Plan) -> None:
    click.echo(verdict(plan))
    for reason in plan.refused:
        click.echo(f"  refused    {reason}")
    size, memory = arguments.size, plan.memory
    formats = ", ".join(f"{name} {size(count)}" for name, count in sorted(plan.weight_bytes.items()) if count)
    rows = [
        ("weights", size(memory.weights), formats),
        ("caches", size(memory.kv), f"{plan.kv}, at {plan.context:,} tokens"),
        ("compressed", size(memory.compressed), "keys that choose the blocks of sparse attention"),
        ("workspace", size(memory.workspace), "inner values of a prompt's step"),
        ("runtime", size(memory.runtime), "Python, tokenizer, backend"),
    ]
    for name, amount, remark in rows:
        click.echo(f"  {name:<10} {amount:>8}  {remark}")
    click.echo(f"  operators  {_operators(plan)}")
    for speed in plan.speeds:
        prefill, decode = (
            "unknown" if value is None else f"{value:,.0f} tok/s" if value >= 100 else f"{value:,.1f} tok/s"
            for value in (speed.prefill_tok_s, speed.decode_tok_s)
        )
        click.echo(f"  at {speed.depth:<8,} prompts {prefill}, answers {decode} (estimated)")
    click.echo(f"  method     {_method(plan)}")
    build = plan.build
    click.echo(
        f"  build      about {_duration(build.total_seconds)} here, {size(build.host_bytes)} of host memory, "
        f"{size(build.disk_bytes)} of disk"
    )
    for note in plan.notes:
        click.echo(f"  note       {note}")
    for change in plan.ladder:
        outcome = "fits" if change.fits else "still too large"
        click.echo(f"  try        {change.change}: saves {size(change.saves_bytes)}, {outcome}")
        click.echo(f"             {change.command}")


def verdict(plan: Plan) -> str:
    """Return one line: whether the plan's model fits its target."""
    needed, title = arguments.size(plan.memory.total), f"{plan.model} -> {plan.target}"
    if plan.available is None or plan.largest_context is None:
        return f"{title}: needs {needed} at {plan.context:,} tokens; {plan.available_source}"
    room = arguments.size(plan.available)
    largest = (
        f"largest context {plan.largest_context:,}" if plan.largest_context else "no context fits with these weights"
    )
    state = "fits" if plan.fits else "does not fit"
    state = f"refused, though it {state}" if plan.refused else state
    return f"{title}: {state}: {needed} of {room} ({plan.available_source}) at {plan.context:,} tokens; {largest}"


def _operators(plan: Plan) -> str:
    if not plan.native:
        return f"{sum(plan.operators.values())}: unknown how this backend would run them"
    return (
        f"{sum(plan.native.values())} native, {sum(plan.absorbed.values())} absorbed by these, 0 decomposed, "
        f"{len(plan.refused)} reasons to refuse"
    )


def _method(plan: Plan) -> str:
    rates, factors = plan.rates, plan.factors
    if rates.bandwidth is None:
        return "no estimate: neither the target's file nor this machine tells its bandwidth"
    name, value = ("fp16", rates.float16) if rates.float16 else ("int8", rates.int8)
    peak = "unknown" if value is None else f"{value / 1e9:,.0f} GOP/s {name}"
    return (
        f"{rates.bandwidth / 1e9:.1f} GB/s, of which weights reach {100 * factors.weight_share:.0f} % and caches "
        f"{100 * factors.cache_share:.0f} %; {peak}, of which prompts reach {100 * factors.product_share:.0f} % "
        f"({rates.source}; shares {factors.source})"
    )


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"
