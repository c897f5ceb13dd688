"""Recipes by name: functions returning a RunConfig, and what makes their inputs where those are missing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from internvl.train.recipes import pocket, tiny
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
}


def find_recipe(name: str) -> Recipe:
    if name not in RECIPES:
        raise ValueError(f"no recipe {name!r}; it is one of {', '.join(RECIPES)}")
    return RECIPES[name]
