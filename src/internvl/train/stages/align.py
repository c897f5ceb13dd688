"""Connector and ViT learn to say, in the language model's own embeddings, what each visual token covers.

A warm start for two cores: the language model is not run, so a picture costs the ViT alone. Records need
`regions` (a text and a box each, as `data build` writes them); a token's target are the embeddings of the words of the
region under it. What follows is `sft`. Not in the papers: docs/parity.md.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from internvl.data.images import normalise, open_image
from internvl.data.mixture import DataSet, Mixture, read_sets
from internvl.data.tiling import single
from internvl.load import load_checkpoint
from internvl.models.chat import ChatModel
from internvl.train import features, trainable
from internvl.train.cells import (
    BACKGROUND,
    Cells,
    Picture,
    Wording,
    centres_under,
    describe,
    directions,
    place_waves,
    texts_under,
)
from internvl.train.export import export_chat
from internvl.train.run import RunConfig
from internvl.train.stages.pictures import PictureStage
from internvl.train.trainable import Learner

NAMES, NEAR, NORM, PLACES, CENTRES = "names", "near", "norm", "places", "centres"
NEAREST, OFF = "nearest", "off"
"""Of held-out pictures; see `Align.evaluate`."""
SHARPNESS = 50.0
"""Factor on the cosines before the softmax over the words."""
BACKGROUND_WEIGHT = 0.3
"""Of a token under which there is nothing; a token inside a region weighs 1."""
BACKGROUND_TOKENS = 12
"""Most such tokens of a picture, drawn anew each time: they are easy, and many."""


def lines_with_regions(sets: Sequence[DataSet]) -> list[tuple[int, int]]:
    """Set and line of each."""
    return [
        (number, position)
        for number, data in enumerate(sets)
        for position in range(len(data.lines))
        if b'"regions"' in data.lines.read(position)
    ]


def repeated(sets: Sequence[DataSet], lines: Sequence[tuple[int, int]], seed: int, epoch: int) -> list[int]:
    """Numbers of the lines of an epoch, shuffled; each as often as its set is repeated."""
    mixture = Mixture(sets, seed)
    place = {int(mixture.bounds[number]) + position: at for at, (number, position) in enumerate(lines)}
    return [place[number] for number in mixture.epoch(epoch).tolist() if number in place]


class Align(PictureStage[Cells]):
    """Contrast of connector outputs with word embeddings; along fixed directions they say where the box is, and whether
    its centre lies here: things that touch, or letters twice, are told apart by that."""

    coefficients: Mapping[str, float] = {NAMES: 1.0, NEAR: 0.5, NORM: 0.1, PLACES: 0.2, CENTRES: 0.5}

    def __init__(
        self, run: RunConfig, model: ChatModel, tokenizer: Any, sets: Sequence[DataSet], also: Align | None = None
    ) -> None:
        """The words of `also` are candidates too."""
        super().__init__(run)
        self.also = also
        self.held_out: Align | None = None
        self.model, self.tokenizer, self.sets = model, tokenizer, sets
        self.side = math.isqrt(model.config.patch_tokens)
        self.wording = Wording(tokenizer)
        self.store: features.MemoryStore | None = None
        self.known: dict[tuple[int, int], Picture] = {}
        if not self.lines:
            raise ValueError(f"{run.data.meta}: no record has regions; write them with `internvl data build`")

    @cached_property
    def lines(self) -> list[tuple[int, int]]:
        """Set and line of each record with regions."""
        return lines_with_regions(self.sets)

    @cached_property
    def words(self) -> dict[int, int]:
        """Token id of each word part of the regions -> its place among the candidates."""
        texts = {BACKGROUND}
        known = set() if self.also is None else set(self.also.words)
        for number, position in self.lines:
            regions = self._line(number, position)["regions"]
            texts.update(text for region in regions for text in texts_under((region, region), (0, 1)))
        ids = sorted(known | {token for text in texts for token in self.wording.ids(text)})
        return {token: place for place, token in enumerate(ids)}

    @cached_property
    def table(self) -> Float[Tensor, "words width"]:
        """Embeddings of the candidates."""
        ids = torch.tensor(list(self.words), device=next(self.model.parameters()).device)
        return self.model.language.embed(ids[None])[0].detach().float()

    @cached_property
    def directions(self) -> Float[Tensor, "waves width"]:
        """As long as what one wave adds to a token, and the centre of a region."""
        return directions(self.table.shape[1], float(self.table.norm(dim=-1).mean())).to(self.table.device)

    def begin(self, run: RunConfig, device: torch.device) -> trainable.Learner:
        self.model.to(device)
        learner = trainable.choose(self.model, run)
        if run.compile:
            for block in self.model.vision.layers:
                block.compile()
        self.store = features.open_store(run, self.model.config, self.model.eyes, self._features, device)
        return learner

    def num_pictures(self) -> int:
        return len(self.lines)

    def order(self, epoch: int) -> list[int]:
        return repeated(self.sets, self.lines, self.run.seed, epoch)

    def made(self, chosen: Sequence[int], drawn: np.random.Generator) -> Cells:
        return self._batch([self._picture(*self.lines[number]) for number in chosen], drawn)

    def prepare(self, batch: Cells) -> Cells:
        return batch

    def weights(self, batch: Cells) -> dict[str, float]:
        said = float(batch.share.double().sum())
        looked, placed = float(len(batch.tokens)), float(len(batch.placed))
        centres = float(batch.centres.double().sum())
        return {NAMES: said, NEAR: said, NORM: looked, PLACES: max(1.0, placed), CENTRES: max(1.0, centres)}

    def losses(self, prepared: Cells) -> dict[str, Float[Tensor, ""]]:
        """Cross-entropy over all words, distance to the right ones, squared errors of log-norms, waves and centres."""
        return self._losses(self._said(prepared), prepared)

    def _said(self, prepared: Cells) -> Float[Tensor, "pictures tokens width"]:
        patches: Tensor = self.model.connector(self._seen(prepared))
        return patches[:, self.model.config.num_queries :]

    def _losses(self, patches: Tensor, prepared: Cells) -> dict[str, Float[Tensor, ""]]:
        said = patches.flatten(0, 1)[prepared.tokens].float()
        cosines = self._cosines(said)
        likely = F.log_softmax(SHARPNESS * cosines, dim=-1)
        names = -(prepared.share * likely[prepared.cell, prepared.word]).sum()
        near = (prepared.share * (1 - cosines[prepared.cell, prepared.word])).sum()
        target = self.table.norm(dim=-1).mean().log()
        norm = (said.norm(dim=-1).clamp_min(1e-6).log() - target).square().sum()
        heard = self._heard(said)
        places = (heard[prepared.placed, :-1] - place_waves(prepared.boxes)).square().sum()
        centres = (heard[:, -1] - prepared.centres).square().sum()
        return {NAMES: names, NEAR: near, NORM: norm, PLACES: places, CENTRES: centres}

    def _cosines(self, said: Float[Tensor, "tokens width"]) -> Float[Tensor, "tokens words"]:
        return (F.normalize(said, dim=-1) @ F.normalize(self.table, dim=-1).T).float()

    def _heard(self, said: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens waves"]:
        """What is said along each direction."""
        return said @ (self.directions / self.directions.square().sum(-1, keepdim=True)).T

    def sizes(self, batch: Cells) -> dict[str, int]:
        tiles = len(batch.sources)
        tokens = tiles * self.side**2
        return {"samples": tiles, "tokens": tokens, "learned": len(batch.tokens), "tiles": tiles}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Mean losses over the held-out pictures; the share of tokens in regions that say a word of theirs more clearly
        than any other; by how many the centres said of a picture miss the number of its regions."""
        return {} if self.held_out is None else self.held_out._measure(device)

    def _measure(self, device: torch.device) -> dict[str, float]:
        chosen = np.random.default_rng(0).permutation(self.num_pictures())[: self.run.data.held_out_samples]
        sums: defaultdict[str, float] = defaultdict(float)
        weights: defaultdict[str, float] = defaultdict(float)
        for first in range(0, len(chosen), self.size):
            batch = self.made(chosen[first : first + self.size].tolist(), np.random.default_rng(first)).to(device)
            patches = self._said(batch)
            for name, loss in self._losses(patches, batch).items():
                sums[name] += float(loss)
                weights[name] += self.weights(batch)[name]
            said = patches.flatten(0, 1).float()
            inside = batch.placed
            right = torch.zeros(len(batch.tokens), len(self.words), dtype=torch.bool, device=device)
            right[batch.cell, batch.word] = True
            nearest = self._cosines(said[batch.tokens[inside]]).argmax(1)
            sums[NEAREST] += int(right[inside, nearest].sum())
            weights[NEAREST] += len(inside)
            cells = said.new_zeros(len(said)).index_put((batch.tokens,), batch.centres)
            missed = self._heard(patches.float())[..., -1].sum(1) - cells.view(len(patches), -1).sum(1)
            sums[OFF] += float(missed.abs().sum())
            weights[OFF] += len(missed)
        means = {name: sums[name] / weights[name] for name in sums}
        total = math.fsum(factor * means[name] for name, factor in self.coefficients.items())
        return {"held_out_loss": total, **{f"held_out_{name}": mean for name, mean in means.items()}}

    def _line(self, number: int, position: int) -> dict[str, Any]:
        line: dict[str, Any] = json.loads(self.sets[number].lines.read(position))
        return line

    def _seen(self, batch: Cells) -> Float[Tensor, "pictures patches width"]:
        if self.store is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.run.vision.learn != "frozen"):
                return self._features(batch.tiles)
        if batch.fresh:
            self.store.gather(batch.tiles, batch.fresh, self._features)
        return torch.stack([self.store.get(name) for name in batch.digests]).to(self.table.device)

    def _features(self, tiles: Tensor) -> Float[Tensor, "tiles patches width"]:
        return self.model.look(normalise(tiles, self.model.config.normalize))

    def _picture(self, number: int, position: int) -> Picture:
        known = self.known.get((number, position))
        if known is not None and self.store is not None and known.digest in self.store:
            return known
        data, line = self.sets[number], self._line(number, position)
        tile = single(open_image(Path(data.root) / line["image"]), self.model.config.tile_size)
        regions = line["regions"]
        digest = features.digests(tile)[0] if self.store is not None else b""
        described = (*describe(regions, self.side), centres_under(regions, self.side))
        picture = Picture(data.source(position), tile, digest, *described)
        if self.store is not None:
            self.known[number, position] = replace(picture, tile=None)
        return picture

    def _batch(self, pictures: Sequence[Picture], drawn: np.random.Generator) -> Cells:
        tokens: list[int] = []
        pairs: list[tuple[int, int, float]] = []
        placed: list[tuple[int, list[int]]] = []
        centres: list[float] = []
        for number, picture in enumerate(pictures):
            empty = [place for place, texts in enumerate(picture.cells) if not texts]
            kept = {int(place) for place in drawn.permutation(empty)[:BACKGROUND_TOKENS]}
            for place, (texts, box) in enumerate(zip(picture.cells, picture.boxes, strict=True)):
                if not texts and place not in kept:
                    continue
                ids = [token for text in texts or [BACKGROUND] for token in self.wording.ids(text)]
                weight = 1.0 if texts else BACKGROUND_WEIGHT
                pairs += [(len(tokens), self.words[token], weight / len(ids)) for token in ids]
                placed += [(len(tokens), box)] if box is not None else []
                centres.append(float(picture.centres[place]))
                tokens.append(number * self.side**2 + place)
        cells, words, shares = zip(*pairs, strict=True)
        side = self.model.config.tile_size
        return Cells(
            torch.cat(
                [torch.empty(0, 3, side, side, dtype=torch.uint8), *(p.tile for p in pictures if p.tile is not None)]
            ),
            tuple(picture.digest for picture in pictures if picture.tile is not None) if self.store is not None else (),
            tuple(picture.digest for picture in pictures) if self.store is not None else (),
            torch.tensor(tokens),
            torch.tensor(cells),
            torch.tensor(words),
            torch.tensor(shares),
            torch.tensor([cell for cell, _ in placed], dtype=torch.long),
            torch.tensor([box for _, box in placed], dtype=torch.float32).reshape(-1, 4) / 1000,
            torch.tensor(centres),
            tuple(picture.source for picture in pictures),
        )

    def export(self, learner: Learner[Any], out: Path) -> None:
        export_chat(learner, self.tokenizer, out)


def open_align(run: RunConfig) -> Align:
    """The model of a run with its tokenizer, and the records with regions."""
    loaded = load_checkpoint(run.model, dtype=torch.bfloat16 if run.precision == "bf16" else torch.float32)
    if loaded.tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer; put its tokenizer.json beside the weights")
    if run.language.learn != "frozen" or run.tokens.learn:
        raise ValueError(
            f"language.learn is {run.language.learn!r} and tokens.learn is {run.tokens.learn}; the align stage does "
            "not run the language model: set them to frozen and false"
        )
    stage = Align(run, loaded.model, loaded.tokenizer, read_sets(run.data.meta))
    if run.data.held_out:
        kept = replace(run, data=replace(run.data, meta=run.data.held_out))
        stage.held_out = Align(kept, loaded.model, loaded.tokenizer, read_sets(run.data.held_out), also=stage)
    return stage
