"""What an executor reaches, beside what the machine allows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arkinfer.errors import UnsupportedError

if TYPE_CHECKING:
    from arkinfer.backends.base import Executor


def decode_limit(executor: Executor, depth: int, bandwidth: float) -> float | None:
    """Return the tokens/s that ``bandwidth`` (bytes/s) allows at ``depth`` tokens; None if the backend cannot count."""
    try:
        return bandwidth / executor.decode_bytes(depth)
    except UnsupportedError:
        return None


def decode_sentence(executor: Executor, depth: int, tokens_per_second: float, seconds: float = 0.4) -> str:
    """Return "N tok/s, M % of the memory-bandwidth limit"; takes ``seconds`` to measure the bandwidth."""
    bandwidth = executor.bandwidth(seconds)
    limit = decode_limit(executor, depth, bandwidth)
    if limit is None:
        return f"{tokens_per_second:.1f} tok/s"
    return (
        f"{tokens_per_second:.1f} tok/s, {100 * tokens_per_second / limit:.0f} % of the memory-bandwidth limit "
        f"({limit:,.0f} tok/s at {bandwidth / 1e9:.1f} GB/s)"
    )
