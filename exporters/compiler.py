"""The TVM compiler in a process of its own: a crash there is an error here, and loading it overlaps other work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import arkinfer
from arkinfer.errors import InternalError
from arkinfer.exporters.platforms import Platform


class Compiler:
    """One process that compiles one program for one instruction-set level of a platform.

    ``module`` is the code of that process.
    """

    def __init__(self, isa: str, platform: Platform, module: str = "relax") -> None:
        root = str(Path(arkinfer.__file__).resolve().parent.parent)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))}
        self._isa = isa
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", f"arkinfer.exporters.{module}", isa, platform.name, platform.glibc],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def start(self, program: str, out: Path) -> None:
        """Hand over ``program`` (JSON); the library will be written to ``out``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{out}\n{program}")
            self._process.stdin.close()
        except BrokenPipeError:  # it died while loading; ``finish`` reports why
            pass
        self._process.stdin = None

    def finish(self) -> None:
        """Wait for the library. Raises InternalError if the compiler failed or crashed."""
        _, log = self._process.communicate()
        if self._process.returncode:
            lines = [line for line in log.splitlines() if line.strip() and "Warning" not in line]
            raise InternalError(
                "the compiler failed",
                facts={
                    "level": self._isa,
                    "exit status": self._process.returncode,
                    "last words": lines[-1] if lines else "none",
                },
                hint="report this with the model's config.json",
                code="ARK-E710",
            )

    def close(self) -> None:
        """End the process if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stderr):
            if stream is not None:
                stream.close()
