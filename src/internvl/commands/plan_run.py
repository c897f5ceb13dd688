"""`internvl plan RECIPE`: the tables of a run. Numbers are plan_run.py's, words of the command line plan.py's."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from internvl.commands import train
from internvl.commands.plan import GIB, Options, size
from internvl.plan_run import Change, RunPlan, Subject, calibrate, changes, more_gpus, plan_run, subject
from internvl.train.recipes import RECIPES

if TYPE_CHECKING:
    from rich.console import Console

TERA = 1e12


def main(options: Options) -> int:
    """Plan, print, and say what would fit; the exit code is 1 where --memory does not suffice."""
    about = open_subject(options)
    device = "cpu" if about.run.device == "cpu" else "cuda"
    plan = plan_run(about, options.gpus, device)
    rate = (
        options.rate * TERA
        if options.rate is not None
        else calibrate(about, options.gpus)
        if options.calibrate
        else None
    )
    limit = None if options.memory is None else round(options.memory * GIB)
    need = plan.memory.on_gpus(options.gpus)
    fits = None if limit is None else need <= limit
    remedies: list[Change] = []
    if limit is not None and not fits:
        remedies = changes(about, limit, options.gpus, device, memory=plan.memory)
        more = more_gpus(plan.memory, limit, options.gpus)
        remedies += [more] if more is not None else []
    found = as_json(options, about, plan, rate) | {"fits": fits, "changes": [asdict(change) for change in remedies]}
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(options, about, plan, found, remedies)
    return 0 if fits is not False else 1


def open_subject(options: Options) -> Subject:
    """The run that the options name, with its model's configuration."""
    recipe = RECIPES.get(options.model)
    words = [word for text in options.set for word in _field(text)]
    words += ["--data.meta", options.data] if options.data else []
    asked = train.parse([options.model, *words] if recipe else ["--run", options.model, *words])
    run = train.configure(asked)
    if recipe is not None and options.model.startswith("tiny_"):
        recipe.prepare(run)
    return subject(run, recipe.release if recipe else "")


def _field(text: str) -> list[str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set {text}; write FIELD=VALUE, such as data.max-tiles=6")
    return [f"--{name}", value]


def as_json(options: Options, about: Subject, plan: RunPlan, rate: float | None) -> dict[str, Any]:
    """Every number of the tables; sizes in bytes, of one device."""
    memory = plan.memory
    return {
        "run": options.model,
        "gpus": options.gpus,
        "parameters": about.config.num_parameters,
        "learned": memory.learned,
        "memory": {**asdict(memory), "activations": memory.activations, "each": memory.on_gpus(options.gpus)},
        "worst": {**plan.worst._asdict(), "learned": plan.worst_learned, "sources": plan.worst_sources},
        "epoch": {
            name: getattr(plan, name)
            for name in ("micro_batches", "samples", "tokens", "positions", "tiles", "steps_per_epoch", "operations")
        },
        "steps": plan.steps,
        "padding": plan.padding,
        "idle": plan.idle,
        "rate": rate,
        "seconds": None if rate is None else plan.seconds(rate),
        "notes": about.notes,
    }


def _show(options: Options, about: Subject, plan: RunPlan, found: dict[str, Any], remedies: list[Change]) -> None:
    from rich.console import Console

    console, memory = Console(highlight=False, markup=False, soft_wrap=True), plan.memory
    console.print(f"{options.model}: {found['parameters']:,} parameters, {memory.learned:,} learn", style="bold")
    rows = [
        ("weights", memory.parameters),
        ("moments of AdamW", memory.optimiser),
        ("gradients at the peak", memory.peak_gradients),
        ("activations at the peak", memory.activations),
        ("  of which logits", memory.peak_logits),
        ("peak of a step", memory.peak),
    ]
    rows += [(f"each of {options.gpus} GPUs that share weights", found["memory"]["each"])] if options.gpus > 1 else []
    _table(console, [(name, size(value)) for name, value in rows])
    worst = plan.worst
    console.print(
        f"worst micro-batch: {worst.samples} samples, {worst.positions:,} positions, {worst.tiles} tiles, "
        f"{plan.worst_learned:,} learned; {', '.join(plan.worst_sources[:3])}"
    )
    console.print("An epoch", style="bold")
    counts = [
        ("samples", plan.samples),
        ("tokens", plan.tokens),
        ("tiles", plan.tiles),
        ("steps", plan.steps_per_epoch),
    ]
    lines = [(name, f"{value:,}") for name, value in counts]
    lines += [("padding", f"{plan.padding:.1%}"), ("idle share of the GPUs", f"{plan.idle:.1%}")]
    _table(console, lines)
    console.print(f"The run: {plan.steps:,} step{'s' * (plan.steps > 1)}, {_duration(found)}", style="bold")
    if found["fits"] is not None:
        verdict = "fits" if found["fits"] else "does not fit"
        console.print(f"{verdict}: {size(found['memory']['each'])} of {options.memory:g} GiB")
    for change in remedies:
        console.print(f"  {change.words}: {size(change.need)} ({change.price})")
    if found["fits"] is False and not remedies:
        console.print("  no change that is known here makes it fit; take a smaller model")
    for note in about.notes:
        console.print(f"note: {note}")


def _table(console: Console, rows: list[tuple[str, str]]) -> None:
    from rich.table import Table

    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _duration(found: dict[str, Any]) -> str:
    if found["seconds"] is None:
        return "time unknown: give --rate or --calibrate"
    seconds = found["seconds"]
    text = (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )
    return f"{text} at {found['rate'] / TERA:.3g} x 10^12 operations a second"
