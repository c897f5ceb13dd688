"""Visual tokens told instead of seen: what the `align` stage wants the connector to say of a picture, from its regions.

So the language model learns how to read names and places out of visual tokens while no encoder runs and none errs.
Not in the papers: docs/parity.md.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from internvl.batch import ChatBatch
from internvl.data.mixture import DataSet
from internvl.models.chat import ChatModel
from internvl.train.cells import BACKGROUND, PLACE_SHARE, Wording, cells_under, directions, place_waves

LEAST_NOISE, MOST_NOISE = 0.2, 1.5
"""Length of what is added to the tokens of a picture, in lengths of what is said: a connector is never this sure."""


@dataclass(frozen=True)
class Said:
    """What is said of some tiles of a batch, and which tiles are looked at."""

    tiles: Int[Tensor, " said"]
    looked: Int[Tensor, " looked"]
    cell: Int[Tensor, " pairs"]
    """Token among those of the tiles that are said."""
    word: Int[Tensor, " pairs"]
    """Token id."""
    placed: Int[Tensor, " placed"]
    boxes: Float[Tensor, "placed 4"]

    def moved(self, move: Any) -> Said:
        return replace(self, **{f.name: move(getattr(self, f.name)) for f in fields(self)})


class Told:
    """Says the tiles of records that have regions and one tile; `share` of them, by a hash of their place."""

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

    def said(self, batch: ChatBatch) -> Said:
        """Of the tiles of `batch`, those that regions describe."""
        counts = [int(n) // self.side**2 for n in batch.input_ids.eq(self.image_token_id).sum(1)]
        tiles: list[int] = []
        pairs: list[tuple[int, int]] = []
        placed: list[tuple[int, list[int]]] = []
        for first, count, source in zip(accumulate([0, *counts[:-1]]), counts, batch.sources, strict=True):
            regions = self._regions(source) if count == 1 else None
            if not regions or drawn(source) >= self.share:
                continue
            start = len(tiles) * self.side**2
            tiles.append(first)
            for place, under in enumerate(cells_under(regions, self.side)):
                texts = [regions[k]["text"] for k in under] or [BACKGROUND]
                pairs += [(start + place, token) for text in texts for token in self.wording.ids(text)]
                if under and len(texts[0]) > 1:
                    placed.append((start + place, regions[under[0]]["box"]))
        looked = sorted(set(range(batch.num_tiles)) - set(tiles))
        cells, words = zip(*pairs, strict=True) if pairs else ((), ())
        return Said(
            torch.tensor(tiles, dtype=torch.long),
            torch.tensor(looked, dtype=torch.long),
            torch.tensor(cells, dtype=torch.long),
            torch.tensor(words, dtype=torch.long),
            torch.tensor([cell for cell, _ in placed], dtype=torch.long),
            torch.tensor([box for _, box in placed], dtype=torch.float32).reshape(-1, 4) / 1000,
        )

    @torch.no_grad()
    def tokens(self, said: Said) -> Float[Tensor, "said tokens width"]:
        """Mean of the words' directions and the waves of the box, as long as a word embedding, and noise."""
        words = self.table[said.word].float()
        count = len(said.tiles) * self.side**2
        named = words.new_zeros(count, words.shape[1]).index_add(0, said.cell, F.normalize(words, dim=-1))
        amount = torch.empty(len(said.tiles), 1, 1).uniform_(LEAST_NOISE, MOST_NOISE).to(words.device)
        named = F.normalize(named, dim=-1).view(-1, self.side**2, words.shape[1])
        noise = torch.randn(named.shape).to(named) * amount / math.sqrt(words.shape[1])
        out = F.normalize(named + noise, dim=-1).flatten(0, 1) * self.length * math.sqrt(1 - PLACE_SHARE**2)
        waves = place_waves(said.boxes) @ directions(words.shape[1], self.length).to(words.device)
        return out.index_add(0, said.placed, waves.float()).view(-1, self.side**2, words.shape[1])

    def _regions(self, source: str) -> list[dict[str, Any]] | None:
        number, position = self.places[source]
        line = self.sets[number].lines.read(position)
        found: list[dict[str, Any]] | None = json.loads(line).get("regions") if b'"regions"' in line else None
        return found


def drawn(source: str) -> float:
    """A number in [0, 1) that belongs to a record: the same whenever it comes, so that a run resumes exactly."""
    return int.from_bytes(hashlib.blake2b(source.encode(), digest_size=7).digest(), "big") / 2**56
