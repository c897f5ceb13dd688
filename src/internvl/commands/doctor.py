"""`internvl doctor`: what is installed; every released model; whether a checkpoint contradicts itself."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

if TYPE_CHECKING:
    from rich.table import Table

    from internvl.doctor.folder import Finding
    from internvl.zoo import Release

MARKS = {"conflict": "CONFLICT", "note": "note"}


@dataclass(frozen=True)
class Options:
    """Without arguments: what is installed and active. With a checkpoint: whether its files contradict each other."""

    checkpoint: Annotated[str | None, tyro.conf.Positional] = None
    """A folder of either layout, pocket, or a hub id. Weights are not read, code in it is not run."""
    zoo: bool = False
    """Show every released chat model: sizes computed and published, and what is not confirmed."""
    json: bool = False
    """Print it as JSON."""


def main(arguments: list[str]) -> int:
    """Exit code 1 where a contradiction would change answers."""
    options = tyro.cli(Options, prog="internvl doctor", args=arguments)
    if options.zoo and options.checkpoint is not None:
        raise ValueError("--zoo shows all releases; give it without a checkpoint")
    if options.zoo:
        return _zoo(options)
    return _machine(options) if options.checkpoint is None else _checkpoint(options.checkpoint, options)


def _machine(options: Options) -> int:
    from internvl.doctor.machine import examine

    facts = examine()
    if options.json:
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
        return 0
    table = _table("", "", "")
    for group, values in facts.items():
        for name, value in values.items():
            table.add_row(group, name, *_fact(value))
            group = ""
        table.add_section()
    _print(table)
    return 0


def _fact(value: Any) -> tuple[str, str]:
    """A value and what is said about it, as text."""
    if isinstance(value, dict):
        return value["version"] or "missing", value.get("for") or value["why"]
    if isinstance(value, list):
        return ", ".join(value) or "none", ""
    if value is None or isinstance(value, bool):
        return ("yes" if value else "no" if value is False else "none"), ""
    return str(value), ""


def _zoo(options: Options) -> int:
    from internvl.zoo import RELEASED

    rows = list(RELEASED.values())
    if options.json:
        sys.stdout.write(json.dumps([_row_json(row) for row in rows], indent=2) + "\n")
        return 0
    heads = (
        "release",
        "billions",
        "printed",
        "language model",
        "ViT",
        "template",
        "words",
        "order",
        "tiles",
        "assumed",
    )
    table = _table(*heads)
    for row in rows:
        config = row.config
        assumed = ", ".join(row.unverified).replace("language.", "")
        sizes = (f"{config.num_parameters / 1e9:.3f}", row.billions)
        parts = (row.language, row.vision.removeprefix("InternViT-"), config.template)
        numbers = (str(config.language.vocab_size), config.pixel_shuffle, str(config.max_tiles))
        table.add_row(row.name, *sizes, *parts, *numbers, assumed)
    _print(table)
    return 0


def _row_json(row: Release) -> dict[str, Any]:
    config = row.config
    return {
        "name": row.name,
        "hub_id": row.hub_id,
        "released": row.date,
        "parameters": config.num_parameters,
        "published_billions": row.billions,
        "language": row.language,
        "vision": row.vision,
        "template": config.template,
        "vocab_size": config.language.vocab_size,
        "pixel_shuffle": config.pixel_shuffle,
        "max_tiles": config.max_tiles,
        "train_tokens": row.train_tokens,
        "unverified": row.unverified,
    }


def _checkpoint(name: str, options: Options) -> int:
    from internvl.convert.dual import is_dual
    from internvl.convert.files import read_json
    from internvl.doctor.checks import CHECKS, diagnose
    from internvl.doctor.folder import read_folder
    from internvl.locate import locate

    place = locate(name)
    if is_dual(read_json(place / "config.json")):
        return _dual(name, place, options)
    folder, unreadable = read_folder(place)
    found = [*unreadable, *diagnose(folder)]
    conflicts = sum(finding.level == "conflict" for finding in found)
    if options.json:
        result = {
            "checkpoint": name,
            "folder": str(folder.path),
            "layout": folder.layout,
            "template": folder.config and folder.config.template,
            "conflicts": conflicts,
            "findings": [asdict(finding) for finding in found],
        }
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    else:
        _findings(f"{folder.path}: {folder.layout} layout", found)
        sys.stdout.write(f"looked at: {', '.join(check.__name__.replace('_', ' ') for check in CHECKS)}\n")
        sys.stdout.write(f"contradictions that change answers: {conflicts}; notes: {len(found) - conflicts}\n")
    return 1 if conflicts else 0


def _dual(name: str, folder: Path, options: Options) -> int:
    """A folder of InternVL-C or -G."""
    from internvl.doctor.dual import CHECKED, diagnose

    config, found = diagnose(folder)
    conflicts = sum(finding.level == "conflict" for finding in found)
    if options.json:
        result = {
            "checkpoint": name,
            "folder": str(folder),
            "layout": "official, dual",
            "parameters": None if config is None else config.num_parameters,
            "conflicts": conflicts,
            "findings": [asdict(finding) for finding in found],
        }
        sys.stdout.write(json.dumps(result, indent=2, ensure_ascii=False) + "\n")
        return 1 if conflicts else 0
    count = "" if config is None else f", {config.num_parameters:,} parameters"
    kind = "InternVL-C" if config is not None and not config.generative else "InternVL-C and -G"
    _findings(f"{folder}: official layout of {kind}{count}", found)
    sys.stdout.write(f"looked at: {CHECKED}\n")
    sys.stdout.write(f"contradictions that change answers: {conflicts}; notes: {len(found) - conflicts}\n")
    return 1 if conflicts else 0


def _findings(title: str, found: Iterable[Finding]) -> None:
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    console.print(title, style="bold")
    for finding in found:
        console.print(f"{MARKS[finding.level]:<9} {finding.about}", style="red" if finding.level == "conflict" else "")
        for label, text in (("file says", finding.says), ("against", finding.against), ("used", finding.used)):
            if text:
                console.print(f"          {label + ':':<10} {text}", soft_wrap=True)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_header=any(columns))
    for column in columns:
        shown.add_column(column, justify="right" if column in ("billions", "printed", "words", "tiles") else "left")
    return shown


def _print(table: Table) -> None:
    """As wide as it needs where nobody's terminal limits it."""
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 240
    console.print(table)
