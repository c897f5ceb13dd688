"""A language model's layers rounded, with the damage measured on a probe; and weight-only int8, half of bfloat16.

Rounding is to the nearest of 255 levels, symmetric, one scale a row. It stays only where the answers stay: the mean
KL divergence of the next-token distributions on a probe batch must be below a limit, else the plain weights return.
Speed is not the aim: weights become the computing type again where they are used. Layers that torchao rounds
(torchao_layers.py) are measured and refused in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from internvl.models.chat import ChatModel

LEVELS = 127
"""Of each sign; -128 is not used, so that negating a weight negates its level."""

KL_LIMIT = 0.01
"""Mean nats a position. `pocket` on 4 x 256 tokens of this project's pages: 0.004 in float32 and 0.007 in bfloat16;
the same rounding to 4 bits, in blocks of 32 columns, moves it by 0.42."""


class Int8Linear(nn.Module):
    """`x @ (levels * scale).T + bias`, the scale applied after the product."""

    levels: Tensor
    scale: Tensor

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__()
        levels, scale = rounded(plain.weight.detach())
        self.register_buffer("levels", levels)
        self.register_buffer("scale", scale)  # in float32: bfloat16 would be wrong by up to 0.4 % of a whole row
        self.bias = plain.bias

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch new_dim"]:
        out = (F.linear(x, self.levels.to(x.dtype)) * self.scale).to(x.dtype)
        return out if self.bias is None else out + self.bias


@dataclass(frozen=True)
class Drift:
    """What quantising did to a model."""

    mean_kl: float
    """Nats a position of the probe, plain against quantised."""
    max_kl: float
    agreement: float
    """Share of positions whose most likely token stays."""
    bytes_before: int
    bytes_after: int
    """Weights of the whole model."""


def rounded(weight: Float[Tensor, "rows columns"]) -> tuple[Tensor, Float[Tensor, " rows"]]:
    """int8 levels and a float32 scale a row; a row of zeros has scale 1."""
    wide = weight.float()
    scale = wide.abs().amax(1) / LEVELS
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (wide / scale[:, None]).round().to(torch.int8), scale


def divergence(
    plain: Float[Tensor, "rows length vocab"],
    other: Float[Tensor, "rows length vocab"],
    counted: Bool[Tensor, "rows length"] | None = None,
) -> tuple[float, float, float]:
    """Mean and largest KL(plain || other) in nats over the counted positions, and the share of equal top tokens."""
    mine, theirs = (logits.float().log_softmax(-1) for logits in (plain, other))
    each = (mine.exp() * (mine - theirs)).sum(-1)
    same = plain.argmax(-1) == other.argmax(-1)
    if counted is not None:
        each, same = each[counted], same[counted]
    if not each.numel():
        raise ValueError("the probe counts no position; give it text")
    return float(each.mean()), float(each.max()), float(same.float().mean())


@torch.no_grad()
def quantise(
    model: ChatModel,
    probe: Callable[[ChatModel], Float[Tensor, "rows length vocab"]],
    limit: float = KL_LIMIT,
    counted: Bool[Tensor, "rows length"] | None = None,
    rounding: Callable[[nn.Linear], nn.Module] = Int8Linear,
) -> Drift:
    """Round the language layers of `model` in place, to int8 or by `rounding`, which makes a new layer of one.

    Embedding, head, connector and vision part stay. `probe` gives the logits of a batch that stands for the use, the
    same one each time; `counted` is False where a position is padding. ValueError, with the plain weights back in
    place, where the mean KL is above `limit` or not a number.
    """
    if not limit > 0:
        raise ValueError(f"KL limit {limit} must be above 0; {KL_LIMIT} is the default")
    places = _linears(model)
    if not places or any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("no plain linear layers to quantise: merge adapters first, or it has been done already")
    before, plain = _bytes(model), probe(model)
    made = [rounding(layer) for _, _, layer in places]
    for (parent, name, _), layer in zip(places, made, strict=True):
        setattr(parent, name, layer)
    mean, largest, agreement = divergence(plain, probe(model), counted)
    if not mean <= limit:
        for parent, name, layer in places:
            setattr(parent, name, layer)
        raise ValueError(
            f"rounded weights move the answers by {mean:.3g} nats a position, limit {limit:.3g}; the model is as it "
            f"was: use dtype bfloat16, or raise the limit if that is acceptable"
        )
    return Drift(mean, largest, agreement, before, _bytes(model))


def is_rounded(tensor: Tensor) -> bool:
    """Weights that no checkpoint layout holds: int8 levels, or torchao's tensors, which look like the plain ones."""
    return tensor.dtype == torch.int8 or type(tensor).__module__.startswith("torchao.")


def stored(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that one is made of: itself, or those inside a torchao tensor."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from stored(getattr(tensor, name))


def _linears(model: ChatModel) -> list[tuple[nn.Module, str, nn.Linear]]:
    """Parent, name and layer of every linear map in the language model's blocks."""
    blocks = model.language.model.model.layers
    return [
        (parent, name, child)
        for parent in blocks.modules()
        for name, child in parent.named_children()
        if type(child) is nn.Linear and not is_rounded(child.weight)
    ]


def _bytes(model: ChatModel) -> int:
    return sum(part.nbytes for tensor in (*model.parameters(), *model.buffers()) for part in stored(tensor))
