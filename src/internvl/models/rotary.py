"""Rotary angles that depend on how long the text is: LongRoPE (Phi-3) and dynamic NTK scaling (InternLM2).

transformers takes the longest sequence of a batch for all of them, and dynamic scaling remembers the longest one ever
seen. Here each sequence has the frequencies of its own length, so that company and order change no answer.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

KINDS = ("longrope", "dynamic")


class LengthRotary(nn.Module):
    """In the place of a transformers rotary embedding; frequencies come from its formulas."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        scaling = config.rope_parameters
        self.config, self.kind = config, scaling["rope_type"]
        self.limit = int(scaling.get("original_max_position_embeddings") or config.max_position_embeddings)
        """Longest sequence that has the plain frequencies."""
        frequencies, self.strength = self._frequencies(None)
        self.inv_freq = nn.Buffer(frequencies, persistent=False)

    @torch.no_grad()
    def forward(
        self, x: Tensor, position_ids: Int[Tensor, "rows length"]
    ) -> tuple[Float[Tensor, "rows length head"], Float[Tensor, "rows length head"]]:
        """Cosines and sines, in the type of `x`. A sequence begins where positions do not go on by one."""
        lengths = sequence_lengths(position_ids)
        angles = position_ids[..., None].float() * self.inv_freq.to(x.device).float()
        longer = lengths.clamp(max=self.limit + 1) if self.kind == "longrope" else lengths
        for length in longer[longer > self.limit].unique().tolist():
            here = longer == length
            angles[here] = position_ids[here][:, None].float() * self._frequencies(length)[0].to(x.device)
        both = torch.cat([angles, angles], -1)
        return (both.cos() * self.strength).to(x.dtype), (both.sin() * self.strength).to(x.dtype)

    def _frequencies(self, length: int | None) -> tuple[Float[Tensor, " half"], float]:
        frequencies, strength = ROPE_INIT_FUNCTIONS[self.kind](self.config, None, seq_len=length)
        return frequencies, float(strength)


def sequence_lengths(position_ids: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """For every token, how long its sequence is so far: one more than the last position of its run."""
    ends = torch.ones_like(position_ids, dtype=torch.bool)
    ends[:, :-1] = position_ids[:, 1:] != position_ids[:, :-1] + 1
    places = torch.arange(position_ids.shape[1], device=position_ids.device).expand_as(position_ids)
    last = torch.where(ends, places, places.shape[1]).flip(1).cummin(1).values.flip(1)
    return position_ids.gather(1, last) + 1
