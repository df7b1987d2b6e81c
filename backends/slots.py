"""The caches of sequences in a GPU's memory: each has its own, and those of one that is gone serve the next."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from arkinfer.backends.base import State, truncated
from arkinfer.backends.cuda_driver import Driver, places


@dataclass
class Slot:
    """The caches of one sequence: addresses by name, and the decode graphs that use them, by the keys they read."""

    block: int
    addresses: Mapping[str, int]
    graphs: dict[int, Any] = field(default_factory=dict)


class Slots:
    """All caches of one executor, of ``sizes`` bytes by name for each sequence; the first are reserved at once."""

    def __init__(self, driver: Driver, sizes: Mapping[str, int]) -> None:
        self._driver = driver
        self._offsets, self.nbytes = places(sizes)
        self.idle = [self._new()]

    def _new(self) -> Slot:
        block = self._driver.allocate(self.nbytes)
        return Slot(block, {name: block + offset for name, offset in self._offsets.items()})

    def take(self) -> Slot:
        """Return caches that no state uses, new ones if there are none."""
        self._driver.current()
        return self.idle.pop() if self.idle else self._new()

    def copy(self, target: Slot, source: Slot) -> None:
        """Copy all caches of a sequence."""
        self._driver.current()
        self._driver.copy(target.block, source.block, self.nbytes)


class SlotState(State):
    """One sequence: a slot of caches and how much of it is in use."""

    def __init__(self, slots: Slots, capacity: int) -> None:
        self.slots, self.capacity, self.length = slots, capacity, 0
        self.slot = slots.take()
        # A state that nobody holds any more gives its caches back, whatever thread collects it.
        weakref.finalize(self, slots.idle.append, self.slot).atexit = False

    def truncate(self, length: int) -> None:
        """Forget every token from ``length`` on; later steps overwrite what the caches hold of them."""
        self.length = truncated(self, length)

    def fork(self) -> SlotState:
        """Return an independent copy, made on the device."""
        twin = SlotState(self.slots, self.capacity)
        self.slots.copy(twin.slot, self.slot)
        twin.length = self.length
        return twin
