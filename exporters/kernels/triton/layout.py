"""How weights and caches lie in device memory.

**Weights.** Rows (outputs) stay rows, so a slice of rows packs to a slice of the packed rows. dense: (N, K) as stored.
Integer formats: (N, words) of 32 bits, in chunks of 16 words (64 bytes). A word holds ``planes`` codes, lowest bits
first; the code of plane p in word j of chunk c belongs to input ``k = (c * planes + p) * 16 + j``. So 16 consecutive
inputs lie in 16 consecutive words at one bit position: a thread that holds four words (one 128-bit load) reads its
inputs four at a time, and a tile of chunks expanded to (planes, words) is in the order of the inputs. Rows are filled
with zeros up to whole chunks. scales (N, G) and zeros (N, G) uint8 are as in arkinfer.quant.packed, except that an int8
weight's zero counts from 0 as the others' do. Groups are multiples of 16 inputs.

**Caches**, for each layer: k, v, nope (c, kv_heads, head_dim), k_scale and v_scale (c, kv_heads) float32, fine and
coarse (kernels, kv_heads, head_dim) float16. ``c`` is the capacity of the sequence, a multiple of 64 that the kernels
do not know: a sequence may have less than the plan's whole context, and its first tokens are the beginning of each
buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from arkinfer.errors import UnsupportedError
from arkinfer.exporters.kernels.triton.kernel import ceil_div
from arkinfer.quant.packed import Packed, pack_crumbs, pack_nibbles, unpack_crumbs, unpack_nibbles

WORDS = 16  # of a chunk; also the inputs that a plane of a chunk holds
BLOCK = 64  # the capacity of a cache is a multiple of this

TORCH = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16,
    "int32": torch.int32, "int8": torch.int8, "uint8": torch.uint8,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in TORCH.items()}


@dataclass(frozen=True)
class CodeFormat:
    """``planes`` codes of ``bits`` bits in a word; ``zero`` is the code of 0 where a weight has no zero points."""

    planes: int
    bits: int
    zero: int

    @property
    def inputs(self) -> int:
        """Inputs that a chunk covers."""
        return WORDS * self.planes


FORMATS: Mapping[str, CodeFormat] = {
    "int8": CodeFormat(planes=4, bits=8, zero=128),
    "int4": CodeFormat(planes=8, bits=4, zero=8),
    "int2": CodeFormat(planes=16, bits=2, zero=2),
    "ternary": CodeFormat(planes=16, bits=2, zero=1),
}


def words(format: str, width: int) -> int:
    """Return the 32-bit words of a packed row of ``width`` inputs."""
    return WORDS * ceil_div(width, FORMATS[format].inputs)


def compressed_rows(stride: int) -> str:
    """Return how many rows a cache of keys compressed every ``stride`` tokens has, as an expression in c."""
    return f"(c + {stride - 1}) // {stride}"


def check_group(format: str, group: int, width: int) -> None:
    """Raise UnsupportedError unless the kernels can read groups of this size."""
    if format != "dense" and group and (group % WORDS or width % group):
        raise UnsupportedError(
            f"the CUDA kernels read weight groups in steps of {WORDS} inputs",
            facts={"format": format, "group": group, "inputs": width},
            hint="--weights int4 quantises again with a group of 32",
            code="ARK-E321",
        )


def check_cache(kv_heads: int, context: int, head_dim: int) -> None:
    """Raise UnsupportedError unless the places of a layer's cache are 32-bit numbers, as the kernels count them."""
    if kv_heads * context * head_dim >= 1 << 31:
        raise UnsupportedError(
            "one layer's keys are more than the CUDA kernels can count",
            facts={"kv heads": kv_heads, "context": context, "head dim": head_dim, "limit": "2^31 elements"},
            hint=f"--context {(1 << 31) // (kv_heads * head_dim) // BLOCK * BLOCK - BLOCK}",
            code="ARK-E322",
        )


def pack(packed: Packed) -> dict[str, torch.Tensor]:
    """Return ``weight``, and ``scales``, ``zeros`` and ``order`` where it has them, for the kernels, rows to rows.

    weight is int32 (rows, words), or the floats of a dense weight; the others keep shape and dtype.
    """
    check_group(packed.format, packed.group, packed.shape[1])
    parts = {"scales": packed.scales, "zeros": packed.zeros, "order": packed.order}
    result = {name: value.contiguous() for name, value in parts.items() if value is not None}
    if packed.format == "dense":
        return {"weight": packed.weight.contiguous(), **result}
    form = FORMATS[packed.format]
    rows, width = packed.shape
    chunks = ceil_div(width, form.inputs)
    codes = torch.zeros(rows, chunks * form.inputs, dtype=torch.int32)
    codes[:, :width] = _codes(packed)
    planes = codes.view(rows, chunks, form.planes, WORDS)
    weight = torch.zeros(rows, chunks, WORDS, dtype=torch.int32)
    for plane in range(form.planes):
        weight |= planes[:, :, plane] << (plane * form.bits)  # the top plane's sign bit wraps, as it should
    return {"weight": weight.view(rows, chunks * WORDS), **result}


def _codes(packed: Packed) -> torch.Tensor:
    if packed.format == "int8":
        return packed.weight.int() + 128
    if packed.format == "int4":
        return unpack_nibbles(packed.weight).int()
    return unpack_crumbs(packed.weight, packed.shape[1]).int()


def unpack(format: str, weight: torch.Tensor, width: int) -> torch.Tensor:
    """Return the codes (rows, width) int32 of packed words (rows, words) int32; int8's count from 0."""
    form = FORMATS[format]
    rows = weight.shape[0]
    shifts = torch.arange(form.planes, dtype=torch.int32) * form.bits
    codes = (weight.view(rows, -1, 1, WORDS) >> shifts[:, None]) & ((1 << form.bits) - 1)
    return codes.reshape(rows, -1)[:, :width]


def dequantise(
    format: str,
    group: int,
    width: int,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the values (rows, width) float32 of packed rows, in packed column order."""
    if format == "dense":
        return weight.float()
    assert scales is not None
    extent = group or width
    values = unpack(format, weight, width).float()
    if zeros is None:
        values -= FORMATS[format].zero
    else:
        values -= zeros.float().repeat_interleave(extent, dim=1)
    return values.mul_(scales.float().repeat_interleave(extent, dim=1))


def canonical(
    format: str,
    group: int,
    shape: tuple[int, int],
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    order: torch.Tensor | None = None,
) -> Packed:
    """Invert ``pack``: return rows of a weight of ``shape`` (rows, width) in canonical form."""
    if format == "dense":
        return Packed("dense", 0, shape, weight)
    codes = unpack(format, weight, shape[1])
    if format == "int8":
        codes = (codes - 128).to(torch.int8)
    else:
        codes = (pack_nibbles if format == "int4" else pack_crumbs)(codes.to(torch.uint8))
    return Packed(format, group, shape, codes, scales, zeros, order)
