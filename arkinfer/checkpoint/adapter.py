"""LoRA adapters as PEFT writes them, merged into the weights of a checkpoint as their rows are read.

W + scale B A (arXiv 2106.09685), scale = alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732). Computed in
float32 and rounded once, to the nearest even, to the type of W. (PEFT's own merge rounds B A to that type first.)
"""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arkinfer.artifact.tensors import NUMPY, TensorEntry, read_header
from arkinfer.checkpoint import ternary
from arkinfer.checkpoint.base import Checkpoint, parse_object
from arkinfer.checkpoint.folder import NO_PICKLE, locate, read_text
from arkinfer.checkpoint.stored import FLOATS, DenseWeight, Parts, StoredWeight, read_tensor
from arkinfer.errors import UserError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<part>[AB])\.weight")
_MAX_RANK = 4096
# Fields that do not change what the saved tensors mean, beside those that are read below.
_HARMLESS = {
    "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "peft_type", "r", "lora_alpha",
    "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "init_lora_weights", "eva_config",
    "runtime_config", "peft_version", "ensure_weight_tying", "qalora_group_size", "megatron_core",
}  # fmt: skip
# Initialisations that leave the base weights as they are; others (pissa, olora, corda, loftq) change them.
_STARTS = ("gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class _Settings:
    rank: int
    alpha: float
    root: bool
    ranks: bool  # modules have ranks of their own
    saved: tuple[str, ...]

    def scale(self, rank: int) -> float:
        return self.alpha / (math.sqrt(rank) if self.root else rank)


class AdaptedCheckpoint(Checkpoint):
    """``base`` with the adapter in ``folder`` merged. Raises UserError where the two do not fit."""

    def __init__(self, base: Checkpoint, folder: Path) -> None:
        self._base, self._folder = base, folder
        self.path, self.raw_config, self.config = base.path, base.raw_config, base.config
        self.headers_only = base.headers_only
        self._settings = _read_settings(folder)
        file = locate(folder, WEIGHTS)
        if file is None:
            pickle = (folder / "adapter_model.bin").is_file()
            raise UserError(
                f"{folder} has no {WEIGHTS}",
                hint=NO_PICKLE if pickle else "give the folder that PEFT's save_pretrained wrote",
                code="ARK-E168",
            )
        self.weights = {**base.weights, **self._merged(read_header(file, code="ARK-E168"))}
        self._digest = _digest(file)

    @property
    def name(self) -> str:
        return self._base.name

    @property
    def source(self) -> dict[str, Any]:
        adapter = {"name": self._folder.resolve().name, "sha256": self._digest, "rank": self._settings.rank}
        return {**self._base.source, "adapter": adapter}

    def files(self) -> list[Path]:
        return [*self._base.files(), *(self._folder / name for name in (CONFIG, WEIGHTS))]

    def asset(self, name: str) -> bytes | None:
        return self._base.asset(name)

    def _merged(self, entries: dict[str, TensorEntry]) -> dict[str, StoredWeight]:
        factors: dict[str, dict[str, TensorEntry]] = {}
        merged: dict[str, StoredWeight] = {}
        for name, entry in entries.items():
            module = name.removeprefix(_PREFIX)
            found = _FACTOR.fullmatch(module)
            if entry.dtype not in FLOATS:
                raise _bad(name, f"is stored as {entry.dtype}")
            if module != name and found is not None:
                factors.setdefault(found["module"], {})[found["part"]] = entry
            elif module != name and module.split(".")[-2:-1] and module.split(".")[-2] in self._settings.saved:
                merged[module] = self._replaced(name, module, entry)
            else:
                raise _bad(name, "is neither a LoRA factor of a linear layer nor in modules_to_save")
        if not entries:
            raise _bad(WEIGHTS, "holds no tensors")
        for module, pair in factors.items():
            merged[f"{module}.weight"] = self._sum(module, pair)
        return merged

    def _target(self, name: str, module: str) -> StoredWeight:
        if module not in self._base.weights:
            raise _bad(name, f"belongs to {module}, which the checkpoint does not have")
        weight = self._base.weights[module]
        kind = weight.layout.scheme or weight.layout.format
        if not weight.layout.quantised and len(weight.layout.shape) == 2 and not self.headers_only:
            kind = "dense" if ternary.detect(weight) is None else "ternary"
        if weight.layout.quantised or kind == "ternary":
            raise UserError(
                "an adapter cannot be merged into weights that are already quantised",
                facts={"tensor": module, "stored as": kind},
                hint="give the original model in bf16 or fp16: arkinfer quantises after merging",
                code="ARK-E169",
            )
        return weight

    def _replaced(self, name: str, module: str, entry: TensorEntry) -> StoredWeight:
        self._require_untied(name, module.removesuffix(".weight"))
        weight = self._target(name, module)
        if entry.shape != weight.layout.shape:
            raise _bad(name, f"has the shape {list(entry.shape)} and replaces {list(weight.layout.shape)}")
        return DenseWeight(entry)

    def _require_untied(self, name: str, module: str) -> None:
        if self.config.tie_embeddings and module.split(".")[-1] in ("embed_tokens", "lm_head"):
            raise _bad(name, "would replace one of the two uses of tied embeddings")

    def _sum(self, module: str, pair: dict[str, TensorEntry]) -> StoredWeight:
        name = f"{_PREFIX}{module}"
        self._require_untied(name, module)
        if set(pair) != {"A", "B"}:
            raise _bad(name, f"has lora_{''.join(pair)} only")
        weight = self._target(name, f"{module}.weight")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or len(weight.layout.shape) != 2:
            raise _bad(name, "is not a matrix")
        rank = a.shape[0]
        rows, width = weight.layout.shape
        if b.shape != (rows, rank) or a.shape != (rank, width) or not 0 < rank <= _MAX_RANK:
            raise _bad(name, f"has B {list(b.shape)} and A {list(a.shape)}, and the weight is {[rows, width]}")
        if rank != self._settings.rank and not self._settings.ranks:
            raise _bad(name, f"has rank {rank}, and {CONFIG} says {self._settings.rank}")
        return _MergedWeight(weight, a, b, self._settings.scale(rank))


class _MergedWeight(StoredWeight):
    """W + scale B A; W (N, K), A (r, K), B (N, r)."""

    def __init__(self, base: StoredWeight, a: TensorEntry, b: TensorEntry, scale: float) -> None:
        self._base, self._a, self._b, self._scale = base, a, b, np.float32(scale)
        self.layout = base.layout

    @property
    def nbytes(self) -> int:
        return self._base.nbytes + self._a.nbytes + self._b.nbytes

    def rows(self, start: int, stop: int) -> Parts:
        dtype = self.layout.dtype
        a = _widened(read_tensor(self._a), self._a.dtype)
        b = _widened(DenseWeight(self._b).rows(start, stop).weight, self._b.dtype)
        with np.errstate(over="ignore", invalid="ignore"):  # checked below
            values = b @ a
            values *= self._scale
            values += _widened(self._base.rows(start, stop).weight, dtype)
            rounded = _to_bfloat16(values) if dtype == "BF16" else values.astype(NUMPY[dtype])
        if not bool(np.isfinite(_widened(rounded, dtype) if dtype == "BF16" else rounded).all()):
            raise UserError(
                "the merged weight holds values that its type cannot",
                facts={"type": dtype, "largest": float(np.abs(values).max())},
                hint="the adapter does not belong to this model, or it diverged",
                code="ARK-E128",
            )
        return Parts(rounded)


def _widened(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32; bfloat16 comes as its bits."""
    if dtype == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the bits of float32 ``values`` rounded to the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded: np.ndarray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return rounded


def _bad(name: str, reason: str) -> UserError:
    return UserError(
        f"the adapter does not fit: {name} {reason}",
        hint="give the model that the adapter was trained on (base_model_name_or_path in its adapter_config.json)",
        code="ARK-E168",
    )


def _read_settings(folder: Path) -> _Settings:
    file = locate(folder, CONFIG)
    if file is None:
        raise UserError(
            f"{folder} has no {CONFIG}", hint="give the folder that PEFT's save_pretrained wrote", code="ARK-E168"
        )
    values = parse_object(read_text(file), str(file))
    if values.get("peft_type") != "LORA":
        raise _unsupported("peft_type", values.get("peft_type"))
    for name, value in values.items():
        if name == "bias" and value != "none":
            raise _unsupported(name, value)
        if name not in _HARMLESS and name != "bias" and value:
            raise _unsupported(name, value)
    start = values.get("init_lora_weights")
    if start is not None and not isinstance(start, bool) and start not in _STARTS:
        raise _unsupported("init_lora_weights", start)
    if values.get("alpha_pattern"):
        raise _unsupported("alpha_pattern", values["alpha_pattern"])
    rank, alpha, saved = values.get("r"), values.get("lora_alpha"), values.get("modules_to_save") or []
    if type(rank) is not int or not 0 < rank <= _MAX_RANK:
        raise _unsupported("r", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e6:
        raise _unsupported("lora_alpha", alpha)
    if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
        raise _unsupported("modules_to_save", saved)
    root = values.get("use_rslora") or False
    if not isinstance(root, bool):
        raise _unsupported("use_rslora", root)
    return _Settings(rank, float(alpha), root, bool(values.get("rank_pattern")), tuple(saved))


def _unsupported(name: str, value: object) -> UserError:
    return UserError(
        f"the adapter's {name} is {value!r}"[:200],
        facts={"read": "LoRA on linear layers, with rslora, rank_pattern and modules_to_save"},
        hint="merge it in Python: PeftModel.from_pretrained(model, ADAPTER).merge_and_unload().save_pretrained(FOLDER)",
        code="ARK-E168",
    )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
