"""What lies under each visual token of a picture, seen or told: texts, boxes and centres of its regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

WAVES = (1, 2, 4)
"""Half periods, over the picture, of the sines and cosines that say where the sides of a box are."""
NUM_SIGNALS = 2 * 4 * len(WAVES) + 1
"""Sine and cosine of each wave for each side of a box, and centres."""
BACKGROUND = "background"
"""What a token says under which there is nothing."""
PLACE_SHARE = 0.5
"""Length of what says the place, in lengths of a word embedding."""
CENTRE_SHARE = 0.35
"""Length of what says that the centre of a region lies under a token, in lengths of a word embedding."""


class Wording:
    """Token ids of the texts of regions."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """A letter as it stands inside a word, or behind a space; a name as it stands inside a sentence."""
        if text not in self._known:
            bare = len(text) == 1 or text.startswith(" ")
            self._known[text] = self.tokenizer.encode(text if bare else f" {text}", add_special_tokens=False)
        return self._known[text]


@dataclass(frozen=True)
class Picture:
    """One record with regions, as one tile."""

    source: str
    tile: UInt8[Tensor, "1 3 side side"] | None
    """None where its features are kept."""
    digest: bytes
    """Content of the tile, where features are kept."""
    cells: list[list[str]]
    """Texts of the regions under each token, row by row; none: background."""
    boxes: list[list[int] | None]
    """The first region under each token: left, top, right, bottom on the 0..1000 grid; None: nothing."""
    centres: Float[np.ndarray, " cells"]
    """Regions whose centre lies under each token."""


@dataclass(frozen=True)
class Cells:
    """Tiles, and which words each token that is looked at should be near."""

    tiles: UInt8[Tensor, "fresh 3 side side"]
    """Of every picture, or of those whose features are not kept."""
    fresh: tuple[bytes, ...]
    digests: tuple[bytes, ...]
    """Content of these tiles, and of every picture's: where features are kept."""
    tokens: Int[Tensor, " looked"]
    """Places among all tokens of all pictures."""
    cell: Int[Tensor, " pairs"]
    """Places in `tokens`."""
    word: Int[Tensor, " pairs"]
    share: Float[Tensor, " pairs"]
    """Weight of the token divided among its words."""
    placed: Int[Tensor, " placed"]
    """Places in `tokens`."""
    boxes: Float[Tensor, "placed 4"]
    """Of the tokens in `placed`: sides as shares of the picture."""
    centres: Float[Tensor, " looked"]
    """Regions whose centre lies under a token."""
    sources: tuple[str, ...]

    def pin_memory(self) -> Cells:
        return moved(self, lambda value: value.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> Cells:
        return moved(self, lambda value: value.to(device, non_blocking=non_blocking))


Given = TypeVar("Given", bound="DataclassInstance")


def moved(given: Given, move: Callable[[Tensor], Tensor]) -> Given:
    """The same with every tensor moved."""
    values = {f.name: getattr(given, f.name) for f in fields(given)}
    return replace(given, **{name: move(value) for name, value in values.items() if isinstance(value, Tensor)})


def describe(regions: Sequence[Mapping[str, Any]], side: int) -> tuple[list[list[str]], list[list[int] | None]]:
    """Texts of the regions under each cell, row by row, and the box of the first of them."""
    covered = cells_under(regions, side)
    texts = [texts_under(regions, under) for under in covered]
    return texts, [regions[under[0]]["box"] if under else None for under in covered]


def cells_under(regions: Sequence[Mapping[str, Any]], side: int) -> list[list[int]]:
    """Which regions lie under each cell of a side x side grid, boxes on the 0..1000 grid.

    A region lies under a cell that it covers, or that covers it, by half along both axes: so each has a cell.
    """
    step = 1000 / side
    found: list[list[int]] = [[] for _ in range(side * side)]
    for number, region in enumerate(regions):
        left, top, right, bottom = region["box"]
        for row in _steps(top, bottom, step, side):
            for column in _steps(left, right, step, side):
                found[row * side + column].append(number)
    return found


def _steps(low: float, high: float, step: float, count: int) -> list[int]:
    """Steps of an axis that share half of themselves, or half of low..high, with it."""
    high = max(high, low + 1)
    least = min(step, high - low) / 2
    near = range(max(0, int(low // step)), min(count, math.ceil(high / step)))
    return [at for at in near if min(high, (at + 1) * step) - max(low, at * step) >= least]


def texts_under(regions: Sequence[Mapping[str, Any]], under: Sequence[int]) -> list[str]:
    """What a cell says of the regions under it. A letter after another is said as at the beginning of a word: by that
    the two are told apart, and a token of a small text holds both."""
    texts = [str(regions[number]["text"]) for number in under]
    return [f" {text}" if place and len(text) == 1 else text for place, text in enumerate(texts)]


def place_waves(boxes: Float[Tensor, "boxes 4"]) -> Float[Tensor, "boxes waves"]:
    """Sides of boxes, as shares of the picture, in sines and cosines: coarse and fine, each linear to read."""
    turns = math.pi * boxes[:, :, None] * boxes.new_tensor(WAVES)
    return torch.cat([turns.cos(), turns.sin()], dim=-1).flatten(1)


def centres_under(regions: Sequence[Mapping[str, Any]], side: int, blur: float = 0.0) -> Float[np.ndarray, " cells"]:
    """How many regions have their centre in each cell of a side x side grid: together, as many as there are.

    `blur` is the deviation, in cells, of one who is not sure where a centre is: each is shared out over the cells by
    how likely it lies there.
    """
    boxes = np.array([region["box"] for region in regions], float).reshape(-1, 4)
    found = [_shares((boxes[:, low] + boxes[:, low + 2]) / 2000 * side, side, blur) for low in (1, 0)]
    return np.asarray(np.einsum("nr,nc->rc", *found).reshape(-1), np.float32)


def _shares(places: np.ndarray, side: int, blur: float) -> np.ndarray:
    """Of each place on an axis, in cells: how likely it is in each."""
    inside = np.clip(places, 0, np.nextafter(side, 0))[:, None]
    if not blur:
        return np.asarray(np.floor(inside) == np.arange(side), float)
    lower = np.vectorize(math.erf, otypes=[float])((np.arange(1, side) - inside) / (blur * math.sqrt(2))) / 2 + 0.5
    ends = np.concatenate([np.zeros_like(inside), lower, np.ones_like(inside)], 1)
    return np.asarray(np.diff(ends, axis=1))


def directions(width: int, length: float) -> Float[Tensor, "waves width"]:
    """Fixed, orthogonal, each as long as what one wave adds to a token; `length` is that of a word embedding.

    The last is that of centres.
    """
    num_waves = NUM_SIGNALS - 1
    generator = torch.Generator().manual_seed(0)
    random = [torch.randn(width, number, generator=generator) for number in (num_waves, 1)]
    orthogonal: Tensor = torch.linalg.qr(torch.cat(random, dim=1))[0].T
    share = PLACE_SHARE / math.sqrt(num_waves / 2)
    return orthogonal * (length * torch.tensor([*[share] * num_waves, CENTRE_SHARE]))[:, None]
