"""Stage 1 of InternVL 1.0: pictures and texts into one space (paper 1.0, section 3.3; CLIP, section 2.3).

InternViT with its pooling and the LLaMA with its projection learn by the symmetric loss over all ranks' pairs.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from internvl.batch import PairBatch
from internvl.data.image_text import Forms
from internvl.load_dual import load_dual
from internvl.models.contrastive import unit
from internvl.train.contrast import contrast
from internvl.train.dual import is_generative
from internvl.train.pieces import in_pieces, texts_in_pieces
from internvl.train.run import RunConfig
from internvl.train.stages.dual import with_tokenizer
from internvl.train.stages.pairs import PairStage

LOSS = "contrast"


class Contrastive(PairStage):
    """InternVL-C."""

    coefficients: Mapping[str, float] = {LOSS: 1.0}
    forms: Forms = "contrast"

    def wanted(self, name: str) -> bool:
        return not is_generative(name) and name != "qllama.head.weight"

    def losses(self, prepared: PairBatch) -> dict[str, Float[Tensor, ""]]:
        self.bound_scale()
        images, texts = self.vectors(prepared)
        mean = contrast(images, texts, self.model.logit_scale.exp(), valid=prepared.valid, same=self.same(prepared))
        return {LOSS: mean * prepared.num_pairs}

    def vectors(self, batch: PairBatch) -> tuple[Float[Tensor, "pairs embed"], Float[Tensor, "pairs embed"]]:
        """Unit vectors of pictures and texts, some at a time where the run says so."""
        size = self.run.pairs.micro_batch
        if self.run.vision.learn == "frozen":
            images = in_pieces(self._pooled, [self.features(batch)], size)
        else:
            shown = [batch.pixels] if batch.kept is None else [batch.pixels, batch.kept]
            images = in_pieces(lambda *some: self._pooled(self._look(*some)), shown, size)
        texts = batch.contrast
        return images, texts_in_pieces(self.model.encode_text, texts.ids, texts.mask, size)

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Loss over all held-out pairs as one batch, and how often the nearest is a right one, both ways."""
        if self.held_out is None:
            return {}
        vectors, numbers = [], []
        for batch in self.held_out.once():
            vectors.append([part.float() for part in self.vectors(batch.to(device))])
            numbers.append(batch.same)
        images, texts = (torch.cat(parts) for parts in zip(*vectors, strict=True))
        return held_out(images, texts, self.model.logit_scale.float().exp(), torch.cat(numbers).to(device))

    def _pooled(self, features: Float[Tensor, "pairs positions dim"]) -> Float[Tensor, "pairs embed"]:
        return unit(self.model.image_pool(features))


def held_out(
    images: Float[Tensor, "pairs embed"],
    texts: Float[Tensor, "pairs embed"],
    scale: Float[Tensor, ""],
    same: Int[Tensor, " pairs"],
) -> dict[str, float]:
    """Contrastive loss and recall at 1 of this rank's pairs alone; pairs of one picture are right for each other."""
    logits = scale * images @ texts.T
    right = (same[:, None] == same).float()
    targets = right / right.sum(1, keepdim=True)
    loss = (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2
    rows = torch.arange(len(same), device=same.device)
    recalls = {
        f"held_out_{name}": float(right[rows, scores.argmax(1)].mean())
        for name, scores in (("image_to_text", logits), ("text_to_image", logits.T))
    }
    return {"held_out_loss": float(loss), **recalls}


def open_contrastive(run: RunConfig) -> Contrastive:
    """The model of a run with its tokenizer, and its pairs."""
    return Contrastive(run, with_tokenizer(run, load_dual(run.model)))
