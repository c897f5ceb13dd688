"""QLLaMA: a LLaMA whose learned queries look at a picture (paper 1.0, section 3.2; official modeling_qllama.py).

Queries come first, text after them. Text never looks at the picture itself: it sees what the queries gathered, as far
as the mask of its task lets it. Embeddings and heads are `contrastive.py`'s.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from internvl.config import DualConfig
from internvl.models.attention import attend
from internvl.models.layers import Linear, RMSNorm, rotary_angles, rotate

Task = Literal["itm", "itc", "itg"]
"""Matching, contrast, captions (image-text matching, image-text contrast, image-grounded text generation)."""

Pair = tuple[Tensor, Tensor]
"""Keys and values of one layer: (rows, kv_heads, positions, head_width) each."""


def visible(
    task: Task, text_mask: Bool[Tensor, "rows text"], num_queries: int
) -> Bool[Tensor, "rows 1 positions positions"]:
    """True where a position (queries, then text) sees another; padding is seen by none (official modeling_internvl.py).

    itm: everything sees everything. itc: queries and text do not see each other, text is causal. itg: text is causal
    and sees the queries, which do not see text.
    """
    rows, length = text_mask.shape
    total = num_queries + length
    if task == "itm":
        allowed = text_mask.new_ones(total, total)
    elif task in ("itc", "itg"):
        allowed = text_mask.new_ones(total, total).tril()
        allowed[:num_queries, :num_queries] = True
        allowed[num_queries:, :num_queries] = task == "itg"
    else:
        raise ValueError(f"task {task!r}; it is 'itm', 'itc' or 'itg'")
    keys = torch.cat([text_mask.new_ones(rows, num_queries), text_mask], dim=1)
    return _never_blind(allowed & keys[:, None, None])


def causal_text(text_mask: Bool[Tensor, "rows text"], num_before: int = 0) -> Bool[Tensor, "rows 1 text keys"]:
    """Rows of `visible` that belong to text alone, after `num_before` positions that all of them see."""
    rows, length = text_mask.shape
    causal = text_mask.new_ones(length, length).tril() & text_mask[:, None, None]
    return _never_blind(torch.cat([text_mask.new_ones(rows, 1, length, num_before), causal], dim=-1))


def _never_blind(allowed: Tensor) -> Tensor:
    """A padded position on the left sees nothing, which is NaN in some kernels: let it see all; nobody sees it."""
    return allowed | ~allowed.any(-1, keepdim=True)


class Cache:
    """Keys and values of positions already read, a pair a layer. Gradients flow through them.

    Grown by concatenation: a caption is some dozens of tokens, so copying them costs less than a layer's products.
    """

    def __init__(self) -> None:
        self.pairs: list[Pair] = []

    @property
    def length(self) -> int:
        return self.pairs[0][0].shape[2] if self.pairs else 0

    def pick(self, rows: Int[Tensor, " new_rows"]) -> Cache:
        """A cache of these rows, each as often as it is named."""
        picked = Cache()
        picked.pairs = [(keys[rows], values[rows]) for keys, values in self.pairs]
        return picked

    def copy(self) -> Cache:
        """The same positions; what is read into one is not in the other."""
        other = Cache()
        other.pairs = list(self.pairs)
        return other


class SelfAttention(nn.Module):
    """LLaMA's: rotary positions, fewer key heads where the configuration says so."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        language = config.language
        self.heads, self.kv_heads, self.head_width = language.heads, language.kv_heads, language.head_width
        self.q_proj = Linear(language.width, self.heads * self.head_width, bias=False)
        self.k_proj = Linear(language.width, self.kv_heads * self.head_width, bias=False)
        self.v_proj = Linear(language.width, self.kv_heads * self.head_width, bias=False)
        self.o_proj = Linear(self.heads * self.head_width, language.width, bias=False)

    def forward(
        self,
        x: Float[Tensor, "rows length width"],
        angles: Float[Tensor, "length head_width"],
        mask: Bool[Tensor, "rows_or_1 1 length keys"] | None,
        causal: bool,
        past: Pair | None,
    ) -> tuple[Float[Tensor, "rows length width"], Pair]:
        """Output, and keys and values of all positions, those of the past first."""
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for y in (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        )
        q, k = rotate(q, angles), rotate(k, angles)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out: Tensor = self.o_proj(attend(q, k, v, causal=causal, mask=mask).transpose(1, 2).flatten(2))
        return out, (k, v)


class CrossAttention(nn.Module):
    """Queries look at every position of the picture, class token too: no mask, no rotary positions, no gate."""

    def __init__(self, config: DualConfig) -> None:
        super().__init__()
        width, seen, self.head_width = config.language.width, config.vision.width, config.language.head_width
        inner = config.language.heads * self.head_width
        self.query_norm = RMSNorm(width, config.norm_eps)
        self.vision_norm = RMSNorm(seen, config.norm_eps)
        self.q_proj = Linear(width, inner, bias=False)
        self.k_proj = Linear(seen, inner, bias=False)
        self.v_proj = Linear(seen, inner, bias=False)
        self.o_proj = Linear(inner, width, bias=False)

    def forward(
        self,
        queries: Float[Tensor, "rows queries width"],
        features: Float[Tensor, "images positions dim"],
        image_of_row: Int[Tensor, " rows"] | None,
    ) -> Float[Tensor, "rows queries width"]:
        """Keys and values are made once an image, however many rows ask about it."""
        seen = self.vision_norm(features)
        q, k, v = (
            y.unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for y in (self.q_proj(self.query_norm(queries)), self.k_proj(seen), self.v_proj(seen))
        )
        if image_of_row is not None:
            k, v = k[image_of_row], v[image_of_row]
        out: Tensor = self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))
        return out


