"""The contrastive loss without its B x B matrix, on one process and across ranks (CLIP, section 2.3).

Cross-entropy against soft targets p is log-sum-exp minus the mean of the logits under p. The second part is linear in the
embeddings, so a matrix is needed nowhere but in the first; that one is summed tile by tile, and again in the backward
pass. Memory: the embeddings, their gradients, two vectors and one tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from internvl.parallel import collectives

BLOCK = 2048
"""Rows and columns of a tile: 16 MiB of float32."""

MAX_BARE_EXPONENT = 60.0
"""Logits up to it need no maximum taken away: exp(60) summed over a billion stays in float32, exp(-60) is normal."""


def contrast(
    images: Float[Tensor, "pairs embed"],
    texts: Float[Tensor, "pairs embed"],
    scale: Float[Tensor, ""],
    *,
    valid: Bool[Tensor, " pairs"] | None = None,
    same: Int[Tensor, " pairs"] | None = None,
    smoothing: float = 0.0,
    block: int = BLOCK,
) -> Float[Tensor, ""]:
    """Mean of image-to-text and text-to-image cross-entropy over the pairs of all ranks, in float32.

    `images` and `texts` are this rank's unit vectors, `scale` the factor of their products (exp of the learned one).
    `valid` False takes a pair out of the mean; it stays among the negatives of the others (official empty texts).
    `same` numbers the picture of each pair: pairs of one picture are positives in equal shares (official retrieval
    fine-tuning); by default each pair stands alone. Each rank returns its part, `ranks` times too large, so that the
    mean over ranks is the loss of the joint batch, and the mean of their gradients its gradient.
    """
    check(images, texts, smoothing, block)
    collectives.check_equal_rows(images)
    images, texts, scale = images.float(), texts.float(), scale.float()
    all_texts = collectives.gather(texts)
    rows, columns = LogSumExps.apply(images, all_texts, scale, block)
    columns = own(merged(columns), len(texts))
    image_targets, text_targets = targets(images, texts, all_texts, same, smoothing)
    losses = rows + columns - scale * ((images * text_targets).sum(1) + (texts * image_targets).sum(1))
    weights = losses.new_ones(len(losses)) if valid is None else valid.to(losses.dtype)
    return (losses * weights).sum() / 2 * share(weights.sum())


def share(count: Tensor) -> Tensor:
    """Ranks over the count of all of them: what turns this rank's sum into its part of the joint mean; 0 for none."""
    whole = collectives.total(count)
    return torch.where(whole > 0, collectives.num_ranks() / whole.clamp(min=1), 0.0)


def check(images: Tensor, texts: Tensor, smoothing: float, block: int) -> None:
    if images.shape != texts.shape or not len(images):
        raise ValueError(
            f"{tuple(images.shape)} images and {tuple(texts.shape)} texts; a batch has one text for each picture"
        )
    if not 0.0 <= smoothing < 1.0 or block < 1:
        raise ValueError(f"label smoothing {smoothing} must be in [0, 1), block {block} 1 or more")


def targets(
    images: Tensor, texts: Tensor, all_texts: Tensor, same: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """Mean embedding under the targets of each pair: of images for its text, of texts for its image."""
    if same is None and not smoothing:
        return images, texts
    all_images = collectives.gather(images)
    if same is None:
        own_images, own_texts = images, texts
    else:
        numbers, group = collectives.gather(same).unique(return_inverse=True)
        mine = own(group, len(images))
        own_images, own_texts = (means(x, group, len(numbers))[mine] for x in (all_images, all_texts))
    return (
        torch.lerp(own_images, all_images.mean(0).expand_as(images), smoothing),
        torch.lerp(own_texts, all_texts.mean(0).expand_as(texts), smoothing),
    )


def means(x: Tensor, group: Tensor, num_groups: int) -> Tensor:
    sums = x.new_zeros(num_groups, x.shape[1]).index_add(0, group, x)
    return sums / torch.bincount(group, minlength=num_groups)[:, None]


def merged(columns: Float[Tensor, " all_pairs"]) -> Float[Tensor, " all_pairs"]:
    """Log-sum-exp over the rows of all ranks from that over each rank's."""
    if collectives.num_ranks() == 1:
        return columns
    return collectives.gather(columns[None]).logsumexp(0)


def own(x: Tensor, rows: int) -> Tensor:
    """This rank's part of something gathered."""
    start = collectives.rank() * rows
    return x[start : start + rows]


class LogSumExps(torch.autograd.Function):
    """log sum exp(scale * a b') over the columns for each row, and over the rows for each column."""

    @staticmethod
    def forward(
        ctx: Any,
        a: Float[Tensor, "rows embed"],
        b: Float[Tensor, "columns embed"],
        scale: Float[Tensor, ""],
        block: int,
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"]]:
        bound = scale.abs() * a.norm(dim=1).max() * b.norm(dim=1).max()
        ctx.bare, ctx.block = bool(bound <= MAX_BARE_EXPONENT), block
        rows, columns = (bare_sums if ctx.bare else shifted_sums)(a, b, scale, block)
        ctx.save_for_backward(a, b, scale, rows, columns)
        return rows, columns

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        """The gradient of a logit is its share of its row's sum and of its column's, each times their gradient."""
        a, b, scale, rows, columns = ctx.saved_tensors
        with torch.no_grad():  # the tiles are made anew; a second derivative is not defined
            grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
            if ctx.bare:
                grad_rows, grad_columns = grads[0] * (-rows).exp(), grads[1] * (-columns).exp()
            else:
                grad_rows, grad_columns = grads
            for i, j, logits in tiles(a, b, scale, ctx.block):
                if ctx.bare:
                    grad = logits.exp_().mul_(grad_rows[i, None] + grad_columns[j])
                else:
                    grad = (logits - rows[i, None]).exp_().mul_(grad_rows[i, None])
                    grad += logits.sub_(columns[j]).exp_().mul_(grad_columns[j])
                grad_a[i].addmm_(grad, b[j])
                grad_b[j].addmm_(grad.T, a[i])
            grad_scale = (a * grad_a).sum()
            return grad_a.mul_(scale), grad_b.mul_(scale), grad_scale, None


def tiles(a: Tensor, b: Tensor, scale: Tensor, block: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """Places and logits of one tile after the other, all in the same memory."""
    room = a.new_empty(min(block, len(a)) * min(block, len(b)))
    for top in range(0, len(a), block):
        part = a[top : top + block] * scale
        for left in range(0, len(b), block):
            other = b[left : left + block]
            logits = room[: len(part) * len(other)].view(len(part), len(other))
            torch.mm(part, other.T, out=logits)
            yield slice(top, top + len(part)), slice(left, left + len(other)), logits


def bare_sums(a: Tensor, b: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """One exponential a logit serves its row and its column."""
    rows, columns = a.new_zeros(len(a)), b.new_zeros(len(b))
    for i, j, logits in tiles(a, b, scale, block):
        logits.exp_()
        rows[i] += logits.sum(1)
        columns[j] += logits.sum(0)
    return rows.log_(), columns.log_()


def shifted_sums(a: Tensor, b: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Running log-sum-exp, safe for logits of any size."""
    rows, columns = a.new_full((len(a),), -torch.inf), b.new_full((len(b),), -torch.inf)
    for i, j, logits in tiles(a, b, scale, block):
        rows[i] = torch.logaddexp(rows[i], logits.logsumexp(1))
        columns[j] = torch.logaddexp(columns[j], logits.logsumexp(0))
    return rows, columns
