"""Marlin tiles, as AutoGPTQ serialises them and as CPM.cu's converter writes them: 4 bits, symmetric.

The layout is that of Marlin's `Layer.pack` (IST-DASLab/marlin), whose permutation follows the fragments of the GPU's
matrix instruction:

    qweight or B (K / 16, 2 N) int32    tiles of 16 x 16 codes, four tiles shuffled together, eight codes to a word
    scales or s  (G, N)                 shuffled in runs of 64 columns, or of 32 where there is one group
                                        W[n, k] = scale[k // group_size, n] * (code[k, n] - 8)

CPM.cu joins q, k, v to `qkv_proj` and gate, up to `gate_up_proj` before it packs; here they are apart again. It leaves
config.json as GPTQ wrote it, so only the shapes tell.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint import gptq
from arkinfer.checkpoint.grouped import Grid, GroupedWeight, as_bytes, expect, grid, pack, read_columns, unpack
from arkinfer.checkpoint.quantization import Quantization, contradiction, misfit, unsupported
from arkinfer.checkpoint.stored import DenseWeight, Parts, StoredWeight
from arkinfer.config import ModelConfig

KNOWN = gptq.KNOWN  # AutoGPTQ writes both, with the same settings
BITS = 4
TILE = 16
COLUMNS = 64  # of a run of four tiles: what one permutation spans
INTERLEAVE = (0, 2, 4, 6, 1, 3, 5, 7)


def _permutation() -> np.ndarray:
    """Return (1024,): which code of four tiles, taken tile by tile and row by row, each place of a run holds."""
    places = []
    for thread in range(32):
        column, row = thread // 4, 2 * (thread % 4)
        fragment = [
            TILE * (row + below) + column + 8 * half for half in (0, 1) for below in (0, 1, 8, 9)
        ]  # what one thread of the matrix instruction holds of a tile
        places += [code + TILE * TILE * tile for tile in range(4) for code in fragment]
    shuffled: np.ndarray = np.array(places).reshape(-1, 8)[:, INTERLEAVE].reshape(-1)
    return shuffled


PLACES = _permutation()
SCALES = np.arange(64).reshape(8, 8).T.reshape(-1)  # place p of a run of 64 holds the scale of column SCALES[p]
SINGLE = np.array([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])  # the same, one group


class MarlinWeight(GroupedWeight):
    """One linear layer, or several that were joined, in Marlin's tiles."""

    def __init__(self, codes: TensorEntry, scales: TensorEntry, numbers: Grid) -> None:
        self._codes, self._scales = codes, scales
        super().__init__("marlin", numbers, scales, False, "", codes.nbytes + scales.nbytes)

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        first, last = start // COLUMNS * COLUMNS, -(-stop // COLUMNS) * COLUMNS
        words = read_columns(self._codes, 2 * first, 2 * last)  # (K / 16, 2 n)
        runs = unpack(as_bytes(words), BITS).reshape(-1, len(PLACES))
        codes = np.empty_like(runs)
        codes[:, PLACES] = runs
        tiles = codes.reshape(len(words), (last - first) // TILE, TILE, TILE)  # (K / 16, n / 16, k, n)
        rows = tiles.transpose(1, 3, 0, 2).reshape(last - first, -1)  # (n, K)
        return pack(rows[start - first : stop - first], BITS)

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        first, last = start // COLUMNS * COLUMNS, -(-stop // COLUMNS) * COLUMNS
        stored = read_columns(self._scales, first, last)  # (G, n)
        places = SINGLE if self.grid.groups == 1 else SCALES
        runs = stored.reshape(-1, len(places))
        scales = np.empty_like(runs)
        scales[:, places] = runs
        return scales.reshape(stored.shape)[:, start - first : stop - first].T

    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        raise AssertionError("Marlin's weights have no zero points")


class RowSlice(StoredWeight):
    """Some consecutive rows of another weight."""

    def __init__(self, whole: StoredWeight, start: int, count: int) -> None:
        self._whole, self._start = whole, start
        self._share = count / whole.layout.shape[0]
        self.layout = replace(whole.layout, shape=(count, *whole.layout.shape[1:]))

    @property
    def nbytes(self) -> int:
        return round(self._whole.nbytes * self._share)

    def rows(self, start: int, stop: int) -> Parts:
        return self._whole.rows(self._start + start, self._start + stop)


def taken(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Return the suffixes of a module's ``tensors`` that are in this layout: no zeros, and two words to a scale."""
    names = _names(tensors)
    if "qzeros" in tensors or not set(names) <= set(tensors):
        return ()
    codes, scales = tensors[names[0]].shape, tensors[names[1]].shape
    fits = names[0] == "B" or (len(codes) == len(scales) == 2 and codes[1] == 2 * scales[1])
    return (*names, "bias") if fits else ()


def _names(tensors: Mapping[str, TensorEntry]) -> tuple[str, str]:
    return ("B", "s") if "B" in tensors else ("qweight", "scales")


def weights(
    name: str, tensors: Mapping[str, TensorEntry], settings: Quantization, config: ModelConfig
) -> dict[str, StoredWeight]:
    """Return the checked weights of the module ``name``: of a joined one, each by its own name.

    Raises UserError where its tensors fit neither each other, the settings nor the model, UnsupportedError for widths
    that Marlin has and arkinfer does not read.
    """
    if settings.method not in ("gptq", "marlin"):
        raise contradiction("Marlin", name, settings)
    code_name, scale_name = _names(tensors)
    codes, scales = tensors[code_name], tensors[scale_name]
    bits = settings.integer("bits")
    if bits not in (None, BITS):
        raise unsupported(f"Marlin with {bits} bits", settings.values, tensor=f"{name}.{code_name}")
    if settings.flag("desc_act") or settings.values.get("sym") is False:
        raise misfit(f"{name}.{code_name}", "is in Marlin's layout, which has neither act-order nor zero points")
    if len(codes.shape) != 2 or len(scales.shape) != 2:
        raise misfit(f"{name}.{code_name}", "is no matrix", shape=list(codes.shape), scales=list(scales.shape))
    width, rows, groups = codes.shape[0] * TILE, scales.shape[1], scales.shape[0]
    if rows % COLUMNS:
        raise misfit(f"{name}.{scale_name}", f"is not a multiple of {COLUMNS} wide", shape=list(scales.shape))
    stated = settings.integer("group_size")
    if stated is None:
        stated = -1 if groups < 2 or width % groups else width // groups
    numbers = grid(name, rows, width, BITS, stated)
    expect(f"{name}.{code_name}", codes, ("I32",), (width // TILE, 2 * rows))
    expect(f"{name}.{scale_name}", scales, ("F16", "BF16"), (numbers.groups, rows))
    whole: dict[str, StoredWeight] = {"weight": MarlinWeight(codes, scales, numbers)}
    if "bias" in tensors:
        expect(f"{name}.bias", tensors["bias"], ("F16", "BF16", "F32"), (rows,))
        whole["bias"] = DenseWeight(tensors["bias"])
    return _apart(name, whole, config)


def _apart(name: str, whole: Mapping[str, StoredWeight], config: ModelConfig) -> dict[str, StoredWeight]:
    """Return the parts of a joined layer by their own names, or the layer itself."""
    heads, kv_heads = config.heads * config.head_dim, config.kv_heads * config.head_dim
    joined = {
        "qkv_proj": {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads},
        "gate_up_proj": {"gate_proj": config.intermediate_size, "up_proj": config.intermediate_size},
    }
    parent, _, last = name.rpartition(".")
    if last not in joined:
        return {f"{name}.{kind}": stored for kind, stored in whole.items()}
    parts = joined[last]
    found: dict[str, StoredWeight] = {}
    for kind, stored in whole.items():
        rows, start = stored.layout.shape[0], 0
        if rows != sum(parts.values()):
            raise misfit(f"{name}.{kind}", "does not have the rows of the layers it joins", **parts, found=rows)
        for part, count in parts.items():
            found[f"{parent}.{part}.{kind}"] = RowSlice(stored, start, count)
            start += count
    return found
