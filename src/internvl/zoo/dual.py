"""InternVL-C and -G: the released sizes (paper 1.0, table 1), `pocket-dual`, and `tiny-dual` of random weights."""

from __future__ import annotations

from dataclasses import replace

from internvl.config import DualConfig, LanguageConfig
from internvl.zoo.released import VISION
from internvl.zoo.small import LLAMA_TINY, SMOLLM2_135M, VIT_POCKET, VIT_TINY_6B

CHINESE_ALPACA_7B = LanguageConfig(
    "llama",
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 49954,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "tie_word_embeddings": False,
    },
)
"""The multilingual LLaMA-7B of QLLaMA (official chinese_alpaca_lora_7b/config.json)."""

_14B = DualConfig(VISION["InternViT-6B-224px"], CHINESE_ALPACA_7B)
_FINE_TUNED = replace(_14B, vision=replace(_14B.vision, image_size=364), image_size=364)

SMOLLM2_KEPT = tuple(range(12))
"""Layers of SmolLM2-135M that `pocket-dual` keeps, in their order."""

SMOLLM2_SHORT = replace(
    SMOLLM2_135M,
    settings={
        **SMOLLM2_135M.settings,
        "num_hidden_layers": len(SMOLLM2_KEPT),
        "vocab_size": 49152,
        "pad_token_id": 0,
    },
)
"""Without the image tokens of `pocket`. Id 0 is <|endoftext|>, which no text contains: padding, as in the release."""

DUAL: dict[str, DualConfig] = {
    "InternVL-14B-224px": _14B,
    "InternVL-14B-Flickr30K-FT-364px": _FINE_TUNED,
    "InternVL-14B-FlickrCN-FT-364px": _FINE_TUNED,
    "InternVL-C-13B-224px": replace(_14B, generative=False),
    "pocket-dual": DualConfig(
        VIT_POCKET, SMOLLM2_SHORT, num_queries=32, cross_every=4, embed_width=384, pool_heads=6
    ),
    "tiny-dual": DualConfig(
        VIT_TINY_6B,
        replace(LLAMA_TINY, settings={**LLAMA_TINY.settings, "num_hidden_layers": 4}),
        num_queries=5,
        embed_width=24,
        pool_heads=4,
    ),
}
"""`InternVL-C-13B-224px` is the original `internvl_c_13b_224px.pth`; the others are checkpoint folders."""
