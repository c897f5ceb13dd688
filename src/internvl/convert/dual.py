"""InternVL-C and -G on disk: the official folder (config.json, key names) and the original `.pth`, both ways.

The original names are those of the classification and segmentation code and of `internvl_c_13b_224px.pth`
(official classification/hf2pytorch.py, clip_benchmark/.../internvl_c.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from internvl.config import DualConfig, LanguageConfig
from internvl.convert.keys import Rule, rename
from internvl.convert.parts import (
    LANGUAGE_SIZES,
    VISION_CONSTANTS,
    VISION_FIELDS,
    VISION_RULES,
    checked,
    mapping,
    rest,
    vision_config,
    vision_settings,
)

MODEL_TYPE = "internvl"

FIELDS = {
    "image_size": "force_image_size",
    "num_queries": "num_query_token",
    "embed_width": "clip_embed_dim",
    "pool_heads": "attn_pool_num_heads",
    "label_smoothing": "label_smoothing",
}
DEFAULTS: dict[str, Any] = {
    "force_image_size": None,
    "num_query_token": 96,
    "clip_embed_dim": 768,
    "attn_pool_num_heads": 16,
    "label_smoothing": 0.0,
}
"""What an absent field means (official configuration_internvl.py)."""

CONSTANTS: dict[str, Any] = {
    "architectures": ["InternVLModel"],
    "model_type": MODEL_TYPE,
    "use_backbone_lora": 0,
    "use_qllama_lora": 0,
}
CROSS_EVERY = "cross_attention_frequency"
GENERATIVE = "internvl_generative"
"""Our one field more: false in a folder of InternVL-C alone, which the official layout does not know."""

DERIVED_KEYS = (
    "qllama.model.layers.*.self_attn.rotary_emb.inv_freq",
    "transformer.layers.*.self_attn.rotary_emb.inv_freq",
)
"""Computed from the config; ignored where a file has them."""


def is_dual(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json is InternVL-C's or -G's: transformers calls its chat model by the same name."""
    return settings.get("model_type") == MODEL_TYPE and "text_config" not in settings


def from_official(settings: Mapping[str, Any], where: object = "config.json") -> DualConfig:
    """The config of an `internvl` config.json."""
    if not is_dual(settings):
        raise ValueError(f"{where}: model_type is {settings.get('model_type')!r}, must be {MODEL_TYPE!r}")
    for key in ("use_backbone_lora", "use_qllama_lora"):
        if settings.get(key):
            raise ValueError(f"{where}: {key} is {settings[key]}, must be 0: fold the adapters in where they were made")
    vision, qllama = mapping(settings, "vision_config", where), mapping(settings, "qllama_config", where)
    wrong = {key: qllama.get(key) for key in LANGUAGE_SIZES if not isinstance(qllama.get(key), int)}
    if wrong:
        raise ValueError(f"{where}: qllama_config has {wrong}; each must be a whole number")
    fields = {ours: settings.get(disk, DEFAULTS[disk]) for ours, disk in FIELDS.items()}
    known = {*FIELDS.values(), "vision_config", "qllama_config", "hidden_size", "torch_dtype", "dtype", GENERATIVE}
    unknown = rest(settings, known, CONSTANTS)
    vision_rest = rest(vision, {*VISION_FIELDS.values(), "drop_path_schedule"}, VISION_CONSTANTS)
    if vision_rest:
        unknown["vision_config"] = vision_rest
    # The official class overwrites the two fields that it stores in qllama_config; they belong to the whole model.
    language = {key: value for key, value in qllama.items() if key not in (CROSS_EVERY, "num_query_token")}
    return checked(
        DualConfig,
        where,
        vision=vision_config(vision, where),
        language=LanguageConfig("llama", language),
        cross_every=qllama.get(CROSS_EVERY, 2),
        generative=settings.get(GENERATIVE, True),
        unknown=unknown,
        **fields,
    )


