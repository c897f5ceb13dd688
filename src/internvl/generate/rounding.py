"""Whether rounded weights may stay: how far they move the next token of a text that every model can read.

The rounding itself is models/int8.py's and models/four_bit.py's.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.generate.engine import Engine
from internvl.models.chat import ChatModel
from internvl.models.int8 import divergence

TEXT = (
    "The picture shows a red apple and two green pears on a wooden table. To the left of the apple stands a white cup, "
    "and behind it a window through which the sea can be seen. How many pieces of fruit are there? There are three. "
    "图中有一个红苹果和两个绿梨。 Sur la table, il y a trois fruits."
)
NUM_READ, NUM_STEPS = 16, 32
KL_LIMITS = {"int8": 0.01, "int4": 0.05}
"""Mean nats a position. `pocket`: int8 0.007, int4 0.003; 4-bit blocks without the low-rank part 0.7."""


def probe_ids(tokenizer: Any) -> Int[Tensor, " length"]:
    """The first tokens of the text; it repeats where a vocabulary of long words makes it short."""
    ids: list[int] = tokenizer.encode(TEXT, add_special_tokens=False)
    length = NUM_READ + NUM_STEPS
    return torch.tensor((ids * (length // len(ids) + 1))[:length])


@torch.inference_mode()
def plain_logits(model: ChatModel, ids: Int[Tensor, " length"]) -> Float[Tensor, "1 length vocab"]:
    weight = model.connector.fc1.weight
    out: Tensor = model(ids[None].to(weight.device))
    return out


@torch.inference_mode()
def check_steps(engine: Engine, ids: Int[Tensor, " length"], limit: float) -> float:
    """Mean KL in nats of the engine's steps to the plain forward of its model; ValueError above `limit`."""
    plain = plain_logits(engine.model, ids)[:, NUM_READ:-1].float()
    decoder = engine.decoder
    decoder.reserve(1, len(ids))
    decoder.read([engine.model.embed(ids[None, :NUM_READ])[0]], [0])
    steps = [decoder.step(ids[at : at + 1], [at]) for at in range(NUM_READ, len(ids) - 1)]
    mean, _, agreement = divergence(plain, torch.stack(steps, 1))
    if not mean <= limit:
        raise ValueError(
            f"4-bit weights move the next token of a probe text by {mean:.3g} nats, limit {limit:.3g} (the likeliest "
            f"token stays in {agreement:.0%} of its places): use dtype bfloat16, or raise max_kl if that is acceptable"
        )
    return mean
