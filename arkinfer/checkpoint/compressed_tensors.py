"""Integers as llm-compressor writes them (compressed-tensors), weights only.

The layouts are those of compressed-tensors' `pack_quantized` and `int_quantized`, already in transformers' (N, K):

    weight_packed     (N, ceil(K * bits / 32)) int32    codes q + 2**(bits - 1), one bit stream a row
    weight            (N, K) int8                       or the signed integers q themselves
    weight_scale      (N, G)                            W[n, k] = scale[n, g] * (q[n, k] - zero[n, g])
    weight_shape      (2,)                              N and K, of packed ones
    weight_zero_point (ceil(N * bits / 32), G) int32    of packed ones: codes as above, one bit stream a column
                      (N, G) int8                       or zero itself; neither where all zeros are 0
    weight_g_idx      (K,) int32                        the group of each input; absent or all -1: k // group_size
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint.grouped import (
    RUN,
    SCALES,
    Grid,
    GroupedWeight,
    as_bytes,
    digest,
    expect,
    grid,
    grouped_order,
    here,
    input_order,
    middle,
    unpack,
)
from arkinfer.checkpoint.quantization import Quantization, contradiction, misfit, unsupported
from arkinfer.checkpoint.stored import StoredWeight, read_rows, read_tensor
from arkinfer.config import ModelConfig

# What the packers write; what changes the meaning of tensors is read below.
KNOWN = (
    "config_groups", "format", "ignore", "kv_cache_scheme", "quantization_status", "sparsity_config", "version",
    "global_compression_ratio", "transform_config",
)  # fmt: skip
PACKED = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx")
PLAIN = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx")
# Widths that do not divide 32 were packed in two ways by different releases, and nothing in the file tells which.
BITS = (2, 4, 8)


class PackedIntegers(GroupedWeight):
    """One linear layer of the format pack-quantized."""

    def __init__(self, name: str, tensors: Mapping[str, TensorEntry], numbers: Grid, ordered: bool) -> None:
        self.grid = numbers
        self._tensors = tensors
        order = digest(grouped_order(f"{name}.weight_g_idx", tensors["weight_g_idx"], numbers)) if ordered else ""
        zeros = "weight_zero_point" in tensors
        if zeros and here(tensors["weight_zero_point"]):
            zeros = bool((self.read_zeros(0, numbers.rows) != middle(numbers.bits)).any())
        nbytes = sum(entry.nbytes for entry in tensors.values())
        super().__init__("compressed-tensors", numbers, tensors["weight_scale"], zeros, order, nbytes)

    def order(self) -> np.ndarray | None:
        return input_order(self._tensors["weight_g_idx"]) if self.layout.order else None

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        stream = as_bytes(read_rows(self._tensors["weight_packed"], start, stop))
        return np.ascontiguousarray(stream[:, : self.grid.width * self.grid.bits // 8])

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        return read_rows(self._tensors["weight_scale"], start, stop)

    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        entry, bits = self._tensors["weight_zero_point"], self.grid.bits
        first, last = start // RUN * RUN, -(-stop // RUN) * RUN
        words = read_rows(entry, first * bits // 32, min(last * bits // 32, entry.shape[0]))
        return unpack(as_bytes(words.T), bits)[:, start - first : stop - first].T


class PlainIntegers(PackedIntegers):
    """One linear layer of the format int-quantized: bytes, whatever the number of bits that were asked for."""

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        return _code(read_rows(self._tensors["weight"], start, stop))

    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        return _code(read_rows(self._tensors["weight_zero_point"], start, stop))


def _code(signed: np.ndarray) -> np.ndarray:
    """Return int8 values plus 128 as uint8."""
    return signed.view(np.uint8) ^ np.uint8(128)


def taken(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Return the suffixes of a module's ``tensors`` that are in one of these layouts."""
    if "weight_packed" in tensors:
        return PACKED
    return PLAIN if "weight_scale" in tensors and "weight" in tensors else ()


