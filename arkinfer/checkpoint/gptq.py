"""GPTQ as AutoGPTQ and GPTQModel write it: 2, 3, 4 or 8 bits, with or without act-order.

The layout is that of AutoGPTQ's `qlinear` modules, "gptq" (v1, zeros stored less one) and GPTQModel's "gptq_v2":

    qweight (K * bits / 32, N) int32    codes of column n in one bit stream down the rows, lowest bits first
    qzeros  (G, N * bits / 32) int32    codes of zero, in one bit stream along the rows
    scales  (G, N)                      W[n, k] = scales[g_idx[k], n] * (code[k, n] - zero[g_idx[k], n])
    g_idx   (K,) int32                  the group of each input; absent: k // group_size

Words are rounded up where a side does not fill the last one.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint.grouped import (
    FORMATS,
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
    read_columns,
    read_field_columns,
)
from arkinfer.checkpoint.quantization import Quantization, contradiction, misfit, unsupported
from arkinfer.checkpoint.stored import StoredWeight, read_tensor
from arkinfer.config import ModelConfig

# What the packers write; what changes the meaning of tensors is read below.
KNOWN = (
    "bits", "group_size", "desc_act", "sym", "static_groups", "true_sequential", "lm_head", "checkpoint_format",
    "format", "method", "dynamic", "pack_dtype", "meta", "damp_percent", "damp_auto_increment", "mse", "hyb_act",
    "act_group_aware", "gptaq", "foem", "model_name_or_path", "model_file_base_name", "dataset", "tokenizer",
    "batch_size", "exllama_config", "use_exllama", "disable_exllama", "use_cuda_fp16", "max_input_length",
    "cache_block_outputs", "modules_in_block_to_quantize", "module_name_preceding_first_block", "pad_token_id",
    "block_name_to_quantize", "model_seqlen", "is_marlin_format", "modules_to_not_convert", "backend", "quantizer",
)  # fmt: skip
TENSORS = ("qweight", "qzeros", "scales", "g_idx")


UNREAD = "stated"  # what Layout.order says where the settings tell of an order and the tensor is not here


class GptqWeight(GroupedWeight):
    """One linear layer of a GPTQ checkpoint. ``stored_less`` is what its version subtracts from zeros: 1 or 0."""

    def __init__(
        self, name: str, tensors: Mapping[str, TensorEntry], numbers: Grid, stored_less: int, settings: Quantization
    ) -> None:
        self.grid = numbers
        self._tensors = tensors
        self._stored_less = stored_less
        order, index = "", tensors.get("g_idx")
        if here(tensors["qzeros"]):
            zeros = bool((self.read_zeros(0, numbers.rows) != middle(numbers.bits)).any())
        else:
            zeros = settings.values.get("sym") is False
        if index is not None and here(index):
            order = digest(grouped_order(f"{name}.g_idx", index, numbers))
        elif index is not None and settings.flag("desc_act") and not settings.flag("static_groups"):
            order = UNREAD
        nbytes = sum(entry.nbytes for entry in tensors.values())
        super().__init__("gptq", numbers, tensors["scales"], zeros, order, nbytes)

    def order(self) -> np.ndarray | None:
        return input_order(self._tensors["g_idx"]) if self.layout.order else None

    def read_stream(self, start: int, stop: int) -> np.ndarray:
        stream = as_bytes(read_columns(self._tensors["qweight"], start, stop).T)
        return np.ascontiguousarray(stream[:, : self.grid.width * self.grid.bits // 8])

    def read_scales(self, start: int, stop: int) -> np.ndarray:
        return read_columns(self._tensors["scales"], start, stop).T

    def read_zeros(self, start: int, stop: int) -> np.ndarray:
        stored = read_field_columns(self._tensors["qzeros"], self.grid.bits, start, stop)
        mask = np.uint8((1 << self.grid.bits) - 1)
        return ((stored + np.uint8(self._stored_less)) & mask).T  # v1 stores 0 as all ones: the mask brings it back


def taken(tensors: Mapping[str, TensorEntry]) -> tuple[str, ...]:
    """Return the suffixes of a module's ``tensors`` that are in this layout: codes and scales of equal width."""
    if not {"qweight", "qzeros", "scales"} <= set(tensors):
        return ()
    codes, scales = tensors["qweight"].shape, tensors["scales"].shape
    return TENSORS if len(codes) == len(scales) == 2 and codes[1] == scales[1] else ()


def weights(
    name: str, tensors: Mapping[str, TensorEntry], settings: Quantization, config: ModelConfig
) -> dict[str, StoredWeight]:
    """Return the checked weight of the module ``name``.

    Raises UserError where its tensors fit neither each other nor the settings, UnsupportedError for another version.
    """
    version = settings.name("checkpoint_format") or settings.name("format")
    if version not in ("", "gptq", "gptq_v2"):
        raise unsupported(f"GPTQ in the layout {version!r}", settings.values)
    if settings.method != "gptq":
        raise contradiction("GPTQ", f"{name}.qweight", settings)
    codes, scales = tensors["qweight"], tensors["scales"]
    if len(codes.shape) != 2 or len(scales.shape) != 2:
        raise misfit(f"{name}.qweight", "is no matrix", shape=list(codes.shape), scales=list(scales.shape))
    bits, rows = settings.integer("bits"), codes.shape[1]
    if bits not in FORMATS:
        raise unsupported(f"GPTQ with {bits or 'an unstated number of'} bits", settings.values)
    index = tensors.get("g_idx")
    if index is not None and len(index.shape) != 1:
        raise misfit(f"{name}.g_idx", "is no vector", shape=list(index.shape))
    if index is None and settings.flag("desc_act"):
        raise misfit(f"{name}.g_idx", "is missing, and the settings say that inputs are in another order (desc_act)")
    width = codes.shape[0] * 32 // bits if index is None else index.shape[0]
    if settings.values.get("dynamic") and width:  # settings of its own for some modules: the tensors tell which
        bits = codes.shape[0] * 32 // width
        if bits not in FORMATS:
            raise unsupported(f"GPTQ with {bits} bits", settings.values, tensor=f"{name}.qweight")
        size = -1 if scales.shape[0] == 1 else _members(index, width, scales.shape[0])
    else:
        size = -1 if (stated := settings.integer("group_size")) is None else stated
    if bits == 3 and (width % RUN or rows % RUN):
        raise unsupported("GPTQ with 3 bits in a matrix that is not a multiple of 32", settings.values, tensor=name)
    if codes.shape[0] != -(-width * bits // 32):
        raise misfit(f"{name}.qweight", "has the wrong shape", found=list(codes.shape), inputs=width, bits=bits)
    numbers = grid(name, rows, width, bits, size)
    expect(f"{name}.qweight", codes, ("I32",), codes.shape)
    expect(f"{name}.scales", scales, SCALES, (numbers.groups, rows))
    expect(f"{name}.qzeros", tensors["qzeros"], ("I32",), (numbers.groups, -(-rows * bits // 32)))
    if index is not None:
        expect(f"{name}.g_idx", index, ("I32",), (width,))
    return {f"{name}.weight": GptqWeight(name, tensors, numbers, 0 if version == "gptq_v2" else 1, settings)}


def _members(index: TensorEntry | None, width: int, groups: int) -> int:
    """Return how many inputs the first of several groups has."""
    if index is None or index.dtype != "I32" or not here(index):
        return -(-width // max(groups, 1))
    return int(np.count_nonzero(read_tensor(index) == 0))
