"""The contrastive loss without its B x B matrix, on one process and across ranks (CLIP, section 2.3).

Cross-entropy against soft targets p is log-sum-exp minus the mean of the logits under p. The second part is linear in
the embeddings, so a matrix is needed nowhere but in the first; that one is summed tile by tile, and again in the
backward pass. Memory: the embeddings, their gradients, some vectors and one tile, two where the logits are large.
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

STRIP = 256
"""Rows of a tile whose factors exist together: 2 MiB instead of a second tile."""

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
    with torch.autocast(images.device.type, enabled=False):  # its bfloat16 would be all of a small loss
        images, texts, scale = images.float(), texts.float(), scale.float()
        all_texts = collectives.gather(texts)
        first = collectives.rank() * len(texts)
        rows, columns, own_logits = LogSumExps.apply(images, all_texts, scale, first, block)
        columns = own(merged(columns), len(texts))
        aimed = 2 * own_logits.double()
        if same is not None:
            count, other_images, other_texts = others(images, texts, all_texts, same)
            aimed = (aimed + scale * paired(images, other_texts, texts, other_images)) / count
        aimed = (1 - smoothing) * aimed
        if smoothing:
            everywhere = collectives.gather(images).mean(0), all_texts.mean(0)
            aimed = aimed + smoothing * scale * paired(images, everywhere[1], texts, everywhere[0])
        losses = rows + columns - aimed
        weights = losses.new_ones(len(losses)) if valid is None else valid.to(losses.dtype)
        mean: Tensor = (losses * weights).sum() / 2 * share(weights.sum())
        return mean.float()


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


def paired(images: Tensor, of_texts: Tensor, texts: Tensor, of_images: Tensor) -> Float[Tensor, " pairs"]:
    """Products of each picture and each text with what it should find, in float64."""
    return ((images * of_texts).sum(1) + (texts * of_images).sum(1)).double()


def others(images: Tensor, texts: Tensor, all_texts: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """For each pair of this rank: how many pairs have its picture, and the sums of the others' images and texts."""
    numbers, group = collectives.gather(same).unique(return_inverse=True)
    mine = own(group, len(images))
    count = torch.bincount(group, minlength=len(numbers))[mine]

    def summed(x: Tensor, itself: Tensor) -> Tensor:
        return x.new_zeros(len(numbers), x.shape[1]).index_add(0, group, x)[mine] - itself

    return count, summed(collectives.gather(images), images), summed(all_texts, texts)


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
    """log sum exp(scale * a b') over the columns for each row, and over the rows for each column, in float64; and the
    logits of row n with column `first + n`. Taken from the tiles, they cancel exactly against the sums.

    Tiles are float32. Vectors are float64, because a loss is the small difference of two large numbers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: Float[Tensor, "rows embed"],
        b: Float[Tensor, "columns embed"],
        scale: Float[Tensor, ""],
        first: int,
        block: int,
    ) -> tuple[Float[Tensor, " rows"], Float[Tensor, " columns"], Float[Tensor, " rows"]]:
        bound = scale.abs() * a.norm(dim=1).max() * b.norm(dim=1).max()
        tops = None if bool(bound <= MAX_BARE_EXPONENT) else _maxima(a, b, scale, block)
        sums, column_sums = a.new_zeros(len(a), dtype=torch.float64), b.new_zeros(len(b), dtype=torch.float64)
        own = a.new_empty(len(a))
        for i, j, logits in tiles(a, b, scale, block):
            places, found = _diagonal(logits, i, i.start + first - j.start)
            own[places] = found
            shares, column_shares = _exponentials(logits, i, j, tops)
            sums[i] += shares.sum(1)
            column_sums[j] += column_shares.sum(0)
        rows, columns = sums.log_(), column_sums.log_()
        if tops is not None:
            rows, columns = rows + tops[0], columns + tops[1]
        ctx.first, ctx.block, ctx.tops = first, block, tops
        ctx.save_for_backward(a, b, scale, rows, columns)
        return rows, columns, own

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of a logit is its share of its row's sum and of its column's, each times their gradient."""
        a, b, scale, rows, columns = ctx.saved_tensors
        learns_b = ctx.needs_input_grad[1]  # not where texts are frozen: a third of the work
        # The tiles are made anew; a second derivative is not defined.
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            grad_a, grad_b = torch.zeros_like(a), torch.zeros_like(b)
            top, column_top = ctx.tops or (0.0, 0.0)
            of_row = (grads[0] * (top - rows).exp()).float()
            of_column = (grads[1] * (column_top - columns).exp()).float()
            for i, j, logits in tiles(a, b, scale, ctx.block):
                shares, column_shares = _exponentials(logits, i, j, ctx.tops)
                if shares is column_shares:
                    for strip, of_strip in zip(shares.split(STRIP), of_row[i].split(STRIP), strict=True):
                        strip.mul_(of_strip[:, None] + of_column[j])
                    grad = shares
                else:
                    grad = shares.mul_(of_row[i, None]).add_(column_shares.mul_(of_column[j]))
                places, found = _diagonal(grad, i, i.start + ctx.first - j.start)
                found += grads[2][places]
                grad_a[i].addmm_(grad, b[j])
                if learns_b:
                    grad_b[j].addmm_(grad.T, a[i])
            pieces = zip(a.split(ctx.block), grad_a.split(ctx.block), strict=True)
            grad_scale = torch.stack([(x * grad).sum() for x, grad in pieces]).sum()  # a whole product is a copy of a
            return grad_a.mul_(scale), grad_b.mul_(scale), grad_scale, None, None


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


def _maxima(a: Tensor, b: Tensor, scale: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Largest logit of each row and of each column."""
    rows, columns = a.new_full((len(a),), -torch.inf), b.new_full((len(b),), -torch.inf)
    for i, j, logits in tiles(a, b, scale, block):
        rows[i] = rows[i].maximum(logits.amax(1))
        columns[j] = columns[j].maximum(logits.amax(0))
    return rows, columns


def _exponentials(logits: Tensor, i: slice, j: slice, tops: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Of a tile, over the maxima of its rows and of its columns; one tensor for both where no maximum is needed."""
    if tops is None:
        logits.exp_()
        return logits, logits
    return (logits - tops[0][i, None]).exp_(), logits.sub_(tops[1][j]).exp_()


def _diagonal(tile: Tensor, i: slice, offset: int) -> tuple[slice, Tensor]:
    """Rows of a tile whose own column, `offset` further right, is in it, and a view of those places."""
    found = tile.diagonal(offset) if -len(tile) < offset < tile.shape[1] else tile.new_empty(0)
    start = i.start + max(-offset, 0)
    return slice(start, start + len(found)), found
