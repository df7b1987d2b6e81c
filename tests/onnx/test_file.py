"""Weights that an ONNX file keeps outside itself, read and judged before any runtime sees the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arkinfer.artifact import Artifact
from arkinfer.backends import onnx_file
from arkinfer.backends import onnxruntime as backend
from arkinfer.errors import ArtifactError

Change = Callable[[Any, Path], None]


@pytest.fixture
def folder(floats: Artifact, tmp_path: Path) -> Path:
    shutil.copytree(floats.path, tmp_path / "copy")
    return tmp_path / "copy"


def entries(model: Any) -> Any:
    tensor = model.graph.initializer[3]
    return {entry.key: entry for entry in tensor.external_data}


def outside(model: Any, folder: Path) -> None:
    shutil.copy(folder / "weights-onnx.safetensors", folder.parent / "weights-onnx.safetensors")
    entries(model)["location"].value = "../weights-onnx.safetensors"


def absolute(model: Any, folder: Path) -> None:
    entries(model)["location"].value = str(folder / "weights-onnx.safetensors")


def link(model: Any, folder: Path) -> None:
    place = folder / "weights-onnx.safetensors"
    place.rename(folder.parent / "elsewhere")
    place.symlink_to(folder.parent / "elsewhere")


def truncated(model: Any, folder: Path) -> None:
    place = folder / "weights-onnx.safetensors"
    place.write_bytes(place.read_bytes()[:-4096])


def beyond(model: Any, folder: Path) -> None:
    entries(model)["offset"].value = str(1 << 40)


def negative(model: Any, folder: Path) -> None:
    entries(model)["offset"].value = "-64"


def twice(model: Any, folder: Path) -> None:
    model.graph.initializer[3].external_data.add(key="location", value="weights-onnx.safetensors")


def in_a_function(model: Any, folder: Path) -> None:
    constant = next(node for node in model.functions[0].node if node.attribute)
    tensor = constant.attribute[0].t
    tensor.name, tensor.data_location = "hidden", onnx.TensorProto.EXTERNAL
    for key, value in (("location", "secret"), ("offset", "0"), ("length", "8")):
        tensor.external_data.add(key=key, value=value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (outside, "outside the artifact"),
        (absolute, "outside the artifact"),
        (link, "link"),
        (truncated, "ends at byte"),
        (beyond, "ends at byte"),
        (negative, "which bytes"),
        (twice, "says twice"),
        (in_a_function, "outside the artifact"),
    ],
)
def test_weights_that_lie_elsewhere_are_refused(floats: Artifact, folder: Path, change: Change, words: str) -> None:
    """The manifest is not asked: these are artifacts whose maker wrote matching digests."""
    model = onnx.load(str(folder / "model.onnx"), load_external_data=False)
    change(model, folder)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ArtifactError) as caught:
        backend.open(Artifact(folder, floats.manifest))
    assert caught.value.code == "ARK-E513" and words in caught.value.render()


@pytest.mark.parametrize(
    "change",
    [
        {"format": 99},
        {"provider": "npu"},
        {"caches": 3},
        {"caches": [{"name": "layers.0.k"}]},
        {"rope": {"inverse_frequencies": ["one"], "magnitude": "0x1p+0"}},
        {"activations": "float99"},
        {"vocab_size": None},
    ],
)
def test_a_plan_that_does_not_hold_what_it_must_is_refused(
    floats: Artifact, folder: Path, change: dict[str, Any]
) -> None:
    place = folder / "payload/plan.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), **change}))
    with pytest.raises(ArtifactError) as caught:
        backend.open(Artifact(folder, floats.manifest))
    assert caught.value.code == "ARK-E512"


def test_it_reads_what_onnx_reads(floats: Artifact) -> None:
    file = floats.file("model.onnx")
    model = onnx.load(str(file), load_external_data=False)
    right = {}
    for tensor in model.graph.initializer:
        values = {entry.key: entry.value for entry in tensor.external_data}
        right[tensor.name] = (values["location"], int(values["offset"]), int(values["length"]))
    found = {each.name: (each.location, each.offset, each.length) for each in onnx_file.external(file)}
    assert found == right and len(right) > 10


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_damaged_files_are_refused_or_read(
    floats: Artifact, tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    """Whatever the bytes: an answer or an ArtifactError, in bounded time."""
    content = bytearray(floats.file("model.onnx").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("damaged") / "model.onnx"
    file.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    try:
        onnx_file.external(file)
    except ArtifactError as error:
        assert error.code == "ARK-E513"
