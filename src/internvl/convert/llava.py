"""InternVL-Chat 1.0 as it was released: a folder of LLaVA-1.5's layout, read and not written (internvl_chat_llava).

The folder holds the projector and the language model; the vision tower lies in a folder of its own, or inside, under
`model.vision_tower`. What config.json leaves open is that of the official code: sizes in pixels follow from the
tower's name, the template is Vicuna's.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from internvl.config import ChatConfig, DualConfig, VisionConfig
from internvl.convert.dual import QUERY_RULES
from internvl.convert.keys import Rule, rename
from internvl.convert.parts import VISION_RULES, checked, language_config, one_of

MODEL_TYPES = ("llava", "llava_llama")
ARCHITECTURE = "LlavaLlamaForCausalLM"
PROJECTORS = {"mlp2x_gelu": False, "two_mlp": True}
"""`mm_projector_type` -> whether it has an MLP for queries."""
INSIDE = "model.vision_tower.vision_tower."
"""What the keys of a tower begin with that was saved with the rest."""
DERIVED_KEYS = ("model.layers.*.rotary_emb.inv_freq",)
OF_LLAVA = ("image_aspect_ratio", "image_grid_pinpoints", "architectures", "auto_map", "model_type", "_name_or_path")
"""Beside `mm_...` and `..._mm_...`: fields that are not the language model's."""


def is_llava(settings: Mapping[str, Any]) -> bool:
    """Whether a config.json has this layout."""
    return settings.get("model_type") in MODEL_TYPES


def tower_name(settings: Mapping[str, Any]) -> str:
    """Last part of what the folder calls its tower: OpenGVLab/InternViT-6B-224px -> InternViT-6B-224px."""
    return PurePosixPath(str(settings.get("mm_vision_tower", settings.get("vision_tower", "")))).name


def has_queries(settings: Mapping[str, Any], where: object = "config.json") -> bool:
    """Whether the projector takes queries of QLLaMA."""
    return PROJECTORS[one_of(settings.get("mm_projector_type"), tuple(PROJECTORS), "mm_projector_type", where)]


def from_llava(
    settings: Mapping[str, Any],
    vision: VisionConfig,
    queries: DualConfig | None,
    where: object = "config.json",
    tile_size: int | None = None,
) -> ChatConfig:
    """The config of a chat folder over a tower of these sizes.

    `tile_size` in pixels; None as the official code has it: 448 where the tower's name says so, else 336.
    """
    if has_queries(settings, where) != (queries is not None):
        tower = "has no queries of QLLaMA" if queries is None else "has queries"
        raise ValueError(
            f"{where}: mm_projector_type is {settings['mm_projector_type']!r}, but the vision tower {tower}"
        )
    for field in ("mm_use_im_start_end", "mm_use_im_patch_token"):
        if settings.get(field):
            raise ValueError(
                f"{where}: {field} is {settings[field]!r}, must be false: 1.0 has no tokens around patches"
            )
    one_of(settings.get("mm_vision_select_feature", "patch"), ("patch",), "mm_vision_select_feature", where)
    width = vision.width if queries is None else queries.language.width
    if settings.get("mm_hidden_size", width) != width:
        raise ValueError(
            f"{where}: mm_hidden_size is {settings['mm_hidden_size']}, the vision tower has {width}; give its own tower"
        )
    language = {k: v for k, v in settings.items() if k not in OF_LLAVA and "mm_" not in k and k != "vision_tower"}
    language |= {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return checked(
        ChatConfig,
        where,
        vision=vision,
        queries=queries,
        language=language_config(language, where),
        tile_size=tile_size or (448 if "448" in tower_name(settings) else 336),
        downsample=1.0,
        feature_layer=settings.get("mm_vision_select_layer", -4),
        template="v1",
        dynamic_tiles=False,
        thumbnail=False,
        max_tiles=1,
        pad_to_square=settings.get("image_aspect_ratio") == "pad",
        crop=True,
        connector_norm=False,
        image_marks=False,
    )


def llava_rules(config: ChatConfig) -> list[Rule]:
    """Our keys and those of the folder; the tower's are spelled as in its own folder, `vision_model.` first."""
    first = "mm_projector" if config.queries is None else "mm_projector.mlp1"
    return [
        *VISION_RULES,
        *QUERY_RULES,
        rename("connector.fc1.*", f"{first}.0.*"),
        rename("connector.fc2.*", f"{first}.2.*"),
        rename("connector.query_fc1.*", "mm_projector.mlp2.0.*"),
        rename("connector.query_fc2.*", "mm_projector.mlp2.2.*"),
        rename("language.model.*", "*"),
    ]


def plain_key(key: str) -> str:
    """A stored key as `llava_rules` spells it: the projector alone was saved without `model.`, or with it."""
    return key.removeprefix("model.") if key.startswith("model.mm_projector.") else key
