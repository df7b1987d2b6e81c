"""examples/native as its reader compiles it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import arkinfer
from arkinfer.artifact import Artifact
from arkinfer.exporters import linker, platforms

EXAMPLES = Path(__file__).parents[2] / "examples" / "native"


def test_c(tiny: Artifact, tmp_path: Path) -> None:
    folder = tiny.path / "payload/native"
    program, platform = tmp_path / "generate", platforms.find("linux-x86_64")
    strict = ["-O2", "-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-rtlib=none"]  # zig's own takes seconds
    source = [str(EXAMPLES / "generate.c"), f"-I{folder}", f"-L{folder}", "-larkinfer"]
    linker.zig("cc", "-target", platform.zig, *strict, *source, "-o", str(program))
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [program, tiny.path, "5", "9", "300"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    with arkinfer.load(tiny.path) as engine:
        expected = engine.generate([5, 9, 300], max_tokens=64, temperature=0.7, top_p=0.9, seed=1).tokens
    assert tuple(map(int, done.stdout.split())) == expected
    done = subprocess.run([*command, "5000"], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "outside the vocabulary" in done.stderr
