"""What the layouts share: an InternViT and a language model in a config.json, their keys, checks of fields."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from internvl.config import LanguageConfig, LanguageFamily, VisionConfig
from internvl.convert.keys import GroupedQKV, Rule, rename

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

VISION_CONSTANTS: dict[str, Any] = {
    "architectures": ["InternVisionModel"],
    "model_type": "intern_vit_6b",
    "hidden_act": "gelu",
    "num_channels": 3,
}
"""Written always; kept as unknown where a file says otherwise."""

LANGUAGE_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""Must be there: no default fits every language model."""

VISION_RULES = [
    rename("vision.embeddings.*", "vision_model.embeddings.*"),
    rename("vision.layers.*.attention.*", "vision_model.encoder.layers.*.attn.*"),
    rename("vision.layers.*.scale1", "vision_model.encoder.layers.*.ls1"),
    rename("vision.layers.*.scale2", "vision_model.encoder.layers.*.ls2"),
    rename("vision.layers.*", "vision_model.encoder.layers.*"),
]


def language_rules(config: LanguageConfig) -> list[Rule]:
    """Our keys and the official ones of a language model."""
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
    one_of(fields["norm"], ("layer_norm", "rms_norm"), "norm_type", where)
    schedule = one_of(settings.get("drop_path_schedule", "linear"), ("linear", "uniform"), "drop_path_schedule", where)
    return checked(VisionConfig, where, **fields, drop_path_schedule=schedule)


def vision_settings(config: VisionConfig) -> dict[str, Any]:
    """The inverse of `vision_config`, without what is the same for all."""
    settings = {disk: getattr(config, ours) for ours, disk in VISION_FIELDS.items()}
    if config.drop_path_schedule != "linear":
        settings["drop_path_schedule"] = config.drop_path_schedule
    return settings


def language_config(settings: Mapping[str, Any], where: object) -> LanguageConfig:
    """A language model from `llm_config`, or from the config.json of one alone."""
    names = settings.get("architectures") or [None]
    if names[0] not in FAMILIES:
        raise ValueError(f"{where}: language model {names[0]!r} is not one of {', '.join(FAMILIES)}")
    wrong = {key: settings.get(key) for key in LANGUAGE_SIZES if not isinstance(settings.get(key), int)}
    if wrong:
        raise ValueError(f"{where}: the language model has {wrong}; each must be a whole number")
    return LanguageConfig(FAMILIES[names[0]], settings)


def one_of(value: Any, allowed: tuple[Any, ...], field: str, where: object) -> Any:
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
