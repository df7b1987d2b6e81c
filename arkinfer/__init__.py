"""arkinfer: compile a language model once, run it on every device."""

from __future__ import annotations

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "setup.cfg").is_file():
    # A checkout: `backends/`, `exporters/`, `runtime/` and `targets/` lie beside this folder, not inside it.
    __path__.append(str(_ROOT))

__version__ = "0.1.0"
