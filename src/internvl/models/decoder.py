"""Decoding with slots of a preallocated cache: what the engine calls, and the path that fits any language model.

Rows 0..n-1 of the cache are the live answers. The fast path of Llama-shaped models is fused.py; choosing tokens,
and who gets which row, is generate/engine.py's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from transformers.cache_utils import Cache

from internvl.models.language import LanguageModel


@runtime_checkable
class Decoder(Protocol):
    """Keys and values of several answers, one a row."""

    def reserve(self, rows: int, length: int) -> None:
        """Room for `rows` answers of `length` positions; what is there is kept."""

    def read(self, prompts: Sequence[Float[Tensor, "_ width"]], rows: Sequence[int]) -> Tensor:
        """Fill rows with prompts; logits (prompts, vocab) of their last positions."""

    def step(self, tokens: Int[Tensor, " rows"], lengths: Sequence[int]) -> Tensor:
        """One more token for rows 0..n-1, which hold `lengths` positions each; logits (rows, vocab)."""

    def move(self, source: int, target: int, length: int) -> None:
        """Copy a row over another one."""


class Slots:
    """The tensors of the cache: for every layer keys and values of (slots, kv_heads, capacity, head_width)."""

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_width: int,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device],
    ) -> None:
        """`device` of all layers, or one each where the model is spread (placement.py)."""
        self.shape = (layers, kv_heads, head_width)
        self.rows = self.capacity = 0
        devices = [device] * layers if isinstance(device, (str, torch.device)) else device
        self.keys: list[Tensor] = [torch.empty(0, kv_heads, 0, head_width, dtype=dtype, device=d) for d in devices]
        self.values: list[Tensor] = list(self.keys)

    def reserve(self, rows: int, length: int) -> bool:
        """Grow to at least this size, keeping what is there; True where the tensors are new."""
        if rows <= self.rows and length <= self.capacity:
            return False
        old_rows, old_capacity = self.rows, self.capacity
        self.rows = max(rows, old_rows)
        if length > old_capacity:
            self.capacity = max(length, 2 * old_capacity)  # copied seldom, however lengths come
        _, kv_heads, head_width = self.shape
        for tensors in (self.keys, self.values):
            for layer, old in enumerate(tensors):
                new = old.new_zeros(self.rows, kv_heads, self.capacity, head_width)
                new[:old_rows, :, :old_capacity] = old
                tensors[layer] = new
        return True

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in (*self.keys, *self.values):
            tensor[target, :, :length] = tensor[source, :, :length]


class PlainDecoder:
    """Any transformers model, through its own forward: every family, every device."""

    def __init__(self, language: LanguageModel) -> None:
        config = language.model.config
        head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        dtype = language.model.get_input_embeddings().weight.dtype
        devices = [next(layer.parameters()).device for layer in language.model.model.layers]
        self.language = language
        self.slots = Slots(config.num_hidden_layers, config.num_key_value_heads, head_width, dtype, devices)

    def reserve(self, rows: int, length: int) -> None:
        self.slots.reserve(rows, length)

    def move(self, source: int, target: int, length: int) -> None:
        self.slots.move(source, target, length)

    @torch.inference_mode()
    def read(self, prompts: Sequence[Float[Tensor, "_ width"]], rows: Sequence[int]) -> Float[Tensor, "prompts vocab"]:
        """On a CPU one by one, which gives the same bits in every company; on a GPU padded at the end.

        A padded end needs no mask: causal attention never looks there, and the next tokens overwrite it.
        """
        groups = [[i] for i in range(len(prompts))] if prompts[0].device.type == "cpu" else [list(range(len(prompts)))]
        last = []
        for group in groups:
            longest = max(len(prompts[i]) for i in group)
            embeds = torch.stack([F.pad(prompts[i], (0, 0, 0, longest - len(prompts[i]))) for i in group])
            hidden = self.language(embeds, cache=_Prompts(self.slots, [rows[i] for i in group]))
            ends = torch.tensor([len(prompts[i]) - 1 for i in group], device=hidden.device)
            last.append(hidden[torch.arange(len(group), device=hidden.device), ends])
        return self.language.head(torch.cat(last))

    @torch.inference_mode()
    def step(self, tokens: Int[Tensor, " rows"], lengths: Sequence[int]) -> Float[Tensor, "rows vocab"]:
        positions = torch.tensor(lengths, device=tokens.device)
        seen = torch.arange(max(lengths) + 1, device=tokens.device) <= positions[:, None]
        hidden = self.language(
            self.language.embed(tokens[:, None]),
            attention_mask=seen[:, None, None],
            position_ids=positions[:, None],
            cache=_NextTokens(self.slots, positions, max(lengths) + 1),
        )
        return self.language.head(hidden[:, 0])


class _SlotCache(Cache):
    """What transformers' layers see of the slots."""

    def __init__(self, slots: Slots) -> None:
        super().__init__(layers=[])
        self.slots = slots

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions are always given, so nothing is derived from it."""
        return 0


class _Prompts(_SlotCache):
    """Whole prompts go into their rows; attention sees the prompts alone."""

    def __init__(self, slots: Slots, rows: list[int]) -> None:
        super().__init__(slots)
        self.target = rows

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        length = key_states.shape[2]
        self.slots.keys[layer_idx][self.target, :, :length] = key_states
        self.slots.values[layer_idx][self.target, :, :length] = value_states
        return key_states, value_states


class _NextTokens(_SlotCache):
    """One position goes into every row; attention sees the rows up to the longest."""

    def __init__(self, slots: Slots, positions: Tensor, longest: int) -> None:
        super().__init__(slots)
        self.index = torch.arange(len(positions), device=positions.device), positions
        self.longest = longest

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        keys, values = self.slots.keys[layer_idx], self.slots.values[layer_idx]
        rows, positions = (index.to(keys.device) for index in self.index)
        keys[rows, :, positions] = key_states[:, :, 0]
        values[rows, :, positions] = value_states[:, :, 0]
        return keys[: len(rows), :, : self.longest], values[: len(rows), :, : self.longest]
