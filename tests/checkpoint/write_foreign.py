"""Write `foreign.safetensors`: small matrices packed by the formats' own tools, for test_foreign.py.

    python -m tests.checkpoint.write_foreign FOLDER

FOLDER holds the unpacked packages, which need not be installed or have a GPU: `auto_gptq` (0.7.1), `awq` (AutoAWQ
0.2.9), `compressed_tensors` (0.20.0) with what that imports. Of the first two only the files that pack are loaded. The
quantised numbers themselves (codes, zeros, scales) are drawn here; the tools' only part is to pack them.
"""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from tests.checkpoint import packers
from tests.checkpoint.packers import Drawn, Tensors

FILE = Path(__file__).with_name("foreign.safetensors")
VERSIONS = {"auto_gptq": "0.7.1", "awq": "0.2.9", "compressed_tensors": "0.20.0"}


def module(folder: Path, path: str) -> Any:
    """Load one file of a package, and none of its `__init__.py`, which would ask for CUDA."""
    parts = path.removesuffix(".py").split("/")
    for depth in range(1, len(parts)):
        name = ".".join(parts[:depth])
        package = types.ModuleType(name)
        package.__path__ = [str(folder / "/".join(parts[:depth]))]
        sys.modules.setdefault(name, package)
    return importlib.import_module(".".join(parts))


def linear(drawn: Drawn, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    rows, width = drawn.codes.shape
    layer = torch.nn.Linear(width, rows, bias=False)
    layer.weight.data = torch.from_numpy(drawn.matrix).to(dtype)
    return layer


def floats(values: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(values.astype(np.float32))


def buffers(layer: torch.nn.Module, *names: str) -> Tensors:
    return {name: getattr(layer, name).contiguous().numpy() for name in names}


def gptq(folder: Path, drawn: Drawn, size: int) -> Tensors:
    rows, width = drawn.codes.shape
    layer = module(folder, "auto_gptq/nn_modules/qlinear/qlinear_cuda.py").QuantLinear(
        drawn.bits, size, width, rows, False
    )
    layer.pack(linear(drawn), floats(drawn.scales), floats(drawn.zeros), torch.from_numpy(drawn.group.astype(np.int32)))
    found = buffers(layer, "qweight", "qzeros", "scales", "g_idx")
    return found | {"scales": found["scales"].astype(np.float16)}


def marlin(folder: Path, drawn: Drawn, size: int) -> Tensors:
    rows, width = drawn.codes.shape
    kind = module(folder, "auto_gptq/nn_modules/qlinear/qlinear_marlin.py").QuantLinear
    layer = kind.__new__(kind)  # its constructor asks for a GPU; packing does not
    torch.nn.Module.__init__(layer)
    layer.infeatures, layer.outfeatures, layer.group_size, layer.bias = width, rows, size, None
    layer.register_buffer("B", torch.empty((width // 16, rows * 2), dtype=torch.int))
    layer.register_buffer("s", torch.empty((width // size, rows), dtype=torch.half))
    layer.pack(linear(drawn, torch.half), torch.from_numpy(drawn.scales))
    return buffers(layer, "B", "s")


def awq(folder: Path, drawn: Drawn, size: int) -> Tensors:
    kind = module(folder, "awq/modules/linear/gemm.py").WQLinear_GEMM
    scales, zeros = floats(drawn.scales.T.copy()), floats(drawn.zeros.T.copy())
    return buffers(kind.from_linear(linear(drawn), 4, size, False, scales, zeros), "qweight", "qzeros", "scales")


def compressed(folder: Path, drawn: Drawn, size: int, symmetric: bool, format: str) -> Tensors:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weights = QuantizationArgs(num_bits=drawn.bits, symmetric=symmetric, strategy="group", group_size=size)
    state = {
        "weight": torch.from_numpy(drawn.matrix),
        "weight_scale": torch.from_numpy(drawn.scales).float(),
        "weight_zero_point": torch.from_numpy((drawn.zeros - (1 << drawn.bits >> 1)).astype(np.int8)),
    }
    packer = BaseCompressor.get_value_from_registry(format)
    packed = packer.compress(state, QuantizationScheme(targets=["Linear"], weights=weights))
    return {name: tensor.numpy() for name, tensor in packed.items() if tensor is not None}


def written(folder: Path) -> Iterator[tuple[str, Drawn, Tensors]]:
    for bits in (2, 3, 4, 8):
        drawn = packers.draw(bits, 32, 64, bits, 32, symmetric=False, act_order=bits == 4)
        yield f"gptq-{bits}", drawn, gptq(folder, drawn, 32)
    for width in (128, 256):
        drawn = packers.draw(width, 64, width, 4, 128, symmetric=True)
        yield f"marlin-{width}", drawn, marlin(folder, drawn, 128)
    drawn = packers.draw(10, 32, 64, 4, 32, symmetric=False)
    yield "awq", drawn, awq(folder, drawn, 32)
    for bits, symmetric, format in (
        (4, False, "pack-quantized"),
        (8, True, "pack-quantized"),
        (8, False, "int-quantized"),
    ):
        drawn = packers.draw(20 + bits, 21, 64, bits, 32, symmetric)
        yield f"{format}-{bits}", drawn, compressed(folder, drawn, 32, symmetric, format)


def main(folder: Path) -> None:
    sys.path.insert(0, str(folder))
    tensors: dict[str, np.ndarray] = {}
    for name, drawn, packed in written(folder):
        tensors |= {f"{name}/{suffix}": tensor for suffix, tensor in packed.items()}
        tensors |= {
            f"{name}/drawn.{part}": getattr(drawn, part).astype(np.uint8) for part in ("codes", "zeros", "group")
        }
        tensors[f"{name}/drawn.scales"] = drawn.scales
    notes: Mapping[str, str] = {f"{package} version": version for package, version in VERSIONS.items()}
    save_file(tensors, FILE, dict(notes))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
