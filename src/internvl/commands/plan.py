"""`internvl plan`: what a model takes in memory before it is loaded, and what a training run takes before it starts."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from internvl.plan import DualPlan, Plan

GIB = 1024**3
MIB = 1024**2
COUNTS = (1, 2, 4, 8)
"""Numbers of devices that are tried where none is given."""


@dataclass(frozen=True)
class Options:
    """Memory that a model takes for inference; with a recipe, memory, tokens, tiles, steps and time of its run."""

    model: Annotated[str, tyro.conf.Positional]
    """Name of a release (InternVL2_5-8B, InternVL-14B-224px), pocket, tiny-*, a hub id, or a checkpoint folder; or a
    recipe (`internvl train --list`), a run.json, or the folder of a run."""
    dtype: Literal["fp32", "bf16", "int8", "int4"] = "bf16"
    """Of the weights; int8 and int4 round the matrices of the language layers and leave the rest bf16."""
    devices: int | None = None
    """Devices that share the model; 1, 2, 4 and 8 when left out."""
    memory: float | None = None
    """GiB of one device: says whether it fits."""
    tokens: int = 0
    """Positions of a prompt with its answer; 0: one largest picture and 1,000 more."""
    rows: int = 1
    """Answers at the same time."""
    tiles: int = 0
    """Tiles that the ViT encodes together; 0: those of one largest picture. Of dual models: pictures; 0: 32."""
    data: str = ""
    """Of a recipe: meta JSON or JSONL file; the recipe's own when left out."""
    gpus: int = 1
    """Of a recipe: devices of the run."""
    rate: float | None = None
    """Of a recipe: 10^12 operations a second that one device reaches in training, for the time."""
    calibrate: bool = False
    """Of a recipe: measure that rate here, with random weights (a few steps)."""
    set: tuple[str, ...] = ()
    """Of a recipe: FIELD=VALUE of its run, such as data.max-tiles=6."""
    json: bool = False
    """Print bytes and counts as JSON."""


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, prog="internvl plan", args=arguments)
    if options.memory is not None and options.memory <= 0:
        raise ValueError(f"--memory {options.memory:g}; give the GiB of one device, such as 24")
    if _is_run(options.model):
        from internvl.commands import plan_run

        return plan_run.main(options)
    from internvl.plan import PICTURES, DualPlan, Plan, assumed_of, config_of, dual_config_of

    dual = dual_config_of(options.model)
    if dual is not None:
        return _dual(options, DualPlan(dual, options.dtype, options.tiles or PICTURES))
    plan = Plan(config_of(options.model), options.dtype, options.rows, options.tokens, options.tiles)
    found = {**as_json(options, plan), "assumed": assumed_of(options.model)}
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        _show(options, plan, found)
    return 0


def _dual(options: Options, plan: DualPlan) -> int:
    """InternVL-C or -G: one device, no chat."""
    peak = plan.weights + max(plan.vision_activation, plan.caption_cache)
    fits = None if options.memory is None else peak <= options.memory * GIB
    found = {
        "model": options.model,
        "dtype": plan.dtype,
        "parameters": plan.config.num_parameters,
        "parts": plan.parameters,
        "weights": plan.weights,
        "pictures": plan.pictures,
        "vision_activation": plan.vision_activation,
        "caption_cache": plan.caption_cache,
        "kept_picture": plan.kept_picture,
        "peak": peak,
        "fits": fits,
    }
    if options.json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
        return 0
    lines = [f"{options.model} in {plan.dtype}"]
    lines += [
        f"  {name:<28} {count:>16,} {size(plan.number_bytes * count):>12}" for name, count in plan.parameters.items()
    ]
    lines += [f"  {'all':<28} {plan.config.num_parameters:>16,} {size(plan.weights):>12}"]
    lines += [
        f"{plan.pictures} pictures at once: ViT {size(plan.vision_activation)}, captions {size(plan.caption_cache)}"
    ]
    lines += [f"a million embeddings on disk: {size(1_000_000 * plan.kept_picture)}"]
    verdict = "" if fits is None else f"; {'fits' if fits else 'does not fit'} into {options.memory:g} GiB"
    lines += [f"peak, driver and allocator not counted: {size(peak)}{verdict}"]
    sys.stdout.write("\n".join(lines) + "\n")
    return 0


def _is_run(name: str) -> bool:
    from internvl.train.recipes import RECIPES

    return name in RECIPES or Path(name).name == "run.json" or (Path(name) / "run.json").is_file()


