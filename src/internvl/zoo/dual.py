"""InternVL-C and -G: the released sizes (paper 1.0, table 1), `pocket-dual`, and `tiny-dual` of random weights."""

from __future__ import annotations

from dataclasses import replace

from internvl.config import DualConfig, LanguageConfig
from internvl.zoo.small import DUAL_TINY, SMOLLM2_135M, VIT_POCKET
from internvl.zoo.vision import VISION

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

SMOLLM2_KEPT = (*range(6), *range(24, 30))
"""Layers of SmolLM2-135M that `pocket-dual` keeps, in their order: as many from the front as from the back.

Twelve, because a step on two cores costs what the text side costs. These, because of 64 captions of stamps a language
model of layers 0-5 and 24-29 has a loss of 9.4 nats a token before any training, of 0-7 and 26-29 12.7, of the first
twelve 31.7; all thirty have 6.0 (docs/pocket-dual.md).
"""

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
        VIT_POCKET,
        SMOLLM2_SHORT,
        num_queries=32,  # as BLIP-2 (arXiv 2301.12597, section 3.1); 96 would cost three times as much to train
        cross_every=3,  # four blocks of 2.2 MB to ship; every second layer, as in the release, would be six
        embed_width=384,
        pool_heads=6,  # of 64 and 96 numbers
    ),
    "tiny-dual": DUAL_TINY,
}
"""`InternVL-C-13B-224px` is the original `internvl_c_13b_224px.pth`; the others are checkpoint folders."""
