"""Losses: the official numbers, and the laws that the loop relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl.tokens import IGNORE_INDEX
from internvl.train.losses import chunked_sum, shift, token_losses, weighted_sum, weighted_tokens
from reference import golden_tensors


def loss_of(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    positions, targets, chosen = shift(labels, weights)
    return weighted_tokens(logits.flatten(0, 1)[positions], targets, chosen)


def by_sample(labels: torch.Tensor, power: float) -> torch.Tensor:
    """Weights of whole rows: 1 / x ** power for x learned tokens."""
    learned = labels != IGNORE_INDEX
    return learned / learned.sum(1, keepdim=True).clamp(min=1) ** power


@pytest.mark.parametrize("name", ["chat_llama", "chat_internlm2"])
@pytest.mark.parametrize(("output", "power"), [("", 0.0), ("_token", 0.0), ("_sample", 1.0), ("_square", 0.5)])
def test_official_losses_of_padded_rows(name: str, output: str, power: float) -> None:
    values, _ = golden_tensors(f"{name}.safetensors")
    labels = values["in/labels"]
    loss = loss_of(values["out/logits"], labels, by_sample(labels, power))
    assert float(loss) == pytest.approx(float(values[f"out/loss{output}"]), abs=1e-5)


@pytest.mark.parametrize("reduction", ["token", "sample", "square"])
def test_official_losses_of_a_packed_row(reduction: str) -> None:
    values, _ = golden_tensors("packed_llama.safetensors")
    loss = loss_of(values["out/logits"], values["in/labels"], values[f"in/loss_weight_{reduction}"])
    assert float(loss) == pytest.approx(float(values[f"out/loss_{reduction}"]), abs=1e-5)


def test_known_value() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    loss = weighted_tokens(logits, torch.tensor([0, 1]), torch.tensor([3.0, 1.0]))
    assert float(loss) == pytest.approx((3 * 0.693147 + 2.126928) / 4, abs=1e-5)


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 7))
def test_sums_of_any_split_add_up(seed: int, num_tokens: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, 11, generator=generator)
    labels = torch.randint(0, 11, (num_tokens,), generator=generator)
    weights = torch.rand(num_tokens, generator=generator)
    pieces = zip(logits.split(chunk), labels.split(chunk), weights.split(chunk), strict=True)
    torch.testing.assert_close(weighted_sum(logits, labels, weights), sum(weighted_sum(*piece) for piece in pieces))


@given(st.integers(0, 2**31), st.integers(1, 40), st.integers(1, 50))
def test_chunked_equals_whole_with_gradients(seed: int, num_tokens: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    head = torch.nn.Linear(5, 11)
    hidden = torch.randn(num_tokens, 5, generator=generator, requires_grad=True)
    labels, weights = torch.randint(0, 11, (num_tokens,), generator=generator), torch.rand(num_tokens)
    whole = weighted_sum(head(hidden), labels, weights)
    parts = chunked_sum(hidden, head, labels, weights, chunk)
    torch.testing.assert_close(parts, whole)
    for a, b in zip(
        torch.autograd.grad(parts, [hidden, head.weight]),
        torch.autograd.grad(whole, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_shift_finds_the_position_before_each_label() -> None:
    ignored = IGNORE_INDEX
    labels = torch.tensor([[5, ignored, 7, 8], [ignored, 3, ignored, ignored]])
    weights = torch.tensor([[9.0, 0.0, 0.5, 0.25], [0.0, 2.0, 0.0, 0.0]])
    positions, targets, chosen = shift(labels, weights)
    assert positions.tolist() == [1, 2, 4]
    assert targets.tolist() == [7, 8, 3]
    assert chosen.tolist() == [0.5, 0.25, 2.0]  # the label of the first position has no position before it


def test_bfloat16_logits_are_summed_in_float32() -> None:
    logits = torch.randn(300, 50).bfloat16()
    labels, weights = torch.randint(0, 50, (300,)), torch.rand(300)
    assert weighted_sum(logits, labels, weights).dtype == torch.float32
    torch.testing.assert_close(weighted_sum(logits, labels, weights), weighted_sum(logits.float(), labels, weights))


def test_ignored_tokens_have_no_loss() -> None:
    assert token_losses(torch.randn(2, 4), torch.tensor([IGNORE_INDEX, 1]))[0] == 0
