"""Any batch into any memory: rows encoded some at a time, their graphs made anew when gradients come back.

This is gradient caching (arXiv 2101.06983): embed every piece without its graph, take the loss over all of them, then
encode each piece again with the gradient of its embeddings. Checkpointing a whole piece is exactly that, and brings
the generators of the first pass back for the second, so drop path falls alike in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internvl.models.contrastive import last_real
from internvl.parallel import collectives

CALL = 100
"""What one more group of rows costs, in positions: its products are smaller (two cores, twelve layers of 576)."""
GROUPS = 4
"""Of rows on several ranks."""


def in_pieces(encode: Callable[..., Tensor], inputs: Sequence[Tensor], size: int | None) -> Tensor:
    """`encode(*inputs)`, rows of all inputs `size` at a time; only inputs and outputs stay until the backward pass.

    No more rows than that are one graph, made once.
    """
    if size is None or len(inputs[0]) <= size:
        return encode(*inputs)
    pieces = zip(*(x.split(size) for x in inputs), strict=True)
    return torch.cat([checkpoint(encode, *piece, use_reentrant=False) for piece in pieces])


def texts_in_pieces(encode: Callable[..., Tensor], ids: Tensor, mask: Tensor, size: int | None) -> Tensor:
    """`encode(ids, mask)`: rows of like length together, or `size` at a time where memory is short."""
    return by_length(encode, ids, mask) if size is None else in_pieces(encode, [ids, mask], size)


def by_length(encode: Callable[..., Tensor], ids: Tensor, mask: Tensor, *more: Tensor, call: int = CALL) -> Tensor:
    """`encode(ids, mask, *more)`, rows of like length together and cut to their longest: captions of many languages
    differ tenfold in tokens, and padding costs what text costs. Padding at a row's begin stays."""
    lengths = last_real(mask.bool()) + 1
    order = lengths.argsort()
    ordered = lengths[order].tolist()
    sizes = group_sizes(ordered, collectives.num_ranks(), call)
    groups = [(rows, int(lengths[rows[-1]])) for rows in order.split(sizes)]
    encoded = torch.cat(
        [encode(ids[rows, :longest], mask[rows, :longest], *(x[rows] for x in more)) for rows, longest in groups]
    )
    return encoded[order.argsort()]


def group_sizes(lengths: Sequence[int], ranks: int, call: int) -> list[int]:
    """Sizes of groups of neighbours in `lengths`, ascending. Ranks gather a sharded block at every call, so all make as
    many, whatever their lengths are: GROUPS equal ones."""
    if ranks == 1:
        return groups_of(lengths, call)
    return [len(part) for part in torch.arange(len(lengths)).chunk(GROUPS)]


def groups_of(lengths: Sequence[int], call: int) -> list[int]:
    """Sizes of groups of neighbours in `lengths`, ascending, that need fewest positions: rows times the longest of a
    group, and `call` for each group. Exact, by the best end of every beginning."""
    longest = np.asarray(lengths, dtype=np.int64)
    costs = np.zeros(len(longest) + 1, dtype=np.int64)
    begins = [0] * len(costs)
    for end in range(1, len(costs)):
        rows = end - np.arange(end)
        found = costs[:end] + rows * longest[end - 1] + call
        begins[end] = int(found.argmin())
        costs[end] = found[begins[end]]
    sizes, end = [], len(longest)
    while end:
        sizes.append(end - begins[end])
        end = begins[end]
    return sizes[::-1]


def padded_positions(lengths: Sequence[int], size: int | None, ranks: int) -> int:
    """Positions that `texts_in_pieces` encodes on one of so many ranks of texts of these lengths."""
    if size is not None:
        return len(lengths) * max(lengths)
    ordered = sorted(lengths)
    sizes = group_sizes(ordered, ranks, CALL)
    return sum(rows * ordered[end - 1] for rows, end in zip(sizes, accumulate(sizes), strict=True))
