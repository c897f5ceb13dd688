"""What a run on single pictures has before it: stages distill and align."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch

from internvl.config import ChatConfig
from internvl.data.images import header_size
from internvl.data.loader import BatchSize
from internvl.data.mixture import read_sets
from internvl.data.tiling import count_tiles
from internvl.models.build import build
from internvl.train import cost
from internvl.train.cells import Cells, cells_under
from internvl.train.outlook import Worst
from internvl.train.rehearse import Memory
from internvl.train.rehearse_others import rehearse_align, rehearse_distill
from internvl.train.run import RunConfig
from internvl.train.stages.align import BACKGROUND_TOKENS, Align
from internvl.train.stages.distill import pictures_of
from internvl.train.teachers import Teacher, sketch_teacher
from internvl.train.trials import Trial, middling, try_align, try_distill


class PictureOutlook:
    """Pictures as tiles, without the language model: stages distill and align."""

    joint = False

    def __init__(self, run: RunConfig, config: ChatConfig, tokenizer: Any) -> None:
        self.run, self.tokenizer = run, tokenizer
        most = run.data.max_tiles
        self.config = config if most is None else replace(config, max_tiles=most)
        self.size = run.data.batch_samples or 16

    @cached_property
    def counts(self) -> list[int]:
        """Tiles of every picture; in the align stage, tokens that are looked at."""
        if self.run.stage == "align":
            return [self._looked(line) for line in self._lines()]
        config = self.config
        if not config.dynamic_tiles or config.max_tiles <= 1:
            return [1] * len(self.pictures)
        count = partial(
            count_tiles,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            tile_size=config.tile_size,
            thumbnail=config.thumbnail,
        )
        return [count(*header_size(path)) for path in self.pictures]

    @cached_property
    def pictures(self) -> list[str]:
        return pictures_of(self.run.data.meta)

    def sizes(self) -> list[BatchSize]:
        found = []
        for chosen in self._batches():
            total = int(sum(self.counts[number] for number in chosen))
            tiles = len(chosen) if self.run.stage == "align" else total
            positions = tiles * (self._grid() ** 2 + (self.run.stage == "distill"))
            found.append(BatchSize(len(chosen), positions, positions, 0, tiles))
        return found

    def work(self) -> list[float]:
        return [self._operations(size.tiles) for size in self.sizes()]

    def worst(self) -> Worst:
        batches = self._batches()
        return self._of(max(range(len(batches)), key=lambda n: sum(self.counts[number] for number in batches[n])))

    def memory(self, device: str) -> Memory:
        worst = self.worst()
        if self.run.stage == "distill":
            return rehearse_distill(self.run, self.config, self._teacher(), worst.size.tiles, device)
        return rehearse_align(self.run, self.config, self._cells(worst), self._num_words(), device)

    def trial(self, device: torch.device) -> tuple[Trial, float]:
        work = self.work()
        chosen = middling(work)
        batch = self._of(chosen)
        if self.run.stage == "distill":
            return try_distill(self.run, self.config, self._teacher(), batch.size.tiles, device), work[chosen]
        return try_align(self.run, self.config, self._cells(batch), self._num_words(), device), work[chosen]

    def _of(self, place: int) -> Worst:
        """A batch by its place in the first epoch."""
        size, chosen = self.sizes()[place], self._batches()[place]
        if self.run.stage == "distill":
            return Worst(size, size.tokens, tuple(self.pictures[number] for number in chosen))
        return Worst(size, sum(self.counts[number] for number in chosen), ())

    def _teacher(self) -> Teacher:
        dtype = torch.bfloat16 if self.run.precision == "bf16" else torch.float32
        return sketch_teacher(self.run.distill.teacher, dtype)

    def _batches(self) -> list[list[int]]:
        """Numbers of the pictures of every batch of the first epoch, as the stage deals them (stages/pictures.py)."""
        order = np.random.default_rng((self.run.seed, 0)).permutation(len(self.counts)).tolist()
        if self.size > len(order):
            raise ValueError(f"data.batch_samples is {self.size} but there are {len(order)} pictures; lower it")
        return [order[at : at + self.size] for at in range(0, len(order) - self.size + 1, self.size)]

    def _lines(self) -> Iterator[dict[str, Any]]:
        for data in read_sets(self.run.data.meta):
            for position in range(len(data.lines)):
                line = data.lines.read(position)
                if b'"regions"' in line:
                    yield json.loads(line)

    def _grid(self) -> int:
        config = self.config
        whole = config.tile_size // config.vision.patch_size
        return round(whole * config.downsample) if self.run.stage == "align" else whole

    def _looked(self, line: dict[str, Any]) -> int:
        side = self._grid()
        filled = sum(1 for cell in cells_under(line["regions"], side) if cell)
        return filled + min(BACKGROUND_TOKENS, side * side - filled)

    def _num_words(self) -> int:
        stage = Align(self.run, build(self.config, device="meta"), self.tokenizer, read_sets(self.run.data.meta))
        return len(stage.words)

    def _cells(self, batch: Worst) -> Cells:
        """So many tokens with a word and a place each."""
        side, tiles, looked = self.config.tile_size, batch.size.tiles, batch.learned
        digests = tuple(b"" for _ in range(tiles)) if self.run.data.features != "none" else ()
        pixels = torch.zeros(0 if digests else tiles, 3, side, side, dtype=torch.uint8)
        places = torch.arange(looked)
        zeros = torch.zeros(looked, dtype=torch.long)
        return Cells(
            pixels,
            (),
            digests,
            zeros,
            places,
            zeros,
            torch.zeros(looked),
            places,
            torch.zeros(looked, 4),
            ("",) * tiles,
        )

    def _operations(self, tiles: int) -> float:
        run, config = self.run, self.config
        if run.stage == "align":
            return cost.operations(run, config, BatchSize(0, 0, 0, 0, tiles), 0)
        found = cost.tile_operations(run, config, tiles)
        if run.distill.features == "none":
            teacher = sketch_teacher(run.distill.teacher)
            numbers = sum(p.numel() for p in teacher.module.parameters())
            found += 2.0 * numbers * tiles * (teacher.grid**2 + 1)
        return found
