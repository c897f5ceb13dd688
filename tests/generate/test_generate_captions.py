"""Captions: the official tokens, cached as uncached, and beam search against transformers' own."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from internvl.generate.captions import CaptionSearch, caption
from internvl.models.contrastive import DualModel
from reference import official_dual
from tiny import tiny_dual, tiny_pictures

PROMPT = torch.tensor([1, 20, 31, 42])
END = 2


@pytest.fixture(scope="module")
def model() -> DualModel:
    return tiny_dual()


def test_caption_tokens_are_the_official_ones() -> None:
    model, tensors, _ = official_dual("g_stage2.safetensors")
    pixels, prompts = tensors["in/pixel_values"][:2], tensors["in/caption_prompt"]
    expected = tensors["out/caption_new_tokens"]
    search = CaptionSearch(beams=1, min_new_tokens=0, max_new_tokens=expected.shape[1])
    assert caption(model, pixels, prompts, END, search) == expected.tolist()


@torch.no_grad()
def next_scores(model: DualModel, pixels: torch.Tensor, written: list[int]) -> torch.Tensor:
    """Log-probabilities after prompt and words, from one pass of queries and text without any cache."""
    ids = torch.tensor([[*PROMPT.tolist(), *written]])
    states = model.qllama.both(model.vision(pixels), ids, torch.ones_like(ids, dtype=torch.bool), "itg")
    return model.qllama.head(states[0, -1]).log_softmax(-1)


def test_greedy_equals_uncached_and_company_changes_nothing(model: DualModel) -> None:
    pixels = tiny_pictures(3)
    search = CaptionSearch(beams=1, min_new_tokens=3, max_new_tokens=6)
    found = caption(model, pixels, PROMPT, END, search)
    for n in range(3):
        written: list[int] = []
        while len(written) < 6:
            scores = next_scores(model, pixels[n : n + 1], written)
            if len(written) < 3:
                scores[END] = -torch.inf
            token = int(scores.argmax())
            if token == END:
                break
            written.append(token)
        assert found[n] == written
        assert caption(model, pixels[n : n + 1], PROMPT, END, search) == [written]


def plain_beams(model: DualModel, pixels: torch.Tensor, search: CaptionSearch, end: int) -> list[int]:
    """The rules of transformers' beam search once more, one list of candidates a step, nothing cached."""
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    ended: list[tuple[float, list[int]]] = []
    for length in range(1, search.max_new_tokens + 1):
        candidates = []
        for total, words in beams:
            scores = next_scores(model, pixels, words)
            if length <= search.min_new_tokens:
                scores[end] = -torch.inf
            candidates += [(total + float(score), words, token) for token, score in enumerate(scores)]
        candidates = sorted(candidates, key=lambda c: -c[0])[: 2 * search.beams]
        for total, words, token in candidates[: search.beams]:
            if token == end:
                ended.append((total / length**search.length_penalty, words))
        ended = sorted(ended, key=lambda e: -e[0])[: search.beams]
        beams = [(total, [*words, token]) for total, words, token in candidates if token != end][: search.beams]
        best_open = candidates[0][0] / length**search.length_penalty
        if len(ended) == search.beams and ended[-1][0] >= best_open:
            return ended[0][1]
    ended += [(total / len(words) ** search.length_penalty, words) for total, words in beams]
    return max(ended, key=lambda e: e[0])[1]


@pytest.mark.parametrize(("penalty", "at_least"), [(1.0, 0), (0.0, 2), (2.0, 1)])
def test_beam_search_equals_a_plain_one(model: DualModel, penalty: float, at_least: int) -> None:
    pixels, end = tiny_pictures(2, seed=4), 118
    with torch.no_grad():  # an end that is likely enough to be met
        model = tiny_dual(seed=3)
        model.qllama.head.weight[end] = 1.5 * model.qllama.head.weight[17]
    search = CaptionSearch(beams=3, min_new_tokens=at_least, max_new_tokens=5, length_penalty=penalty)
    found = caption(model, pixels, PROMPT, end, search)
    assert found == [plain_beams(model, pixels[n : n + 1], search, end) for n in range(2)]


def test_wide_beams_find_the_likeliest_caption() -> None:
    """With as many beams as words, two steps are an exhaustive search."""
    settings = {**tiny_dual().config.language.settings, "vocab_size": 12}
    model = tiny_dual(language=type(tiny_dual().config.language)("llama", settings))
    prompt, end, pixels = torch.tensor([1, 5]), 2, tiny_pictures(1)
    search = CaptionSearch(beams=12, min_new_tokens=2, max_new_tokens=2)
    ids = torch.tensor([[1, 5, a] for a in range(12) if a != end])
    with torch.no_grad():
        features = model.vision(pixels)
        mask = torch.ones_like(ids, dtype=torch.bool)
        states = model.qllama.both(features, ids, mask, "itg", torch.zeros(len(ids), dtype=torch.long))
        logs = model.qllama.head(states[:, -2:]).log_softmax(-1)
    words = [a for a in range(12) if a != end]
    totals = {(a, b): float(logs[n, 0, a] + logs[n, 1, b]) for (n, a), b in itertools.product(enumerate(words), words)}
    best = max(totals, key=lambda key: totals[key])
    assert caption(model, pixels, prompt, end, search) == [list(best)]
    assert math.isfinite(totals[best])


def test_bad_input_says_what_to_do(model: DualModel) -> None:
    with pytest.raises(ValueError, match="0 beams, 8 to 30 new tokens"):
        CaptionSearch(beams=0)
    with pytest.raises(ValueError, match="at least 1 beam"):
        CaptionSearch(min_new_tokens=9, max_new_tokens=8)
    with pytest.raises(ValueError, match=r"prompts \(3, 4\) for 2 pictures; give one each"):
        caption(model, tiny_pictures(2), PROMPT.expand(3, -1), END)
