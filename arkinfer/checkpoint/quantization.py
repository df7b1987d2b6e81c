"""What a checkpoint says about its quantisation: in config.json, or in the file that older packers wrote beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from arkinfer.errors import UnsupportedError, UserError

BESIDE = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's and AutoAWQ's
METHODS = ("gptq", "awq", "marlin", "compressed-tensors")
# Keys of the same meaning under another name, and those that must agree where they are given twice.
_SPELLINGS = {"w_bit": "bits", "q_group_size": "group_size"}
_DECISIVE = ("bits", "group_size", "checkpoint_format")


@dataclass(frozen=True)
class Quantization:
    """The quantisation settings of a checkpoint; ``method`` is empty where it states none."""

    method: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, raw_config: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> Quantization:
        """Take the settings from config.json's object and, where that leaves them out, from the file ``beside`` it.

        Raises UserError for settings that contradict each other or are no object, and UnsupportedError for a method
        that arkinfer does not read: before any weight is opened.
        """
        found = raw_config.get("quantization_config", raw_config.get("compression_config"))
        if found is not None and not isinstance(found, dict):
            raise _malformed("is not an object", value=repr(found)[:80])
        values, older = _spelled(found or {}), _spelled(beside or {})
        for name in _DECISIVE:
            if name in values and name in older and values[name] != older[name]:
                raise _malformed(
                    f"and the file beside it disagree about `{name}`",
                    **{"config.json": values[name], "beside": older[name]},
                )
        values = {**older, **values}
        method = values.get("quant_method", "")
        if not isinstance(method, str):
            raise _malformed("has a `quant_method` that is not a name", value=repr(method)[:80])
        method = method.lower() or _method(values)
        if method and method not in METHODS:
            raise unsupported(f"quantised with {method!r}", values)
        return cls(method, values)

    def integer(self, name: str) -> int | None:
        """Return an integer setting, or None where it is absent. Raises UserError for anything else."""
        value = self.values.get(name)
        if value is not None and type(value) is not int:
            raise _malformed(f"has a `{name}` that is not an integer", value=repr(value)[:80])
        return value

    def flag(self, name: str) -> bool:
        """Return a yes or no, no where it is absent. Raises UserError for anything else."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, bool):
            raise _malformed(f"has a `{name}` that is neither true nor false", value=repr(value)[:80])
        return bool(value)

    def name(self, name: str) -> str:
        """Return a name in lower case, empty where it is absent. Raises UserError for anything else."""
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise _malformed(f"has a `{name}` that is not a name", value=repr(value)[:80])
        return (value or "").lower()

    def note_unknown(self, known: Iterable[str], notes: list[str]) -> None:
        """Add a note that names the settings outside of ``known``: nobody has told what they change."""
        unknown = sorted(set(self.values) - set(known) - {"quant_method"})
        if unknown:
            notes.append(f"quantization_config has settings that arkinfer does not know: {', '.join(unknown)}")


def unsupported(what: str, values: Mapping[str, Any], **facts: object) -> UnsupportedError:
    """Return the error for a quantisation that is not read: names it, and the way out."""
    stated = {
        name: values[name] for name in ("quant_method", "checkpoint_format", "format", "version") if name in values
    }
    return UnsupportedError(
        f"this checkpoint is {what}, which arkinfer does not read",
        facts={**stated, **facts, "read": ", ".join(METHODS)},
        hint="take the model's unquantised checkpoint, or its GPTQ or AWQ one",
        code="ARK-E313",
    )


def contradiction(packing: str, tensor: str, settings: Quantization) -> UserError:
    """Return the error for tensors in one format under the settings of another, or of none."""
    return UserError(
        f"the weights are packed as {packing}, and config.json says otherwise",
        facts={"tensor": tensor, "config.json says": settings.method or "nothing"},
        hint="use the config.json, or the quantize_config.json, that the checkpoint was published with",
        code="ARK-E142",
    )


def misfit(tensor: str, reason: str, **facts: object) -> UserError:
    """Return the error for a quantised tensor that does not fit its neighbours or the settings."""
    return UserError(
        f"quantised tensor {tensor} {reason}",
        facts=facts,
        hint="complete the download, and use the config.json that belongs to these weights",
        code="ARK-E141",
    )


def _malformed(reason: str, **facts: object) -> UserError:
    return UserError(
        f"quantization_config {reason}",
        facts=facts,
        hint="compare the file with the one that the model's author published",
        code="ARK-E140",
    )


def _spelled(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_SPELLINGS.get(name, name): value for name, value in values.items()}


def _method(values: Mapping[str, Any]) -> str:
    """Tell the method of settings that do not name it, as the first releases of the packers wrote them."""
    if "config_groups" in values:
        return "compressed-tensors"
    if "zero_point" in values:
        return "awq"
    return "gptq" if "bits" in values else ""
