"""Ranks from embeddings in blocks: who stands before the right one, honestly counted where scores are equal.

No matrix of all queries by all items is held: memory is block x block. What a query and an item are is the callers'.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DECIMALS = 9
"""Cosines are compared to this many decimals, in float64. Equal vectors then score equal in every block, whatever the
order of summation; float32 vectors carry seven digits, so nothing real is lost."""
BLOCK = 2048
"""Rows and columns of the scores that exist together: 34 MB in float64."""


def unit(vectors: Float[Tensor, "*rows dim"]) -> Float[Tensor, "*rows dim"]:
    """Rows of length 1 in float64; ValueError for a row that is zero or not finite."""
    held = vectors.detach()
    wide = (held.cpu() if held.device.type == "mps" else held).double()  # Apple's GPUs have no float64
    length = wide.norm(dim=-1, keepdim=True)
    bad = ~(torch.isfinite(length) & (length > 0))
    if bool(bad.any()):
        place = bad.flatten().nonzero()[0].item()
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} embeddings are zero or not finite, the first is row {place}; "
            "embed in float32, or look for broken pictures"
        )
    rows: Tensor = wide / length
    return rows


@dataclass(frozen=True)
class Side:
    """Embeddings of one side, and which group each belongs to: rows of one group belong together across sides."""

    vectors: Float[Tensor, "rows dim"]
    group: Int[Tensor, " rows"]

    def __post_init__(self) -> None:
        if self.vectors.ndim != 2 or len(self.vectors) != len(self.group) or not len(self.group):
            raise ValueError(
                f"embeddings of shape {tuple(self.vectors.shape)} with {len(self.group)} groups; "
                "give (rows, dim) and one group a row, at least one row"
            )


@dataclass(frozen=True)
class Ranks:
    """Of each query: what stands before, beside and with its best right item."""

    greater: Int[Tensor, " queries"]
    """Wrong items that score higher than the best right one."""
    equal: Int[Tensor, " queries"]
    """Wrong items that score the same."""
    right: Int[Tensor, " queries"]
    """Right items that share the best score, at least 1."""

    def hits(self, k: int) -> Float[Tensor, " queries"]:
        """Chance that a right item is among the first k, where items of equal score stand in random order.

        1 or 0 without ties. A model that scores everything alike gets exactly chance level, neither all nor nothing.
        """
        if k < 1:
            raise ValueError(f"the first {k} items: k must be at least 1")
        free = (k - self.greater).clamp(min=0)
        wrong, right = self.equal.double(), self.right.double()
        drawn = torch.minimum(free, self.equal + self.right).double()
        # hypergeometric: all `drawn` places of the tie go to wrong items
        misses = (
            torch.lgamma(wrong + 1)
            - torch.lgamma((wrong - drawn).clamp(min=0) + 1)
            - torch.lgamma(wrong + right + 1)
            + torch.lgamma(wrong + right - drawn + 1)
        ).exp()
        return torch.where(drawn > wrong, 1.0, torch.where(drawn > 0, 1.0 - misses, 0.0)).clamp(0, 1)

    @property
    def expected(self) -> Float[Tensor, " queries"]:
        """Expected place of the first right item, from 1."""
        return self.greater + 1 + self.equal / (self.right + 1)


def score_blocks(
    queries: Float[Tensor, "queries dim"],
    items: Float[Tensor, "items dim"],
    block: int,
    log_norm: Float[Tensor, " items"] | None = None,
    scale: float = 1.0,
) -> Iterator[tuple[int, int, Float[Tensor, "rows columns"]]]:
    """First row, first column and rounded scores of each block; for one row of blocks all columns come in turn."""
    if block < 1:
        raise ValueError(f"block {block}: at least one row is needed")
    for top in range(0, len(queries), block):
        for left in range(0, len(items), block):
            scores = queries[top : top + block] @ items[left : left + block].T
            if log_norm is not None:
                share = torch.exp(scale * scores - log_norm[left : left + block])
                scores = scores * share * len(queries)  # the factor changes no rank and keeps the decimals meaningful
            yield top, left, scores.round(decimals=DECIMALS)


def column_log_norm(
    queries: Float[Tensor, "queries dim"], items: Float[Tensor, "items dim"], scale: float, block: int
) -> Float[Tensor, " items"]:
    """log sum over queries of exp(scale x score), for each item."""
    total = torch.full((len(items),), -torch.inf, dtype=queries.dtype, device=queries.device)
    for _, left, scores in score_blocks(queries, items, block):
        part = slice(left, left + scores.shape[1])
        total[part] = torch.logaddexp(total[part], (scale * scores).logsumexp(0))
    return total


def rank(queries: Side, items: Side, *, block: int = BLOCK, dual_softmax: float | None = None) -> Ranks:
    """Ranks of the items of each query's own group, by cosine.

    `dual_softmax`: scores are multiplied by their softmax over the queries at this scale (official MSR-VTT script: 1).
    It looks at all queries at once, so it is no retrieval of one query: off unless asked for.
    """
    if dual_softmax is not None and not dual_softmax > 0:
        raise ValueError(f"dual softmax at a scale of {dual_softmax}; it must be above 0, or left out")
    queries, items = together(queries, items)
    given, wanted = queries.vectors, items.vectors
    missing = ~torch.isin(queries.group, items.group)
    if bool(missing.any()):
        raise ValueError(
            f"{int(missing.sum())} of {len(missing)} queries have nothing to find, the first is row "
            f"{int(missing.nonzero()[0])}; leave them out"
        )
    norm = None if dual_softmax is None else column_log_norm(given, wanted, dual_softmax, block)
    scale = 1.0 if dual_softmax is None else dual_softmax
    best = torch.full((len(given),), -torch.inf, dtype=given.dtype, device=given.device)
    for top, left, scores in score_blocks(given, wanted, block, norm, scale):
        rows = slice(top, top + len(scores))
        own = _own(queries, items, top, left, scores)
        best[rows] = torch.maximum(best[rows], scores.masked_fill(~own, -torch.inf).amax(1))
    counts = torch.zeros(3, len(given), dtype=torch.long, device=given.device)
    for top, left, scores in score_blocks(given, wanted, block, norm, scale):
        rows = slice(top, top + len(scores))
        own = _own(queries, items, top, left, scores)
        same = scores == best[rows, None]
        counts[0, rows] += ((scores > best[rows, None]) & ~own).sum(1)
        counts[1, rows] += (same & ~own).sum(1)
        counts[2, rows] += (same & own).sum(1)
    return Ranks(*counts)


def together(queries: Side, items: Side) -> tuple[Side, Side]:
    """Both sides as unit vectors in float64 on the device of the queries; ValueError where their widths differ."""
    if queries.vectors.shape[1] != items.vectors.shape[1]:
        raise ValueError(
            f"vectors of {queries.vectors.shape[1]} and of {items.vectors.shape[1]} numbers; both sides must come from "
            "the same model"
        )
    given = unit(queries.vectors)
    wanted = unit(items.vectors).to(given.device)
    return Side(given, queries.group.to(given.device)), Side(wanted, items.group.to(given.device))


def _own(queries: Side, items: Side, top: int, left: int, scores: Tensor) -> Bool[Tensor, "rows columns"]:
    rows, columns = scores.shape
    return queries.group[top : top + rows, None] == items.group[None, left : left + columns]


def top_k(
    queries: Float[Tensor, "queries dim"], items: Float[Tensor, "items dim"], k: int, *, block: int = BLOCK
) -> tuple[Float[Tensor, "queries best"], Int[Tensor, "queries best"]]:
    """Cosines and places of the k best items of each query, best first; of equal scores the earlier item first.

    min(k, items) columns.
    """
    if k < 1:
        raise ValueError(f"the best {k} items: k must be at least 1")
    given, wanted = unit(queries), unit(items)
    wanted = wanted.to(given.device)
    kept: list[tuple[Tensor, Tensor]] = []
    for top, left, scores in score_blocks(given, wanted, block):
        places = torch.arange(left, left + scores.shape[1], device=scores.device).expand_as(scores)
        if left:
            scores = torch.cat((kept[-1][0], scores), 1)
            places = torch.cat((kept[-1][1], places), 1)
        else:
            kept.append((scores[:, :0], places[:, :0]))
        ordered = scores.sort(dim=1, descending=True, stable=True)  # stable: kept and earlier items come first
        kept[top // block] = ordered.values[:, :k], places.gather(1, ordered.indices[:, :k])
    return torch.cat([values for values, _ in kept]), torch.cat([places for _, places in kept])
