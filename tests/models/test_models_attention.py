"""attend(): every path against softmax(QK)V written out in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from internvl.models.attention import _products_are_faster, attend, causal_mask
from internvl.models.layers import Linear, onednn_is_faster


def written_out(q, k, v, allowed=None, scale=None):
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores.softmax(-1) @ v


def qkv(queries=7, keys=7, heads=4, kv_heads=4, batch=2, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(batch, heads, queries, 16, generator=g).to(dtype),
        torch.randn(batch, kv_heads, keys, 16, generator=g).to(dtype),
        torch.randn(batch, kv_heads, keys, 16, generator=g).to(dtype),
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_full(kv_heads: int) -> None:
    q, k, v = qkv(kv_heads=kv_heads, keys=9)
    assert_close(attend(q, k, v), written_out(q, k, v).float(), atol=1e-5, rtol=1e-4)
    assert_close(attend(q, k, v, scale=0.3), written_out(q, k, v, scale=0.3).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize(("queries", "keys"), [(7, 7), (1, 9), (3, 9), (1, 1)])
def test_causal_queries_are_the_last_positions(queries: int, keys: int, kv_heads: int) -> None:
    q, k, v = qkv(queries, keys, kv_heads=kv_heads)
    allowed = torch.tensor([[j <= i + keys - queries for j in range(keys)] for i in range(queries)])
    assert torch.equal(causal_mask(queries, keys, q.device)[0, 0], allowed)
    assert_close(attend(q, k, v, causal=True), written_out(q, k, v, allowed).float(), atol=1e-5, rtol=1e-4)


def test_mask_says_what_is_seen() -> None:
    q, k, v = qkv(5, 8, kv_heads=2)
    mask = torch.rand(2, 1, 5, 8) > 0.4
    mask[..., 0] = True
    assert_close(attend(q, k, v, causal=True, mask=mask), written_out(q, k, v, mask).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["full", "causal", "last positions", "mask", "segments"])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_bfloat16_that_learns_takes_products_and_agrees(monkeypatch, kind: str, kv_heads: int) -> None:
    """Values and gradients of all three; no kernel of sdpa runs."""
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", None)
    batch, queries, keys = {"segments": (1, 12, 12), "last positions": (2, 5, 12)}.get(kind, (2, 12, 12))
    given = [x.requires_grad_() for x in qkv(queries, keys, kv_heads=kv_heads, batch=batch, dtype=torch.bfloat16)]
    seen = torch.ones(queries, keys, dtype=torch.bool)
    options: dict[str, object] = {"causal": True}
    if kind == "full":
        options = {}
    elif kind == "mask":
        seen = (torch.rand(batch, 1, queries, keys, generator=torch.Generator().manual_seed(1)) > 0.4).logical_or(
            torch.eye(queries, keys, dtype=torch.bool)
        )
        options = {"mask": seen}
    elif kind == "segments":
        row = torch.arange(keys) >= 5
        seen = (row[:, None] == row).tril()
        options = {"causal": True, "segments": torch.tensor([0, 5, 12])}
    else:
        seen = seen.tril(keys - queries)
    found, wanted = attend(*given, **options), written_out(*given, seen)
    assert_close(found, wanted.bfloat16(), atol=0.03, rtol=0.03)
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    gradients = [torch.autograd.grad((out * weights).sum(), given) for out in (found, wanted)]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs, atol=0.05, rtol=0.05)


def test_a_query_that_sees_nothing_stays_finite_and_learns_nothing_wrong() -> None:
    q, k, v = (x.requires_grad_() for x in qkv(dtype=torch.bfloat16))
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool).tril()
    mask[0, :, 2] = False
    found = attend(q, k, v, mask=mask)
    assert bool(found.isfinite().all())
    keep = [n for n in range(7) if n != 2]
    gradient = torch.autograd.grad(found[:, :, keep].sum(), q)[0]
    assert bool(gradient.isfinite().all())
    assert not gradient[0, :, 2].any()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.booleans(), st.sampled_from([1, 2, 4]))
def test_segments_are_separate_rows(lengths: list[int], causal: bool, kv_heads: int) -> None:
    total = sum(lengths)
    q, k, v = qkv(total, total, kv_heads=kv_heads, batch=1)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    packed = attend(q, k, v, causal=causal, segments=bounds)
    where = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    allowed = where[:, None] == where[None]
    if causal:
        allowed = allowed & torch.ones(total, total, dtype=torch.bool).tril()
    assert_close(packed, written_out(q, k, v, allowed).float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bounds", [[0, 3], [1, 7], [0, 3, 9]])
def test_segments_that_do_not_cover_the_row_are_refused(bounds: list[int]) -> None:
    q, k, v = qkv(batch=1)
    with pytest.raises(ValueError, match="do not cover"):
        attend(q, k, v, segments=torch.tensor(bounds))
    with pytest.raises(ValueError, match="batch 2"):
        attend(*qkv(batch=2), segments=torch.tensor([0, 7]))


@pytest.mark.parametrize("length", [63, 64, 383, 384, 700])
def test_long_bfloat16_rows_take_another_kernel_and_agree(length: int) -> None:
    q, k, v = qkv(length, length, dtype=torch.bfloat16)
    wanted = written_out(q, k, v)
    ours = (attend(q, k, v).double() - wanted).abs().max()
    plain = ((q @ k.transpose(-1, -2) * 0.25).softmax(-1) @ v).double()  # what the official code computes
    assert ours <= 1.5 * (plain - wanted).abs().max()


@pytest.fixture
def two_threads():
    """oneDNN's convolutions take over where torch may use more than one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("heads", "length", "width"), [(4, 400, 16), (6, 384, 64), (3, 700, 48)])
