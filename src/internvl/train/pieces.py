"""Any batch into any memory: rows encoded some at a time, their graphs made anew when gradients come back.

This is gradient caching (arXiv 2101.06983): embed every piece without its graph, take the loss over all of them, then
encode each piece again with the gradient of its embeddings. Checkpointing a whole piece is exactly that, and brings
the generators of the first pass back for the second, so drop path falls alike in both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

PIECES = 4
"""Groups of rows of like length. More would save little padding and make the products small."""


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


def by_length(encode: Callable[..., Tensor], ids: Tensor, mask: Tensor, pieces: int = PIECES) -> Tensor:
    """`encode(ids, mask)`, rows of like length together and cut to their longest: captions of many languages differ
    tenfold in tokens, and padding costs what text costs. Rows are padded at their end."""
    lengths = mask.sum(1)
    order = lengths.argsort()
    groups = [(rows, int(lengths[rows].max())) for rows in order.chunk(pieces)]
    encoded = torch.cat([encode(ids[rows, :longest], mask[rows, :longest]) for rows, longest in groups])
    return encoded[order.argsort()]
