"""What an app and its build read: the folder, the library's archive, and the JSON files."""

from __future__ import annotations

import ctypes
import hashlib
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import tvm_ffi

from arkinfer.artifact import Artifact
from arkinfer.artifact.tensors import TensorSpec
from arkinfer.backends.mlc import MlcExecutor
from arkinfer.errors import ArtifactError
from arkinfer.exporters import linker, mlc_weights, platforms
from arkinfer.exporters.compiler import Compiler
from tests.mlc.test_calls import Engine, ids


def _json(package: Artifact, name: str) -> dict:
    return json.loads(package.file(f"payload/{name}").read_text(encoding="utf-8"))


def test_the_folder_is_whole_and_holds_what_the_library_asks_for(package: Artifact, executor: MlcExecutor) -> None:
    folder = package.file("payload/mlc/tensor-cache.json").parent
    assert {file.name for file in folder.iterdir()} == {
        "mlc-chat-config.json",
        "params_shard_0.bin",
        "tensor-cache.json",
        "tokenizer.json",
    }
    records = {}
    for shard in _json(package, "mlc/tensor-cache.json")["records"]:
        data = (folder / shard["dataPath"]).read_bytes()
        assert len(data) == shard["nbytes"] and hashlib.md5(data).hexdigest() == shard["md5sum"]
        end = 0
        for entry in shard["records"]:
            assert entry["byteOffset"] == end and entry["format"] == "raw"
            end += entry["nbytes"]
            records[entry["name"]] = (entry["shape"], entry["dtype"])
        assert end == shard["nbytes"]
    stated = json.loads(executor.machine["_metadata"]())
    assert {item["name"]: (item["shape"], item["dtype"]) for item in stated["params"]} == records
    assert stated["kv_cache"]["num_hidden_layers"] == 4 and stated["kv_state_kind"] == "kv_cache"
    assert (
        stated["memory_usage"]["decode"] < stated["memory_usage"]["prefill"] <= stated["memory_usage"]["batch_verify"]
    )
    config = _json(package, "mlc/mlc-chat-config.json")
    for name in ("context_window_size", "prefill_chunk_size", "model_type", "quantization"):
        assert config[name] == stated[name]
    assert config["tokenizer_info"]["token_postproc_method"] == "byte_level"
    space = executor.machine["alloc_embedding_tensor"]()
    assert tuple(space.shape) == (stated["prefill_chunk_size"], 256)


def test_an_apps_developer_is_told_one_name(package: Artifact) -> None:
    listed, packed = _json(package, "mlc-app-config.json"), _json(package, "mlc-package-config.json")
    (model,), (entry,) = listed["model_list"], packed["model_list"]
    name = model["model_lib"]
    assert entry["model_lib"] == name and packed["device"] == "android"
    payload = package.file("payload/plan.json").parent
    archive = payload / packed["model_lib_path_for_prepare_libs"][name]
    assert (payload / entry["model"] / "tensor-cache.json").is_file()
    with tarfile.open(archive) as objects:
        data = {item.name: objects.extractfile(item).read() for item in objects}  # type: ignore[union-attr]
    assert set(data) == {"lib0.o", f"{name}_devc.o"}
    for code in data.values():
        assert code[:5] == b"\x7fELF\x02" and int.from_bytes(code[18:20], "little") == 183  # EM_AARCH64
    # What `mlc_llm package` looks for, and what the engine then opens the library by.
    assert f"{name}___tvm_ffi__library_bin".encode() in data[f"{name}_devc.o"]


def test_the_archive_is_a_system_library(package: Artifact, executor: MlcExecutor, tmp_path: Path) -> None:
    """Its x86-64 form, linked as an app links the other, opened by its prefix, gives equal logits."""
    stated = json.loads(executor.machine["_metadata"]())
    description = json.loads(package.file("payload/library.json").read_text(encoding="utf-8"))
    assert description["metadata"] == stated
    prefix = "ark_test_"
    archive, platform = tmp_path / "library.tar", platforms.find("linux-x86_64")
    compiler = Compiler("x86-64-v3", platform, "mlc_relax")
    compiler.start(json.dumps({**description, "prefix": prefix}), archive)
    compiler.finish()
    with tarfile.open(archive) as objects:
        objects.extractall(tmp_path, filter="data")
        names = objects.getnames()
    linker.link(platform, [tmp_path / name for name in names], tmp_path / "app.so")
    symbols = subprocess.run(["nm", "-D", str(tmp_path / "app.so")], capture_output=True, text=True, check=False).stdout
    assert "U cosf" in symbols or not symbols
    loaded = ctypes.CDLL(str(tmp_path / "app.so"))  # its constructor registers the symbols, as an app's does
    machine = tvm_ffi.system_lib(prefix)["vm_load_executable"]()
    machine["vm_initialization"](1, 0, 2)
    assert json.loads(machine["_metadata"]()) == stated
    tokens, want = ids(9, 30), {}
    shared, engine = executor.machine, Engine(executor, 1)
    for name, library in (("shared", shared), ("system", machine)):
        executor.machine = library
        try:
            engine = Engine(executor, 1)
            engine.add(0)
            want[name] = [engine.forward("prefill", {0: tokens}), engine.forward("decode", {0: tokens[:1]})]
        finally:
            executor.machine = shared
    for one, other in zip(want["shared"], want["system"], strict=True):
        np.testing.assert_array_equal(one, other)
    assert loaded


def test_shards_are_cut_between_tensors_and_read_back(tmp_path: Path) -> None:
    specs = {
        "a": TensorSpec("U8", (3, 5)),
        "large": TensorSpec("F32", (7, 11)),
        "b": TensorSpec("F16", (4,)),
        "empty": TensorSpec("I32", (0, 3)),
        "bits": TensorSpec("BF16", (2, 9)),
    }
    generator = np.random.default_rng(0)
    arrays = {
        name: generator.integers(0, 200, spec.shape).astype(mlc_weights.NUMPY[spec.dtype])
        for name, spec in specs.items()
    }
    with mlc_weights.ShardWriter(tmp_path, specs, cap=64) as writer:
        for name, array in arrays.items():
            list(writer.pieces(name, [array[:2], array[2:]]))
    index = json.loads((tmp_path / "tensor-cache.json").read_text())
    assert [[entry["name"] for entry in shard["records"]] for shard in index["records"]] == [
        ["a"],
        ["large"],
        ["b", "empty", "bits"],
    ]
    for name, array in mlc_weights.load(tmp_path).items():
        np.testing.assert_array_equal(array, arrays[name])
    loader = tvm_ffi.get_global_func("vm.builtin.tensor_cache.load")
    loader(str(tmp_path), 1, 0)
    found = tvm_ffi.get_global_func("vm.builtin.param_array_from_cache_by_name")(list(specs))
    tvm_ffi.get_global_func("vm.builtin.tensor_cache.clear")()
    for name, tensor in zip(specs, found, strict=True):
        np.testing.assert_array_equal(np.from_dlpack(tensor), arrays[name])
    with pytest.raises(ValueError, match="out of order"), mlc_weights.ShardWriter(tmp_path, specs, cap=64) as writer:
        list(writer.pieces("b", [arrays["b"]]))
    with pytest.raises(ValueError, match="declared"), mlc_weights.ShardWriter(tmp_path, specs) as writer:
        list(writer.pieces("a", [arrays["a"][:1]]))
    (tmp_path / "params_shard_1.bin").unlink()
    with pytest.raises(ArtifactError, match="cannot be read"):
        mlc_weights.load(tmp_path)
