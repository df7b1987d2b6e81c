"""Recognise how the tensors of a checkpoint make up its weights: from names, dtypes and shapes, never from its path."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import ModuleType

from arkinfer.artifact.tensors import TensorEntry
from arkinfer.checkpoint import awq, compressed_tensors, gptq, marlin
from arkinfer.checkpoint.quantization import Quantization, misfit, unsupported
from arkinfer.checkpoint.stored import FLOATS, DenseWeight, StoredWeight
from arkinfer.config import ModelConfig
from arkinfer.errors import UserError

# Each tells by `taken` which tensors of a module are in its layout, and makes the `weights` of them.
READERS: Mapping[str, ModuleType] = {
    "gptq": gptq,
    "awq": awq,
    "marlin": marlin,
    "compressed-tensors": compressed_tensors,
}
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
        reader, suffixes = _reader(tensors, settings)
        taken = {suffix: entry for suffix, entry in tensors.items() if suffix in suffixes}
        rest = {suffix: entry for suffix, entry in tensors.items() if suffix not in suffixes}
        if reader is not None and not _needed(f"{stem}.weight", config):
            passed += [f"{stem}.{suffix}" for suffix in taken]
        elif reader is not None:
            for name, weight in reader.weights(stem, taken, settings, config).items():
                if name in weights or (name.startswith(f"{stem}.") and name.rpartition(".")[2] in rest):
                    raise misfit(name, "is there twice")
                if name == "model.embed_tokens.weight" and weight.layout.order:
                    raise unsupported("one whose embedding table has its inputs in another order", settings.values)
                weights[name] = weight
        for suffix, entry in rest.items():
            name = f"{stem}.{suffix}".lstrip(".")
            if entry.dtype in FLOATS:
                if name in weights:
                    raise misfit(name, "is there twice")
                weights[name] = DenseWeight(entry)
            elif _needed(name, config):
                raise _unexplained(name, entry, settings)
            else:
                passed.append(name)
    if passed:
        notes.append(f"{len(passed)} tensors are not the model's and were not read, the first {sorted(passed)[0]}")
    if settings.method:
        reader = READERS[settings.method]
        settings.note_unknown(reader.KNOWN, notes)
    return weights


def check(settings: Quantization) -> None:
    """Raise what the settings alone tell to be unreadable, before the header of any weight file is opened."""
    if settings.method == "compressed-tensors":
        compressed_tensors.stated_schemes(settings)


def _reader(tensors: Mapping[str, TensorEntry], settings: Quantization) -> tuple[ModuleType | None, tuple[str, ...]]:
    """Return the reader of a module's tensors and the suffixes it takes, or None and nothing.

    Shapes tell; where they fit no format the settings do, so that the reader can say what is wrong.
    """
    for reader in READERS.values():
        if suffixes := reader.taken(tensors):
            return reader, suffixes
    if settings.method in ("gptq", "awq") and {"qweight", "qzeros", "scales"} <= set(tensors):
        return READERS[settings.method], READERS[settings.method].TENSORS
    return None, ()


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