def to_official(config: DualConfig) -> dict[str, Any]:
    """A config.json that the official InternVLModel reads, of InternVL-G; C alone is ours only."""
    unknown = dict(config.unknown)
    vision_rest = unknown.pop("vision_config", {})
    fields = {disk: getattr(config, ours) for ours, disk in FIELDS.items()}
    own = {} if config.generative else {GENERATIVE: False}
    qllama = {CROSS_EVERY: config.cross_every, "num_query_token": config.num_queries}
    return {
        **CONSTANTS,
        **unknown,
        **fields,
        **own,
        "hidden_size": config.language.width,
        "vision_config": {**VISION_CONSTANTS, **vision_rest, **vision_settings(config.vision)},
        "qllama_config": {**config.language.settings, **qllama},
    }


def _pool(ours: str, disk: str) -> list[Rule]:
    return [
        *(rename(f"{ours}.norm_{part}.*", f"{disk}.norm1_{part}.*") for part in "qkv"),
        *(rename(f"{ours}.{part}.bias", f"{disk}.cross_attn.{part}_bias") for part in "qkv"),
        *(rename(f"{ours}.{part}.weight", f"{disk}.cross_attn.{part}.weight") for part in "qkv"),
        rename(f"{ours}.proj.*", f"{disk}.cross_attn.proj.*"),
    ]


def _trunk(disk: str) -> list[Rule]:
    layers = f"{disk}.layers.*"
    return [
        rename("qllama.layers.*.attention_norm.*", f"{layers}.input_layernorm.*"),
        rename("qllama.layers.*.mlp_norm.*", f"{layers}.post_attention_layernorm.*"),
        rename("qllama.layers.*.attention.*", f"{layers}.self_attn.*"),
        rename("qllama.layers.*.cross.query_norm.*", f"{layers}.cross_attn.norm1.*"),
        rename("qllama.layers.*.cross.vision_norm.*", f"{layers}.cross_attn.norm2.*"),
        rename("qllama.layers.*.cross.*", f"{layers}.cross_attn.*"),
        rename("qllama.layers.*.mlp.*", f"{layers}.mlp.*"),
        rename("qllama.embed_tokens.*", f"{disk}.embed_tokens.*"),
        rename("qllama.norm.*", f"{disk}.norm.*"),
    ]


_BY_THEMSELVES = [rename("text_projection", "text_projection"), rename("logit_scale", "logit_scale")]

QUERY_RULES: list[Rule] = [rename("qllama.queries", "query_tokens"), *_trunk("qllama.model")]
"""The queries and what they pass through: what a chat model of 1.0 has of InternVL-G."""

BESIDE_QUERIES = (
    *("qllama.model.embed_tokens.*", "qllama.lm_head.*", "clip_projector.*", "clip_projector2.*", "itm_head.*"),
    *("text_projection", "logit_scale"),
)
"""What else the folder of InternVL-G holds: texts, and heads."""

OFFICIAL_RULES: list[Rule] = [
    *VISION_RULES,
    rename("qllama.head.*", "qllama.lm_head.*"),
    *QUERY_RULES,
    *_pool("image_pool", "clip_projector"),
    *_pool("query_pool", "clip_projector2"),
    rename("match_head.*", "itm_head.*"),
    *_BY_THEMSELVES,
]
"""Our keys and those of the official folder: 1,048 of the 14B model."""

ORIGINAL_VISION_RULES = [
    rename("vision.embeddings.class_embedding", "cls_token"),
    rename("vision.embeddings.position_embedding", "pos_embed"),
    rename("vision.embeddings.patch_embedding.*", "patch_embed.proj.*"),
    rename("vision.layers.*.scale1", "blocks.*.ls1.gamma"),
    rename("vision.layers.*.scale2", "blocks.*.ls2.gamma"),
    rename("vision.layers.*.attention.*", "blocks.*.attn.*"),
    rename("vision.layers.*", "blocks.*"),
]

ORIGINAL_RULES: list[Rule] = [
    *ORIGINAL_VISION_RULES,
    *_trunk("transformer"),
    *_pool("image_pool", "clip_projector"),
    *_BY_THEMSELVES,
]
"""Our keys and those of an original `.pth`, InternVL-C or an encoder with its pooling."""
