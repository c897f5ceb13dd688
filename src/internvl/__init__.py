"""InternVL: the whole family in one package. Names are imported when first used, so `import internvl` is quick."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from internvl.data.templates import render
    from internvl.data.tiling import Tiling, tile
    from internvl.generate.dual import Dual
    from internvl.generate.opening import load
    from internvl.generate.reply import Reply
    from internvl.generate.session import Chat

__version__ = "0.1.0"

_HOME = {
    "load": "internvl.generate.opening",
    "Chat": "internvl.generate.session",
    "Dual": "internvl.generate.dual",
    "Reply": "internvl.generate.reply",
    "tile": "internvl.data.tiling",
    "Tiling": "internvl.data.tiling",
    "render": "internvl.data.templates",
}
__all__ = ["Chat", "Dual", "Reply", "Tiling", "load", "render", "tile"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'internvl' has no attribute {name!r}; it has {', '.join(sorted(__all__))}")
    return getattr(import_module(_HOME[name]), name)


class _Package(ModuleType):
    """`internvl.load` is the function: importing the module `internvl/load.py` does not put itself in its place."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
