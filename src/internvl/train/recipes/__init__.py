"""Recipes by name: functions returning a RunConfig, and what makes their inputs where those are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internvl.train.recipes import pocket, pocket_dual, tiny, v1_0
from internvl.train.run import RunConfig


@dataclass(frozen=True)
class Recipe:
    make: Callable[[], RunConfig]
    prepare: Callable[[RunConfig], None]
    """Makes the model folder or records that the recipe names, when they are not there."""

    @property
    def summary(self) -> str:
        return (self.make.__doc__ or "").strip().splitlines()[0]


RECIPES: dict[str, Recipe] = {
    "tiny_sft": Recipe(tiny.tiny_sft, tiny.prepare),
    "pocket_align_connector": Recipe(pocket.pocket_align_connector, pocket.prepare),
    "pocket_align": Recipe(pocket.pocket_align, pocket.prepare),
    "pocket_connector": Recipe(pocket.pocket_connector, pocket.prepare),
    "pocket_sft": Recipe(pocket.pocket_sft, pocket.prepare),
    "pocket_connector_cpu": Recipe(pocket.pocket_connector_cpu, pocket.prepare),
    "pocket_sft_cpu": Recipe(pocket.pocket_sft_cpu, pocket.prepare),
    "tiny_contrastive": Recipe(v1_0.tiny_contrastive, v1_0.prepare_tiny),
    "tiny_generative": Recipe(v1_0.tiny_generative, v1_0.prepare_tiny),
    "v1_0_contrastive": Recipe(v1_0.v1_0_contrastive, v1_0.prepare),
    "v1_0_contrastive_224": Recipe(v1_0.v1_0_contrastive_224, v1_0.prepare),
    "v1_0_generative": Recipe(v1_0.v1_0_generative, v1_0.prepare),
    "pocket_dual_contrastive": Recipe(pocket_dual.pocket_dual_contrastive, pocket_dual.prepare),
    "pocket_dual_generative": Recipe(pocket_dual.pocket_dual_generative, pocket_dual.prepare),
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; it is one of {', '.join(RECIPES)}")
    return RECIPES[name]
