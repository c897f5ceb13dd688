"""Any causal language model of transformers behind one face: embed, forward, head, resize.

Attention goes through transformers' public registry to `attention.py`, so packed rows run as real segments.
Generation loops and losses are left to others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

from internvl.config import LanguageConfig
from internvl.models.attention import attend, causal_mask
from internvl.models.rotary import KINDS, LengthRotary

ATTENTION = "internvl"
"""Our entry in transformers' attention registry. It has no mask function there: masks are made here."""

CONFIG_CLASS: dict[str, type] = {
    "llama": LlamaConfig,
    "internlm2": LlamaConfig,  # same computation under other names; convert/keys.py splits wqkv
    "qwen2": Qwen2Config,
    "phi3": Phi3Config,
}

COMMON_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_scaling"),
    *("rope_parameters", "initializer_range", "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id"),
)
FAMILY_FIELDS: dict[str, tuple[str, ...]] = {
    "llama": ("attention_bias", "mlp_bias", "head_dim"),
    "internlm2": (),
    "qwen2": ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"),
    "phi3": (
        *("original_max_position_embeddings", "partial_rotary_factor", "sliding_window"),
        *("resid_pdrop", "embd_pdrop"),
    ),
}


def transformers_config(config: LanguageConfig) -> Any:
    """The settings that shape the computation, as transformers' own config; the rest stays in `settings`."""
    settings = config.settings
    names = [*COMMON_FIELDS, *FAMILY_FIELDS[config.family]]
    chosen = {name: deepcopy(settings[name]) for name in names if settings.get(name) is not None}
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        chosen.setdefault(name, None)
    scaling = chosen.get("rope_scaling")
    if config.family == "phi3" and scaling and scaling.get("type", scaling.get("rope_type")) == "su":
        # Phi-3-mini-128k before July 2024, so Mini-InternVL-Chat-4B-V1-5; transformers 5 reads it by the new name only
        chosen["rope_scaling"] = {**scaling, "type": "longrope", "rope_type": "longrope"}
    if config.family == "internlm2":
        chosen["attention_bias"] = bool(settings.get("bias", False))
    return CONFIG_CLASS[config.family](**chosen, tie_word_embeddings=config.tied)


