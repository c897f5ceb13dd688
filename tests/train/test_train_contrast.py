"""The tiled contrastive loss equals the full one: values, gradients, targets, one process and two."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.testing import assert_close

from internvl.parallel import collectives
from internvl.train.contrast import contrast

TIGHT = {"atol": 1e-6, "rtol": 1e-6}


def unit_pairs(pairs: int, width: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = F.normalize(torch.randn(pairs, width, generator=generator), dim=1)
    texts = F.normalize(0.5 * images + torch.randn(pairs, width, generator=generator), dim=1)
    return images, texts


def full(
    images: torch.Tensor,
    texts: torch.Tensor,
    scale: torch.Tensor,
    valid: torch.Tensor | None = None,
    same: torch.Tensor | None = None,
    smoothing: float = 0.0,
) -> torch.Tensor:
    """The whole matrix, torch's cross-entropy with soft targets."""
    logits, pairs = scale * images @ texts.T, len(images)
    numbers = torch.arange(pairs) if same is None else same
    target = (numbers[:, None] == numbers).to(logits.dtype)
    target = target / target.sum(1, keepdim=True)
    losses = [F.cross_entropy(x, target, label_smoothing=smoothing, reduction="none") for x in (logits, logits.T)]
    weights = torch.ones(pairs, dtype=logits.dtype) if valid is None else valid.to(logits.dtype)
    return sum(losses) @ weights / 2 / weights.sum()


def values_and_gradients(loss: Any, images: torch.Tensor, texts: torch.Tensor, scale: float, **options: Any) -> Any:
    inputs = [x.clone().requires_grad_() for x in (images, texts, torch.tensor(scale, dtype=images.dtype))]
    value = loss(*inputs, **options)
    return value.detach(), *torch.autograd.grad(value, inputs)


def close(found: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...], scale: float, pairs: int) -> None:
    """To 1e-6 or to what float32 logits allow: a logit near `scale` is right to scale / 2^23, a share p of a sum to
    p (1 - p) <= 1/4 of that, and an embedding's gradient is `scale` / `pairs` times such shares."""
    logit = 2.0**-23 * scale
    share = logit / 4 * scale / pairs
    for ours, truth, bound in zip(found, exact, (logit, share, share, logit), strict=True):
        assert_close(ours.double(), truth, rtol=1e-6, atol=max(1e-6, bound))


