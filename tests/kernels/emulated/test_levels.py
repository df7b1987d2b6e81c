"""Code of a level has the instructions that the level is for, and a processor without them stops at the first."""

from __future__ import annotations

import signal

import numpy as np
import pytest

from arkinfer.exporters import emulator
from arkinfer.exporters.kernels.tir.linear_int8 import linear_int8
from tests.kernels.emulated import runner
from tests.kernels.linear.kernel_runner import compiled
from tests.kernels.linear.samples import Case, activations, sample

CASE = Case("int4", 64, 128, 20)
LESSER = {"aarch64-i8mm": "cortex-a76", "aarch64-dotprod": "cortex-a72"}  # a processor just below the level


@pytest.mark.parametrize(
    ("level", "form", "instruction"),
    [
        ("aarch64-dotprod", "one", "sdot"),
        ("aarch64-dotprod", "many", "sdot"),
        ("aarch64-i8mm", "one", "usdot"),
        ("aarch64-i8mm", "many", "usmmla"),
    ],
)
def test_a_level_uses_what_it_is_for(level: str, form: str, instruction: str) -> None:
    program = compiled(linear_int8, level, form, CASE.options)
    assembly = program.with_suffix(".s").read_text().split()
    assert instruction in assembly
    tokens = 1 if form == "one" else 3
    arguments = [*activations(CASE, tokens)[1], *sample(CASE).packed, np.zeros((tokens, CASE.columns), np.float32)]
    assert runner.attempt(program, emulator.PROCESSORS[level], arguments).returncode == 0
    assert runner.attempt(program, LESSER[level], arguments).returncode == -signal.SIGILL