def as_json(options: Options, plan: Plan) -> dict[str, Any]:
    """Everything that the tables show, sizes in bytes."""
    parts = plan.parts
    layers = parts[2:-1]
    groups = {"vision and connector": parts[:1], "embedding": parts[1:2], "layers": layers, "norm and head": parts[-1:]}
    counts = COUNTS if options.devices is None else (options.devices,)
    return {
        "model": options.model,
        "dtype": plan.dtype,
        "parameters": plan.config.num_parameters,
        "weights": plan.weights,
        "parts": {
            name: {"parameters": sum(p.parameters for p in group), "weights": sum(p.weights for p in group)}
            for name, group in groups.items()
        },
        "cache": {
            "per_1000_tokens": 1000 * plan.cache_bytes_per_token,
            "picture_1_tile": plan.picture_tokens(1) * plan.cache_bytes_per_token,
            "picture_largest": plan.picture_tokens(plan.max_tiles) * plan.cache_bytes_per_token,
            "planned": plan.cache,
        },
        "positions": {
            "picture_1_tile": plan.picture_tokens(1),
            "picture_largest": plan.picture_tokens(plan.max_tiles),
            "largest_tiles": plan.max_tiles,
            "planned": plan.tokens,
            "rows": plan.rows,
        },
        "activation": {"vision": plan.vision_activation, "prompt": plan.prompt_activation, "tiles": plan.tiles},
        "cpu_copy": plan.copy_bytes,
        "devices": [_on(plan, count, options.memory) for count in counts],
    }


def _on(plan: Plan, count: int, memory: float | None) -> dict[str, Any]:
    needs = plan.on_devices(count)
    fits = None if memory is None else max(needs) <= memory * GIB
    return {"devices": count, "used": len(needs), "fullest": max(needs), "each": needs, "fits": fits}


def _show(options: Options, plan: Plan, found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)

    def table(title: str, *columns: str) -> Table:
        console.print(title, style="bold")
        shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
        for place, column in enumerate(columns):
            shown.add_column(column, justify="right" if place else "left", no_wrap=True)
        return shown

    parts = table(f"{options.model} in {plan.dtype}", "part", "parameters", "weights")
    for name, part in found["parts"].items():
        parts.add_row(name, f"{part['parameters']:,}", size(part["weights"]))
    parts.add_row("all", f"{found['parameters']:,}", size(found["weights"]), style="bold")
    console.print(parts)

    positions, cache = found["positions"], found["cache"]
    largest = f"picture of {plan.max_tiles} tiles" + (" (thumbnail included)" if plan.max_tiles > 1 else "")
    kept = table("Key-value cache of one answer", "", "positions", "memory")
    kept.add_row("1,000 tokens", "1,000", size(cache["per_1000_tokens"]))
    kept.add_row("picture of 1 tile", f"{positions['picture_1_tile']:,}", size(cache["picture_1_tile"]))
    if plan.max_tiles > 1:
        kept.add_row(largest, f"{positions['picture_largest']:,}", size(cache["picture_largest"]))
    rows = "" if plan.rows == 1 else f" x {plan.rows} answers"
    kept.add_row(f"planned{rows}", f"{plan.tokens:,}", size(cache["planned"]), style="bold")
    console.print(kept)

    passing = table("Peak while it runs, beside the weights", "", "memory")
    passing.add_row(f"ViT, {plan.tiles} tiles at once", size(found["activation"]["vision"]))
    passing.add_row(f"reading a prompt of {plan.tokens:,} positions", size(found["activation"]["prompt"]))
    console.print(passing)

    limit = "" if options.memory is None else f" of {options.memory:g} GiB"
    split = table(f"Devices{limit}: need of the fullest", "devices", "memory", *(["fits"] if limit else []))
    for row in found["devices"]:
        fits = [] if row["fits"] is None else ["yes" if row["fits"] else "no"]
        split.add_row(str(row["devices"]), size(row["fullest"]), *fits)
    console.print(split)
    console.print(
        f"Driver and allocator come on top. On a CPU `internvl chat` adds {size(found['cpu_copy'])}: matrices in "
        "another layout (of the ViT alone where the language model is not Llama-shaped)."
    )
    if found["assumed"]:
        console.print(
            f"Without the checkpoint's config.json these are assumptions: {', '.join(found['assumed'])}. "
            "The folder of the checkpoint gives exact numbers."
        )


def size(number: int) -> str:
    """Bytes for people."""
    return f"{number / GIB:,.2f} GiB" if number >= GIB else f"{number / MIB:,.1f} MiB"
