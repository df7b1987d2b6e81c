"""Needle in a haystack on the artifact: all 32 hidden values are found, sparse over 128K tokens and dense over 16K."""

from __future__ import annotations

import numpy as np
import pytest

from arkinfer import backends, pipeline
from arkinfer.artifact import Artifact
from examples.needle import retrieve

CHUNK = 512


@pytest.fixture(scope="module", params=["fp16", "int8"])
def needle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    out = tmp_path_factory.mktemp("needle") / "needle.ark"
    return pipeline.build("needle", out=out, kv=request.param, context=131136, verify="none")


@pytest.mark.parametrize(("attention", "length"), [("auto", 131072), ("dense", 16384)])
def test_every_needle_is_found(needle: Artifact, attention: str, length: int) -> None:
    if attention == "auto" and needle.manifest.kv == "int8":
        length //= 4  # the same kernels as for fp16 but for loading: a shorter haystack will do
    executor = backends.open(needle, attention=attention)
    tokens, answers = retrieve.haystack(length)
    state = executor.new_state(length + 4)
    for start in range(0, length, CHUNK):
        executor.step(tokens[start : start + CHUNK], state, "none")
    found = {}
    for key in answers:
        state.truncate(length)
        value = int(np.argmax(executor.step([key], state)[-1]))
        end = int(np.argmax(executor.step([value], state)[-1]))
        found[key] = value if end == 2 else -1
    executor.close()
    assert found == answers
