"""Which layout a folder has, and its config, from config.json alone. No weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from internvl.config import ChatConfig
from internvl.convert import dual, llava, native, official
from internvl.convert.files import read_json


def layout_of(settings: Mapping[str, Any], folder: Path) -> str:
    """ "official", "native", or "llava" (1.0); ValueError for any other model."""
    if dual.is_dual(settings):
        raise ValueError(
            f"{folder / 'config.json'}: this is InternVL-C or -G, which does not chat; open it by internvl.load, or "
            "use internvl embed, search, or evaluate with a task (zero-shot, retrieval, captions, probe, segment)"
        )
    if settings.get("model_type") == native.MODEL_TYPE:
        return "native"
    if settings.get("model_type") == official.MODEL_TYPE:
        return "official"
    if llava.is_llava(settings):
        return "llava"
    raise ValueError(
        f"{folder / 'config.json'}: model_type is {settings.get('model_type')!r}, must be "
        f"{official.MODEL_TYPE!r} (official layout) or {native.MODEL_TYPE!r} (native layout)"
    )


def read_config(folder: Path) -> ChatConfig:
    """The config of a checkpoint folder of either layout."""
    path = folder / "config.json"
    settings = read_json(path)
    layout = layout_of(settings, folder)
    if layout == "llava":
        raise ValueError(
            f"{folder}: is InternVL-Chat 1.0 as released, whose vision tower lies elsewhere; put both together first: "
            f"internvl convert {folder} NEW --vision-tower TOWER"
        )
    if layout == "native":
        return native.from_native(settings, path)[0]
    return official.from_official(settings, path)
