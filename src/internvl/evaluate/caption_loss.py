"""Teacher-forced loss of reference answers, row by row. Which picture stands beside which answer is run.py's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy

from internvl.tokens import IGNORE_INDEX

if TYPE_CHECKING:
    from internvl.batch import ChatBatch

LOGITS_AT_ONCE = 2048
"""Positions whose logits exist together: 0.4 GB in float32 for 49,161 tokens."""


class Head(Protocol):
    def head(self, hidden: Tensor) -> Tensor: ...


class AnswerModel(Protocol):
    """The two halves of a chat model that a loss at a few positions needs."""

    @property
    def language(self) -> Head: ...

    def hidden(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        *,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor: ...


@torch.inference_mode()
def answer_losses(
    model: AnswerModel, batch: ChatBatch, pixel_values: Float[Tensor, "tiles 3 side side"] | None
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Summed negative log-likelihood (nats) and number of the learned tokens of each row.

    Only positions that predict a learned token reach the output head.
    """
    hidden = model.hidden(
        batch.input_ids, pixel_values, attention_mask=batch.attention_mask, position_ids=batch.position_ids
    )
    targets = batch.labels[:, 1:]
    rows, positions = (targets != IGNORE_INDEX).nonzero(as_tuple=True)
    asked, wanted = hidden[rows, positions], targets[rows, positions]
    losses = torch.zeros(targets.shape[0], dtype=torch.float64, device=hidden.device)
    for start in range(0, len(rows), LOGITS_AT_ONCE):
        part = slice(start, start + LOGITS_AT_ONCE)
        logits = model.language.head(asked[part]).float()
        losses.index_add_(0, rows[part], cross_entropy(logits, wanted[part], reduction="none").double())
    return losses, torch.bincount(rows, minlength=targets.shape[0])
