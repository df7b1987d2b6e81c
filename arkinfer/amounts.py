"""Amounts as people read them."""

from __future__ import annotations


def size(nbytes: float) -> str:
    """Return a number of bytes for people."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while nbytes >= 1000 and len(units) > 1:
        nbytes /= 1000
        del units[0]
    return f"{nbytes:.0f} {units[0]}" if units[0] == "B" or nbytes >= 100 else f"{nbytes:.1f} {units[0]}"
