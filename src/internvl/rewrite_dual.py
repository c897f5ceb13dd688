"""InternVL-C and -G into another number type, or between the official folder and the original `.pth`; checked.

The whole model is in memory: 28 GB in bfloat16 for the release. Chat models are rewrite.py's.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from internvl.config import DualConfig
from internvl.convert import dual
from internvl.convert.files import read_json
from internvl.load_dual import load_dual, load_original, save_dual, save_original
from internvl.locate import locate
from internvl.models.contrastive import DualModel
from internvl.rewrite import BESIDE, TOKENIZER_FILES, forget_code, fresh_folder
from internvl.zoo import DUAL

ORIGINAL = ".pth"


@dataclass(frozen=True)
class WrittenDual:
    source_layout: str
    target_layout: str
    parameters: int
    difference: float | None
    """Largest difference of embeddings of the same pictures and texts; None where it was not checked."""


def is_dual_source(source: str) -> bool:
    """A name of the zoo, its hub id, an original `.pth`, or a folder whose config.json is InternVL-C's or -G's."""
    path = Path(source)
    if path.suffix == ORIGINAL or (not path.is_dir() and path.name in DUAL):
        return True
    return (path / "config.json").is_file() and dual.is_dual(read_json(path / "config.json"))


def convert_dual(
    source: str,
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    like: str | None = None,
    check: bool = True,
    tolerance: float = 0.0,
) -> WrittenDual:
    """Write `source` to a folder, or to a `.pth` where the target is named so (InternVL-C alone has original names).

    `like` says the sizes of an original `.pth`, which holds no configuration: a name of the zoo, or a folder.
    ValueError, and no target, where the embeddings of what was written differ by more than `tolerance`.
    """
    original = Path(source).suffix == ORIGINAL
    if original:
        model = load_original(source, _sizes(like), dtype=dtype)
        tokenizer, folder = None, None
    else:
        if like is not None:
            raise ValueError(f"--like {like}: {source} says its own sizes; leave it out")
        loaded = load_dual(source, dtype=dtype)
        model, tokenizer = loaded.model, loaded.tokenizer
        folder = None if source.startswith("tiny-") else locate(source)
    said = ("original" if original else "official", "original" if target.suffix == ORIGINAL else "official")
    if target.suffix == ORIGINAL:
        return _to_original(model, target, said, check, tolerance)
    with fresh_folder(target) as fresh:
        save_dual(model, None if _has_words(folder) else tokenizer, fresh)
        if folder is not None:
            for name in (*BESIDE, *(TOKENIZER_FILES if _has_words(folder) else ())):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, fresh / name)
            forget_code(fresh)
        difference = _compare(model, load_dual(fresh, dtype=_dtype(model)).model, target, tolerance) if check else None
    return WrittenDual(*said, _count(model), difference)


def _has_words(folder: Path | None) -> bool:
    return folder is not None and any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))


def _to_original(model: DualModel, target: Path, said: tuple[str, str], check: bool, tolerance: float) -> WrittenDual:
    if target.exists():
        raise ValueError(f"{target}: is there already; give another name")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.stem}.fresh{ORIGINAL}")
    try:
        save_original(model, scratch)
        again = load_original(scratch, model.config, dtype=_dtype(model))
        difference = _compare(model, again, target, tolerance) if check else None
        scratch.rename(target)
    finally:
        scratch.unlink(missing_ok=True)
    return WrittenDual(*said, _count(again), difference)


def _sizes(like: str | None) -> DualConfig | str:
    if like is None:
        return "InternVL-C-13B-224px"
    path = Path(like) / "config.json"
    return dual.from_official(read_json(path), path) if path.is_file() else like


def _dtype(model: DualModel) -> torch.dtype:
    return model.text_projection.dtype


def _count(model: DualModel) -> int:
    return model.config.num_parameters


def probe(model: DualModel) -> Tensor:
    """Embeddings of random pictures and texts, in float32; those of InternVL-G too where the model has them."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.side
    pixels = torch.randn(2, 3, side, side, generator=generator).to(_dtype(model))
    ids = torch.randint(3, model.config.language.vocab_size, (2, 12), generator=generator)
    with torch.inference_mode():
        found = [model.encode_image(pixels), model.encode_text(ids)]
        found += [model.encode_image(pixels, "g")] if model.config.generative else []
    return torch.cat([x.float() for x in found])


def _compare(before: DualModel, after: DualModel, target: Path, tolerance: float) -> float:
    one, two = probe(before), probe(after)
    rows = min(len(one), len(two))  # an original file has the C part alone
    difference = float((one[:rows] - two[:rows]).abs().max())
    if not difference <= tolerance:
        raise ValueError(
            f"{target}: embeddings differ by up to {difference:.3g}, tolerance {tolerance:.3g}; nothing was written"
        )
    return difference
