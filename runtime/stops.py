"""Stop strings: the answer ends before the first of them, and no part of one is ever shown."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes text through until a stop string completes.

    The first stop to complete wins, and of those that complete together the longest: the outcome does not depend on
    how the text was cut into pieces.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.hit: str | None = None

    def push(self, text: str) -> str:
        """Return what may be shown now; text that could begin a stop string is held back."""
        if self.hit is not None:
            return ""
        self._held += text
        found = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in self._held]
        if found:
            end, _, self.hit = min(found)
            shown, self._held = self._held[: end - len(self.hit)], ""
            return shown
        keep = self._possible()
        shown = self._held[: len(self._held) - keep]
        self._held = self._held[len(self._held) - keep :]
        return shown

    def flush(self) -> str:
        """Return the held text at the end of the answer: it turned out not to be a stop string."""
        text, self._held = self._held, ""
        return text

    def _possible(self) -> int:
        """Return the length of the longest end of the held text that begins some stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
