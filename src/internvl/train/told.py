"""Visual tokens told instead of seen: what the `align` stage wants the connector to say of a picture, from its regions.

So the language model learns how to read names and places out of visual tokens while no encoder runs and none errs.
Not in the papers: docs/parity.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from internvl.batch import ChatBatch
from internvl.data import colours
from internvl.data.mixture import DataSet
from internvl.models.chat import ChatModel
from internvl.train.cells import BACKGROUND, PLACE_SHARE, Wording, centres_under, describe, directions, place_waves

LEAST_NOISE, MOST_NOISE = 0.3, 2.2
"""Length of what is added to the tokens of a picture, in lengths of what is said: a connector is never this sure."""
CONFUSED, MOST_CONFUSED = 0.6, 0.7
"""Share of names that are said together with that of a thing from another record, and the most that the other takes of
what is said: an encoder that never saw a thing takes it in part for another one."""
MOST_BLUR = 0.8
"""Deviation, in tokens, of where the centre of a region is said to be: an encoder is not sure which token it is."""
WAVE_NOISE, CENTRE_NOISE = 0.4, 0.15
"""Most deviation of what is said of boxes and centres from what is so; a wave is -1 to 1, a centre 0 or 1. More on 64
tokens, and their sum would not be a count."""

Weighted = list[tuple[int, float]]
"""Token ids, each with its share of what is said."""


@dataclass(frozen=True)
class Said:
    """What is said of some tiles of a batch, and which tiles are looked at."""

    tiles: Int[Tensor, " said"]
    looked: Int[Tensor, " looked"]
    cell: Int[Tensor, " pairs"]
    """Token among those of the tiles that are said."""
    word: Int[Tensor, " pairs"]
    """Token id."""
    weight: Float[Tensor, " pairs"]
    placed: Int[Tensor, " placed"]
    boxes: Float[Tensor, "placed 4"]
    centres: Float[Tensor, " tokens"]
    """Regions whose centre lies under each token of the tiles that are said."""


class Told:
    """Says the tiles of JSONL records that have regions and one tile; `share` of them, by a hash of their place."""

    def __init__(self, model: ChatModel, tokenizer: Any, sets: Sequence[DataSet], share: float) -> None:
        if model.config.num_queries:
            raise ValueError(
                f"data.told is {share} but {model.config.num_queries} queries stand before the patches of a tile, and "
                "regions say nothing of them; set --data.told 0"
            )
        self.sets, self.share = sets, share
        self.side = math.isqrt(model.config.patch_tokens)
        self.image_token_id = -1 if model.image_token_id is None else model.image_token_id
        self.wording = Wording(tokenizer)
        # whole, as it is before the model is spread over ranks; the rows of words never learn beside adapters
        self.table = model.language.model.get_input_embeddings().weight.detach()
        self.length = float(self.table.float().norm(dim=-1).mean())
        self.places = {data.source(k): (n, k) for n, data in enumerate(sets) for k in range(len(data))}
        if not any(b'"regions"' in data.raw(k) for data in sets for k in range(len(data))):
            raise ValueError(
                f"data.told is {share} but no line of {', '.join(data.annotation for data in sets)} has regions; write "
                "them with `internvl data build`, or set --data.told 0"
            )

    def said(self, batch: ChatBatch) -> Said:
        """Of the tiles of `batch`, those that regions describe."""
        counts = [int(n) // self.side**2 for n in batch.input_ids.eq(self.image_token_id).sum(1)]
        found = [self._regions(s) if n == 1 else None for n, s in zip(counts, batch.sources, strict=True)]
        tiles: list[int] = []
        pairs: list[tuple[int, int, float]] = []
        placed: list[tuple[int, list[int]]] = []
        centres: list[Float[np.ndarray, " cells"]] = [np.empty(0, np.float32)]
        for row, (first, source) in enumerate(zip(accumulate([0, *counts[:-1]]), batch.sources, strict=True)):
            regions = found[row]
            if not regions or drawn(source) >= self.share:
                continue
            start = len(tiles) * self.side**2
            tiles.append(first)
            texts, boxes = describe(regions, self.side)
            centres.append(centres_under(regions, self.side, MOST_BLUR * drawn(f"{source} centres")))
            others = [region["text"] for one in (*found[row + 1 :], *found[:row]) for region in one or ()]
            spoken = self._spoken([text for cell in texts for text in cell], others, source)
            for place, box in enumerate(boxes):
                said = [spoken[text] for text in texts[place]] or [self._weighted(BACKGROUND, 1.0)]
                pairs += [(start + place, token, weight) for words in said for token, weight in words]
                placed += [(start + place, box)] if box is not None else []
        looked = sorted(set(range(batch.num_tiles)) - set(tiles))
        cells, words, weights = zip(*pairs, strict=True) if pairs else ((), (), ())
        return Said(
            torch.tensor(tiles, dtype=torch.long),
            torch.tensor(looked, dtype=torch.long),
            torch.tensor(cells, dtype=torch.long),
            torch.tensor(words, dtype=torch.long),
            torch.tensor(weights, dtype=torch.float32),
            torch.tensor([cell for cell, _ in placed], dtype=torch.long),
            torch.tensor([box for _, box in placed], dtype=torch.float32).reshape(-1, 4) / 1000,
            torch.from_numpy(np.concatenate(centres)),
        )

    @torch.no_grad()
    def tokens(self, said: Said) -> Float[Tensor, "said tokens width"]:
        """Mean of the words' directions, with noise; waves of the box; centres. About as long as a word embedding."""
        words = F.normalize(self.table[said.word].float(), dim=-1) * said.weight[:, None]
        count = len(said.tiles) * self.side**2
        named = words.new_zeros(count, words.shape[1]).index_add(0, said.cell, words)
        amount = torch.empty(len(said.tiles), 1, 1).uniform_(LEAST_NOISE, MOST_NOISE).to(words.device)
        named = F.normalize(named, dim=-1).view(-1, self.side**2, words.shape[1])
        noise = torch.randn(named.shape).to(named) * amount / math.sqrt(words.shape[1])
        out = F.normalize(named + noise, dim=-1).flatten(0, 1) * self.length * math.sqrt(1 - PLACE_SHARE**2)
        doubt = torch.rand(len(said.tiles)).to(words.device).repeat_interleave(self.side**2)
        waves, centres = place_waves(said.boxes), said.centres
        waves = waves + torch.randn(waves.shape).to(waves) * WAVE_NOISE * doubt[said.placed, None]
        centres = centres + torch.randn(count).to(centres) * CENTRE_NOISE * doubt
        along = directions(words.shape[1], self.length).to(words.device)
        out = out.index_add(0, said.placed, (waves @ along[:-1]).float()) + centres[:, None] * along[-1]
        return out.view(-1, self.side**2, words.shape[1])

    def _spoken(self, texts: Sequence[str], others: Sequence[str], source: str) -> dict[str, Weighted]:
        """Token ids of each text with their weights; now and then partly those of another thing, colours apart."""
        rng = np.random.default_rng(list(source.encode()))
        names = sorted({_colour_and_name(text)[1] for text in others if len(text) > 1})
        spoken = {}
        for text in dict.fromkeys(texts):
            colour, name = _colour_and_name(text)
            strangers = [other for other in names if other != name]
            taken = rng.uniform(0, MOST_CONFUSED) if rng.random() < CONFUSED else 0.0
            if len(text.strip()) == 1 or not strangers or not taken:
                spoken[text] = self._weighted(text, 1.0)
                continue
            other = strangers[int(rng.integers(len(strangers)))]
            size = len(self.wording.ids(name))
            spoken[text] = [
                *(self._weighted(colour, 1.0) if colour else ()),
                *self._weighted(name, 1 - taken),
                *self._weighted(other, taken * size / len(self.wording.ids(other))),
            ]
        return spoken

    def _weighted(self, text: str, weight: float) -> Weighted:
        return [(token, weight) for token in self.wording.ids(text)]

    def _regions(self, source: str) -> list[dict[str, Any]] | None:
        number, position = self.places[source]
        line = self.sets[number].raw(position)
        found: list[dict[str, Any]] | None = json.loads(line).get("regions") if b'"regions"' in line else None
        return found


def _colour_and_name(text: str) -> tuple[str, str]:
    """ "red apple": red, apple; the colour is empty where none is said."""
    colour, _, name = text.partition(" ")
    return (colour, name) if name and colour in colours.NAMES else ("", text)


def drawn(source: str) -> float:
    """A number in [0, 1) that belongs to a record: the same whenever it comes, so that a run resumes exactly."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=7).digest(), "big") / 2**56
