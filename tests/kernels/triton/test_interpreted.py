"""The code of every CUDA kernel, in Triton's interpreter, against its torch reference in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from arkinfer.exporters.kernels import triton as kernels
from tests.kernels.triton.cases import borders, cases

pytest.importorskip("triton")


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What each case deviates by; one process for all, since loading torch and triton takes longer than most cases."""
    script = Path(__file__).with_name("interpret.py")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("case", [*cases(), *borders()], ids=str)
def test_the_code_computes_what_the_reference_says(case: Any, report: dict[str, Any]) -> None:
    outputs = report[str(case)]
    assert outputs
    assert [output for output in outputs if not output[3]] == []  # [argument, error, allowed, fine]


def test_every_kernel_has_cases() -> None:
    assert {case.kernel for case in cases()} == set(kernels.KERNELS)


def test_cases_have_names_of_their_own() -> None:
    names = [str(case) for case in [*cases(), *borders()]]
    assert len(names) == len(set(names))
