"""A folder with a tiny random InternVL-G and a tokenizer, pictures and videos to go with it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from internvl.generate.dual import Dual
from internvl.load_dual import save_dual
from internvl.zoo import DUAL
from tiny import tiny_dual, tiny_tokenizer


def make_dual(folder: Path, seed: int = 0) -> Path:
    language = DUAL["tiny-dual"].language
    model = tiny_dual(seed, language=replace(language, settings={**language.settings, "vocab_size": 280}))
    save_dual(model, tiny_tokenizer(), folder)
    return folder


def open_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands of a test module share what they opened; opening is tested elsewhere."""
    monkeypatch.setattr(Dual, "open", lambda name, device="cpu", dtype="float32": _opened(str(name), device, dtype))


_OPEN = Dual.open


@lru_cache
def _opened(name: str, device: str, dtype: str) -> Dual:
    return _OPEN(name, device=device, dtype=dtype)


def picture(seed: int, width: int = 60, height: int = 40) -> Image.Image:
    """Large patches, so that pictures differ after being made small."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.NEAREST)


def make_pictures(folder: Path, names: list[str]) -> Path:
    for seed, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(path)
    return folder


def make_video(folder: Path, seed: int, frames: int = 5) -> Path:
    """A folder of frames, which is read as a video."""
    folder.mkdir(parents=True)
    for number in range(frames):
        picture(100 * seed + number).save(folder / f"frame_{number}.png")
    return folder