def weights(
    name: str, tensors: Mapping[str, TensorEntry], settings: Quantization, config: ModelConfig
) -> dict[str, StoredWeight]:
    """Return the checked weight of the module ``name``.

    Raises UserError where its tensors fit neither each other nor the settings, UnsupportedError for what is more than
    integer weights: floats, sparsity, quantised activations, rotations.
    """
    if settings.method != "compressed-tensors":
        raise contradiction("compressed-tensors", name, settings)
    schemes = stated_schemes(settings)
    packed = "weight_packed" in tensors
    if "weight_scale" not in tensors:
        raise misfit(f"{name}.weight_scale", "is missing")
    scales = tensors["weight_scale"]
    if len(scales.shape) != 2:
        raise unsupported("quantised with one scale a matrix", settings.values, tensor=f"{name}.weight_scale")
    groups = scales.shape[1]
    if packed:
        codes = tensors["weight_packed"]
        if len(codes.shape) != 2:
            raise misfit(f"{name}.weight_packed", "is no matrix", shape=list(codes.shape))
        stated = _shape(name, tensors)
        rows, width = stated or (codes.shape[0], codes.shape[1] * 32 // schemes[0][0])  # as if nothing were padding
        schemes = [scheme for scheme in schemes if codes.shape == (rows, -(-width * scheme[0] // 32))]
    else:
        codes = tensors["weight"]
        if codes.dtype != "I8" or len(codes.shape) != 2:
            raise unsupported(f"one whose scaled weights are {codes.dtype}", settings.values, tensor=f"{name}.weight")
        rows, width = codes.shape
    fitting = [scheme for scheme in schemes if groups == (1 if scheme[1] == -1 else -(-width // max(scheme[1], 1)))]
    if len({size for _, size, _ in fitting}) != 1:
        raise misfit(
            f"{name}.{'weight_packed' if packed else 'weight'}",
            "fits no group of quantization_config",
            shape=list(codes.shape),
            matrix=[rows, width],
            scales=list(scales.shape),
        )
    bits, size, _ = fitting[0]
    numbers = grid(name, rows, width, bits if packed else 8, size)
    expect(f"{name}.weight_scale", scales, SCALES, (rows, numbers.groups))
    if "weight_zero_point" in tensors:
        zeros = tensors["weight_zero_point"]
        if packed:
            expect(f"{name}.weight_zero_point", zeros, ("I32",), (-(-rows * bits // 32), numbers.groups))
        else:
            expect(f"{name}.weight_zero_point", zeros, ("I8",), (rows, numbers.groups))
    elif not any(symmetric for *_, symmetric in fitting):
        raise misfit(f"{name}.weight_zero_point", "is missing, and the settings say that zeros are not all 0")
    ordered = False
    if "weight_g_idx" in tensors:
        expect(f"{name}.weight_g_idx", tensors["weight_g_idx"], ("I32",), (width,))
        index = tensors["weight_g_idx"]
        ordered = here(index) and bool((read_tensor(index) != -1).any())  # -1: allocated and never filled
    expect(f"{name}.{'weight_packed' if packed else 'weight'}", codes, ("I32",) if packed else ("I8",), codes.shape)
    kind = PackedIntegers if packed else PlainIntegers
    return {f"{name}.weight": kind(name, tensors, numbers, ordered)}


def _shape(name: str, tensors: Mapping[str, TensorEntry]) -> tuple[int, int] | None:
    """Return the (N, K) that a packed weight states, or None where that tensor is not here."""
    entry = tensors.get("weight_shape")
    if entry is None:
        raise misfit(f"{name}.weight_shape", "is missing")
    if entry.dtype not in ("I64", "I32"):
        raise misfit(f"{name}.weight_shape", "has a dtype that its format does not use", found=entry.dtype)
    expect(f"{name}.weight_shape", entry, ("I64", "I32"), (2,))
    if not here(entry):
        return None
    rows, width = (int(extent) for extent in read_tensor(entry))
    return rows, width


def stated_schemes(settings: Quantization) -> list[tuple[int, int, bool]]:
    """Return (bits, group size, symmetric) of each group of settings.

    Raises UnsupportedError for what is not integer weights alone.
    """
    values = settings.values
    _refuse_extras(values)
    groups = values.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise misfit("quantization_config", "has no config_groups")
    return [_scheme(group, values) for group in groups.values()]


def _refuse_extras(values: Mapping[str, Any]) -> None:
    if values.get("format", "pack-quantized") not in ("pack-quantized", "int-quantized", "mixed-precision"):
        raise unsupported(f"compressed as {values['format']!r}", values)
    sparsity = values.get("sparsity_config") or {}
    if not isinstance(sparsity, dict) or sparsity.get("format", "dense") != "dense":
        raise unsupported("sparse", values)
    if values.get("transform_config"):
        raise unsupported("rotated before it was quantised (transform_config)", values)


def _scheme(group: object, values: Mapping[str, Any]) -> tuple[int, int, bool]:
    arguments = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(group, dict) or not isinstance(arguments, dict):
        raise unsupported("quantised otherwise than in its weights", values)
    if group.get("input_activations") or group.get("output_activations"):
        raise unsupported("quantised in its activations too", values)
    bits, strategy, size = (arguments.get(key) for key in ("num_bits", "strategy", "group_size"))
    if arguments.get("type", "int") != "int" or bits not in BITS:
        raise unsupported(f"quantised to {arguments.get('type', 'int')} of {bits} bits", values)
    if strategy is None:
        strategy = "group" if size else "channel"
    symmetric = arguments.get("symmetric", True) is not False
    if strategy == "channel":
        return bits, -1, symmetric
    if strategy != "group" or type(size) is not int:
        raise unsupported(f"quantised by the strategy {strategy!r}", values)
    return bits, size, symmetric
