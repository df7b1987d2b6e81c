"""The import graph of ARCHITECTURE.md: which folder may import which, and which libraries each may load."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from tree import ROOT, SHIPPED, files, imports, module

# Own folders that the key may import besides itself. `arkinfer.errors` and `arkinfer.artifact` are open to all.
FOLDERS = {
    "arkinfer": {"backends", "exporters", "runtime", "targets"},
    "exporters": {"arkinfer", "targets"},
    "backends": {"targets"},
    "runtime": {"backends", "targets"},
    "targets": set(),
}
# What runs on the device may take from `arkinfer/` only what itself needs no torch.
EVERYWHERE = ("arkinfer.errors", "arkinfer.artifact", "arkinfer.__version__")

# Libraries by folder, and the single files that own a heavier one.
LIBRARIES = {
    "arkinfer": {"numpy", "torch", "click", "yaml"},
    "exporters": {"numpy"},
    "backends": {"numpy"},
    "runtime": {"numpy", "tokenizers", "minijinja"},
    "targets": {"yaml"},
}
OWNERS = {
    "arkinfer/checkpoint/gguf_blocks.py": {"gguf"},
    "arkinfer/checkpoint/hub.py": {"huggingface_hub"},
    "arkinfer/artifact/tensorrt.py": {"tensorrt", "tensorrt_rtx"},
    "arkinfer/pipeline.py": {"tokenizers"},  # asks whether a tokenizer adds BOS itself
    "backends/cuda_driver.py": {"cuda"},
    "backends/onnxruntime.py": {"onnxruntime"},
    "backends/tvm.py": {"tvm_ffi"},
    "exporters/tensorrt.py": {"torch"},  # states its version
    "exporters/mlc.py": {"torch"},  # states its version
    "exporters/mlc_relax.py": {"tvm"},
    "exporters/tvm.py": {"torch"},  # states its version
    "exporters/stored.py": {"torch"},  # tensors as arrays and back
    "exporters/weights.py": {"torch"},  # reads weights as tensors
    "exporters/cuda.py": {"torch"},  # states its version
    "exporters/cuda_weights.py": {"torch"},  # reads weights as tensors
    "exporters/cuda_lowering.py": {"torch"},  # walks the graph, which is torch.fx's
    "exporters/lowering.py": {"torch"},  # walks the graph, which is torch.fx's
    "exporters/linker.py": {"ziglang"},
    "exporters/onnx_layout.py": {"torch"},  # lays weights out as tensors
    "exporters/onnx_lowering.py": {"torch"},  # walks the graph, which is torch.fx's
    "exporters/onnx_model.py": {"onnx_ir"},
    "exporters/onnx_weights.py": {"torch"},  # reads weights as tensors
    "exporters/onnxruntime.py": {"torch"},  # states its version
    "exporters/relax.py": {"tvm"},
    "exporters/kernels/tir/source.py": {"tvm"},
    "exporters/kernels/triton/device/language.py": {"triton"},
    # Layouts and references of the CUDA kernels are plain torch; their code is not, and no exporter loads it.
    **{
        f"exporters/kernels/triton/{name}.py": {"torch"}
        for name in (
            "append",
            "attention",
            "compress",
            "elementwise",
            "embedding",
            "layout",
            "linear",
            "norm",
            "sampling",
            "select",
        )
    },
}
# Torch-free parts of `arkinfer/`: loaded by `import arkinfer`, every --help, and on devices.
LIGHT = (
    "arkinfer/__init__.py",
    "arkinfer/__main__.py",
    "arkinfer/artifact/",
    "arkinfer/checkpoint/",
    "arkinfer/cli/",
    "arkinfer/config.py",
    "arkinfer/errors.py",
    "arkinfer/quant/groups.py",
    "arkinfer/alternatives.py",
    "arkinfer/effort.py",
    "arkinfer/estimate.py",
    "arkinfer/options.py",
    "arkinfer/planning.py",
    "arkinfer/rates.py",
    "arkinfer/recipe.py",
    "arkinfer/structure.py",
)


def _folder(name: str) -> str:
    """Return the top-level folder that holds the module ``name`` of this package."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in SHIPPED else "arkinfer"


def _own(file: Path) -> str:
    return file.relative_to(ROOT).parts[0]


@pytest.mark.parametrize("folder", SHIPPED)
def test_folders_import_only_what_they_may(folder: str) -> None:
    wrong = []
    for file in files(folder):
        for name, line, runs in imports(file):
            if not runs or name.split(".")[0] != "arkinfer":
                continue
            other = _folder(name)
            if other == folder or name.startswith(EVERYWHERE) or name == "arkinfer":
                continue
            if other not in FOLDERS[folder]:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong


@pytest.mark.parametrize("folder", SHIPPED)
def test_folders_load_only_their_libraries(folder: str) -> None:
    wrong = []
    for file in files(folder):
        path = file.relative_to(ROOT).as_posix()
        allowed = LIBRARIES[folder] | OWNERS.get(path, set())
        for name, line, runs in imports(file):
            top = name.split(".")[0]
            if runs and top not in sys.stdlib_module_names and top != "arkinfer" and top not in allowed:
                wrong.append(f"{path}:{line} imports {top}")
    assert not wrong


def test_nothing_opens_a_network_connection() -> None:
    network = {"socket", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc", "asyncio", "socketserver"}
    wrong = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in files(*SHIPPED)
        for name, line, _ in imports(file)
        if name.split(".")[0] in network
    ]
    assert not wrong


def test_light_modules_do_not_import_torch() -> None:
    wrong = []
    for file in files("arkinfer"):
        path = file.relative_to(ROOT).as_posix()
        if path.startswith(LIGHT):
            wrong += [f"{path}:{line}" for name, line, runs in imports(file) if runs and name.split(".")[0] == "torch"]
    assert not wrong


def test_imports_are_absolute_and_resolve() -> None:
    known = {module(file) for file in files(*SHIPPED)}
    wrong = []
    for file in files(*SHIPPED):
        for name, line, _ in imports(file):
            if not name:
                wrong.append(f"{file.relative_to(ROOT)}:{line} is relative")
            elif name.startswith("arkinfer.") and name not in known and name.rpartition(".")[0] not in known:
                wrong.append(f"{file.relative_to(ROOT)}:{line} imports {name}, which does not exist")
    assert not wrong
