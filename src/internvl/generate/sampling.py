"""One row of logits to one token: greedy, temperature, top-k, top-p, repetition penalty.

The mathematics is float32 and every request owns its generator, so neighbours in a batch change nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen; the defaults are greedy."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0 takes the likeliest token; above, logits are divided by it before drawing."""
    top_k: int = 0
    """Draw among the k likeliest tokens; 0 means all."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together reach this probability."""
    repetition_penalty: float = 1.0
    """Divides (multiplies, where negative) the logits of tokens that the answer already has."""
    seed: int = 0
    logprobs: bool = False
    """Record the log-probability of every chosen token, before temperature and cuts."""

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0.0 <= self.temperature < float("inf"), "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all) or more"),
            "top_p": (0.0 < self.top_p <= 1.0, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0.0, "above 0; 1 is none"),
        }
        for name, (fits, rule) in limits.items():
            if not fits:
                raise ValueError(f"{name} {getattr(self, name)}: it must be {rule}")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def plain(self) -> bool:
        """The largest logit is the answer, nothing else is asked."""
        return self.greedy and self.repetition_penalty == 1.0 and not self.logprobs


def choose(
    logits: Float[Tensor, " vocab"], sampling: Sampling, said: list[int], generator: torch.Generator
) -> tuple[int, float | None]:
    """The next token and, where asked, its log-probability; `said` are the answer's tokens so far."""
    scores = logits.float()
    logprobs = scores.log_softmax(-1) if sampling.logprobs else None
    if sampling.repetition_penalty != 1.0 and said:
        scores = penalise(scores, said, sampling.repetition_penalty)
    if sampling.greedy:
        token = int(scores.argmax())
    else:
        token = int(torch.multinomial(probabilities(scores, sampling), 1, generator=generator))
    return token, None if logprobs is None else float(logprobs[token])


def penalise(scores: Float[Tensor, " vocab"], said: list[int], penalty: float) -> Float[Tensor, " vocab"]:
    """Scores with every token of `said` made less likely (CTRL, section 4.1; signs as in transformers)."""
    index = torch.tensor(sorted(set(said)), device=scores.device)
    chosen = scores[index]
    return scores.index_put((index,), torch.where(chosen > 0, chosen / penalty, chosen * penalty))


def probabilities(scores: Float[Tensor, " vocab"], sampling: Sampling) -> Float[Tensor, " vocab"]:
    """What a token is drawn from: temperature, then top-k, then top-p (the order of transformers)."""
    scores = scores / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        lowest = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    chances = scores.softmax(-1)
    if sampling.top_p < 1.0:
        ordered, index = chances.sort(descending=True, stable=True)
        before = ordered.cumsum(-1) - ordered  # the likeliest token always stays
        chances = torch.zeros_like(chances).index_put((index,), ordered * (before < sampling.top_p))
    return chances / chances.sum()