@given(
    pairs=st.integers(1, 40),
    block=st.integers(1, 48),
    scale=st.sampled_from([1.0, 14.3, 55.0, 100.0, 400.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    seed=st.integers(0, 99),
    grouped=st.booleans(),
    some_empty=st.booleans(),
)
def test_tiled_equals_full(
    pairs: int, block: int, scale: float, smoothing: float, seed: int, grouped: bool, some_empty: bool
) -> None:
    images, texts = unit_pairs(pairs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    same = torch.randint(0, max(pairs // 2, 1), (pairs,), generator=generator) if grouped else None
    valid = torch.rand(pairs, generator=generator) < 0.7 if some_empty else None
    if valid is not None:
        valid[0] = True
    options = {"valid": valid, "same": same, "smoothing": smoothing}
    found = values_and_gradients(contrast, images, texts, scale, block=block, **options)
    exact = values_and_gradients(full, images.double(), texts.double(), scale, **options)
    close(found, exact, scale, pairs if valid is None else int(valid.sum()))


def test_tiled_equals_full_over_several_large_blocks() -> None:
    images, texts = unit_pairs(1500, 64)
    found = values_and_gradients(contrast, images, texts, 14.3, block=512)
    for ours, theirs in zip(found, values_and_gradients(full, images, texts, 14.3), strict=True):
        assert_close(ours, theirs, **TIGHT)


def test_small_losses_at_large_scales_keep_their_digits() -> None:
    """The difference of two logits near 100, which must not be lost in their rounding."""
    images, _ = unit_pairs(64, 8)
    for scale in (55.0, 100.0):
        found = values_and_gradients(contrast, images, images, scale, block=20)
        exact = values_and_gradients(full, images.double(), images.double(), scale)
        assert 0 < float(exact[0]) < 0.1
        assert float(found[0]) == pytest.approx(float(exact[0]), abs=1e-7)


def test_no_matrix_is_ever_held() -> None:
    """Every tensor that the loss makes or saves is smaller than the matrix by far."""
    from torch.utils._python_dispatch import TorchDispatchMode

    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            sizes.extend(x.untyped_storage().nbytes() // 4 for x in _tensors(out))
            return out

    images, texts = unit_pairs(512, 8)
    with Watch():
        values_and_gradients(contrast, images, texts, 14.3, block=64)
    assert max(sizes) == max(512 * 8, 64 * 64)


def _tensors(out: Any) -> list[torch.Tensor]:
    parts = out if isinstance(out, (tuple, list)) else [out]
    return [x for x in parts if isinstance(x, torch.Tensor)]


def test_temperature_learns() -> None:
    images, texts = unit_pairs(32)
    log_scale = torch.tensor(1.0, requires_grad=True)
    contrast(images, texts, log_scale.exp()).backward()
    assert log_scale.grad is not None
    step = 1e-3
    up, down = (float(contrast(images.double(), texts, torch.tensor(1.0 + d).exp())) for d in (step, -step))
    assert float(log_scale.grad) == pytest.approx((up - down) / (2 * step), rel=1e-2)


def test_autocast_and_frozen_texts_change_nothing() -> None:
    images, texts = unit_pairs(40)
    expected = values_and_gradients(contrast, images, texts, 14.3, block=16)
    inputs = images.clone().requires_grad_(), texts, torch.tensor(14.3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrast(*inputs, block=16)
        loss.backward()
    assert torch.equal(loss, expected[0])
    assert torch.equal(inputs[0].grad, expected[1])
    assert torch.equal(inputs[2].grad, expected[3])


def test_all_pairs_empty_is_nothing() -> None:
    images, texts = unit_pairs(4)
    loss, *grads = values_and_gradients(contrast, images, texts, 10.0, valid=torch.zeros(4, dtype=torch.bool))
    assert float(loss) == 0.0
    assert all(float(grad.abs().sum()) == 0.0 for grad in grads)


def test_bfloat16_is_computed_in_float32() -> None:
    images, texts = (x.bfloat16() for x in unit_pairs(64))
    scale = torch.tensor(20.0)
    assert torch.equal(contrast(images, texts, scale), contrast(images.float(), texts.float(), scale))


def test_bad_input_says_what_to_do() -> None:
    images, texts = unit_pairs(4)
    with pytest.raises(ValueError, match=r"\(0, 16\) images and \(0, 16\) texts; a batch has one text"):
        contrast(images[:0], texts[:0], torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"label smoothing 1\.0 must be in \[0, 1\)"):
        contrast(images, texts, torch.tensor(1.0), smoothing=1.0)


# two processes


CASES: list[dict[str, Any]] = [
    {},
    {"smoothing": 0.1},
    {"valid": torch.tensor([True, False, True, True, True, False, True, True, True, False, False, False])},
    {"same": torch.tensor([0, 1, 2, 0, 4, 5, 0, 7, 5, 9, 10, 10])},
]


def _on_rank(rank: int, ranks: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    images, texts = unit_pairs(12)
    mine = slice(rank * 6, rank * 6 + 6)
    found = []
    for case in CASES:
        part = {key: value[mine] if isinstance(value, torch.Tensor) else value for key, value in case.items()}
        found.append(values_and_gradients(contrast, images[mine], texts[mine], 14.3, block=4, **part))
    message = ""
    try:
        collectives.check_equal_rows(torch.zeros(3 + rank))
    except ValueError as error:
        message = str(error)
    torch.save((found, message), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_on_rank, (2, folder), nprocs=2, start_method="spawn")
        return [torch.load(Path(folder, f"{rank}.pt")) for rank in range(2)]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_ranks_equal_one(two_ranks: list[Any], case: int) -> None:
    images, texts = unit_pairs(12)
    whole = values_and_gradients(contrast, images, texts, 14.3, **CASES[case])
    exact = values_and_gradients(full, images, texts, 14.3, **CASES[case])
    (loss0, images0, texts0, scale0), (loss1, images1, texts1, scale1) = (rank[0][case] for rank in two_ranks)
    joint = (
        *((loss0 + loss1) / 2, torch.cat([images0, images1]) / 2),
        *(torch.cat([texts0, texts1]) / 2, (scale0 + scale1) / 2),
    )
    for found, one, theirs in zip(joint, whole, exact, strict=True):
        assert_close(found, one, **TIGHT)
        assert_close(found, theirs, **TIGHT)


def test_unequal_ranks_say_what_to_do(two_ranks: list[Any]) -> None:
    assert all(
        message == "ranks bring [3, 4] rows; they must be equal: drop the last, smaller batch"
        for _, message in two_ranks
    )
