"""`internvl train`: run a recipe with overrides, go on with a run, list the recipes. The work is in train/."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl.train.run import RunConfig

USAGE = """usage: internvl train RECIPE [--FIELD VALUE ...]    (internvl train RECIPE --help lists the fields)
       internvl train --run RUN.JSON [--FIELD VALUE ...]
       internvl train --list

  A run whose folder (--out) holds a checkpoint goes on from it; the same settings are needed.
  --resume      insist on a checkpoint to go on from
  --no-resume   refuse one
  --export      only write the trained model of the latest checkpoint
  --dry-run     two steps of the recipe on a tiny model of its family and generated records, in a temporary folder
  --json        the result as JSON on standard output
"""


@dataclass(frozen=True)
class Asked:
    """The words that are not fields of the run."""

    recipe: str | None
    run_json: str | None
    resume: bool | None
    export: bool
    json: bool
    rest: list[str]
    dry: bool = False


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if arguments == ["--list"]:
        return _list()
    asked = parse(arguments)
    from internvl.train.recipes import find_recipe

    run = configure(asked)
    if asked.dry:
        return _dry(run, asked)
    if asked.recipe is not None:
        find_recipe(asked.recipe).prepare(run)
    return _train(run, asked)


def parse(arguments: list[str]) -> Asked:
    """Split the words of this command from the fields of the run."""
    rest, recipe, run_json = list(arguments), None, None
    if rest[0] == "--run":
        if len(rest) < 2:
            raise ValueError("--run needs the run.json that a run wrote, or its folder")
        run_json, rest = rest[1], rest[2:]
    elif rest[0].startswith("-"):
        raise ValueError(f"{rest[0]!r} comes before the recipe; write: internvl train RECIPE {rest[0]} ...")
    else:
        recipe, rest = rest[0], rest[1:]
    if "--resume" in rest and "--no-resume" in rest:
        raise ValueError("--resume and --no-resume exclude each other; give one")
    resume = True if "--resume" in rest else False if "--no-resume" in rest else None
    words = ("--resume", "--no-resume", "--export", "--json", "--dry-run")
    kept = [word for word in rest if word not in words]
    return Asked(recipe, run_json, resume, "--export" in rest, "--json" in rest, kept, "--dry-run" in rest)


def configure(asked: Asked) -> RunConfig:
    """The run that was asked for: a recipe or a run.json, with its overrides."""
    import tyro

    from internvl.train.recipes import find_recipe
    from internvl.train.run import RunConfig, read_run

    if asked.run_json is not None:
        default, name = read_run(Path(asked.run_json)), f"--run {asked.run_json}"
    else:
        assert asked.recipe is not None
        recipe = find_recipe(asked.recipe)
        default, name = recipe.make(), asked.recipe
    return tyro.cli(RunConfig, default=default, args=asked.rest, prog=f"internvl train {name}")


def _train(run: RunConfig, asked: Asked) -> int:
    from internvl.train.checkpoint import check_folder
    from internvl.train.loop import export_latest, train
    from internvl.train.stages import open_stage

    check_folder(run, True if asked.export else asked.resume)  # before minutes of loading
    stage = open_stage(run)
    if asked.export:
        result = export_latest(run, stage)
    else:
        result = train(run, stage, evaluators=[stage.evaluate], resume=asked.resume)
    if asked.json:
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        sys.stdout.write(json.dumps({**values, "out": run.out}) + "\n")
    elif not result.finished and not asked.export:
        sys.stderr.write(f"stopped at step {result.step}, saved; go on with: internvl train --run {run.out}\n")
    return 0


def _dry(run: RunConfig, asked: Asked) -> int:
    import tempfile

    from internvl.train.dry import dry_run
    from internvl.train.recipes import find_recipe

    release = find_recipe(asked.recipe).release if asked.recipe is not None else ""
    with tempfile.TemporaryDirectory() as folder:
        found = dry_run(run, release, Path(folder))
    if asked.json:
        sys.stdout.write(json.dumps(vars(found)) + "\n")
        return 0
    first, last = found.losses[0], found.losses[-1]
    sys.stdout.write(
        f"{found.steps} steps on {found.model}: loss {first:.3f}, then {last:.3f}; grad {found.norm:.3g}\n"
    )
    sys.stdout.write(f"learns: {', '.join(found.learns)}\n")
    sys.stdout.write("changed for the dry run: " + "; ".join(found.changed) + "\n")
    return 0


def _list() -> int:
    """A line for each recipe, or for each family of sizes."""
    from internvl.train.recipes import GROUPS

    for title, group in GROUPS.items():
        sys.stdout.write(f"{title}\n")
        families: dict[str, list[str]] = {}
        for name, recipe in group.items():
            families.setdefault(recipe.family or name, []).append(name)
        for family, names in families.items():
            sizes = [name.removeprefix(f"{family}_") for name in names if name != family]
            shown = f"{family}_SIZE" if sizes else family
            summary = shorten(group[names[0]].summary, 90, placeholder=" ...")
            sys.stdout.write(f"  {shown:<24} {summary}\n")
            if sizes:
                indent = " " * 27
                sys.stdout.write(fill(f"SIZE: {' '.join(sizes)}", 110, initial_indent=indent, subsequent_indent=indent))
                sys.stdout.write("\n")
    return 0
