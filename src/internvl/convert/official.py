"""The official layout, as the releases and vLLM, SGLang and lmdeploy use it: config.json and key names, both ways.

Fields that this project does not use are kept in `ChatConfig.unknown` and written back.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from internvl.config import ChatConfig, LanguageConfig, LanguageFamily, VisionConfig
from internvl.convert.keys import GroupedQKV, Rule, rename

MODEL_TYPE = "internvl_chat"

FAMILIES: dict[str, LanguageFamily] = {
    "LlamaForCausalLM": "llama",
    "InternLM2ForCausalLM": "internlm2",
    "Phi3ForCausalLM": "phi3",
    "Qwen2ForCausalLM": "qwen2",
}
"""`llm_config.architectures[0]` picks the class (official modeling_internvl_chat.py)."""

VISION_FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "image_size": "image_size",
    "patch_size": "patch_size",
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "qkv_bias",
    "qk_norm": "qk_normalization",
    "scale_init": "initializer_factor",
    "weight_std": "initializer_range",
    "drop_path": "drop_path_rate",
    "norm": "norm_type",
}
"""Our field to the official one."""

VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 3200,
    "num_hidden_layers": 48,
    "num_attention_heads": 25,
    "intermediate_size": 12800,
    "image_size": 224,
    "patch_size": 14,
    "layer_norm_eps": 1e-6,
    "qkv_bias": False,
    "qk_normalization": True,
    "initializer_factor": 0.1,
    "initializer_range": 0.02,
    "drop_path_rate": 0.0,
    "norm_type": "rms_norm",
}
"""What an absent field means (official configuration_intern_vit.py)."""

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

CHAT_CONSTANTS: dict[str, Any] = {
    "architectures": ["InternVLChatModel"],
    "model_type": MODEL_TYPE,
    "use_backbone_lora": 0,
    "use_llm_lora": 0,
}
VISION_CONSTANTS: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_act": "gelu",
    "num_channels": 3,
}
"""Written always; kept as unknown where a file says otherwise."""

READ_BY_US = {*CHAT_FIELDS.values(), "vision_config", "llm_config", "torch_dtype", "dtype"} | {
    *("use_backbone_lora", "use_llm_lora"),  # how the weights are wrapped (convert/lora.py), not what the model is
}

LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Must be there: no default fits every language model."""

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
    _one_of(chat["downsample"], (0.5, 1.0, 0.25), "downsample_ratio", where)
    _one_of(chat["pixel_shuffle"], ("v1", "v2"), "ps_version", where)
    _one_of(chat["normalize"], ("imagenet", "clip", "siglip"), "normalize_type", where)
    unknown = rest(settings, READ_BY_US, CHAT_CONSTANTS)
    vision_rest = rest(vision, {*VISION_FIELDS.values(), "drop_path_schedule"}, VISION_CONSTANTS)
    if vision_rest:
        unknown["vision_config"] = vision_rest
    return checked(
        ChatConfig,
        where,
        vision=vision_config(vision, where),
        language=language_config(language, where),
        unknown=unknown,
        **chat,
    )


def to_official(config: ChatConfig) -> dict[str, Any]:
    """A config.json that the official code, vLLM, SGLang and lmdeploy read."""
    unknown = dict(config.unknown)
    vision_rest = unknown.pop("vision_config", {})
    vision = {disk: getattr(config.vision, ours) for ours, disk in VISION_FIELDS.items()}
    if config.vision.drop_path_schedule != "linear":
        vision["drop_path_schedule"] = config.vision.drop_path_schedule
    chat = {disk: getattr(config, ours) for ours, disk in CHAT_FIELDS.items()}
    if chat["system_message"] is None:
        del chat["system_message"]
    if chat["normalize_type"] == "imagenet":  # no official field: the official code takes it as an argument
        del chat["normalize_type"]
    return {
        **CHAT_CONSTANTS,
        **unknown,
        **chat,
        "vision_config": {**VISION_CONSTANTS, **vision_rest, **vision},
        "llm_config": dict(config.language.settings),
    }


def official_rules(config: ChatConfig) -> list[Rule]:
    """Our keys and the official ones."""
    return [*VISION_RULES, *CONNECTOR_RULES, *language_rules(config.language)]


