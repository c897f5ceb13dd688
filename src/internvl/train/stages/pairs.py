"""What the stages on pictures with captions share: pairs, kept features, the bound on the scale. Losses are theirs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.batch import PairBatch
from internvl.config import DualConfig
from internvl.data.dual_texts import DualTokeniser
from internvl.data.image_text import Forms, PairEncoder, PairSettings
from internvl.data.images import normalise
from internvl.data.pair_loader import PairLoader
from internvl.load_dual import LoadedDual
from internvl.parallel import collectives
from internvl.train.dual import DualLearner
from internvl.train.features import MemoryStore
from internvl.train.joint import groups
from internvl.train.run import RunConfig
from internvl.train.stages.dual import DualStage, check_dual, sets_of

VISION_PIECE = 64
"""Pictures that a frozen vision encoder sees at a time where the run does not say."""


class PairStage(DualStage[PairBatch]):
    """A stage over pairs; a subclass says what learns, which forms of a text it needs, and its losses."""

    forms: Forms
    loader: PairLoader

    def __init__(self, run: RunConfig, loaded: LoadedDual) -> None:
        check(run)
        super().__init__(run, loaded)
        self.store = MemoryStore() if run.data.features == "memory" else None
        words, known = DualTokeniser(loaded.tokenizer, loaded.config.language), None
        if self.store is not None:
            known = self.store.__contains__
        self.loader = open_pairs(run, loaded.config, words, self.forms, known=known)
        self.held_out = None
        if run.data.held_out:
            self.held_out = open_pairs(run, loaded.config, words, self.forms, learning=False, known=known)

    def begin(self, run: RunConfig, device: torch.device) -> DualLearner:
        self.model.vision.set_drop_path(run.pairs.drop_path, run.pairs.drop_path_schedule)
        return super().begin(run, device)

    def sizes(self, batch: PairBatch) -> dict[str, int]:
        learned = int(batch.contrast.mask.sum()) if batch.labels is None else int((batch.labels != -100).sum())
        forms = (batch.contrast, batch.match, batch.negatives, batch.caption)
        tokens = sum(int(texts.mask.sum()) for texts in forms if texts is not None)
        return {"samples": batch.num_pairs, "tokens": tokens, "learned": learned, "tiles": batch.num_pairs}

    def bound_scale(self) -> None:
        """CLIP bounds the learned factor after each step; before the next one is the same."""
        if self.run.pairs.max_scale is not None:
            with torch.no_grad():
                self.model.logit_scale.clamp_(max=math.log(self.run.pairs.max_scale))

    def same(self, batch: PairBatch) -> Int[Tensor, " pairs"]:
        """Equal for pairs of one picture or one text, over all ranks: no negatives of each other."""
        return batch.same if batch.reading is None else groups(batch.same, batch.reading)

    def features(self, batch: PairBatch) -> Float[Tensor, "pairs positions dim"]:
        """What the frozen vision encoder says about each picture; kept ones are not computed again."""
        if self.store is not None:
            if batch.fresh:
                self.store.gather(batch.pixels, batch.fresh, self._look)
            return torch.stack([self.store.get(name) for name in batch.names]).to(self.model.logit_scale.device)
        size = self.run.pairs.micro_batch or VISION_PIECE
        kept = [None] * -(-batch.num_pairs // size) if batch.kept is None else batch.kept.split(size)
        with torch.no_grad():
            pieces = zip(batch.pixels.split(size), kept, strict=True)
            return torch.cat([self._look(pixels, some) for pixels, some in pieces])

    def _look(self, pixels: Tensor, kept: Tensor | None = None) -> Float[Tensor, "pairs positions dim"]:
        out: Tensor = self.model.vision(normalise(pixels, "imagenet"), kept=kept)
        return out


def open_pairs(
    run: RunConfig,
    config: DualConfig,
    words: DualTokeniser,
    forms: Forms,
    learning: bool = True,
    known: Callable[[bytes], bool] | None = None,
) -> PairLoader:
    """The pairs of a run. Held-out ones are shown whole, in order, on every rank; an unusable one ends the run."""
    data, pairs = run.data, run.pairs
    settings = PairSettings(pairs.side or config.side, config.vision.patch_size, forms=forms)
    if learning:
        settings = replace(settings, area=(pairs.area[0], pairs.area[1]), mask_share=pairs.mask_share)
    sets = sets_of(run, learning)
    if not learning and data.held_out_samples is not None:
        share = min(1.0, data.held_out_samples / sum(len(some) for some in sets))
        sets = [replace(some, repeat=share) for some in sets]
    return PairLoader(
        sets,
        PairEncoder(words, settings),
        data.batch_samples or 16,
        seed=run.seed,
        shuffle=learning,
        negatives=forms == "all" and (pairs.negatives == "random" or not learning),
        workers=data.workers if learning else 0,
        on_error="skip" if learning and data.on_error == "skip" else "error",
        rank=collectives.rank() if learning else 0,
        ranks=collectives.num_ranks() if learning else 1,
        known=known,
        changed=data.changed,
    )


def check(run: RunConfig) -> None:
    """ValueError for settings that have no meaning for pairs."""
    check_dual(run, "pairs")
    data, pairs = run.data, run.pairs
    if run.accumulate != 1:
        raise ValueError(
            f"accumulate is {run.accumulate}; pairs of another micro-batch would be no negatives: raise "
            "data.batch_samples instead, and set pairs.micro_batch to what fits into memory"
        )
    if data.features == "disk":
        raise ValueError("data.features is 'disk'; stages on pairs keep features in memory, or none")
    changing = [run.vision.learn != "frozen", tuple(pairs.area) != (1.0, 1.0), pairs.mask_share > 0, data.workers > 0]
    if data.features == "memory" and any(changing):
        raise ValueError(
            f"data.features is 'memory', but vision.learn is {run.vision.learn!r}, pairs.area {pairs.area}, "
            f"pairs.mask_share {pairs.mask_share} and data.workers {data.workers}; features are kept of a frozen "
            "encoder and of pictures that never change: set frozen, 1 1, 0 and 0"
        )
