"""The language models that releases were built on, each as a difference from another, with the releases' vocabulary.

For tests and plans: loading reads the checkpoint's own `llm_config`. Sizes are those of the public base models; where
neither paper nor code of InternVL states one, it is named in `unverified`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from internvl.config import LanguageConfig


@dataclass(frozen=True)
class Base:
    """A language model before InternVL trained it further."""

    name: str
    """As its authors call it."""
    config: LanguageConfig
    unverified: tuple[str, ...] = ()
    """Settings of `config` that are assumptions."""


def differ(base: LanguageConfig, **settings: Any) -> LanguageConfig:
    """The same model with other settings."""
    return replace(base, settings={**base.settings, **settings})


LLAMA2_13B = LanguageConfig(
    "llama",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 40,
        # Not published. What 19.1B leaves for it, rounded down: between 35,000 and 45,000 rows.
        "vocab_size": 40000,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
    },
)
VICUNA_13B = differ(LLAMA2_13B, vocab_size=32000, bos_token_id=1, eos_token_id=2, pad_token_id=0)
"""Sizes of LLaMA2-13B: with InternViT they are the 37.9 GB that hub: InternVL-Chat-ViT-6B-Vicuna-13B holds."""
VICUNA_7B = differ(
    VICUNA_13B,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)
"""As config.json of hub: InternVL-Chat-ViT-6B-Vicuna-7B, which leaves out rope_theta: LLaMA's default."""
YI_34B = differ(
    LLAMA2_13B,
    hidden_size=7168,
    intermediate_size=20480,
    num_hidden_layers=60,
    num_attention_heads=56,
    num_key_value_heads=8,
    vocab_size=64009,  # base 64,000 and the nine special tokens: not published
    rope_theta=5e6,
)
LLAMA3_70B = differ(
    YI_34B,
    hidden_size=8192,
    intermediate_size=28672,
    num_hidden_layers=80,
    num_attention_heads=64,
    vocab_size=128265,  # base 128,256 and the nine special tokens: not published
    max_position_embeddings=8192,
    rope_theta=5e5,
)

INTERNLM2_1_8B = LanguageConfig(
    "internlm2",
    {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "vocab_size": 92553,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
        "hidden_act": "silu",
        "bias": False,
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": False,
    },
)
INTERNLM2_7B = differ(
    INTERNLM2_1_8B, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32
)
INTERNLM2_20B = differ(
    INTERNLM2_7B, hidden_size=6144, intermediate_size=16384, num_hidden_layers=48, num_attention_heads=48
)

QWEN2_0_5B = LanguageConfig(
    "qwen2",
    {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151655,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "use_sliding_window": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "tie_word_embeddings": False,
    },
)
"""Tied in its base release; official chat checkpoints store both matrices (official configuration_internvl_chat.py)."""
QWEN2_5_0_5B = differ(QWEN2_0_5B, vocab_size=151674)
QWEN2_5_3B = differ(
    QWEN2_5_0_5B, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16
)
QWEN2_5_32B = differ(
    QWEN2_5_0_5B,
    hidden_size=5120,
    intermediate_size=27648,
    num_hidden_layers=64,
    num_attention_heads=40,
    num_key_value_heads=8,
)
QWEN2_5_72B = differ(
    QWEN2_5_32B, hidden_size=8192, intermediate_size=29568, num_hidden_layers=80, num_attention_heads=64
)

PHI3_MINI = LanguageConfig(
    "phi3",
    {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32020,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        # LongRoPE has 48 factors of each kind; the real ones are in the checkpoint. Ones leave positions as they are.
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 32000,
        "pad_token_id": 32000,
        "tie_word_embeddings": False,
    },
)

_MLP = ("intermediate_size",)
_WIDTHS = ("hidden_size", "num_hidden_layers", "num_key_value_heads", *_MLP)
_CONTEXT = ("max_position_embeddings",)
_ROTARY = ("rope_theta",)
_NORM = ("rms_norm_eps",)
LANGUAGES: dict[str, Base] = {
    base.name: base
    for base in (
        Base("vicuna-7b-v1.5", VICUNA_7B),
        Base("vicuna-13b-v1.5", VICUNA_13B, (*_CONTEXT, *_NORM)),
        Base("LLaMA2-13B (Chinese chat)", LLAMA2_13B, ("vocab_size", *_ROTARY, *_NORM)),
        Base("Nous-Hermes-2-Yi-34B", YI_34B, ("vocab_size", *_CONTEXT, *_NORM)),
        Base("Hermes-2-Theta-Llama-3-70B", LLAMA3_70B, ("vocab_size", *_MLP, *_CONTEXT, *_ROTARY, *_NORM)),
        Base("internlm2-chat-1_8b", INTERNLM2_1_8B, _NORM),
        Base("internlm2_5-1_8b-chat", INTERNLM2_1_8B, _NORM),
        Base("internlm2_5-7b-chat", INTERNLM2_7B, (*_MLP, *_NORM)),
        Base("internlm2-chat-20b", INTERNLM2_20B, (*_WIDTHS, *_NORM)),
        Base("internlm2_5-20b-chat", INTERNLM2_20B, (*_WIDTHS, *_NORM)),
        Base("Qwen2-0.5B-Instruct", QWEN2_0_5B, (*_MLP, *_CONTEXT, *_ROTARY, *_NORM)),
        Base("Qwen2.5-0.5B-Instruct", QWEN2_5_0_5B, (*_MLP, *_CONTEXT, *_ROTARY, *_NORM)),
        Base("Qwen2.5-3B-Instruct", QWEN2_5_3B, (*_CONTEXT, *_ROTARY, *_NORM)),
        Base("Qwen2.5-32B-Instruct", QWEN2_5_32B, (*_MLP, *_CONTEXT, *_ROTARY, *_NORM)),
        Base("Qwen2.5-72B-Instruct", QWEN2_5_72B, (*_MLP, *_CONTEXT, *_ROTARY, *_NORM)),
        Base("Phi-3-mini-128k-instruct", PHI3_MINI, ("rope_scaling", *_CONTEXT, *_ROTARY, *_NORM)),
    )
}
"""By name. Parameter counts confirm the assumed sizes to the printed digit (tests/test_zoo.py)."""
