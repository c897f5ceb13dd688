"""The fast path of decoding: Llama and Qwen2 layers as few large operators over fused weights and a static cache.

Equal to transformers' module (tests/generate), whose weights it reads once, when it is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float, Int
from torch import Tensor, nn

from internvl.models.attention import attend
from internvl.models.decoder import Slots
from internvl.models.four_bit import FourBitProduct
from internvl.models.language import LanguageModel
from internvl.models.products import (
    BlockedProduct,
    FixedRows,
    JointGate,
    PlainProduct,
    Product,
    SplitGate,
    keeps_bits,
    ungrouped,
)

Form = Literal["plain", "blocked", "int4"]
PRODUCTS: dict[Form, type[PlainProduct] | type[BlockedProduct]] = {"plain": PlainProduct, "blocked": BlockedProduct}

KEYS_MULTIPLE = 64
"""Attention of a step runs over whole blocks of keys, so that its sums do not depend on the neighbours' lengths."""

QUERY_BLOCK = {torch.bfloat16: 128, torch.float32: 64, torch.float16: 128}
"""Queries of one block of a prompt (measured on two cores)."""


@dataclass
class _Layer:
    norm1: Tensor
    qkv: Product
    out: Product
    norm2: Tensor
    gated: Callable[[Tensor], Tensor]
    down: Product


