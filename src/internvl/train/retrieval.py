"""Fine-tuning for retrieval: contrast of both image vectors, and matching against own and foreign texts, no captions.

Source: official internvl_g/internvl/model/internvl_stage2_retrieval. C and G learn together: a checkpoint stays both.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from internvl.batch import Texts
from internvl.models.contrastive import DualModel, unit
from internvl.tokens import IGNORE_INDEX
from internvl.train.alignment import (
    EMPTY_CONTRAST,
    EMPTY_MATCH,
    AlignmentBatch,
    MatchRows,
    Negatives,
    matching,
    mined_rows,
    padded,
)
from internvl.train.contrast import contrast
from internvl.train.joint import brought
from internvl.train.pieces import in_pieces, texts_in_pieces


def retrieval_losses(
    model: DualModel,
    batch: AlignmentBatch,
    *,
    features: Float[Tensor, "pairs positions dim"],
    negatives: Negatives = "given",
    generator: torch.Generator | None = None,
    piece: int | None = None,
) -> dict[str, Float[Tensor, ""]]:
    """ "itc" and "itm", each a mean over all ranks' pairs as `contrast` returns it.

    "itc" is the symmetric loss of the pooled queries plus that of the pooled patches (C), without smoothing; texts of
    one picture are right together. "itm" matches every picture with `batch.negatives` and with its own text, or with
    `negatives` "hard" as `alignment_losses` does. `features` are those of the vision encoder, which may learn.
    """

    def looked(some: Tensor) -> Float[Tensor, "pairs 2 embed"]:
        return torch.stack([model.pool_queries(model.qllama.look(some)), unit(model.image_pool(some))], dim=1)

    queries, patches = in_pieces(looked, [features], piece).unbind(1)
    texts = texts_in_pieces(model.encode_text, batch.contrast.ids, batch.contrast.mask, piece)
    counted = batch.valid if batch.valid is not None else torch.ones_like(batch.contrast.ids[:, 0], dtype=torch.bool)
    scale, valid = model.logit_scale.exp(), batch.contrast.longer_than(EMPTY_CONTRAST) & counted
    itc = sum(contrast(images, texts, scale, valid=valid, same=batch.same) for images in (queries, patches))
    assert isinstance(itc, Tensor)
    if negatives == "hard":
        rows = mined_rows(batch, queries, texts, scale, counted, generator)
        shown, places = brought(features, rows.image_of_row)
        rows = replace(rows, image_of_row=places)
    else:
        rows, shown = both_rows(batch, counted), features
    return {"itc": itc, "itm": matching(model, shown, rows, piece)}


def both_rows(batch: AlignmentBatch, counted: Bool[Tensor, " pairs"]) -> MatchRows:
    """Every picture with its foreign text, then every picture with its own."""
    if batch.negatives is None:
        raise ValueError("the batch has no negatives; draw one text of another picture for each pair, or use 'hard'")
    own, foreign = padded(batch.match, batch.negatives)
    texts = Texts(torch.cat([foreign.ids, own.ids]), torch.cat([foreign.mask, own.mask]))
    images = torch.arange(len(own.ids), device=own.ids.device)
    labels = torch.cat([torch.zeros_like(images), torch.ones_like(images)])
    counts = texts.longer_than(EMPTY_MATCH) & counted.repeat(2)
    return MatchRows(texts, images.repeat(2), labels.masked_fill(~counts, IGNORE_INDEX))
