"""Losses: the official numbers, and the laws that the loop relies on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl.tokens import IGNORE_INDEX
from internvl.train.losses import (
    chunked_sum,
    is_matrix,
    linear_sum,
    shift,
    token_losses,
    weighted_sum,
    weighted_tokens,
)
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


def plain(hidden: torch.Tensor, table: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """All logits at once, every gradient by autograd."""
    return weighted_sum(hidden @ table.T, labels, weights)


@given(st.integers(0, 2**31), st.integers(0, 40), st.integers(1, 50), st.booleans())
def test_gradients_made_on_the_way_are_those_of_autograd(seed: int, count: int, chunk: int, ignores: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, 6, generator=generator, requires_grad=True)
    table = torch.randn(13, 6, generator=generator, requires_grad=True)
    labels, weights = torch.randint(0, 13, (count,), generator=generator), torch.rand(count, generator=generator)
    if ignores:
        labels[::3] = IGNORE_INDEX
    found, expected = linear_sum(hidden, table, labels, weights, chunk), plain(hidden, table, labels, weights)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    # a factor behind the loss, as the loop has one
    grads = zip(
        torch.autograd.grad(found * 0.37, [hidden, table]),
        torch.autograd.grad(expected * 0.37, [hidden, table]),
        strict=True,
    )
    for ours, theirs in grads:
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("learns", ["hidden", "table", "neither"])
def test_only_gradients_that_are_needed_are_made(learns: str) -> None:
    hidden = torch.randn(20, 6, requires_grad=learns == "hidden")
    table = torch.randn(13, 6, requires_grad=learns == "table")
    labels, weights = torch.randint(0, 13, (20,)), torch.rand(20)
    found = linear_sum(hidden, table, labels, weights, 7)
    torch.testing.assert_close(found, plain(hidden, table, labels, weights))
    assert found.requires_grad == (learns != "neither")
    if learns != "neither":
        found.backward()
    assert (hidden.grad is not None) == (learns == "hidden")
    assert (table.grad is not None) == (learns == "table")


def test_a_tied_table_gets_both_gradients() -> None:
    table = torch.nn.Parameter(torch.randn(13, 6))
    ids, labels, weights = torch.arange(9), torch.arange(1, 10), torch.rand(9)
    grads = []
    for loss in (linear_sum, plain):
        extra = (4,) if loss is linear_sum else ()
        value = loss(torch.nn.functional.embedding(ids, table).tanh(), table, labels, weights, *extra)
        grads.append(torch.autograd.grad(value, table)[0])
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_under_autocast_it_is_as_close_to_float32_as_the_plain_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 32, generator=generator, requires_grad=True)
    table = torch.randn(97, 32, generator=generator, requires_grad=True)
    labels, weights = torch.randint(0, 97, (200,), generator=generator), torch.rand(200, generator=generator)
    exact = torch.autograd.grad(plain(hidden, table, labels, weights), [hidden, table])
    errors = []
    for loss, extra in ((linear_sum, (64,)), (plain, ())):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss(hidden, table, labels, weights, *extra)
        assert value.dtype == torch.float32
        grads = torch.autograd.grad(value, [hidden, table])
        assert [g.dtype for g in grads] == [torch.float32] * 2
        errors.append([float((g - e).norm() / e.norm()) for g, e in zip(grads, exact, strict=True)])
    assert all(ours <= 1.5 * theirs for ours, theirs in zip(*errors, strict=True))


def test_heads_that_are_more_than_a_matrix_are_called() -> None:
    peft = pytest.importorskip("peft")
    model = torch.nn.Sequential(torch.nn.Linear(6, 13, bias=False))
    assert is_matrix(model[0])
    assert not is_matrix(torch.nn.Linear(6, 13))
    hooked = torch.nn.Linear(6, 13, bias=False)
    hooked.register_forward_hook(lambda module, inputs, out: out * 2)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2, init_lora_weights=False))
    hidden, labels, weights = torch.randn(20, 6), torch.randint(0, 13, (20,)), torch.rand(20)
    for head in (hooked, adapted.base_model.model[0], torch.nn.Linear(6, 13)):
        assert not is_matrix(head)
        found = chunked_sum(hidden, head, labels, weights, 7)
        torch.testing.assert_close(found, weighted_sum(head(hidden), labels, weights))
        learned = [p for p in head.parameters() if p.requires_grad]
        ours = torch.autograd.grad(found, learned)
        theirs = torch.autograd.grad(weighted_sum(head(hidden), labels, weights), learned)
        torch.testing.assert_close(ours, theirs)


def test_logits_of_a_chunk_are_all_that_is_held() -> None:
    """One buffer of scores: nothing of the size of all logits is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.size = max(self.size, out.numel())
            return out

    hidden, table = torch.randn(300, 4, requires_grad=True), torch.randn(50, 4, requires_grad=True)
    with Largest() as largest:
        linear_sum(hidden, table, torch.randint(0, 50, (300,)), torch.ones(300), 30).backward()
    assert largest.size <= 30 * 50


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunks of 0 tokens"):
        linear_sum(torch.randn(3, 2), torch.randn(5, 2), torch.zeros(3, dtype=torch.int64), torch.ones(3), 0)