class FusedDecoder:
    """See `Decoder`. `exact`: every row has the bits that it would have alone."""

    def __init__(
        self, language: LanguageModel, form: Form = "blocked", *, reading: Form | None = None, exact: bool = True
    ) -> None:
        """`reading`: the form for prompts and the head where the steps take 4-bit blocks."""
        model = language.model
        config = model.config
        self.language = language
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.dtype = self.embedding.dtype
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        self.scale = self.head_width**-0.5
        self.width, self.mlp_width = config.hidden_size, config.intermediate_size
        device = self.embedding.device
        self.eps = torch.tensor((self.width * config.rms_norm_eps) ** 0.5, device=device)
        self.slots = Slots(len(model.model.layers), self.kv_heads, self.head_width, self.dtype, device)
        self.flat: list[tuple[Tensor, Tensor]] = []
        self.turns = torch.empty(0, self.head_width // 2, dtype=torch.complex64, device=device)
        # Prompts, and the output head, are read with the weights as they are: 4-bit blocks serve the layers of the
        # steps, where memory traffic decides (a 4-bit head alone costs 0.05 nats of KL, docs/chat.md).
        reading = form if form != "int4" else reading or "blocked"
        # float32 rows part by 1e-6 at most: not worth the time.
        fixed = self._parting(form, reading) if exact and self.dtype == torch.bfloat16 else frozenset()
        self.layers = [self._layer(layer, form, fixed) for layer in model.model.layers]
        if form == "int4":
            self.reading = [self._layer(layer, reading) for layer in model.model.layers]
        else:
            self.reading = [_alone(layer) for layer in self.layers]
        self.norm = self._norm_weight(model.model.norm)
        self.head = _product(reading, [model.lm_head], "head" in fixed)

    # weights

    def _layer(self, layer: Any, form: Form, fixed: frozenset[str] = frozenset()) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        gate, up = [mlp.gate_proj], [mlp.up_proj]
        if form == "int4" or "gate" in fixed:
            gated: Callable[[Tensor], Tensor] = JointGate(_product(form, gate + up, "gate" in fixed))
        else:
            gated = SplitGate(PRODUCTS[form](*_joined(gate)), PRODUCTS[form](*_joined(up)))
        return _Layer(
            self._norm_weight(layer.input_layernorm),
            _product(form, [attention.q_proj, attention.k_proj, attention.v_proj], "qkv" in fixed),
            _product(form, [attention.o_proj], "out" in fixed),
            self._norm_weight(layer.post_attention_layernorm),
            gated,
            _product(form, [mlp.down_proj], "down" in fixed),
        )

    def _parting(self, form: Form, reading: Form) -> frozenset[str]:
        """Products that sum a wide batch in another order than a single row on this processor."""
        model = self.language.model
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        tried = {
            "qkv": (form, [attention.q_proj, attention.k_proj, attention.v_proj]),
            "out": (form, [attention.o_proj]),
            "gate": (form, [mlp.gate_proj]),
            "down": (form, [mlp.down_proj]),
            "head": (reading, [model.lm_head]),
        }
        return frozenset(
            name for name, (way, some) in tried.items() if not keeps_bits(_product(way, some), some[0].in_features)
        )

    def _norm_weight(self, norm: Any) -> Tensor:
        """RMSNorm divides by the norm over sqrt(width): the root is here."""
        weight: Tensor = norm.weight.detach().float() * self.width**0.5
        return weight

    # cache

    def reserve(self, rows: int, length: int) -> None:
        if not self.slots.reserve(rows, -(-length // KEYS_MULTIPLE) * KEYS_MULTIPLE):
            return
        self.flat = [
            (keys.view(-1, self.head_width), values.view(-1, self.head_width))
            for keys, values in zip(self.slots.keys, self.slots.values, strict=True)
        ]
        # Not beyond the model's positions: a rope that depends on the length would change for all of them.
        last = min(self.slots.capacity, self.language.model.config.max_position_embeddings)
        positions = torch.arange(last, device=self.embedding.device)[None]
        cos, sin = self.language.model.model.rotary_emb(self.norm, positions)
        half = self.head_width // 2
        self.turns = torch.complex(cos[0, :, :half].float(), sin[0, :, :half].float())

    def move(self, source: int, target: int, length: int) -> None:
        self.slots.move(source, target, length)

    # computation

    @torch.inference_mode()
    def read(self, prompts: Sequence[Float[Tensor, "_ width"]], rows: Sequence[int]) -> Float[Tensor, "prompts vocab"]:
        """One by one: a prompt fills the cores, and its bits do not depend on its neighbours."""
        return torch.cat([self._read(prompt, row) for prompt, row in zip(prompts, rows, strict=True)])

    def _read(self, x: Float[Tensor, "length width"], row: int) -> Float[Tensor, "1 vocab"]:
        length = len(x)
        turns = self.turns[:length]
        x = x.to(self.dtype)
        for index, layer in enumerate(self.reading):
            q, k, v = self._project(x, layer, turns)
            self.slots.keys[index][row, :, :length] = k
            self.slots.values[index][row, :, :length] = v
            if layer is self.reading[-1]:
                q, x = q[:, -1:], x[-1:]  # nothing above needs the other positions
            x = self._finish(x, attend_causally(q, k, v, self.scale), layer)
        return self.head(self._normalise(x, self.norm))

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " rows"], lengths: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        attention = self._step_attention(lengths)
        turns = self.turns[torch.tensor(lengths)]
        x = F.embedding(tokens, self.embedding)
        for index, layer in enumerate(self.layers):
            x = self._finish(x, attention(index, *self._project(x, layer, turns)), layer)
        return self.head(self._normalise(x, self.norm))

    def _step_attention(self, lengths: Sequence[int]) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
        """Store one position a row, then attend to each row's own past. Made once a step, used by every layer."""
        rows, kv_heads, capacity = len(lengths), self.kv_heads, self.slots.capacity
        positions = torch.tensor(lengths)
        longest = -(-(max(lengths) + 1) // KEYS_MULTIPLE) * KEYS_MULTIPLE
        row_of = torch.arange(rows)
        places = ((row_of[None] * kv_heads + torch.arange(kv_heads)[:, None]) * capacity + positions[None]).flatten()
        unseen = torch.arange(longest) > positions[:, None]
        mask = torch.zeros(rows, longest, dtype=self.dtype).masked_fill_(unseen, -torch.inf)[:, None, None]
        group, width, scale = self.heads // kv_heads, self.head_width, self.scale
        keys, values, flat = self.slots.keys, self.slots.values, self.flat
        sdpa = F.scaled_dot_product_attention

        def attention(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            flat_keys, flat_values = flat[index]
            flat_keys.index_copy_(0, places, k.reshape(-1, width))
            flat_values.index_copy_(0, places, v.reshape(-1, width))
            # The heads that share keys stand as queries of one head: CPU sdpa then reads the keys once.
            seen = sdpa(
                q.view(kv_heads, group, rows, width).permute(2, 0, 1, 3),
                keys[index][:rows, :, :longest],
                values[index][:rows, :, :longest],
                attn_mask=mask,
                scale=scale,
            )
            return seen.reshape(rows, -1)

        return attention

    def _project(
        self, x: Float[Tensor, "length width"], layer: _Layer, turns: Complex[Tensor, "length half"]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (heads, length, head_width); the first two rotated, halves interleaved."""
        qkv = layer.qkv(self._normalise(x, layer.norm1))
        length, width, half = len(x), self.head_width, self.head_width // 2
        rotated = self.heads + self.kv_heads
        stride = qkv.stride(0)
        # Interleaved halves are complex numbers, so rotating is one product; q k^T does not see the order.
        pairs = torch.empty(rotated, length, half, 2)
        pairs.copy_(qkv.as_strided((rotated, length, half, 2), (width, stride, 1, half)))
        torch.view_as_complex(pairs).mul_(turns)
        both = pairs.view(rotated, length, width).to(self.dtype)
        v = qkv.as_strided((self.kv_heads, length, width), (width, stride, 1), qkv.storage_offset() + rotated * width)
        return both[: self.heads], both[self.heads :], v

    def _finish(self, x: Tensor, seen: Float[Tensor, "length heads_width"], layer: _Layer) -> Tensor:
        x = layer.out.plus(seen, x)
        y = self._normalise(x, layer.norm2)
        return layer.down.plus(layer.gated(y), x)

    def _normalise(self, x: Float[Tensor, "length width"], weight: Tensor) -> Float[Tensor, "length width"]:
        """RMSNorm in float32: the norm, with eps inside by hypot, in four operators."""
        norm = torch.linalg.vector_norm(x, 2, -1, True, dtype=torch.float32)
        return torch.div(x, norm.hypot_(self.eps)).mul_(weight).to(self.dtype)


def attend_causally(
    q: Float[Tensor, "heads queries head_width"],
    k: Float[Tensor, "kv_heads keys head_width"],
    v: Float[Tensor, "kv_heads keys head_width"],
    scale: float,
) -> Float[Tensor, "queries heads_width"]:
    """Attention of the last positions of one sequence, without gradients.

    On a CPU by blocks of queries, each against the keys up to its end, as plain products in which the heads that
    share keys are rows of one matrix: 1.5 (float32) to 3.5 times (bfloat16) as fast as sdpa at 100 to 1,000 tokens.
    """
    (heads, queries, width), (kv_heads, keys, _) = q.shape, k.shape
    if q.device.type != "cpu" or queries == 1:
        seen = attend(q[None], k[None], v[None], causal=True, scale=scale)
        return seen[0].transpose(0, 1).reshape(queries, -1)
    size = QUERY_BLOCK[q.dtype]
    out = torch.empty(queries, heads, width, dtype=q.dtype)
    unseen = torch.full((size, size), -torch.inf, dtype=q.dtype).triu_(1)
    q, group, before = q * scale, heads // kv_heads, keys - queries
    for start in range(0, queries, size):
        stop = min(start + size, queries)
        rows, end = stop - start, before + stop
        scores = torch.bmm(q[:, start:stop].reshape(kv_heads, group * rows, width), k[:, :end].transpose(1, 2))
        scores.view(heads, rows, end)[:, :, -rows:].add_(unseen[:rows, :rows])
        out[start:stop] = torch.bmm(scores.softmax(-1), v[:, :end]).view(heads, rows, width).transpose(0, 1)
    return out.view(queries, -1)


def _alone(layer: _Layer) -> _Layer:
    """The same weights for a prompt, which is read alone: it needs no groups of one number of rows."""
    gated = layer.gated
    if isinstance(gated, JointGate):
        gated = JointGate(ungrouped(gated.both))
    return replace(layer, qkv=ungrouped(layer.qkv), out=ungrouped(layer.out), gated=gated, down=ungrouped(layer.down))


def _joined(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of several matrices with the same input."""
    weights = [linear.weight.detach() for linear in linears]
    biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
    return torch.cat(weights) if len(weights) > 1 else weights[0], torch.cat(biases) if biases else None


def _product(form: Form, linears: Sequence[nn.Linear], fixed: bool = False) -> Product:
    """One product of several matrices; `fixed`: in groups of one number of rows."""
    product = FourBitProduct(*_joined(linears)) if form == "int4" else PRODUCTS[form](*_joined(linears))
    return FixedRows(product) if fixed else product
