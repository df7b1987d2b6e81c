"""AWQ as AutoAWQ writes it, version "gemm": 4 bits.

The layout is that of AutoAWQ's `WQLinear_GEMM`; within each word the columns are interleaved:

    qweight (K, N / 8) int32    nibble i of word c is the code of column 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]
    qzeros  (G, N / 8) int32    codes of zero, in the same order
    scales  (G, N)              W[n, k] = scales[k // group_size, n] * (code[k, n] - zero[k // group_size, n])
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint.grouped import (
    SCALES,
    Grid,
    GroupedWeight,
    as_bytes,
    expect,
    grid,
    here,
    middle,
    pack,
    read_columns,
    unpack,
)
from arkinfer.checkpoint.quantization import Quantization, contradiction, unsupported
from arkinfer.checkpoint.stored import StoredWeight
from arkinfer.config import ModelConfig

# What the packers write; what changes the meaning of tensors is read below.
KNOWN = (
    "bits", "group_size", "zero_point", "version", "modules_to_not_convert", "backend", "do_fuse", "fuse_max_seq_len",
    "modules_to_fuse", "exllama_config", "checkpoint_format", "format", "method", "pack_dtype", "meta", "desc_act",
    "sym", "lm_head", "dynamic",
)  # fmt: skip
TENSORS = ("qweight", "qzeros", "scales")
BITS = 4
PER_WORD = 8
NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)  # where the code of column 8c + j lies in its word


class AwqWeight(GroupedWeight):
    """One linear layer of an AWQ checkpoint."""

    def __init__(self, tensors: Mapping[str, TensorEntry], numbers: Grid, stated_zeros: bool) -> None:
        self.grid = numbers
        self._tensors = tensors
        zeros = stated_zeros
        if here(tensors["qzeros"]):
            zeros = bool((self.read_zeros(0, numbers.rows) != middle(BITS)).any())
        nbytes = sum(entry.nbytes for entry in tensors.values())
        super().__init__("awq", numbers, tensors["scales"], zeros, "", nbytes)

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        return pack(_columns(self._tensors["qweight"], start, stop).T, BITS)

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        return read_columns(self._tensors["scales"], start, stop).T

    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        return _columns(self._tensors["qzeros"], start, stop).T


def _columns(entry: TensorEntry, start: int, stop: int) -> np.ndarray:
    """Return the codes (R, stop - start) uint8 of some columns."""
    first, last = start // PER_WORD, -(-stop // PER_WORD)
    nibbles = unpack(as_bytes(read_columns(entry, first, last)), BITS)
    codes = nibbles.reshape(len(nibbles), -1, PER_WORD)[..., NIBBLE].reshape(len(nibbles), -1)
    return codes[:, start - first * PER_WORD : stop - first * PER_WORD]


def taken(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Return the suffixes of a module's ``tensors`` that are in this layout: eight codes to a word of scales' width."""
    if not set(TENSORS) <= set(tensors):
        return ()
    codes, scales = tensors["qweight"].shape, tensors["scales"].shape
    return TENSORS if len(codes) == len(scales) == 2 and codes[1] * PER_WORD == scales[1] else ()


def weights(
    name: str, tensors: Mapping[str, TensorEntry], settings: Quantization, config: ModelConfig
) -> dict[str, StoredWeight]:
    """Return the checked weight of the module ``name``.

    Raises UserError where its tensors fit neither each other nor the settings, UnsupportedError for another version.
    """
    for version in (settings.name(key) for key in ("version", "checkpoint_format", "format")):
        if version not in ("", "gemm"):
            raise unsupported(f"AWQ in the version {version!r}", settings.values)
    bits, stated = settings.integer("bits"), settings.integer("group_size")
    if bits not in (None, BITS):
        raise unsupported(f"AWQ with {bits} bits", settings.values)
    if settings.method not in ("", "awq"):
        raise contradiction("AWQ", f"{name}.qweight", settings)
    codes, scales = tensors["qweight"], tensors["scales"]
    width, rows = codes.shape[0], codes.shape[1] * PER_WORD if len(codes.shape) > 1 else 0
    if stated is None:
        groups = scales.shape[0]
        stated = -1 if groups < 2 or width % groups else width // groups
    numbers = grid(name, rows, width, BITS, stated)
    expect(f"{name}.qweight", codes, ("I32",), (width, rows // PER_WORD))
    expect(f"{name}.scales", scales, SCALES, (numbers.groups, rows))
    expect(f"{name}.qzeros", tensors["qzeros"], ("I32",), (numbers.groups, rows // PER_WORD))
    return {f"{name}.weight": AwqWeight(tensors, numbers, settings.values.get("zero_point") is not False)}
