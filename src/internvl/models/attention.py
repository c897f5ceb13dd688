"""One attention for everything: full, causal, masked, or packed rows as real segments.

Which kernel runs is decided here and nowhere else. Masks and segments are made by the caller.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

MIN_PLAIN_LENGTH = 256
"""Below it bfloat16 sdpa is not slower than plain products on a CPU (benchmarks/vision.py)."""


def attend(
    q: Float[Tensor, "batch heads queries head_width"],
    k: Float[Tensor, "batch kv_heads keys head_width"],
    v: Float[Tensor, "batch kv_heads keys head_width"],
    *,
    causal: bool = False,
    mask: Bool[Tensor, "batch_or_1 heads_or_1 queries keys"] | None = None,
    segments: Int[Tensor, "bounds"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads queries head_width"]:
    """Softmax attention. `mask` is True where a query sees a key; `segments` are the bounds of a packed row.

    Causal with fewer queries than keys means that the queries are the last positions (a cache holds the rest).
    """
    q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast, rotary embeddings leave them in float32
    if segments is not None:
        return _attend_segments(q, k, v, segments, causal, scale)
    queries, keys = q.shape[2], k.shape[2]
    if causal and mask is None and 1 < queries < keys:
        mask = causal_mask(queries, keys, q.device)
    causal = causal and mask is None and queries > 1
    if not causal and mask is None and _plain_is_faster(q, k):
        return _plain_products(q, k, v, scale)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
    )


def causal_mask(queries: int, keys: int, device: torch.device) -> Bool[Tensor, "1 1 queries keys"]:
    """True where one of the last `queries` of `keys` positions sees itself or an earlier one."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]


def _attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, causal: bool, scale: float | None) -> Tensor:
    bounds = segments.tolist()
    if q.shape[0] != 1 or bounds[0] != 0 or bounds[-1] != q.shape[2] or q.shape[2] != k.shape[2]:
        raise ValueError(
            f"segments {bounds} do not cover one packed row: batch {q.shape[0]}, {q.shape[2]} queries, "
            f"{k.shape[2]} keys; bounds run from 0 to the length of a single row"
        )
    parts = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=causal, scale=scale) for a, b in pairwise(bounds)]
    return torch.cat(parts, dim=2)


def _plain_is_faster(q: Tensor, k: Tensor) -> bool:
    """On CPU in bfloat16 the two matrix products run at 2.5 times the rate of sdpa; float32 sdpa wins."""
    return (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and k.shape[2] >= MIN_PLAIN_LENGTH
        and q.shape[2] >= MIN_PLAIN_LENGTH
        and q.shape[1] == k.shape[1]
    )


def _plain_products(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    scores = (q * (q.shape[-1] ** -0.5 if scale is None else scale)) @ k.transpose(-1, -2)
    return scores.softmax(-1) @ v
