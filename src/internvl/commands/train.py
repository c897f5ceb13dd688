"""`internvl train`: run a recipe with overrides, go on with a run, list the recipes. The work is in train/."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from textwrap import fill, shorten
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from internvl.train.loop import Evaluator, Result
    from internvl.train.run import RunConfig

USAGE = """usage: internvl train RECIPE [--FIELD VALUE ...]    (internvl train RECIPE --help lists the fields)
       internvl train --run RUN.JSON [--FIELD VALUE ...]
       internvl train --list

  A run whose folder (--out) holds a checkpoint goes on from it; the same settings are needed.
  --resume      insist on a checkpoint to go on from
  --no-resume   refuse one
  --nproc N     on N processes of this machine, a GPU each where there are GPUs (several machines: docs/ranks.md)
  --export      only write the trained model of the latest checkpoint (--export last|best|ema|none: which, at the end)
  --average N   only write the mean of the latest N checkpoints as the trained model
  --dry-run     two steps of the recipe on a tiny model of its family and generated records, in a temporary folder
  --json        the result as JSON on standard output
"""

WORDS = ("--resume", "--no-resume", "--export", "--json", "--dry-run")
WEIGHTS = ("last", "best", "ema", "none")


@dataclass(frozen=True)
class Asked:
    """The words that are not fields of the run."""

    recipe: str | None
    run_json: str | None
    resume: bool | None
    export: bool
    json: bool
    nproc: int
    average: int
    rest: list[str]
    dry: bool = False


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0 if arguments else 2
    if arguments == ["--list"]:
        return _list()
    asked = parse(arguments)
    from internvl.parallel import launch

    if asked.nproc > 1:
        if launch.place().num_ranks > 1:
            raise ValueError("--nproc inside torchrun: torchrun has started the processes; leave --nproc out")
        return launch.start(["train", *without_value(arguments, "--nproc")], asked.nproc)
    run = configure(asked)
    if asked.dry:
        return _dry(run, asked)
    with launch.joined(run.device) as here:
        if here.rank == 0 and asked.recipe is not None:
            from internvl.train.recipes import find_recipe

            find_recipe(asked.recipe).prepare(run)
        result = _train(run, asked)
    if here.num_ranks > 1 and here.rank == 0 and result.finished and run.export != "none":
        _export(run, asked)  # the ranks have parted: one process holds the whole model, on the host
    if here.rank == 0:
        _report(run, result, asked)
    return 0


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
    counts = {}
    for word in ("--nproc", "--average"):
        counts[word] = _count(rest, word)
        rest = without_value(rest, word)
    words = [word for at, word in enumerate(rest) if word in WORDS and not _chooses(rest, at)]
    kept = [word for at, word in enumerate(rest) if word not in WORDS or _chooses(rest, at)]
    resume = True if "--resume" in words else False if "--no-resume" in words else None
    export, as_json, dry = ("--export" in words, "--json" in words, "--dry-run" in words)
    return Asked(recipe, run_json, resume, export, as_json, counts["--nproc"], counts["--average"], kept, dry)


def without_value(words: Sequence[str], name: str) -> list[str]:
    """The words but for `name` and what follows it."""
    if name not in words:
        return list(words)
    at = list(words).index(name)
    return [*words[:at], *words[at + 2 :]]


def _count(words: Sequence[str], name: str) -> int:
    if name not in words:
        return 1
    given = [*words, ""][list(words).index(name) + 1]
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{name} is {given!r}; it takes a number of at least 1")
    return int(given)


def _chooses(words: Sequence[str], at: int) -> bool:
    """`--export best` is the field of the run, `--export` alone a word of this command."""
    return words[at] == "--export" and [*words, ""][at + 1] in WEIGHTS


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


def _train(run: RunConfig, asked: Asked) -> Result:
    from internvl.parallel.collectives import barrier
    from internvl.train.checkpoint import check_folder
    from internvl.train.loop import train
    from internvl.train.samples import Answers
    from internvl.train.stages import open_stage
    from internvl.train.stages.sft import Sft

    barrier()  # the first rank has made what was missing
    if asked.export or asked.average > 1:
        return _export(run, asked)
    check_folder(run, asked.resume)  # before minutes of loading
    stage = open_stage(run)
    evaluators: list[Evaluator] = [stage.evaluate]
    if run.watch.samples:
        if not isinstance(stage, Sft):
            raise ValueError(
                f"watch.samples is {run.watch.samples} but stage {run.stage!r} answers nothing; set it to 0"
            )
        evaluators.append(Answers(stage, run.watch.samples, run.watch.sample_tokens))
    return train(run, stage, evaluators=evaluators, resume=asked.resume)


def _export(run: RunConfig, asked: Asked) -> Result:
    from internvl.parallel.collectives import num_ranks
    from internvl.parallel.launch import place
    from internvl.train.checkpoint import check_folder
    from internvl.train.loop import export_latest
    from internvl.train.stages import open_stage

    if num_ranks() > 1:
        raise ValueError("--export and --average are one process's work; leave --nproc out")
    check_folder(run, resume=True)
    run = replace(run, device="cpu") if place().num_ranks > 1 else run
    return export_latest(run, open_stage(run), asked.average)


def _report(run: RunConfig, result: Result, asked: Asked) -> None:
    if asked.json:
        values = {f.name: getattr(result, f.name) for f in fields(result)}
        sys.stdout.write(json.dumps({**values, "out": run.out}) + "\n")
    elif not result.finished and not asked.export:
        sys.stderr.write(f"stopped at step {result.step}, saved; go on with: internvl train --run {run.out}\n")


def _dry(run: RunConfig, asked: Asked) -> int:
    import tempfile

    from internvl.train.dry import dry_run
    from internvl.train.recipes import find_recipe

    recipe = None if asked.recipe is None else find_recipe(asked.recipe)
    release = "" if recipe is None else recipe.release or recipe.like
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
