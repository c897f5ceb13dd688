"""InternVL-C and -G: pictures and texts in one space, matching, and the states that captions are read from.

Official modeling_internvl.py. Losses are train/'s; writing captions is generate/'s.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from internvl.config import DualConfig
from internvl.models.attention import attend
from internvl.models.internvit import InternViT
from internvl.models.layers import Linear
from internvl.models.qllama import Cache, QLLaMA

LOGIT_SCALE = math.log(1 / 0.07)
"""Initial value; its exponential divides by the temperature 0.07 (CLIP, section 2.5)."""

Head = Literal["c", "g"]


class AttentionPooling(nn.Module):
    """The mean of the tokens asks all of them: one vector (official AttentionPoolingBlock). No residual, no MLP."""

    def __init__(self, width: int, heads: int, out_width: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_k, self.norm_v = (nn.LayerNorm(width, eps=1e-5) for _ in range(3))
        self.q, self.k, self.v = (Linear(width, width) for _ in range(3))
        self.proj = Linear(width, out_width)

    def forward(self, tokens: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch out_width"]:
        mean = tokens.mean(dim=1, keepdim=True)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.q(self.norm_q(mean)), self.k(self.norm_k(tokens)), self.v(self.norm_v(tokens)))
        )
        out: Tensor = self.proj(attend(q, k, v).transpose(1, 2).flatten(1))
        return out


class DualModel(nn.Module):
    """Official InternVLModel: `vision`, `qllama` and the heads. InternVL-C alone has only what C needs."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        width = config.language.width
        self.config = config
        self.vision = InternViT(config.vision)
        self.qllama = QLLaMA(config)
        self.image_pool = AttentionPooling(config.vision.width, config.pool_heads, config.embed_width)
        self.text_projection = nn.Parameter(torch.zeros(width, config.embed_width))
        self.logit_scale = nn.Parameter(torch.tensor(LOGIT_SCALE))
        if config.generative:
            self.query_pool = AttentionPooling(width, config.pool_heads, config.embed_width)
            self.match_head = nn.Linear(width, 2)

    def encode_image(
        self, pixel_values: Float[Tensor, "images 3 height width"], head: Head = "c", raw: bool = False
    ) -> Float[Tensor, "images embed"]:
        """Unit vectors of normalised pictures. g is the sum of two unit vectors, pooled patches (c) and pooled
        queries, made unit again: the ensemble that the published numbers were measured with. `raw` leaves out the
        last division by the length, as the official encode_image does: frames of a video are averaged so.
        """
        if head not in ("c", "g"):
            raise ValueError(f"head {head!r}; it is 'c' (pooled patches) or 'g' (with the pooled queries of QLLaMA)")
        features = self.vision(pixel_values)
        embeds: Tensor = self.image_pool(features)
        if head == "g":
            embeds = unit(embeds) + self.pool_queries(self.qllama.look(features))
        return embeds if raw else unit(embeds)

    def pool_queries(self, states: Float[Tensor, "rows queries width"]) -> Float[Tensor, "rows embed"]:
        """Unit vectors of query states."""
        return unit(self.query_pool(states))

    def encode_text(
        self, input_ids: Int[Tensor, "texts length"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "texts embed"]:
        """Unit vectors, the same for both heads: the state of the last real token. Without a mask id 0 is padding."""
        mask = text_mask(input_ids, attention_mask)
        states = self.qllama.read(input_ids, mask)
        last = states[torch.arange(len(states), device=states.device), last_real(mask)]
        return unit(last @ self.text_projection)

    def similarity(
        self, images: Float[Tensor, "images embed"], texts: Float[Tensor, "texts embed"]
    ) -> Float[Tensor, "images texts"]:
        """Logits of images against texts, unit vectors both."""
        return self.logit_scale.exp() * images @ texts.T

    def match_logits(
        self,
        features: Float[Tensor, "images positions dim"],
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Tensor | None = None,
        image_of_row: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows 2"]:
        """Logits of (no, yes): does the text fit the picture; the mean over queries that saw both."""
        mask = text_mask(input_ids, attention_mask)
        states = self.qllama.both(features, input_ids, mask, "itm", image_of_row)
        out: Tensor = self.match_head(states[:, : self.config.num_queries]).mean(dim=1)
        return out

    def caption_states(
        self, seen: Cache, input_ids: Int[Tensor, "rows length"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "rows length width"]:
        """States of caption tokens after the queries in `seen` (from `qllama.look`); `qllama.head` scores the next."""
        return self.qllama.read(input_ids, text_mask(input_ids, attention_mask), seen.copy())

    def match(
        self,
        pixel_values: Float[Tensor, "rows 3 height width"],
        input_ids: Int[Tensor, "rows length"],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, " rows"]:
        """Probability that each text fits its picture, 0 to 1."""
        return self.match_logits(self.vision(pixel_values), input_ids, attention_mask).softmax(-1)[:, 1]

    def checkpoint(self, on: bool = True) -> None:
        """Recompute vision blocks and QLLaMA layers in the backward pass instead of keeping their activations."""
        self.vision.checkpointing = self.qllama.checkpointing = on


def unit(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
    """Divided by its length."""
    return F.normalize(x, dim=-1)


def text_mask(
    input_ids: Int[Tensor, "rows length"], attention_mask: Tensor | None = None
) -> Bool[Tensor, "rows length"]:
    """True where there is text; without a mask, where the id is above 0 (the contract of the released tokenizer)."""
    mask = input_ids > 0 if attention_mask is None else attention_mask.bool()
    if mask.shape != input_ids.shape:
        raise ValueError(f"attention_mask {tuple(mask.shape)} for ids {tuple(input_ids.shape)}; make them equal")
    empty = (~mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"texts {empty[:8]} have no token at all; begin and end of text are tokens too: add them")
    return mask


def last_real(mask: Bool[Tensor, "rows length"]) -> Int[Tensor, " rows"]:
    """Place of the last real token, on whichever side the padding is."""
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(dim=1)