VISION_RULES = [
    rename("vision.embeddings.*", "vision_model.embeddings.*"),
    rename("vision.layers.*.attention.*", "vision_model.encoder.layers.*.attn.*"),
    rename("vision.layers.*.scale1", "vision_model.encoder.layers.*.ls1"),
    rename("vision.layers.*.scale2", "vision_model.encoder.layers.*.ls2"),
    rename("vision.layers.*", "vision_model.encoder.layers.*"),
]
CONNECTOR_RULES = [
    rename("connector.norm.*", "mlp1.0.*"),
    rename("connector.fc1.*", "mlp1.1.*"),
    rename("connector.fc2.*", "mlp1.3.*"),
]


def language_rules(config: LanguageConfig) -> list[Rule]:
    if config.family != "internlm2":
        return [rename("language.model.*", "language_model.*")]
    ours, disk = "language.model.model.layers.*", "language_model.model.layers.*"
    qkv = GroupedQKV(config.heads, config.kv_heads)
    projections = tuple(f"{ours}.self_attn.{name}_proj.*" for name in "qkv")
    return [
        Rule(projections, (f"{disk}.attention.wqkv.*",), qkv.split, qkv.fuse),
        rename(f"{ours}.self_attn.o_proj.*", f"{disk}.attention.wo.*"),
        rename(f"{ours}.mlp.gate_proj.*", f"{disk}.feed_forward.w1.*"),
        rename(f"{ours}.mlp.up_proj.*", f"{disk}.feed_forward.w3.*"),
        rename(f"{ours}.mlp.down_proj.*", f"{disk}.feed_forward.w2.*"),
        rename(f"{ours}.input_layernorm.*", f"{disk}.attention_norm.*"),
        rename(f"{ours}.post_attention_layernorm.*", f"{disk}.ffn_norm.*"),
        rename("language.model.model.embed_tokens.*", "language_model.model.tok_embeddings.*"),
        rename("language.model.model.norm.*", "language_model.model.norm.*"),
        rename("language.model.lm_head.*", "language_model.output.*"),
    ]


def vision_config(settings: Mapping[str, Any], where: object) -> VisionConfig:
    """InternViT from `vision_config`, or from the config.json of an encoder alone."""
    if settings.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"{where}: vision hidden_act is {settings['hidden_act']!r}, must be 'gelu'")
    fields = {ours: settings.get(disk, VISION_DEFAULTS[disk]) for ours, disk in VISION_FIELDS.items()}
    _one_of(fields["norm"], ("layer_norm", "rms_norm"), "norm_type", where)
    schedule = _one_of(settings.get("drop_path_schedule", "linear"), ("linear", "uniform"), "drop_path_schedule", where)
    return checked(VisionConfig, where, **fields, drop_path_schedule=schedule)


def language_config(settings: Mapping[str, Any], where: object) -> LanguageConfig:
    """A language model from `llm_config`, or from the config.json of one alone."""
    names = settings.get("architectures") or [None]
    if names[0] not in FAMILIES:
        raise ValueError(f"{where}: language model {names[0]!r} is not one of {', '.join(FAMILIES)}")
    wrong = {key: settings.get(key) for key in LANGUAGE_SIZES if not isinstance(settings.get(key), int)}
    if wrong:
        raise ValueError(f"{where}: the language model has {wrong}; each must be a whole number")
    return LanguageConfig(FAMILIES[names[0]], settings)


def _one_of(value: Any, allowed: tuple[Any, ...], field: str, where: object) -> Any:
    if value not in allowed:
        raise ValueError(f"{where}: {field} is {value!r}, must be one of {', '.join(map(str, allowed))}")
    return value


def rest(settings: Mapping[str, Any], known: Iterable[str], constants: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that would be lost: not read, and not written as a constant."""
    return {
        key: value
        for key, value in settings.items()
        if key not in known and (key not in constants or constants[key] != value)
    }


def mapping(settings: Mapping[str, Any], key: str, where: object) -> Mapping[str, Any]:
    value = settings.get(key)
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {key} is {type(value).__name__}, must be an object")
    return value


T = TypeVar("T")


def checked(make: type[T], where: object, **fields: Any) -> T:
    """The dataclass, with the file named when a field has an impossible value."""
    try:
        return make(**fields)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"{where}: {error}") from error
