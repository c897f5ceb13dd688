"""Every released chat checkpoint, each as a difference from another; of 1.0 also those that only the paper has.

For tests, plans and `internvl doctor`: loading reads the checkpoint's own config.json and never this table. What could
not be checked against a published file is named in `unverified`. Sources: papers 1.5, Mini, 2.5, MPO; model cards;
official `internvl/model/internvl_chat` and `internvl/conversation.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from internvl.config import FORM_1_0, ChatConfig
from internvl.zoo.dual import DUAL
from internvl.zoo.languages import LANGUAGES
from internvl.zoo.vision import VISION


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
    """Published number of parameters, in billions, with the digits that were printed; empty where none was."""
    date: str | None
    """First day of the release, ISO; None where none was found. InternVL2 came out from this day on."""
    train_tokens: int | None
    """Longest row in the last stage of training; None where it was not published."""
    assumed: tuple[str, ...] = ()
    """Fields of this row, beyond those of the language model, that are assumptions."""
    on_hub: bool = True
    """False: scores were published, the weights were not; the name is ours."""

    @property
    def hub_id(self) -> str:
        return f"OpenGVLab/{self.name}" if self.on_hub else ""

    @property
    def unverified(self) -> tuple[str, ...]:
        """Fields that are assumptions, as `template`, `vision.scale_init`, `language.vocab_size`."""
        of_language = tuple(f"language.{name}" for name in LANGUAGES[self.language].unverified)
        return (*self.assumed, *of_language, *(("vision.scale_init",) if "300M" in self.vision else ()))


_OF_ROW = ("billions", "date", "train_tokens", "assumed", "on_hub")


def _differ(base: Release, name: str, vision: str = "", language: str = "", **changes: Any) -> Release:
    """A release like `base` but for what is given: fields of Release, or of its config."""
    vision, language = vision or base.vision, language or base.language
    of_row = {key: changes.pop(key) for key in _OF_ROW if key in changes}
    config = replace(base.config, vision=VISION[vision], language=LANGUAGES[language].config, **changes)
    return replace(base, name=name, config=config, vision=vision, language=language, **of_row)


def _generation_1_0() -> Iterator[Release]:
    """LLaVA-1.5 around InternViT-6B; with QLLaMA's queries in the paper alone (tables 9 and 18, official docs)."""
    vision, language = "InternViT-6B-224px", "vicuna-7b-v1.5"
    config = ChatConfig(
        VISION[vision],
        LANGUAGES[language].config,
        tile_size=336,
        template="v1",
        **FORM_1_0,
    )
    small = Release("InternVL-Chat-ViT-6B-Vicuna-7B", config, vision, language, "", None, 2048)
    sharp: dict[str, Any] = {"vision": "InternViT-6B-448px-V1-0", "tile_size": 448}
    large = _differ(small, "InternVL-Chat-ViT-6B-Vicuna-13B", language="vicuna-13b-v1.5")
    yield from (small, large)
    yield _differ(small, "InternVL-Chat-ViT-6B-Vicuna-7B-448px", **sharp, on_hub=False)
    yield _differ(large, "InternVL-Chat-ViT-6B-Vicuna-13B-448px", **sharp)
    asked: dict[str, Any] = {"queries": DUAL["InternVL-14B-224px"], "on_hub": False}
    for base, size in ((small, "7B"), (large, "13B")):
        for side in (224, 336):
            # The paper shows scores of a 7B at 224 px alone, and says nothing of padding.
            silent = ("pad_to_square",)
            yield _differ(base, f"InternVL-Chat-QLLaMA-Vicuna-{size}-{side}px", tile_size=side, assumed=silent, **asked)


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
    rows = {release.name: release for release in _generation_1_0()}
    rows |= {release.name: release for release in _first_releases()}
    rows |= {release.name: release for release in _generation_1_5(rows["InternVL-Chat-V1-2"])}
    rows |= {release.name: release for release in _generation_2(rows["Mini-InternVL-Chat-2B-V1-5"])}
    rows |= {release.name: release for release in _generation_2_5(rows["InternVL2-2B"])}
    return rows


RELEASED: dict[str, Release] = _all()
"""Chat checkpoints by name, oldest first. InternVL2-Pro is missing: its weights were never released."""
