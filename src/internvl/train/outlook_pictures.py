"""What a run on single pictures has before it: stages distill and align."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch

from internvl.config import ChatConfig, DualConfig
from internvl.data.images import header_size
from internvl.data.loader import BatchSize
from internvl.data.mixture import read_sets
from internvl.data.tiling import count_tiles
from internvl.models.build import build
from internvl.train import cost
from internvl.train.alive import Memory
from internvl.train.cells import Cells, cells_under
from internvl.train.outlook import Worst
from internvl.train.rehearse_others import rehearse_align, rehearse_distill
from internvl.train.run import RunConfig
from internvl.train.stages.align import BACKGROUND_TOKENS, Align, lines_with_regions, repeated
from internvl.train.stages.distill import pictures_of
from internvl.train.stages.pictures import shuffled
from internvl.train.teachers import Teacher, sketch_teacher
from internvl.train.trials import Trial, middling, try_align, try_distill


class PictureOutlook(ABC):
    """Pictures as tiles, without the language model, dealt as stages/pictures.py deals them."""

    joint = False
    counts: list[int]
    """What each picture weighs in a batch."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.size = run.data.batch_samples or 16

    @abstractmethod
    def batch(self, chosen: list[int]) -> Worst:
        """Of these pictures, by number."""

    @abstractmethod
    def operations(self, tiles: int) -> float: ...

    @abstractmethod
    def memory(self, device: str) -> Memory: ...

    @abstractmethod
    def attempt(self, batch: Worst, device: torch.device) -> Trial:
        """A step over such a batch."""

    def sizes(self) -> list[BatchSize]:
        return [self.batch(chosen).size for chosen in self.batches()]

    def work(self) -> list[float]:
        return [self.operations(size.tiles) for size in self.sizes()]

    def worst(self) -> Worst:
        return self.batch(max(self.batches(), key=lambda chosen: sum(self.counts[number] for number in chosen)))

    def trial(self, device: torch.device) -> tuple[Trial, float]:
        work = self.work()
        chosen = middling(work)
        return self.attempt(self.batch(self.batches()[chosen]), device), work[chosen]

    def order(self) -> list[int]:
        return shuffled(len(self.counts), self.run.seed, 0)

    def batches(self) -> list[list[int]]:
        """Numbers of the pictures of every batch of the first epoch."""
        order = self.order()
        if self.size > len(order):
            raise ValueError(f"data.batch_samples is {self.size} but an epoch has {len(order)} pictures; lower it")
        return [order[at : at + self.size] for at in range(0, len(order) - self.size + 1, self.size)]


class DistillOutlook(PictureOutlook):
    """Stage distill; `counts` are tiles."""

    def __init__(self, run: RunConfig, config: ChatConfig | DualConfig) -> None:
        super().__init__(run)
        most = run.data.max_tiles
        if isinstance(config, ChatConfig) and most is not None:
            config = replace(config, max_tiles=most)
        self.config = config
        side = config.tile_size if isinstance(config, ChatConfig) else config.side
        self.positions = (side // config.vision.patch_size) ** 2 + 1
        """Of a tile."""

    @cached_property
    def pictures(self) -> list[str]:
        return pictures_of(self.run.data.meta)

    @cached_property
    def counts(self) -> list[int]:  # type: ignore[override]
        config = self.config
        if not isinstance(config, ChatConfig) or not config.dynamic_tiles or config.max_tiles <= 1:
            return [1] * len(self.pictures)
        count = partial(
            count_tiles,
            min_tiles=config.min_tiles,
            max_tiles=config.max_tiles,
            tile_size=config.tile_size,
            thumbnail=config.thumbnail,
        )
        return [count(*header_size(path)) for path in self.pictures]

    def batch(self, chosen: list[int]) -> Worst:
        tiles = sum(self.counts[number] for number in chosen)
        size = BatchSize(len(chosen), tiles * self.positions, tiles * self.positions, 0, tiles)
        return Worst(size, size.tokens, tuple(self.pictures[number] for number in chosen))

    def operations(self, tiles: int) -> float:
        run, positions = self.run, self.positions
        found = cost.vision_operations(run, self.config.vision, tiles, positions, positions)
        if run.distill.features == "none":
            teacher = self._teacher()
            numbers = sum(p.numel() for p in teacher.module.parameters())
            found += 2.0 * numbers * tiles * (teacher.grid**2 + 1)
        return found

    def memory(self, device: str) -> Memory:
        return rehearse_distill(self.run, self.config, self._teacher(), self.worst().size.tiles, device)

    def attempt(self, batch: Worst, device: torch.device) -> Trial:
        return try_distill(self.run, self.config, self._teacher(), batch.size.tiles, device)

    def _teacher(self) -> Teacher:
        dtype = torch.bfloat16 if self.run.precision == "bf16" else torch.float32
        return sketch_teacher(self.run.distill.teacher, dtype)


class AlignOutlook(PictureOutlook):
    """Stage align; `counts` are tokens that are looked at."""

    def __init__(self, run: RunConfig, config: ChatConfig, tokenizer: Any) -> None:
        super().__init__(run)
        self.config, self.tokenizer = config, tokenizer
        self.side = round(config.tile_size // config.vision.patch_size * config.downsample)
        """Tokens a side."""

    @cached_property
    def counts(self) -> list[int]:  # type: ignore[override]
        return [self._looked(line) for line in self._lines()]

    def order(self) -> list[int]:
        sets = read_sets(self.run.data.meta)
        return repeated(sets, lines_with_regions(sets), self.run.seed, 0)

    def batch(self, chosen: list[int]) -> Worst:
        positions = len(chosen) * self.side**2
        size = BatchSize(len(chosen), positions, positions, 0, len(chosen))
        return Worst(size, sum(self.counts[number] for number in chosen), ())

    def operations(self, tiles: int) -> float:
        return cost.operations(self.run, self.config, BatchSize(0, 0, 0, 0, tiles), 0)

    def memory(self, device: str) -> Memory:
        return rehearse_align(self.run, self.config, self._cells(self.worst()), self._num_words(), device)

    def attempt(self, batch: Worst, device: torch.device) -> Trial:
        return try_align(self.run, self.config, self._cells(batch), self._num_words(), device)

    def _lines(self) -> Iterator[dict[str, Any]]:
        sets = read_sets(self.run.data.meta)
        for number, position in lines_with_regions(sets):
            yield json.loads(sets[number].lines.read(position))

    def _looked(self, line: dict[str, Any]) -> int:
        filled = sum(1 for cell in cells_under(line["regions"], self.side) if cell)
        return filled + min(BACKGROUND_TOKENS, self.side**2 - filled)

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
            torch.zeros(looked),
            ("",) * tiles,
        )
