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


def in_pieces(encode: Callable[..., Tensor], inputs: Sequence[Tensor], size: int | None) -> Tensor:
    """`encode(*inputs)`, rows of all inputs `size` at a time; only inputs and outputs stay until the backward pass."""
    if size is None:
        return encode(*inputs)
    pieces = zip(*(x.split(size) for x in inputs), strict=True)
    return torch.cat([checkpoint(encode, *piece, use_reentrant=False) for piece in pieces])
