"""A weight file that was cut off anywhere is completed to the same bytes, and nothing that is wrong is trusted."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arkinfer.artifact import journal, tensors
from arkinfer.artifact.journal import Journal, Part
from arkinfer.artifact.tensors import TensorSpec, TensorWriter

ARRAYS = {f"tensor.{index}": np.arange(7 + 900 * index, dtype=np.float32) + index for index in range(9)}
SPECS = {name: TensorSpec("F32", array.shape) for name, array in ARRAYS.items()}
KEY = "k" * 64


class Stopped(Exception):
    pass


@pytest.fixture(autouse=True)
def save_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensors, "SAVE_SECONDS", 0.0)


def write(folder: Path, stop_before: str = "", key: str = KEY) -> dict[str, str]:
    """Write ARRAYS, one part each, and return what was finished when the writing began."""
    with TensorWriter(folder / "weights.safetensors", SPECS, Journal(folder / journal.NAME, key)) as writer:
        finished = dict(writer.finished)
        for name, array in ARRAYS.items():
            if name in finished:
                continue
            if name == stop_before:
                raise Stopped
            writer.tensor(name, np.array_split(array, 3))
            writer.finish(name, f"origin of {name}")
    return finished


def whole(folder: Path) -> bytes:
    return (folder / "weights.safetensors").read_bytes()


@pytest.fixture
def expected(tmp_path: Path) -> bytes:
    tensors.write(tmp_path / "plain.safetensors", SPECS, ((name, [array]) for name, array in ARRAYS.items()))
    return (tmp_path / "plain.safetensors").read_bytes()


def loaded(file: Path) -> Mapping[str, np.ndarray]:
    return {name: array for name, array in tensors.load(file).items() if not name.startswith("~")}


@pytest.mark.parametrize("stop", list(ARRAYS))
def test_an_interrupted_file_is_completed(tmp_path: Path, expected: bytes, stop: str) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, stop_before=stop)
    finished = write(tmp_path)
    assert list(finished) == list(ARRAYS)[: list(ARRAYS).index(stop)]
    assert all(origin == f"origin of {name}" for name, origin in finished.items())
    assert whole(tmp_path) == expected
    np.testing.assert_equal(dict(loaded(tmp_path / "weights.safetensors")), ARRAYS)
    assert write(tmp_path).keys() == ARRAYS.keys()  # all of it is there: nothing is written again


@given(st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_of_any_kind_costs_time_not_bytes(tmp_path: Path, expected: bytes, data: st.DataObject) -> None:
    """Cut or change either file at any byte."""
    folder = tmp_path / os.urandom(8).hex()
    folder.mkdir()
    with pytest.raises(Stopped):
        write(folder, stop_before=data.draw(st.sampled_from(list(ARRAYS)[1:])))
    file = folder / data.draw(st.sampled_from([journal.NAME, "weights.safetensors"]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[place:]
    else:
        content[place] ^= data.draw(st.integers(1, 255))
    file.write_bytes(content)
    write(folder)
    assert whole(folder) == expected


def test_another_key_starts_anew(tmp_path: Path, expected: bytes) -> None:
    with pytest.raises(Stopped):
        write(tmp_path, stop_before="tensor.5")
    assert write(tmp_path, key="another") == {}
    assert whole(tmp_path) == expected


def test_parts_are_noted_only_when_they_are_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sync, append = os.fsync, Journal.append
    monkeypatch.setattr(os, "fsync", lambda descriptor: (events.append("sync"), sync(descriptor)))

    def noted(self: Journal, parts: list[Part]) -> None:
        events.append("note" if parts else "start")
        append(self, parts)

    monkeypatch.setattr(Journal, "append", noted)
    write(tmp_path)
    notes = [index for index, event in enumerate(events) if event == "note"]
    assert len(notes) == len(ARRAYS)
    assert all(events[index - 1] == "sync" for index in notes)


def test_a_tensor_of_the_wrong_size_or_place_is_refused(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "a", SPECS) as writer, pytest.raises(ValueError, match="declared"):
        writer.tensor("tensor.0", [ARRAYS["tensor.1"]])
    with TensorWriter(tmp_path / "b", SPECS) as writer, pytest.raises(ValueError, match="order"):
        writer.tensor("tensor.1", [ARRAYS["tensor.1"]])
