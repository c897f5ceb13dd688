"""Pictures with captions, one JSONL line each: {"image", "caption": text or list of texts, "id"?, "language"?}.

Sets are named by a meta JSON as for chat records (mixture.py); other layouts become such lines by `pair_layouts.py`.
Here a line becomes what one pair of a batch holds; batches are pair_loader.py's.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from internvl.batch import PairBatch, Texts
from internvl.data.captions import check_unicode, clean_caption
from internvl.data.crop import random_crop, squash
from internvl.data.dual_texts import TEXT_PREFIX, DualTokeniser, Row, pad
from internvl.data.images import open_image
from internvl.tokens import IGNORE_INDEX

Forms = Literal["contrast", "all"]
"""Which forms of a text a stage needs: `summarize:` alone, or also those of matching and captions."""


@dataclass(frozen=True)
class Pair:
    """A picture and what is said about it."""

    path: str
    captions: tuple[str, ...]
    """One at least; none is empty."""
    language: str = ""
    """As the line says: en, zh, ...; empty where it says nothing."""
    source: str = "line"
    """File and line, for messages."""

    @property
    def name(self) -> bytes:
        """A short name of the picture, by its path."""
        return hashlib.blake2b(os.path.abspath(self.path).encode(), digest_size=16).digest()

    @property
    def number(self) -> int:
        """The name as a number, for telling pictures apart."""
        return int.from_bytes(self.name[:8], "little", signed=True)


def parse_pair(line: bytes, root: str = "", source: str = "line", pictured: bool = True) -> Pair:
    """One line; ValueError with file and line where it is not a pair. Unless `pictured`, it may have no picture, which
    is an empty path."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not JSON ({error}); write one object on a line") from error
    image = data.get("image") if isinstance(data, Mapping) else None
    if image is None and isinstance(data, Mapping) and not pictured:
        image = ""
    elif not isinstance(image, str) or not image:
        raise ValueError(f"{source}: `image` is {str(image)[:60]!r}; give the path of one picture")
    language = data.get("language", "")
    if not isinstance(language, str):
        raise ValueError(f'{source}: `language` is {language!r}; write it as text, such as "en"')
    captions = _captions(data.get("caption"), source)
    return Pair(os.path.join(root, image) if image else "", captions, language.strip().lower(), source)


def _captions(value: Any, source: str) -> tuple[str, ...]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{source}: `caption` is {str(value)[:60]!r}; it is a text or a list of texts")
    kept = tuple(text.strip() for text in texts if text.strip())
    if not kept:
        raise ValueError(f"{source}: an empty caption; remove the line, or in training set data.on_error to skip")
    for text in kept:
        try:
            check_unicode(text)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
    return kept


