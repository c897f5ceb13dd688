"""Stage 2 of InternVL 1.0: contrast, matching and captions through QLLaMA's queries (paper 1.0, section 3.3).

Queries, cross-attention, their pooling, the matching head and the logit scale learn; the rest is frozen, so a picture
is seen by the vision encoder without a graph. The losses are alignment.py's. Fine-tuning for retrieval, where all
learns, is the same stage with the losses of retrieval.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from internvl.batch import PairBatch
from internvl.data.image_text import Forms
from internvl.load_dual import LoadedDual
from internvl.models.contrastive import DualModel
from internvl.parallel import collectives
from internvl.train.alignment import AlignmentBatch, Negatives, alignment_losses
from internvl.train.dual import is_generative, open_generative, part_of
from internvl.train.pieces import in_pieces
from internvl.train.retrieval import retrieval_losses
from internvl.train.run import RunConfig
from internvl.train.stages.dual import with_tokenizer
from internvl.train.stages.pairs import PairStage
from internvl.train.trainable import Learner


class Generative(PairStage):
    """InternVL-G."""

    coefficients: Mapping[str, float] = {"itc": 1.0, "itm": 1.0, "itg": 1.0}
    forms: Forms = "all"

    def wanted(self, name: str) -> bool:
        """The pooling of patches is in none of the losses, the projection of texts stays that of stage 1."""
        return is_generative(name) or name == "logit_scale" or part_of(name) != "connector"

    def losses(self, prepared: PairBatch) -> dict[str, Float[Tensor, ""]]:
        self.bound_scale()
        found = self._means(prepared, self.run.pairs.negatives)
        return {name: mean * prepared.num_pairs for name, mean in found.items()}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """The three losses over held-out pairs, matched with the same foreign texts each time, and their sum."""
        if self.held_out is None:
            return {}
        sums, count = dict.fromkeys(self.coefficients, 0.0), 0
        for batch in self.held_out.once():
            count += batch.num_pairs
            with collectives.alone():  # every rank brings the same pairs
                found = self._means(batch.to(device), "random")
            for name, mean in found.items():
                sums[name] += float(mean) * batch.num_pairs
        means = {f"held_out_{name}": value / count for name, value in sums.items()}
        return {"held_out_loss": sum(means.values()), **means}

    def _means(self, batch: PairBatch, negatives: Literal["random", "hard"]) -> dict[str, Float[Tensor, ""]]:
        whole, features, piece = self._whole(batch), self._seen(batch), self.run.pairs.micro_batch
        kind: Negatives = "hard" if negatives == "hard" else "given"
        return alignment_losses(
            self.model, whole, negatives=kind, generator=self._draws(batch), features=features, piece=piece
        )

    def _seen(self, batch: PairBatch) -> Float[Tensor, "pairs positions dim"]:
        if self.run.vision.learn == "frozen":
            return self.features(batch)
        shown = [batch.pixels] if batch.kept is None else [batch.pixels, batch.kept]
        return in_pieces(lambda *some: self._look(*some), shown, self.run.pairs.micro_batch)

    def _draws(self, batch: PairBatch) -> torch.Generator:
        return torch.Generator().manual_seed(seed_at(self.run.seed, batch.place))

    def _whole(self, batch: PairBatch) -> AlignmentBatch:
        assert batch.match is not None
        assert batch.caption is not None
        assert batch.labels is not None
        return AlignmentBatch(
            None,
            contrast=batch.contrast,
            match=batch.match,
            caption=batch.caption,
            labels=batch.labels,
            negatives=batch.negatives,
            same=self.same(batch),
            valid=batch.valid,
        )


class Retrieval(Generative):
    """InternVL-C and -G fine-tuned for retrieval (paper 1.0, table 21; official internvl_stage2_finetune.py)."""

    coefficients: Mapping[str, float] = {"itc": 1.0, "itm": 1.0}

    def __init__(self, run: RunConfig, loaded: LoadedDual) -> None:
        super().__init__(run, loaded)
        for loader in (self.loader, self.held_out):
            if loader is not None:  # captions are cleaned as they are when the model is scored
                loader.encoder = replace(loader.encoder, clean=True)

    def wanted(self, name: str) -> bool:
        """The output head is in none of the losses."""
        return name != "qllama.head.weight"

    def export(self, learner: Learner[DualModel], out: Path) -> None:
        """The model is then asked with the pictures that it was tuned with."""
        if self.run.pairs.side is not None:
            self.model.config = replace(self.model.config, image_size=self.run.pairs.side)
        super().export(learner, out)

    def _means(self, batch: PairBatch, negatives: Literal["random", "hard"]) -> dict[str, Float[Tensor, ""]]:
        kind: Negatives = "hard" if negatives == "hard" else "given"
        return retrieval_losses(
            self.model,
            self._whole(batch),
            features=self._seen(batch),
            negatives=kind,
            generator=self._draws(batch),
            piece=self.run.pairs.micro_batch,
        )


def seed_at(seed: int, place: int) -> int:
    """Of what is drawn about the joint batch at a place: the same on every rank, and after a resume."""
    return int(np.random.SeedSequence([seed, place]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def open_generative_stage(run: RunConfig) -> Generative:
    """InternVL-G, from InternVL-C where the folder holds that, with its tokenizer, and its pairs."""
    kind = Retrieval if run.pairs.losses == "retrieval" else Generative
    return kind(run, with_tokenizer(run, open_generative(run)))
