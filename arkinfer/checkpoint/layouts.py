"""Recognise how the tensors of a checkpoint make up its weights: from names, dtypes and shapes, never from its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint import gptq
from arkinfer.checkpoint.quantization import Quantization, misfit
from arkinfer.checkpoint.stored import FLOATS, DenseWeight, StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError

# Each tells by `claims` whether the tensors of a module are its own, and makes the `weight` of them.
READERS: Mapping[str, ModuleType] = {"gptq": gptq}
_NEEDED = re.compile(
    r"model\.(embed_tokens|norm|layers\.(?P<layer>\d+)\.(\w+_layernorm|self_attn\.\w+_(proj|norm)|mlp\.\w+_proj))\..*"
    r"|lm_head\..*"
)


def recognise(
    entries: Mapping[str, TensorEntry], settings: Quantization, config: ModelConfig, notes: list[str]
) -> dict[str, StoredWeight]:
    """Return the weights that ``entries`` hold, by transformers' names, and add to ``notes`` what was passed over.

    Raises UserError for tensors that no known format explains or that do not fit each other, UnsupportedError for
    formats that are known and not read.
    """
    weights: dict[str, StoredWeight] = {}
    modules: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        stem, _, suffix = name.rpartition(".")
        if not name.startswith("~"):  # the padding between tensors that arkinfer itself writes
            modules.setdefault(stem, {})[suffix] = entry
    passed: list[str] = []
    for stem, tensors in modules.items():
        reader = _reader(tensors, settings)
        rest = tensors
        if reader is not None:
            taken = {suffix: entry for suffix, entry in tensors.items() if suffix in reader.TENSORS}
            rest = {suffix: entry for suffix, entry in tensors.items() if suffix not in taken}
            if "weight" in rest:
                raise misfit(f"{stem}.weight", "is there twice, as integers and as floats")
            if _needed(f"{stem}.weight", config):
                weights[f"{stem}.weight"] = reader.weight(stem, taken, settings)
            else:
                passed += [f"{stem}.{suffix}" for suffix in taken]
        for suffix, entry in rest.items():
            name = f"{stem}.{suffix}".lstrip(".")
            if entry.dtype in FLOATS:
                weights[name] = DenseWeight(entry)
            elif _needed(name, config):
                raise _unexplained(name, entry, settings)
            else:
                passed.append(name)
    if passed:
        notes.append(f"{len(passed)} tensors are not the model's and were not read, the first {sorted(passed)[0]}")
    if settings.method in READERS:
        settings.note_unknown(READERS[settings.method].KNOWN, notes)
    return weights


def _reader(tensors: Mapping[str, TensorEntry], settings: Quantization) -> ModuleType | None:
    """Return the reader of a module's tensors: by their shapes, or by the settings where the shapes fit nothing."""
    for reader in READERS.values():
        if reader.claims(tensors):
            return reader
    if "qweight" in tensors and "scales" in tensors:
        return READERS.get(settings.method)
    return None


def _needed(name: str, config: ModelConfig) -> bool:
    """Tell whether the model may have a weight of that name."""
    found = _NEEDED.fullmatch(name)
    return found is not None and int(found["layer"] or 0) < config.layers


def _unexplained(name: str, entry: TensorEntry, settings: Quantization) -> UserError:
    return UserError(
        "a weight is stored as integers, in no format that arkinfer knows",
        facts={"tensor": name, "dtype": entry.dtype, "quant_method": settings.method or "none stated"},
        hint="take the model's unquantised checkpoint, or its GPTQ or AWQ one",
        code="ARK-E126",
    )