class LanguageModel(nn.Module):
    """Built empty or random from a config; weights are assigned by `load.py`."""

    def __init__(self, config: LanguageConfig, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.model: Any = AutoModelForCausalLM.from_config(
            transformers_config(config), attn_implementation=ATTENTION, dtype=dtype
        )
        if self.model.model.rotary_emb.rope_type in KINDS:
            self.model.model.rotary_emb = LengthRotary(self.model.config)

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def switches_at(self) -> int | None:
        """Length beyond which every position has other angles (LongRoPE), so that keys kept from before are void."""
        rotary = self.model.model.rotary_emb
        return rotary.limit if isinstance(rotary, LengthRotary) and rotary.kind == "longrope" else None

    def embed(self, input_ids: Int[Tensor, "rows length"]) -> Float[Tensor, "rows length width"]:
        out: Tensor = self.model.get_input_embeddings()(input_ids)
        return out

    def forward(
        self,
        embeds: Float[Tensor, "rows length width"],
        *,
        attention_mask: Bool[Tensor, "rows keys"]
        | Int[Tensor, "rows keys"]
        | Bool[Tensor, "rows_or_1 heads_or_1 length keys"]
        | None = None,
        position_ids: Int[Tensor, "rows length"] | None = None,
        segments: Int[Tensor, "bounds"] | None = None,
        cache: Any = None,
    ) -> Float[Tensor, "rows length width"]:
        """Hidden states after the final norm.

        `attention_mask` covers the cached positions too. `cache` is a transformers Cache, filled in place.
        """
        if segments is not None:
            if cache is not None or attention_mask is not None:
                raise ValueError("segments describe a whole packed row; give no attention mask and no cache with them")
            segments = segments.cpu()  # read once here, not in every layer
            position_ids = segment_positions(segments, embeds.device) if position_ids is None else position_ids
        mask = attention_mask
        if mask is not None and mask.ndim == 2:
            if position_ids is None and cache is None and isinstance(self.model.model.rotary_emb, LengthRotary):
                position_ids = real_positions(mask.bool())
            mask = padding_mask(mask.bool(), embeds.shape[1])
        hidden: Tensor = self.model.model(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=cache is not None,
            segments=segments,
        ).last_hidden_state
        return hidden

    @property
    def output(self) -> nn.Module:
        """The module that makes scores: a plain matrix where nothing is adapted."""
        out: nn.Module = self.model.lm_head
        return out

    def head(self, hidden: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch vocab"]:
        """Scores of the next token."""
        out: Tensor = self.model.lm_head(hidden)
        return out

    def fill_buffers(self) -> None:
        """Compute the rotary frequencies, in float32: no checkpoint stores them, and rounding would move positions."""
        decoder, device = self.model.model, self.model.get_input_embeddings().weight.device
        with torch.device("cpu" if device.type != "meta" else "meta"):
            decoder.rotary_emb = type(decoder.rotary_emb)(config=self.model.config)
        decoder.rotary_emb.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LanguageModel:
        """Casts and moves leave the rotary frequencies in float32."""
        super()._apply(fn, recurse)
        self.fill_buffers()
        return self

    def checkpoint(self, on: bool) -> None:
        """Recompute layers in the backward pass (training mode only) instead of keeping their activations."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # the new name is not in every transformers 5
            if on:
                self.model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                self.model.gradient_checkpointing_disable()

    @torch.no_grad()
    def resize(self, new_size: int, seed: int = 0) -> None:
        """Change the vocabulary: new input rows are random, new output rows the mean of the old (official rule)."""
        old_size = self.vocab_size
        self.model.resize_token_embeddings(new_size, mean_resizing=False)
        rows = self.model.get_input_embeddings().weight[old_size:]
        rows.normal_(0.0, self.model.config.initializer_range, generator=torch.Generator(rows.device).manual_seed(seed))
        output = self.model.get_output_embeddings().weight
        if new_size > old_size and not self.model.config.tie_word_embeddings:
            output[old_size:] = output[:old_size].float().mean(0).to(output.dtype)


def padding_mask(seen: Bool[Tensor, "rows keys"], queries: int) -> Bool[Tensor, "rows 1 queries keys"] | None:
    """Causal mask over real positions; None on CPU where nothing is padded. The queries are the last positions."""
    if seen.device.type == "cpu" and bool(seen.all()):
        return None
    allowed = causal_mask(queries, seen.shape[1], seen.device) & seen[:, None, None, :]
    return allowed | ~allowed.any(-1, keepdim=True)  # one that sees nothing is NaN in some kernels


def segment_positions(segments: Int[Tensor, "bounds"], device: torch.device) -> Int[Tensor, "1 length"]:
    """Positions that restart at every sample of a packed row."""
    lengths = segments.diff().tolist()
    return torch.cat([torch.arange(length) for length in lengths])[None].to(device)


def real_positions(seen: Bool[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """Places in the row, 0 at padding, which then adds nothing to the length of a sequence."""
    return torch.arange(seen.shape[1], device=seen.device).expand(seen.shape) * seen


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: Tensor | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """What transformers calls in each layer: causal attention by `attend`, in its argument order."""
    if dropout:
        raise ValueError(f"attention dropout {dropout} is not supported; set attention_dropout to 0 in llm_config")
    if sliding_window is not None:
        longest = key.shape[2] if segments is None else int(segments.diff().max())
        if longest > sliding_window:
            raise ValueError(f"{longest} tokens exceed the sliding window of {sliding_window}; use a shorter input")
    out = attend(query, key, value, causal=True, mask=attention_mask, segments=segments, scale=scaling)
    return out.transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
