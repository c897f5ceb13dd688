"""Recipes by name: functions returning a RunConfig, and what makes their inputs where those are missing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial

from internvl.train.recipes import (
    mini,
    pocket,
    pocket_dual,
    tiny,
    tiny_text,
    v1_0,
    v1_0_chat,
    v1_1,
    v1_2,
    v1_5,
    v2_0,
    v2_5,
)
from internvl.train.recipes.official import Family
from internvl.train.run import RunConfig


@dataclass(frozen=True)
class Recipe:
    make: Callable[[], RunConfig]
    prepare: Callable[[RunConfig], None]
    """Makes the model folder or records that the recipe names, when they are not there."""
    release: str = ""
    """The release whose shape it trains; `pocket` or tiny where there is none."""
    like: str = ""
    """Without a release: the name of the zoo in whose shape it runs dry; `pocket` where there is none."""
    family: str = ""
    """Name without the size, of a recipe for several sizes."""

    @property
    def summary(self) -> str:
        function = self.make.func if isinstance(self.make, partial) else self.make
        return (function.__doc__ or "").strip().splitlines()[0]


def _of(families: Sequence[Family]) -> dict[str, Recipe]:
    return {
        family.recipe(size): Recipe(
            partial(family.make, size), partial(family.prepare, size), release, family=family.name
        )
        for family in families
        for size, release in family.releases.items()
    }


GROUPS: dict[str, dict[str, Recipe]] = {
    "here, on random weights and on `pocket`": {
        "tiny_sft": Recipe(tiny.tiny_sft, tiny.prepare),
        "tiny_text": Recipe(tiny_text.tiny_text, tiny_text.prepare),
        "tiny_contrastive": Recipe(v1_0.tiny_contrastive, v1_0.prepare_tiny),
        "tiny_generative": Recipe(v1_0.tiny_generative, v1_0.prepare_tiny),
        "tiny_retrieval": Recipe(v1_0.tiny_retrieval, v1_0.prepare_tiny),
        "tiny_chat_qllama": Recipe(v1_0_chat.tiny_chat_qllama, v1_0_chat.prepare_tiny, like="tiny-1.0-qllama"),
        "pocket_align_connector": Recipe(pocket.pocket_align_connector, pocket.prepare),
        "pocket_align": Recipe(pocket.pocket_align, pocket.prepare),
        "pocket_told": Recipe(pocket.pocket_told, pocket.prepare),
        "pocket_told_boxes": Recipe(pocket.pocket_told_boxes, pocket.prepare),
        "pocket_told_counts": Recipe(pocket.pocket_told_counts, pocket.prepare),
        "pocket_connector": Recipe(pocket.pocket_connector, pocket.prepare),
        "pocket_sft": Recipe(pocket.pocket_sft, pocket.prepare),
        "pocket_connector_cpu": Recipe(pocket.pocket_connector_cpu, pocket.prepare),
        "pocket_sft_cpu": Recipe(pocket.pocket_sft_cpu, pocket.prepare),
        "pocket_distill": Recipe(pocket.pocket_distill, pocket.prepare),
        "pocket_dual_distill": Recipe(pocket_dual.pocket_dual_distill, pocket_dual.prepare, like="tiny-dual"),
        "pocket_dual_text": Recipe(pocket_dual.pocket_dual_text, pocket_dual.prepare),
        "pocket_dual_contrastive": Recipe(pocket_dual.pocket_dual_contrastive, pocket_dual.prepare),
        "pocket_dual_generative": Recipe(pocket_dual.pocket_dual_generative, pocket_dual.prepare),
        "pocket_dual_chat": Recipe(v1_0_chat.pocket_dual_chat, v1_0_chat.prepare_pocket, like="tiny-1.0-qllama"),
    },
    "InternVL 1.0": {
        "v1_0_contrastive": Recipe(v1_0.v1_0_contrastive, v1_0.prepare),
        "v1_0_contrastive_224": Recipe(v1_0.v1_0_contrastive_224, v1_0.prepare),
        "v1_0_generative": Recipe(v1_0.v1_0_generative, v1_0.prepare),
        "v1_0_retrieval": Recipe(v1_0.v1_0_retrieval, v1_0.prepare),
        "v1_0_retrieval_coco": Recipe(v1_0.v1_0_retrieval_coco, v1_0.prepare),
        **_of(v1_0_chat.FAMILIES),
    },
    "InternVL-Chat 1.1": _of(v1_1.FAMILIES),
    "InternVL-Chat 1.2": _of(v1_2.FAMILIES),
    "InternVL-Chat 1.5": _of(v1_5.FAMILIES),
    "Mini-InternVL": _of(mini.FAMILIES),
    "InternVL 2.0": _of(v2_0.FAMILIES),
    "InternVL 2.5": _of(v2_5.FAMILIES),
}
"""Recipes by what they belong to, in the order of the releases."""
RECIPES: dict[str, Recipe] = {name: recipe for group in GROUPS.values() for name, recipe in group.items()}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        known = dict.fromkeys(f"{r.family}_SIZE" if r.family not in ("", n) else n for n, r in RECIPES.items())
        near = get_close_matches(name, RECIPES, 3)
        meant = f" (near it: {', '.join(near)})" if near else ""
        raise ValueError(f"no recipe {name!r}; it is one of {', '.join(known)}{meant}")
    return RECIPES[name]
