"""Every released vision encoder and chat checkpoint, each as a difference from another.

For tests, plans and `internvl doctor`: loading reads the checkpoint's own config.json and never this table. What could
not be checked against a published file is named in `unverified`. Sources: papers 1.5, Mini, 2.5, MPO; model cards;
official `internvl/model/internvl_chat` and `internvl/conversation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from internvl.config import ChatConfig, VisionConfig
from internvl.zoo.languages import LANGUAGES

_VIT_6B = VisionConfig(
    width=3200, depth=45, heads=25, mlp_width=12800, norm="rms_norm", qkv_bias=False, qk_norm=True, weight_std=1e-10
)
"""Three blocks fewer than before: the fourth-to-last block had the best features (paper 1.5, section 3.2)."""
_VIT_300M = VisionConfig()

VISION: dict[str, VisionConfig] = {
    "InternViT-6B-224px": replace(_VIT_6B, depth=48, image_size=224),
    "InternViT-6B-448px-V1-0": replace(_VIT_6B, depth=48),
    "InternViT-6B-448px-V1-2": _VIT_6B,
    "InternViT-6B-448px-V1-5": _VIT_6B,
    "InternViT-6B-448px-V2_5": _VIT_6B,
    "InternViT-300M-448px-Distill": _VIT_300M,
    "InternViT-300M-448px": _VIT_300M,
    "InternViT-300M-448px-V2_5": _VIT_300M,
}
"""Vision encoders (paper 2.5, table 1)."""
VISION_BILLIONS = {
    name: ("0.3" if "300M" in name else "5.9" if vision.depth == 48 else "5.5") for name, vision in VISION.items()
}
"""Published sizes, as printed."""


@dataclass(frozen=True)
class Release:
    """One chat checkpoint as it was published."""

    name: str
    config: ChatConfig
    vision: str
    """Key of VISION."""
    language: str
    """Key of LANGUAGES."""
    billions: str
    """Published number of parameters, in billions, with the digits that were printed."""
    date: str | None
    """First day of the release, ISO; None where none was found. InternVL2 came out from this day on."""
    train_tokens: int | None
    """Longest row in the last stage of training; None where it was not published."""
    assumed: tuple[str, ...] = ()
    """Fields of this row, beyond those of the language model, that are assumptions."""

    @property
    def hub_id(self) -> str:
        return f"OpenGVLab/{self.name}"

    @property
    def unverified(self) -> tuple[str, ...]:
        """Fields that are assumptions, as `template`, `vision.scale_init`, `language.vocab_size`."""
        of_language = tuple(f"language.{name}" for name in LANGUAGES[self.language].unverified)
        return (*self.assumed, *of_language, *(("vision.scale_init",) if "300M" in self.vision else ()))


def _differ(base: Release, name: str, vision: str = "", language: str = "", **changes: Any) -> Release:
    """A release like `base` but for what is given: fields of Release, or of its config."""
    vision, language = vision or base.vision, language or base.language
    of_row = {key: changes.pop(key) for key in ("billions", "date", "train_tokens", "assumed") if key in changes}
    config = replace(base.config, vision=VISION[vision], language=LANGUAGES[language].config, **changes)
    return replace(base, name=name, config=config, vision=vision, language=language, **of_row)


def _first_releases() -> Iterator[Release]:
    """One square of 448 px a picture, column-major tokens."""
    vision, language = "InternViT-6B-448px-V1-0", "LLaMA2-13B (Chinese chat)"
    config = ChatConfig(
        VISION[vision],
        LANGUAGES[language].config,
        pixel_shuffle="v1",
        feature_layer=-4,  # the default of the class in those days
        template="internvl_zh",
        dynamic_tiles=False,
        thumbnail=False,
        max_tiles=1,
    )
    first = Release(
        "InternVL-Chat-V1-1", config, vision, language, "19.1", "2024-01-24", None, assumed=("feature_layer",)
    )
    yield first
    second = _differ(
        first,
        "InternVL-Chat-V1-2",
        vision="InternViT-6B-448px-V1-2",
        language="Nous-Hermes-2-Yi-34B",
        feature_layer=-1,
        template="Hermes-2",
        billions="40",
        date="2024-02-11",
        train_tokens=2048,
        assumed=(),
    )
    yield second
    yield _differ(second, "InternVL-Chat-V1-2-Plus", date="2024-02-21", system_message="Answer the questions.")


def _generation_1_5(v1_2: Release) -> Iterator[Release]:
    """Dynamic tiles and row-major tokens."""
    large = _differ(
        v1_2,
        "InternVL-Chat-V1-5",
        vision="InternViT-6B-448px-V1-5",
        language="internlm2-chat-20b",
        pixel_shuffle="v2",
        template="internlm2-chat",
        dynamic_tiles=True,
        thumbnail=True,
        max_tiles=12,
        billions="25.5",
        date="2024-04-18",
        train_tokens=4096,
    )
    yield large
    small = _differ(
        large,
        "Mini-InternVL-Chat-2B-V1-5",
        vision="InternViT-300M-448px",
        language="internlm2-chat-1_8b",
        billions="2.2",
        date="2024-05-19",
        train_tokens=8192,
    )
    yield small
    yield _differ(
        small,
        "Mini-InternVL-Chat-4B-V1-5",
        language="Phi-3-mini-128k-instruct",
        template="phi3-chat",
        billions="4.2",
        date="2024-05-28",
    )


def _generation_2(mini: Release) -> Iterator[Release]:
    """The texts that each repository stores as system message were not read: `system_message` is an assumption."""
    two = _differ(mini, "InternVL2-2B", date="2024-07-04", assumed=("system_message",))
    one = _differ(two, "InternVL2-1B", language="Qwen2-0.5B-Instruct", template="Hermes-2", billions="0.9")
    four = _differ(two, "InternVL2-4B", language="Phi-3-mini-128k-instruct", template="phi3-chat", billions="4.2")
    eight = _differ(two, "InternVL2-8B", language="internlm2_5-7b-chat", billions="8.1")
    large = _differ(
        two, "InternVL2-26B", vision="InternViT-6B-448px-V1-5", language="internlm2-chat-20b", billions="25.5"
    )
    forty = _differ(large, "InternVL2-40B", language="Nous-Hermes-2-Yi-34B", template="Hermes-2", billions="40.1")
    yield from (one, two, four, eight)
    yield _differ(eight, "InternVL2-8B-MPO", date="2024-11-14")
    yield from (large, forty)
    yield _differ(
        large,
        "InternVL2-Llama3-76B",
        language="Hermes-2-Theta-Llama-3-70B",  # the scripts name internlm2-chat for it
        billions="76.3",
        assumed=("system_message", "template"),
    )
    for base in (one, two, four):
        size = base.name.removeprefix("InternVL2-")
        for domain in ("Drivelm", "BDD", "RS", "Medical"):
            yield _differ(
                base,
                f"Mini-InternVL2-{size}-DA-{domain}",
                date=None,
                train_tokens=16384,
                assumed=("system_message", "max_tiles"),
            )


def _generation_2_5(v2: Release) -> Iterator[Release]:
    """One template for all sizes; then the same sizes after preference optimisation."""
    two = _differ(
        v2,
        "InternVL2_5-2B",
        vision="InternViT-300M-448px-V2_5",
        language="internlm2_5-1_8b-chat",
        template="internvl2_5",
        date="2024-12-05",
        train_tokens=16384,
        assumed=(),
    )
    large = _differ(
        two, "InternVL2_5-26B", vision="InternViT-6B-448px-V2_5", language="internlm2_5-20b-chat", billions="25.5"
    )
    sizes = (
        _differ(two, "InternVL2_5-1B", language="Qwen2.5-0.5B-Instruct", billions="0.9"),
        two,
        _differ(two, "InternVL2_5-4B", language="Qwen2.5-3B-Instruct", billions="3.7"),
        _differ(two, "InternVL2_5-8B", language="internlm2_5-7b-chat", billions="8.1"),
        large,
        _differ(large, "InternVL2_5-38B", language="Qwen2.5-32B-Instruct", billions="38.4"),
        _differ(large, "InternVL2_5-78B", language="Qwen2.5-72B-Instruct", billions="78.4"),
    )
    yield from sizes
    for base in sizes:
        yield _differ(base, f"{base.name}-MPO", date="2024-12-20", train_tokens=8192)


def _all() -> dict[str, Release]:
    rows = {release.name: release for release in _first_releases()}
    rows |= {release.name: release for release in _generation_1_5(rows["InternVL-Chat-V1-2"])}
    rows |= {release.name: release for release in _generation_2(rows["Mini-InternVL-Chat-2B-V1-5"])}
    rows |= {release.name: release for release in _generation_2_5(rows["InternVL2-2B"])}
    return rows


RELEASED: dict[str, Release] = _all()
"""Chat checkpoints by name, oldest first. InternVL2-Pro is missing: its weights were never released."""
