"""`internvl.load`: a name or a folder to what it is, a chat model or InternVL-C and -G."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from internvl.convert.dual import is_dual
from internvl.convert.files import read_json
from internvl.generate.open_chat import load_chat
from internvl.zoo import DUAL


def load(name_or_folder: str | Path, **options: Any) -> Any:
    """A `Chat`, with the options of `generate.open_chat.load_chat`; or, for InternVL-C and -G, a `Dual` (`Dual.open`).

    Typed code opens the one that it wants: `generate.open_chat.load_chat`, `generate.dual.Dual.open`.
    """
    if is_dual_name(name_or_folder):
        from internvl.generate.dual import Dual

        return Dual.open(name_or_folder, **options)
    return load_chat(name_or_folder, **options)


def is_dual_name(name_or_folder: str | Path) -> bool:
    """True for the names of zoo/dual.py, alone or as a hub id, and for folders in that layout."""
    config = Path(name_or_folder) / "config.json"
    if config.is_file():
        return is_dual(read_json(config))
    return str(name_or_folder).rpartition("/")[2] in DUAL
