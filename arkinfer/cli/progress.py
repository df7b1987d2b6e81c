"""Progress of long work: one line on a terminal's stderr, nothing anywhere else."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 28
_INTERVAL = 0.1  # seconds between redraws
_BYTES = ("weights", "check")  # stages whose units are bytes


class Progress:
    """Call it with (stage, done, total); as a context manager it leaves a clean line behind.

    A stage that ends within ``patience`` seconds leaves nothing.
    """

    def __init__(self, stream: TextIO | None = None, patience: float = 0.0) -> None:
        self._stream = stream if stream is not None else sys.stderr
        self._patience = patience
        self._shown = self._stream.isatty()
        self._stage = ""
        self._began = self._drawn = 0.0
        self._first = 0  # units that were done when the stage began: an earlier build's

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *failure: object) -> None:
        self._finish(failed=failure[0] is not None)

    def __call__(self, stage: str, done: int, total: int) -> None:
        if not self._shown:
            return
        now = time.monotonic()
        if stage != self._stage:
            self._finish()
            self._stage, self._began, self._drawn, self._first = stage, now, 0.0, done
        if now - self._began < self._patience or (now - self._drawn < _INTERVAL and done < total):
            return
        self._drawn = now
        filled = WIDTH * done // total if total > 0 else 0
        bar = "#" * filled + "." * (WIDTH - filled)
        amount = f"{done / 1e9:.2f}/{total / 1e9:.2f} GB" if stage in _BYTES else f"{done}/{total}"
        self._write(f"{stage:<14.14} [{bar}] {amount}  {self._left(now, done, total)}")

    def _left(self, now: float, done: int, total: int) -> str:
        elapsed, advanced = now - self._began, done - self._first
        if advanced <= 0 or done >= total or elapsed < 2:
            return ""
        rate = f"{advanced / elapsed / 1e6:.0f} MB/s  " if self._stage in _BYTES else ""
        return f"{rate}{elapsed * (total - done) / advanced:.0f} s left"

    def _finish(self, failed: bool = False) -> None:
        if not self._drawn:
            self._stage = ""
            return
        seconds = time.monotonic() - self._began
        self._write(f"{self._stage:<14.14} {'stopped after' if failed else ''} {seconds:.1f} s".replace("  s", " s"))
        self._stream.write("\n")
        self._stream.flush()
        self._stage = ""

    def _write(self, line: str) -> None:
        self._stream.write(f"\r{line}\x1b[K")
        self._stream.flush()
