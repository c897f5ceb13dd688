"""`pocket`, and the `tiny-*` models of random weights for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from internvl.config import FORM_1_0, ChatConfig, DualConfig, LanguageConfig, VisionConfig

VIT_TINY = VisionConfig(width=64, depth=3, heads=4, mlp_width=112, image_size=56)
"""InternViT-300M in small: LayerNorm and qkv bias."""

VIT_TINY_6B = replace(VIT_TINY, norm="rms_norm", qkv_bias=False, qk_norm=True)
"""InternViT-6B in small: RMSNorm, normed queries and keys, no qkv bias."""

VIT_POCKET = VisionConfig(width=384, depth=11, heads=6, mlp_width=1536, image_size=224, scale_init=1.0)
"""DINOv2 small without its last block, in the InternViT layout; positions resized from 37 x 37 to 16 x 16."""

TINY_SETTINGS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "initializer_range": 0.08,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}

LLAMA_TINY = LanguageConfig("llama", {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **TINY_SETTINGS})
QWEN2_TINY = LanguageConfig("qwen2", {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **TINY_SETTINGS})
INTERNLM2_TINY = LanguageConfig(
    "internlm2",
    {
        "architectures": ["InternLM2ForCausalLM"],
        "model_type": "internlm2",
        **TINY_SETTINGS,
        "bias": False,
        "rope_scaling": {"type": "dynamic", "factor": 2.0},
    },
)
PHI3_TINY = LanguageConfig(
    "phi3",
    {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        **TINY_SETTINGS,
        "num_key_value_heads": 4,
        "original_max_position_embeddings": 128,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
    },
)

SMOLLM2_135M = LanguageConfig(
    "llama",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49161,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000.0,
        "hidden_act": "silu",
        "initializer_range": 0.041666666666666664,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "tie_word_embeddings": True,
    },
)
"""SmolLM2-135M-Instruct: 49,152 tokens and the nine special ones; the output head shares the embedding."""


DUAL_TINY = DualConfig(
    VIT_TINY_6B,
    replace(LLAMA_TINY, settings={**LLAMA_TINY.settings, "num_hidden_layers": 4}),
    num_queries=5,
    embed_width=24,
    pool_heads=4,
)
"""InternVL-G in small."""

VIT_TINY_1_0 = replace(VIT_TINY_6B, depth=5)
"""Of the tiny chat models of 1.0, which tap the fourth hidden state from the last: here that of block 2."""


def _tiny_1_0(queries: DualConfig | None = None) -> ChatConfig:
    return ChatConfig(
        VIT_TINY_1_0,
        LLAMA_TINY,
        tile_size=56,
        template="v1",
        **FORM_1_0,
        queries=queries,
    )


def _tiny(language: LanguageConfig, vision: VisionConfig = VIT_TINY) -> ChatConfig:
    return ChatConfig(vision, language, tile_size=56)


CHAT: dict[str, ChatConfig] = {
    "pocket": ChatConfig(
        VIT_POCKET,
        SMOLLM2_135M,
        tile_size=224,
        max_tiles=4,  # as many as it learned from
        system_message="You are InternVL pocket, a small assistant that sees pictures.",
    ),
    "tiny-llama": _tiny(LLAMA_TINY),
    "tiny-qwen2": _tiny(QWEN2_TINY),
    "tiny-phi3": _tiny(PHI3_TINY),
    "tiny-internlm2": _tiny(INTERNLM2_TINY),
    "tiny-6b-llama": _tiny(LLAMA_TINY, VIT_TINY_6B),
    "tiny-6b-qwen2": _tiny(QWEN2_TINY, VIT_TINY_6B),
    "tiny-1.0": _tiny_1_0(),
    # QLLaMA is wider than the encoder here, as in the release: a swap of the two shows.
    "tiny-1.0-qllama": _tiny_1_0(
        replace(
            DUAL_TINY,
            vision=VIT_TINY_1_0,
            language=replace(LLAMA_TINY, settings={**DUAL_TINY.language.settings, "hidden_size": 80}),
        )
    ),
}
"""Names that open by themselves: `pocket` from packaged weights, the others with random ones."""
