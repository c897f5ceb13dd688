"""The native layout of transformers (InternVLForConditionalGeneration): config.json and key names, both ways.

What that layout has no place for (template, tiling, the official language settings) travels in a field of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from internvl.config import ChatConfig, LanguageConfig, LanguageFamily, VisionConfig
from internvl.convert.keys import Rule, fuse, rename, thirds
from internvl.convert.official import from_official, to_official

MODEL_TYPE = "internvl"
EXTRA = "official_config"
"""Our field in a native config.json; transformers keeps it and does not read it."""

FAMILIES: dict[str, LanguageFamily] = {"llama": "llama", "qwen2": "qwen2", "phi3": "phi3"}
CLASSES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "phi3": "Phi3ForCausalLM"}
NOT_IN_TEXT = {"architectures", "auto_map", "model_type", "bias", "attn_implementation", "_attn_implementation"}

VISION_FIELDS = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "norm": "norm_type",
    "norm_eps": "layer_norm_eps",
    "qkv_bias": "attention_bias",
    "qk_norm": "use_qk_norm",
    "scale_init": "layer_scale_init_value",
    "weight_std": "initializer_range",
}
CORE_TEXT = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def to_native(config: ChatConfig, image_token_id: int | None) -> dict[str, Any]:
    """A config.json for transformers; ValueError where it has no such model."""
    _refuse(config, image_token_id)
    vision = {disk: getattr(config.vision, ours) for ours, disk in VISION_FIELDS.items()}
    side, patch = config.vision.image_size, config.vision.patch_size
    text = {key: value for key, value in config.language.settings.items() if key not in NOT_IN_TEXT}
    if config.language.family == "internlm2":
        text["attention_bias"] = bool(config.language.settings.get("bias", False))
    scaling = text.get("rope_scaling")
    if config.language.family == "phi3" and scaling and scaling.get("type") == "su":
        text["rope_scaling"] = {**scaling, "type": "longrope"}  # the name that transformers 5 knows
    official = to_official(config)
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "image_token_id": image_token_id,
        "image_seq_length": config.tokens_per_tile,
        "downsample_ratio": config.downsample,
        "projector_hidden_act": "gelu",
        "vision_feature_layer": config.feature_layer,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": config.language.tied,
        "text_config": {**text, "model_type": _text_type(config.language)},
        "vision_config": {
            "model_type": "internvl_vision",
            "hidden_act": "gelu",
            "image_size": [side, side],
            "patch_size": [patch, patch],
            "use_absolute_position_embeddings": True,
            "use_mean_pooling": True,
            **vision,
        },
        EXTRA: official,
    }


def from_native(settings: Mapping[str, Any], where: object = "config.json") -> tuple[ChatConfig, int]:
    """The config and the id of <IMG_CONTEXT>."""
    vision, text = settings.get("vision_config"), settings.get("text_config")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping) or "image_token_id" not in settings:
        raise ValueError(f"{where}: needs vision_config, text_config and image_token_id; is this a native checkpoint?")
    if text.get("model_type") not in FAMILIES:
        raise ValueError(f"{where}: language model {text.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    family = FAMILIES[text["model_type"]]
    tied = bool(settings.get("tie_word_embeddings", True))
    language = {**text, "architectures": [CLASSES[family]], "tie_word_embeddings": tied}
    own = _vision(vision, where)
    config = ChatConfig(
        vision=own,
        language=LanguageConfig(family, language),
        tile_size=own.image_size,
        downsample=settings.get("downsample_ratio", 0.5),
        feature_layer=settings.get("vision_feature_layer", -1),
    )
    return _with_extra(config, settings.get(EXTRA), where), int(settings["image_token_id"])


def native_rules(config: ChatConfig) -> list[Rule]:
    """Our keys and those that transformers writes (5.x, `model.` in front)."""
    block, tower = "vision.layers.*", "model.vision_tower.encoder.layer.*"
    projections = tuple(f"{tower}.attention.{name}_proj.*" for name in "qkv")
    return [
        Rule((f"{block}.attention.qkv.*",), projections, fuse, thirds),
        rename(f"{block}.attention.proj.*", f"{tower}.attention.projection_layer.*"),
        rename(f"{block}.norm1.*", f"{tower}.layernorm_before.*"),
        rename(f"{block}.norm2.*", f"{tower}.layernorm_after.*"),
        rename(f"{block}.scale1", f"{tower}.lambda_1"),
        rename(f"{block}.scale2", f"{tower}.lambda_2"),
        rename(block, tower),
        rename("vision.embeddings.class_embedding", "model.vision_tower.embeddings.cls_token"),
        rename("vision.embeddings.position_embedding", "model.vision_tower.embeddings.position_embeddings"),
        rename("vision.embeddings.patch_embedding.*", "model.vision_tower.embeddings.patch_embeddings.projection.*"),
        rename("connector.norm.*", "model.multi_modal_projector.layer_norm.*"),
        rename("connector.fc1.*", "model.multi_modal_projector.linear_1.*"),
        rename("connector.fc2.*", "model.multi_modal_projector.linear_2.*"),
        rename("language.model.lm_head.*", "lm_head.*"),
        rename("language.model.model.*", "model.language_model.*"),
    ]


HEAD_KEY = "lm_head.weight"
OLD_PREFIXES = {
    "vision_tower.": "model.vision_tower.",
    "multi_modal_projector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}


def current_key(key: str) -> str:
    """The key as transformers names it in memory; `save_pretrained` and older releases write other prefixes."""
    for old, new in OLD_PREFIXES.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key


def _text_type(config: LanguageConfig) -> str:
    return "llama" if config.family == "internlm2" else config.family


def _refuse(config: ChatConfig, image_token_id: int | None) -> None:
    if config.queries is not None or not config.connector_norm:
        raise ValueError("InternVL-Chat 1.0 has no native form: no queries there, and a norm in every connector")
    if config.pixel_shuffle != "v2":
        raise ValueError("pixel shuffle v1 has no native form: transformers emits tokens row by row; use official")
    if image_token_id is None:
        raise ValueError("the native layout stores the id of <IMG_CONTEXT>; set model.image_token_id first")
    if config.vision.qk_norm and config.vision.norm_eps != 1e-6:
        raise ValueError(f"vision norm eps {config.vision.norm_eps}: transformers norms queries and keys with 1e-6")


def _vision(settings: Mapping[str, Any], where: object) -> VisionConfig:
    if not settings.get("use_absolute_position_embeddings", True):
        raise ValueError(f"{where}: a vision tower without position embeddings is not InternViT")
    if not settings.get("use_mean_pooling", True):
        raise ValueError(f"{where}: use_mean_pooling is false, which adds a final norm that InternViT has not")
    fields = {ours: settings[disk] for ours, disk in VISION_FIELDS.items() if disk in settings}
    fields.setdefault("qkv_bias", False)  # transformers' default; ours is that of the 300M
    side, patch = settings.get("image_size", 448), settings.get("patch_size", 14)
    try:
        return VisionConfig(
            **fields,
            image_size=side if isinstance(side, int) else side[0],
            patch_size=patch if isinstance(patch, int) else patch[0],
        )
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where}: vision_config: {error}") from error


def _with_extra(config: ChatConfig, extra: object, where: object) -> ChatConfig:
    """Add what only the official config says, where it still describes the same model."""
    if not isinstance(extra, Mapping):
        return config
    official = from_official(extra, where)
    mine, theirs = config.language.settings, official.language.settings
    schedule = official.vision.drop_path_schedule
    vision = replace(config.vision, drop_path=official.vision.drop_path, drop_path_schedule=schedule)
    if vision != official.vision or any(mine.get(key) != theirs.get(key) for key in CORE_TEXT):
        return config
    settings = {**theirs, "vocab_size": mine["vocab_size"], "tie_word_embeddings": config.language.tied}
    if "tie_word_embeddings" not in theirs and not config.language.tied:
        del settings["tie_word_embeddings"]
    return replace(official, language=replace(official.language, settings=settings))
