"""One attention for everything: full, causal, masked, or packed rows as real segments.

Which kernel runs is decided here and nowhere else. Masks and segments are made by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from internvl.models.layers import onednn_is_faster, rows_by_matrix

LONG = 384
"""From here on bare exponents, and in float32 oneDNN's products, win on a CPU (benchmarks/vision.py)."""

MIN_PLAIN_LENGTH = 64
"""From here to LONG plain products beat sdpa in bfloat16; in float32 sdpa wins."""

LEARNED = 1024
"""Fewer keys than that, and plain products beat sdpa in bfloat16 on a CPU where something learns, with or without a
mask: the shorter the row, the more. In float32 sdpa wins (benchmarks/attention.py)."""

MAX_SCORES = 2**23
"""Scores held at once: more leave the cache, and memory that the allocator gives back after every layer."""

MAX_BARE_EXPONENT = 60.0
"""Scores up to it need no row maximum taken away before the exponential:
exp(60) summed over a hundred thousand keys is far from the largest bfloat16, exp(-60) from the smallest normal."""


_sdpa_only = False


@contextmanager
def sdpa_only() -> Iterator[None]:
    """While a CPU stands for a GPU in a rehearsal of memory: sdpa alone runs, as it would there."""
    global _sdpa_only
    _sdpa_only = True
    try:
        yield
    finally:
        _sdpa_only = False


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
    if not causal and mask is None and _products_are_faster(q, k):
        return _products(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
    if _products_learn_faster(q, k, v):
        mask = causal_mask(queries, keys, q.device) if causal else mask
        return _masked_products(q, k, v, mask, q.shape[-1] ** -0.5 if scale is None else scale)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # sdpa's fast CUDA kernels take fewer key heads only in half precision and without a mask.
        k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=groups > 1)


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
    if _varlen_runs(q, bounds):
        return _varlen(q, k, v, bounds, causal, scale)
    parts = [attend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], causal=causal, scale=scale) for a, b in pairwise(bounds)]
    return torch.cat(parts, dim=2)


def _varlen_runs(q: Tensor, bounds: list[int]) -> bool:
    """Whether one kernel can do all segments: torch's flash attention of unequal lengths, half precision, Ampere on."""
    if not q.is_cuda or q.dtype not in (torch.float16, torch.bfloat16) or len(bounds) <= 2:
        return False
    head_width = q.shape[-1]
    return head_width <= 256 and head_width % 8 == 0 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def _varlen(q: Tensor, k: Tensor, v: Tensor, bounds: list[int], causal: bool, scale: float | None) -> Tensor:
    """All segments in one call; keys and values of fewer heads are repeated."""
    from torch.nn.attention.varlen import varlen_attn

    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (q, k, v))
    edges, longest = torch.tensor(bounds, dtype=torch.int32, device=q.device), max(b - a for a, b in pairwise(bounds))
    window = (-1, 0) if causal else (-1, -1)
    out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=window)
    assert isinstance(out, Tensor)
    return out.transpose(0, 1).unsqueeze(0)


def _products_are_faster(q: Tensor, k: Tensor) -> bool:
    """On a CPU without mask: sdpa's own loops reach 40 % of the rate of bfloat16 products, 55 % in float32."""
    length = min(q.shape[2], k.shape[2])
    if q.device.type != "cpu" or q.shape[1] != k.shape[1] or _sdpa_only:
        return False
    if q.dtype == torch.bfloat16:
        return length >= MIN_PLAIN_LENGTH
    return length >= LONG and onednn_is_faster(q) and not _learns(q, k)


def _learns(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _products_learn_faster(q: Tensor, k: Tensor, v: Tensor) -> bool:
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or _sdpa_only:
        return False
    return k.shape[2] < LEARNED and _learns(q, k, v)


def _masked_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention as two matrix products; a query that sees nothing gets the mean of all values, as good as any."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q * scale @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1) @ v


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention as two matrix products of all heads; long rows one batch item and some queries at a time."""
    if _learns(q, k, v) or min(q.shape[2], k.shape[2]) < LONG:
        return _masked_products(q, k, v, None, scale)
    bare = type(q) is Tensor and bool(
        scale * q.norm(dim=-1).max().float() * k.norm(dim=-1).max().float() <= MAX_BARE_EXPONENT
    )
    some = _some_in_float32 if q.dtype == torch.float32 else _some_in_bfloat16
    at_once = max(1, MAX_SCORES // (k.shape[1] * k.shape[2]))
    items = [
        torch.cat([some(part, keys, values, scale, bare) for part in queries.split(at_once, dim=1)], dim=1)
        for queries, keys, values in zip(q, k, v, strict=True)
    ]
    return torch.stack(items)


def _some_in_bfloat16(q: Tensor, k: Tensor, v: Tensor, scale: float, bare: bool) -> Tensor:
    scores: Tensor = q * scale @ k.transpose(1, 2)
    weights = scores.exp_() if bare else scores.softmax(-1)
    return torch.div(weights @ v, weights.sum(-1, keepdim=True))


def _some_in_float32(q: Tensor, k: Tensor, v: Tensor, scale: float, bare: bool) -> Tensor:
    """Each head is a group of columns; its keys, and then its values, are the matrix of that group."""
    heads, keys, head_width = k.shape
    scale *= math.log2(math.e)  # exp2 is four times as fast as exp
    columns = (q * scale).transpose(0, 1).flatten(1)
    scores = rows_by_matrix(columns, k.reshape(-1, head_width), groups=heads).unflatten(1, (heads, keys))
    weights = scores.exp2_() if bare else (scores * math.log(2)).softmax(-1)
    out = rows_by_matrix(weights.flatten(1), v.transpose(1, 2).reshape(-1, keys), groups=heads)
    out = torch.div(out.unflatten(1, (heads, -1)), weights.sum(-1, keepdim=True))
    return torch.transpose(out, 0, 1)
