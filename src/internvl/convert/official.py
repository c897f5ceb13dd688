"""The official layout, as the releases and vLLM, SGLang and lmdeploy use it: config.json and key names, both ways.

Fields that this project does not use are kept in `ChatConfig.unknown` and written back.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from internvl.config import ChatConfig, DualConfig, VisionConfig
from internvl.convert import dual
from internvl.convert.keys import Rule, rename
from internvl.convert.parts import (
    VISION_CONSTANTS,
    VISION_DEFAULTS,
    VISION_FIELDS,
    VISION_RULES,
    checked,
    language_config,
    language_rules,
    mapping,
    one_of,
    rest,
    vision_config,
    vision_settings,
)

MODEL_TYPE = "internvl_chat"

CHAT_FIELDS = {
    "tile_size": "force_image_size",
    "downsample": "downsample_ratio",
    "pixel_shuffle": "ps_version",
    "feature_layer": "select_layer",
    "template": "template",
    "system_message": "system_message",
    "dynamic_tiles": "dynamic_image_size",
    "thumbnail": "use_thumbnail",
    "min_tiles": "min_dynamic_patch",
    "max_tiles": "max_dynamic_patch",
    "pad_to_square": "pad2square",
    "normalize": "normalize_type",
}

CHAT_DEFAULTS: dict[str, Any] = {
    "downsample_ratio": 0.5,
    "ps_version": "v1",
    "select_layer": -1,
    "system_message": None,
    "dynamic_image_size": False,
    "use_thumbnail": False,
    "min_dynamic_patch": 1,
    "max_dynamic_patch": 6,
    "pad2square": False,
    "normalize_type": "imagenet",
}
"""What an absent field means (official configuration_internvl_chat.py); `ps_version` is really v1 then."""

OWN_FIELDS = {
    "connector_norm": ("internvl_connector_norm", True),
    "image_marks": ("internvl_image_marks", True),
    "crop": ("internvl_crop", False),
}
"""What 1.0 does otherwise, for which the official layout, younger than it, has no field; with the usual value."""
QUERIES = "internvl_queries"
"""Likewise: the config of InternVL-G, without the encoder, where its queries are part of the chat model."""

CHAT_CONSTANTS: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": MODEL_TYPE,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
READ_BY_US = {*CHAT_FIELDS.values(), "vision_config", "llm_config", "torch_dtype", "dtype", QUERIES} | {
    *(field for field, _ in OWN_FIELDS.values()),
    *("use_backbone_lora", "use_llm_lora"),  # how the weights are wrapped (convert/lora.py), not what the model is
}

DERIVED_KEYS = ("language_model.*.rotary_emb.inv_freq",)
"""Stored by transformers before 4.32, computed from the config since: ignored where a file has them."""


def from_official(settings: Mapping[str, Any], where: object = "config.json") -> ChatConfig:
    """The config of an `internvl_chat` config.json."""
    if settings.get("model_type") != MODEL_TYPE:
        raise ValueError(f"{where}: model_type is {settings.get('model_type')!r}, must be {MODEL_TYPE!r}")
    if "ps_version" not in settings:
        warnings.warn(
            f"{where}: ps_version is absent, which means v1 (tokens column by column, as releases before 1.5 learned "
            f"them); if the model is newer, set it to v2",
            stacklevel=2,
        )
    vision, language = mapping(settings, "vision_config", where), mapping(settings, "llm_config", where)
    chat = {
        ours: settings.get(disk, CHAT_DEFAULTS.get(disk))
        for ours, disk in CHAT_FIELDS.items()
        if disk in settings or disk in CHAT_DEFAULTS
    }
    if chat.get("tile_size") is None:
        chat["tile_size"] = vision.get("image_size", VISION_DEFAULTS["image_size"])
    if not isinstance(chat.get("template"), str):
        raise ValueError(f"{where}: template is {chat.get('template')!r}, must name a conversation template")
    one_of(chat["downsample"], (0.5, 1.0, 0.25), "downsample_ratio", where)
    one_of(chat["pixel_shuffle"], ("v1", "v2"), "ps_version", where)
    one_of(chat["normalize"], ("imagenet", "clip", "siglip"), "normalize_type", where)
    chat |= {ours: settings.get(disk, usual) for ours, (disk, usual) in OWN_FIELDS.items()}
    unknown = rest(settings, READ_BY_US, CHAT_CONSTANTS)
    vision_rest = rest(vision, {*VISION_FIELDS.values(), "drop_path_schedule"}, VISION_CONSTANTS)
    if vision_rest:
        unknown["vision_config"] = vision_rest
    seen = vision_config(vision, where)
    return checked(
        ChatConfig,
        where,
        vision=seen,
        queries=_queries(settings, seen, where) if QUERIES in settings else None,
        language=language_config(language, where),
        unknown=unknown,
        **chat,
    )


def to_official(config: ChatConfig) -> dict[str, Any]:
    """A config.json that the official code, vLLM, SGLang and lmdeploy read; of 1.0 ours alone."""
    unknown = dict(config.unknown)
    vision_rest = unknown.pop("vision_config", {})
    chat = {disk: getattr(config, ours) for ours, disk in CHAT_FIELDS.items()}
    if chat["system_message"] is None:
        del chat["system_message"]
    if chat["normalize_type"] == "imagenet":  # no official field: the official code takes it as an argument
        del chat["normalize_type"]
    own = {disk: getattr(config, ours) for ours, (disk, usual) in OWN_FIELDS.items() if getattr(config, ours) != usual}
    if config.queries is not None:
        own[QUERIES] = {k: v for k, v in dual.to_official(config.queries).items() if k != "vision_config"}
    return {
        **CHAT_CONSTANTS,
        **unknown,
        **chat,
        **own,
        "vision_config": {**VISION_CONSTANTS, **vision_rest, **vision_settings(config.vision)},
        "llm_config": dict(config.language.settings),
    }


def official_rules(config: ChatConfig) -> list[Rule]:
    """Our keys and the official ones."""
    return [*VISION_RULES, *dual.QUERY_RULES, *CONNECTOR_RULES, *language_rules(config.language)]


CONNECTOR_RULES = [
    rename("connector.norm.*", "mlp1.0.*"),
    rename("connector.fc1.*", "mlp1.1.*"),
    rename("connector.fc2.*", "mlp1.3.*"),
    rename("connector.query_fc1.*", "mlp2.1.*"),
    rename("connector.query_fc2.*", "mlp2.3.*"),
]
"""`mlp2` is ours alone: no release in this layout has queries."""


def _queries(settings: Mapping[str, Any], vision: VisionConfig, where: object) -> DualConfig:
    stored = mapping(settings, QUERIES, where)
    return dual.from_official({**stored, "vision_config": vision_settings(vision)}, f"{where}: {QUERIES}")
