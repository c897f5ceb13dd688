"""Losses: pure functions of tensors. No model, batch, rank or config; gathering happens before, weighting after."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from internvl.tokens import IGNORE_INDEX


def token_losses(logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"]) -> Float[Tensor, " tokens"]:
    """Cross-entropy of each token in fp32; 0 where the label is ignored."""
    return F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")


def weighted_sum(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"], weights: Float[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Sum of weight x cross-entropy: what adds up over micro-batches before one division."""
    return (token_losses(logits, labels) * weights.float()).sum()


def weighted_tokens(
    logits: Float[Tensor, "tokens vocab"], labels: Int[Tensor, " tokens"], weights: Float[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Mean cross-entropy under the weights (paper 2.5, section 3.4; official modeling_internvl_chat.py)."""
    return weighted_sum(logits, labels, weights) / weights.float().sum()


def shift(
    labels: Int[Tensor, "rows length"], weights: Float[Tensor, "rows length"]
) -> tuple[Int[Tensor, " learned"], Int[Tensor, " learned"], Float[Tensor, " learned"]]:
    """(flat position, next label, its weight) of every position whose next label is learned; host tensors."""
    length = labels.shape[1]
    rows, columns = torch.nonzero(labels[:, 1:] != IGNORE_INDEX, as_tuple=True)
    positions = rows * length + columns
    return positions, labels[rows, columns + 1], weights[rows, columns + 1]


def chunked_sum(
    hidden: Float[Tensor, "tokens width"],
    head: Callable[[Tensor], Tensor],
    labels: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    chunk: int,
) -> Float[Tensor, ""]:
    """`weighted_sum` of `head(hidden)`, holding the logits of at most `chunk` tokens at a time."""
    if hidden.shape[0] <= chunk:
        return weighted_sum(head(hidden), labels, weights)

    def part(piece: Tensor, piece_labels: Tensor, piece_weights: Tensor) -> Tensor:
        return weighted_sum(head(piece), piece_labels, piece_weights)

    total = hidden.new_zeros((), dtype=torch.float32)
    pieces = zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True)
    for piece, piece_labels, piece_weights in pieces:
        total = total + checkpoint(part, piece, piece_labels, piece_weights, use_reentrant=False)
    return total
