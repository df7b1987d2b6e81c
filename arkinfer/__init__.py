"""arkinfer: compile a language model once, run it on every device."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from arkinfer.artifact import Artifact as Artifact
    from arkinfer.errors import ArkError as ArkError
    from arkinfer.pipeline import build as build
    from arkinfer.pipeline import verify_artifact as verify
    from arkinfer.planning import plan as plan
    from arkinfer.runtime.engine import Engine as Engine
    from arkinfer.runtime.engine import load as load
    from arkinfer.targets import Target as Target

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file():
    # A checkout: `backends/`, `exporters/`, `runtime/` and `targets/` lie beside this folder, not inside it.
    __path__.append(str(_ROOT))

__version__ = "0.1.0"

# Public name -> where it is defined. Loaded on first use: a device that only runs artifacts has no torch to import.
_PUBLIC = {
    "ArkError": ("arkinfer.errors", "ArkError"),
    "Artifact": ("arkinfer.artifact", "Artifact"),
    "Engine": ("arkinfer.runtime.engine", "Engine"),
    "Target": ("arkinfer.targets", "Target"),
    "build": ("arkinfer.pipeline", "build"),
    "load": ("arkinfer.runtime.engine", "load"),
    "ops": ("arkinfer.ops", ""),
    "plan": ("arkinfer.planning", "plan"),
    "verify": ("arkinfer.pipeline", "verify_artifact"),
}


def __getattr__(name: str) -> object:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'arkinfer' has no attribute {name!r}")
    module, attribute = _PUBLIC[name]
    loaded = import_module(module)
    value: object = getattr(loaded, attribute) if attribute else loaded
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})


__all__ = ["ArkError", "Artifact", "Engine", "Target", "__version__", "build", "load", "plan", "verify"]