def test_long_float32_rows_take_another_kernel_and_agree(two_threads, heads: int, length: int, width: int) -> None:
    q, k, v = (torch.randn(2, heads, length, width) for _ in range(3))
    assert _products_are_faster(q, k)
    assert_close(attend(q, k, v), written_out(q, k, v).float(), atol=1e-5, rtol=1e-4)
    loud = attend(6 * q, 6 * k, v)  # too large for bare exponents
    assert_close(loud, written_out(6 * q, 6 * k, v).float(), atol=1e-4, rtol=1e-3)
    learning = q.clone().requires_grad_()
    assert not _products_are_faster(learning, k)
    attend(learning, k, v).sum().backward()
    assert learning.grad.abs().sum() > 0


@pytest.mark.parametrize("size", [0.1, 3.0, 30.0, 300.0])
def test_large_scores_in_bfloat16_do_not_overflow(size: float) -> None:
    q, k, v = qkv(400, 400, dtype=torch.bfloat16)
    out = attend(size * q, size * k, v)
    plain = ((size * q * 0.25) @ (size * k).transpose(-1, -2)).softmax(-1) @ v
    wanted = written_out(size * q, size * k, v)
    assert out.isfinite().all()
    assert (out.double() - wanted).abs().mean() <= 1.5 * (plain.double() - wanted).abs().mean() + 1e-6


@pytest.mark.parametrize("shape", [(1025, 384), (3, 257, 64), (41, 513)])
def test_linear_by_onednn_is_a_linear_layer_with_its_gradients(two_threads, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x, layer = torch.randn(shape, requires_grad=True), Linear(shape[-1], 96)
    assert onednn_is_faster(x)
    plain = torch.nn.functional.linear(x, layer.weight, layer.bias)
    assert_close(layer(x), plain, atol=1e-5, rtol=1e-4)
    target = torch.randn_like(plain)
    wanted = torch.autograd.grad((plain * target).sum(), [x, layer.weight, layer.bias])
    found = torch.autograd.grad((layer(x) * target).sum(), [x, layer.weight, layer.bias])
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_queries_in_float32_with_values_in_bfloat16() -> None:
    q, k, v = qkv()
    out = attend(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
