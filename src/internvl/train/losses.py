"""Losses: pure functions of tensors. No model, batch, rank or config; gathering happens before, weighting after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
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
    """`weighted_sum` of `head(hidden)`, holding the logits of at most `chunk` tokens at a time.

    Of a plain matrix, gradients are made beside the loss, so no logits are computed twice; a head with adapters, hooks
    or a sharded table is called as it is and computes each chunk again in the backward pass.
    """
    if isinstance(head, nn.Module) and is_matrix(head):
        return linear_sum(hidden, head.weight, labels, weights, chunk)
    if hidden.shape[0] <= chunk:
        return weighted_sum(head(hidden), labels, weights)

    def part(piece: Tensor, piece_labels: Tensor, piece_weights: Tensor) -> Tensor:
        return weighted_sum(head(piece), piece_labels, piece_weights)

    total = hidden.new_zeros((), dtype=torch.float32)
    pieces = zip(hidden.split(chunk), labels.split(chunk), weights.split(chunk), strict=True)
    for piece, piece_labels, piece_weights in pieces:
        total = total + checkpoint(part, piece, piece_labels, piece_weights, use_reentrant=False)
    return total


def is_matrix(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling the head is one product with its weight: nothing hooked, wrapped, added, quantised or sharded."""
    return (
        type(head) is nn.Linear
        and head.bias is None
        and type(head.weight) in (nn.Parameter, FakeTensor)  # the latter in a rehearsal of memory
        and head.weight.is_floating_point()
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
    )


def linear_sum(
    hidden: Float[Tensor, "tokens width"],
    weight: Float[Tensor, "vocab width"],
    labels: Int[Tensor, " tokens"],
    weights: Float[Tensor, " tokens"],
    chunk: int,
) -> Float[Tensor, ""]:
    """`weighted_sum` of `hidden @ weight.T`, `chunk` tokens at a time; gradients are made on the way.

    The loss is a sum, so the gradient of the logits, weight x (softmax - one-hot), is known as soon as they are: three
    products instead of four, two where the table is frozen. Under autocast the products run in its type.
    """
    if chunk < 1:
        raise ValueError(f"chunks of {chunk} tokens; it must be at least 1")
    total: Tensor = _LinearSum.apply(hidden, weight, labels, weights, chunk)
    return total


class _LinearSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, weights: Tensor, chunk: int) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        table = weight.to(dtype)
        learns_hidden, learns_table = ctx.needs_input_grad[:2]
        # float32 sums, whatever the products run in: chunks add up without rounding
        grad_table = torch.zeros_like(weight, dtype=torch.float32) if learns_table else None
        grad_hidden = torch.empty_like(hidden) if learns_hidden else None
        total = hidden.new_zeros((), dtype=torch.float32)
        for begin in range(0, hidden.shape[0], chunk):
            span = slice(begin, begin + chunk)
            piece = hidden[span].to(dtype)
            total += _chunk_sum(piece, table, labels[span], weights[span].float(), grad_table, grad_hidden, span)
        ctx.grads = grad_hidden, grad_table
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        grad_hidden, grad_table = ctx.grads
        ctx.grads = None, None
        if grad_hidden is not None:
            grad_hidden.mul_(grads[0].to(grad_hidden.dtype))
        if grad_table is not None:
            grad_table = grad_table.mul_(grads[0]).to(ctx.dtype)
        return grad_hidden, grad_table, None, None, None


def _chunk_sum(
    piece: Tensor,
    table: Tensor,
    labels: Tensor,
    weights: Tensor,
    grad_table: Tensor | None,
    grad_hidden: Tensor | None,
    span: slice,
) -> Tensor:
    """The loss of a chunk; its part of the gradients is put where it belongs. One buffer of logits is alive."""
    scores = (piece @ table.T).float()
    learned = labels != IGNORE_INDEX
    weights = torch.where(learned, weights, 0.0)
    targets = labels.clamp(min=0)[:, None]
    chosen, top = scores.gather(1, targets), scores.amax(-1, keepdim=True)
    sums = scores.sub_(top).exp_().sum(-1, keepdim=True)  # in place: the scores are the largest tensor of a step
    total = ((sums.log() + top - chosen)[:, 0] * weights).sum()
    if grad_table is None and grad_hidden is None:
        return total
    scores.mul_(weights[:, None] / sums).scatter_add_(1, targets, -weights[:, None])
    grad_scores = scores.to(table.dtype)
    if grad_hidden is not None:
        grad_hidden[span] = grad_scores @ table
    if grad_table is not None:
        if grad_scores.dtype == torch.float32:
            grad_table.addmm_(grad_scores.T, piece)
        else:
            grad_table += grad_scores.T @ piece
    return total


def cosine_sum(
    said: Float[Tensor, "tiles states positions width"],
    target: Float[Tensor, "tiles states positions width"],
    class_weight: float,
) -> Float[Tensor, ""]:
    """Sum over tiles of 1 - cosine: the mean over patches and the class token by its weight, the mean over states.

    1 - cosine has the gradient of the paper's negative cosine, and is 0 where the student says the same.
    """
    apart = 1 - F.cosine_similarity(said.float(), target.float(), dim=-1)
    each = (apart[..., 1:].mean(-1) + class_weight * apart[..., 0]) / (1 + class_weight)
    return each.mean(1).sum()


def relation_sum(
    said: Float[Tensor, "tiles states positions width"], target: Float[Tensor, "tiles dim"]
) -> Float[Tensor, ""]:
    """Squared differences of similarities between tiles, per tile: the student's (class token, and mean patch, after
    LayerNorm, less the mean of the batch) less those of the teacher's class token. Not in the paper."""
    normed = F.layer_norm(said[:, -1].float(), said.shape[-1:])
    wanted = _similarities(target.float())
    off = ~torch.eye(len(said), dtype=torch.bool, device=said.device)
    parts = (normed[:, 0], normed[:, 1:].mean(1))
    apart = sum((_similarities(part) - wanted)[off].square().mean() for part in parts)
    return torch.as_tensor(apart) / len(parts) * len(said)


def neighbours_sum(
    said: Float[Tensor, "texts dim"],
    target: Float[Tensor, "texts dim"],
    among: Float[Tensor, "all_texts dim"],
    temperature: float,
) -> Float[Tensor, ""]:
    """Sum over texts of the divergence (nats) of where a text lies `among` the targets of all ranks from where its own
    target lies: softmax over cosines / temperature. Unit vectors all; 0 where the student says what the teacher says.
    """
    said, target, among = said.float(), target.float(), among.float()
    wanted = (target @ among.T / temperature).log_softmax(-1)
    found = (said @ among.T / temperature).log_softmax(-1)
    return F.kl_div(found, wanted, reduction="sum", log_target=True)


def _similarities(vectors: Float[Tensor, "tiles dim"]) -> Float[Tensor, "tiles tiles"]:
    unit = F.normalize(vectors - vectors.mean(0), dim=-1)
    return unit @ unit.T