@dataclass(frozen=True)
class PairSettings:
    """What becomes of a line."""

    side: int
    """Of the picture, in pixels."""
    patch_size: int
    area: tuple[float, float] = (1.0, 1.0)
    """Least and greatest share of the picture that a random crop shows; (1, 1): all of it, squashed."""
    mask_share: float = 0.0
    """Of the patches, left out at random."""
    forms: Forms = "contrast"

    def __post_init__(self) -> None:
        least, most = self.area
        if not 0 < least <= most <= 1:
            raise ValueError(f"pairs.area is {self.area}; it must be two shares with 0 < least <= greatest <= 1")
        if not 0 <= self.mask_share < 1:
            raise ValueError(f"pairs.mask_share is {self.mask_share}; it must be at least 0 and below 1")
        if self.side < 1 or self.side % self.patch_size:
            raise ValueError(f"pairs.side is {self.side} px; it must be a multiple of the patch size {self.patch_size}")

    @property
    def num_patches(self) -> int:
        return int((self.side // self.patch_size) ** 2)

    @property
    def num_kept(self) -> int:
        """Patches that the encoder sees; at least one."""
        return max(1, round(self.num_patches * (1 - self.mask_share)))


@dataclass(frozen=True)
class PairSample:
    """One pair, encoded."""

    pixels: UInt8[Tensor, "3 side side"] | None
    """None where the features of the picture are kept."""
    kept: Int[np.ndarray, " kept"] | None
    contrast: Row
    match: Row | None
    caption: Row | None
    labels: list[int] | None
    negative: Row | None
    name: bytes
    number: int
    source: str

    @property
    def reading(self) -> int:
        """A number for the text, by what the model reads."""
        digest = hashlib.blake2b(repr(self.contrast.ids).encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little", signed=True)

    @property
    def is_cut(self) -> bool:
        return any(row is not None and row.is_cut for row in (self.contrast, self.match, self.caption))


@dataclass(frozen=True)
class PairEncoder:
    """A pair to a sample; everything random comes from the generator that it is given."""

    words: DualTokeniser
    settings: PairSettings
    clean: bool = False
    """Captions after the official clean-up (`captions.clean_caption`), as retrieval is scored."""

    def encode(
        self, pair: Pair, rng: np.random.Generator, negative: str | None = None, with_pixels: bool = True
    ) -> PairSample:
        """`negative`: a text of another picture. The text is drawn first, so pixels left out change nothing else."""
        settings, words = self.settings, self.words
        text = pair.captions[int(rng.integers(len(pair.captions)))]
        if self.clean:
            text, negative = clean_caption(text), None if negative is None else clean_caption(negative)
        whole = settings.forms == "all"
        caption, labels = words.caption(text) if whole else (None, None)
        pixels = kept = None
        if settings.mask_share:
            order = rng.permutation(settings.num_patches)[: settings.num_kept]
            kept = np.sort(order)
        if with_pixels:
            image = open_image(pair.path)
            cut = settings.area != (1.0, 1.0)
            pixels = random_crop(image, settings.side, settings.area, rng) if cut else squash(image, settings.side)
        return PairSample(
            pixels,
            kept,
            words.row(TEXT_PREFIX + text),
            words.row(text) if whole else None,
            caption,
            labels,
            None if negative is None else words.row(negative),
            pair.name,
            pair.number,
            pair.source,
        )


def collate_pairs(samples: Sequence[PairSample], valid: Sequence[bool], side: int, named: bool) -> PairBatch:
    """Samples as one batch; `named`: with the names under which features are kept."""
    fresh = [sample for sample in samples if sample.pixels is not None]
    pixels = [sample.pixels for sample in fresh if sample.pixels is not None]
    kept = [torch.from_numpy(sample.kept) for sample in samples if sample.kept is not None]
    labels = [sample.labels for sample in samples if sample.labels is not None]
    return PairBatch(
        pixels=torch.stack(pixels) if pixels else torch.empty(0, 3, side, side, dtype=torch.uint8),
        contrast=pad([sample.contrast.ids for sample in samples]),
        same=torch.tensor(alike(samples)),
        valid=torch.tensor(list(valid)),
        kept=torch.stack(kept) if kept else None,
        match=_padded([sample.match for sample in samples]),
        negatives=_padded([sample.negative for sample in samples]),
        caption=_padded([sample.caption for sample in samples]),
        labels=_labels(labels),
        names=tuple(sample.name for sample in samples) if named else (),
        fresh=tuple(sample.name for sample in fresh) if named else (),
        sources=tuple(sample.source for sample in samples),
        reading=torch.tensor([sample.reading for sample in samples]),
    )


def alike(samples: Sequence[PairSample]) -> list[int]:
    """A number for each pair, equal where pictures or texts are, if by way of a third: no negatives of each other.

    It is the least of their pictures' numbers, so that ranks agree where they hold the same picture.
    """
    owner: dict[tuple[str, int], int] = {}
    group = list(range(len(samples)))
    for place, sample in enumerate(samples):
        for key in (("picture", sample.number), ("text", sample.reading)):
            old, new = group[owner.setdefault(key, place)], group[place]
            group = [new if one == old else one for one in group]
    least = {one: min(s.number for s, of in zip(samples, group, strict=True) if of == one) for one in set(group)}
    return [least[one] for one in group]


def _padded(rows: Sequence[Row | None]) -> Texts | None:
    found = [row.ids for row in rows if row is not None]
    return pad(found) if found else None


def _labels(rows: Sequence[Sequence[int]]) -> Int[Tensor, "pairs length"] | None:
    if not rows:
        return None
    padded = pad(rows)
    return padded.ids.masked_fill(~padded.mask.bool(), IGNORE_INDEX)
