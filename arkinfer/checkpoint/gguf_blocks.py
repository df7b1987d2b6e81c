"""The weights of a GGUF file: ggml's blocks as the canonical form of arkinfer.quant.packed.

Q4_0, Q8_0, TQ1_0 and TQ2_0 keep their own integers and float16 scales, float types their floats; the gguf package
multiplies the other types out to float32. Layouts: ggml-common.h and ggml-quants.c of ggml.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arkinfer.checkpoint.gguf_file import GgufTensor
from arkinfer.checkpoint.stored import Layout, Parts, StoredWeight, read_bytes
from arkinfer.errors import UserError

KEPT = {"Q4_0": ("int4", 4), "Q8_0": ("int8", 8), "TQ1_0": ("ternary", 2), "TQ2_0": ("ternary", 2)}
_FLOATS: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
_BITS = {"Q2_K": 2, "Q3_K": 3, "Q4_1": 4, "Q4_K": 4, "IQ4_NL": 4, "IQ4_XS": 4, "Q5_0": 5, "Q5_1": 5, "Q5_K": 5,
         "Q6_K": 6}  # fmt: skip


class GgufWeight(StoredWeight):
    """One tensor; ``heads`` > 0 says that its rows lie as llama.cpp's converter permutes q and k of that many heads."""

    def __init__(self, tensor: GgufTensor, heads: int = 0) -> None:
        self.tensor = tensor
        self._extent = tensor.shape[0] // heads if heads else 0
        if tensor.type in KEPT:
            kind, bits = KEPT[tensor.type]
            self.layout = Layout(kind, tensor.shape, "F16", tensor.block, scheme=tensor.type, bits=bits)
        elif tensor.type in _FLOATS:
            self.layout = Layout("dense", tensor.shape, tensor.type)
        else:
            self.layout = Layout("dense", tensor.shape, "F32", scheme=tensor.type, bits=_BITS[tensor.type])

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        if len(self.tensor.shape) == 1:  # a vector: of a block type only as a whole
            return self._vector(start, stop)
        if not self._extent:
            return self._unpacked(self._bytes(start, stop))
        wanted = _permuted(np.arange(start, stop), self._extent)
        first = int(wanted.min()) if len(wanted) else start
        last = int(wanted.max()) + 1 if len(wanted) else start
        return self._unpacked(self._bytes(first, last)[wanted - first])

    def _vector(self, start: int, stop: int) -> Parts:
        data = read_bytes(self.tensor.file, self.tensor.start, self.tensor.nbytes)[None]
        values = self._unpacked(data).weight[0]
        if self._extent:
            return Parts(values[_permuted(np.arange(start, stop), self._extent)])
        return Parts(np.ascontiguousarray(values[start:stop]))

    def _bytes(self, start: int, stop: int) -> np.ndarray:
        """Return (rows, bytes of a row) uint8."""
        width = self.tensor.row_bytes
        data = read_bytes(self.tensor.file, self.tensor.start + start * width, (stop - start) * width)
        return data.reshape(stop - start, width)

    def _unpacked(self, data: np.ndarray) -> Parts:
        kind = self.tensor.type
        if kind in _FLOATS:
            return Parts(np.ascontiguousarray(data).view(_FLOATS[kind]))
        if kind not in KEPT:
            return Parts(_multiplied(data, kind))
        rows = data.shape[0]
        blocks = data.reshape(rows, -1, self.tensor.block_bytes)  # (rows, G, bytes)
        if kind == "Q4_0":
            scales, codes = blocks[:, :, :2], _q4_0(blocks[:, :, 2:])
        elif kind == "Q8_0":
            scales, codes = blocks[:, :, :2], blocks[:, :, 2:].reshape(rows, -1).view(np.int8)
        else:
            trits = _tq1_0(blocks[:, :, :-2]) if kind == "TQ1_0" else _tq2_0(blocks[:, :, :-2])
            scales, codes = blocks[:, :, -2:], _crumbs(trits.reshape(rows, -1))
        return Parts(np.ascontiguousarray(codes), np.ascontiguousarray(scales).view(np.float16)[:, :, 0])


def _permuted(rows: np.ndarray, extent: int) -> np.ndarray:
    """Return where llama.cpp's converter puts rows of q or k: in each head, the two halves interleaved.

    ``extent`` is the number of rows of a head (LlamaModel.permute in convert_hf_to_gguf.py).
    """
    head, row = np.divmod(rows, extent)
    half, place = np.divmod(row, extent // 2)
    places: np.ndarray = head * extent + 2 * place + half
    return places


def _q4_0(codes: np.ndarray) -> np.ndarray:
    """(rows, G, 16) bytes, weights m and m + 16 in byte m, to (rows, 16 G) bytes of neighbours, low nibble first."""
    ordered = np.concatenate((codes & 15, codes >> 4), axis=2).reshape(codes.shape[0], -1)
    packed: np.ndarray = ordered[:, 0::2] | (ordered[:, 1::2] << 4)
    return packed


def _tq2_0(codes: np.ndarray) -> np.ndarray:
    """(rows, G, 64) bytes to codes 0..2 (rows, G, 256): byte 32 j + m holds weights 128 j + 32 l + m, l = 0..3."""
    halves = codes.reshape(*codes.shape[:2], 2, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(4, 1)
    ordered: np.ndarray = (halves & 3).reshape(*codes.shape[:2], 256)
    return ordered


def _tq1_0(codes: np.ndarray) -> np.ndarray:
    """(rows, G, 52) bytes to codes 0..2 (rows, G, 256): five trits a byte in 48, four a byte in the last 4."""

    def trits(part: np.ndarray, count: int) -> np.ndarray:
        powers = np.array([1, 3, 9, 27, 81][:count], np.uint8).reshape(count, 1)
        shifted = part[:, :, None, :] * powers  # wraps modulo 256, as the format wants
        digits: np.ndarray = ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8)
        flat: np.ndarray = digits.reshape(*part.shape[:2], -1)
        return flat

    return np.concatenate(
        (trits(codes[:, :, :32], 5), trits(codes[:, :, 32:48], 5), trits(codes[:, :, 48:], 4)), axis=2
    )


def _crumbs(codes: np.ndarray) -> np.ndarray:
    """Codes 0..3 (rows, K), K a multiple of 4, to (rows, K / 4) bytes, lowest bits first."""
    packed: np.ndarray = codes[:, 0::4] | (codes[:, 1::4] << 2) | (codes[:, 2::4] << 4) | (codes[:, 3::4] << 6)
    return packed


def _multiplied(data: np.ndarray, kind: str) -> np.ndarray:
    try:
        import gguf
    except ImportError as error:
        raise UserError(
            f"reading {kind} weights needs the gguf package", hint="pip install 'arkinfer[gguf]'", code="ARK-E160"
        ) from error
    values: np.ndarray = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    return values