class GatedMLP(nn.Module):
    """LLaMA's SwiGLU."""

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_proj = Linear(width, hidden_width, bias=False)
        self.up_proj = Linear(width, hidden_width, bias=False)
        self.down_proj = Linear(hidden_width, width, bias=False)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """Self-attention, then cross-attention of the queries where the layer has it and a picture is there, then MLP."""

    def __init__(self, config: DualConfig, index: int) -> None:
        super().__init__()
        width = config.language.width
        self.num_queries = config.num_queries
        self.attention_norm = RMSNorm(width, config.norm_eps)
        self.attention = SelfAttention(config)
        self.cross = CrossAttention(config) if config.crosses(index) else None
        self.mlp_norm = RMSNorm(width, config.norm_eps)
        self.mlp = GatedMLP(width, config.language.mlp_width)

    def forward(
        self,
        x: Float[Tensor, "rows length width"],
        angles: Float[Tensor, "length head_width"],
        mask: Bool[Tensor, "rows_or_1 1 length keys"] | None,
        causal: bool,
        features: Float[Tensor, "images positions dim"] | None,
        image_of_row: Int[Tensor, " rows"] | None,
        past: Pair | None,
    ) -> tuple[Float[Tensor, "rows length width"], Pair]:
        attended, pair = self.attention(self.attention_norm(x), angles, mask, causal, past)
        x = x + attended
        if self.cross is not None and features is not None:
            queries, text = x[:, : self.num_queries], x[:, self.num_queries :]
            x = torch.cat([queries + self.cross(queries, features, image_of_row), text], dim=1)
        return x + self.mlp(self.mlp_norm(x)), pair


class QLLaMA(nn.Module):
    """Rows of queries and text to hidden states after the final norm; without `reads` it takes no text, only looks."""

    def __init__(self, config: DualConfig, reads: bool = True) -> None:
        super().__init__()
        language = config.language
        self.config = config
        self.checkpointing = False
        """Recompute layers in the backward pass instead of keeping their activations."""
        if reads:
            self.embed_tokens = nn.Embedding(language.vocab_size, language.width)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(language.depth))
        self.norm = RMSNorm(language.width, config.norm_eps)
        if config.generative:
            self.queries = nn.Parameter(torch.zeros(1, config.num_queries, language.width))
        if config.generative and reads:
            self.head = Linear(language.width, language.vocab_size, bias=False)

    def forward(
        self,
        x: Float[Tensor, "rows length width"],
        mask: Bool[Tensor, "rows_or_1 1 length keys"] | None = None,
        *,
        causal: bool = True,
        features: Float[Tensor, "images positions dim"] | None = None,
        image_of_row: Int[Tensor, " rows"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "rows length width"]:
        """Without a `mask` causal, or not. With `features` the first positions are the queries; row n looks at image
        `image_of_row[n]` (by default at its own). A cache is extended in place, and its positions come before x.
        """
        before = cache.length if cache is not None else 0
        positions = torch.arange(before, before + x.shape[1], device=x.device)
        angles = rotary_angles(positions, self.config.language.head_width, self.config.rope_base)
        recompute = self.checkpointing and torch.is_grad_enabled()
        pasts = cache.pairs if cache is not None and cache.pairs else [None] * len(self.layers)
        pairs = []
        for layer, past in zip(self.layers, pasts, strict=True):
            given = (x, angles, mask, causal and mask is None, features, image_of_row, past)
            x, pair = checkpoint(layer, *given, use_reentrant=False) if recompute else layer(*given)
            if cache is not None:  # nobody else needs them, and 32 layers of them outweigh a block of the ViT
                pairs.append(pair)
        if cache is not None:
            cache.pairs = pairs
        out: Tensor = self.norm(x)
        return out

    def look(
        self, features: Float[Tensor, "images positions dim"], cache: Cache | None = None
    ) -> Float[Tensor, "images queries width"]:
        """States of the queries of each picture. They see no text in contrast and in captions, so these are theirs."""
        out: Tensor = self(self._queries(len(features)), causal=False, features=features, cache=cache)
        return out

    def read(
        self,
        input_ids: Int[Tensor, "rows text"],
        text_mask: Bool[Tensor, "rows text"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "rows text width"]:
        """Causal text, alone (contrast) or after what a cache holds (captions: the queries; then its own tokens)."""
        before = cache.length if cache is not None else 0
        # On a GPU the look at the mask would cost a synchronisation.
        plain = text_mask is None or (text_mask.device.type == "cpu" and bool(text_mask.all()))
        mask = None if plain or text_mask is None else causal_text(text_mask, before)
        out: Tensor = self(self.embed_tokens(input_ids), mask, cache=cache)
        return out

    def both(
        self,
        features: Float[Tensor, "images positions dim"],
        input_ids: Int[Tensor, "rows text"],
        text_mask: Bool[Tensor, "rows text"],
        task: Task,
        image_of_row: Int[Tensor, " rows"] | None = None,
    ) -> Float[Tensor, "rows queries_and_text width"]:
        """Queries and text in one pass, under the mask of a task."""
        queries = self._queries(len(input_ids))
        x = torch.cat([queries, self.embed_tokens(input_ids)], dim=1)
        out: Tensor = self(x, visible(task, text_mask, queries.shape[1]), features=features, image_of_row=image_of_row)
        return out

    def _queries(self, rows: int) -> Tensor:
        if not self.config.generative:
            raise ValueError("InternVL-C alone has no queries; use head 'c', or a checkpoint of InternVL-G (14B)")
        return self.queries.expand(rows, -1, -1)
