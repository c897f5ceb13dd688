"""Laws of choosing a token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from internvl.generate.sampling import Sampling, choose, penalise, probabilities


def _logits(seed: int, size: int = 50) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 3


@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3.0),
    top_k=st.integers(0, 60),
    top_p=st.floats(0.05, 1.0),
)
def test_probabilities_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    scores = TemperatureLogitsWarper(temperature)(None, _logits(seed)[None])
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = TopPLogitsWarper(top_p)(None, scores)
    ours = probabilities(_logits(seed), Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(ours, scores.softmax(-1)[0], rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 1000), said=st.lists(st.integers(0, 49), min_size=1), penalty=st.floats(0.5, 2.0))
def test_penalty_is_that_of_transformers(seed: int, said: list[int], penalty: float) -> None:
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([said]), _logits(seed)[None].clone())[0]
    torch.testing.assert_close(penalise(_logits(seed), said, penalty), theirs)


@given(seed=st.integers(0, 1000), options=st.sampled_from([{}, {"top_k": 3}, {"top_p": 0.5}]))
def test_zero_temperature_is_the_largest_and_low_ones_approach_it(seed: int, options: dict[str, float]) -> None:
    logits, generator = _logits(seed), torch.Generator()
    best = int(logits.argmax())
    assert choose(logits, Sampling(**options), [], generator)[0] == best
    assert choose(logits, Sampling(temperature=1e-4, **options), [], generator.manual_seed(0))[0] == best


def test_same_seed_same_token_other_seed_other_token() -> None:
    logits, sampling = _logits(1) / 9, Sampling(temperature=1.0)
    draws = [[choose(logits, sampling, [], torch.Generator().manual_seed(s))[0] for s in range(20)] for _ in range(2)]
    assert draws[0] == draws[1]
    assert len(set(draws[0])) > 5


def test_logprob_is_of_the_plain_distribution() -> None:
    token, logprob = choose(_logits(3), Sampling(logprobs=True, repetition_penalty=1.3), [2], torch.Generator())
    assert logprob == pytest.approx(float(_logits(3).log_softmax(-1)[token]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("repetition_penalty", 0.0),
    ],
)
def test_impossible_settings_are_named(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} {value}"):
        Sampling(**{name: value})
