"""Version ranges, as the toolchain of a target states them."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping

_COMPARE: Mapping[str, Callable[[tuple[int, ...], tuple[int, ...]], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}


def within(version: str, wanted: str) -> bool:
    """Return whether ``version`` satisfies every part of a range such as ">=10.3,<10.8"."""
    for part in wanted.split(","):
        match = re.fullmatch(r"\s*(==|!=|>=|<=|>|<)\s*([0-9][\w.+!-]*)\s*", part)
        if match and not _COMPARE[match[1]](_numbers(version), _numbers(match[2])):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(digits) for digits in re.findall(r"\d+", version.partition("+")[0]))
