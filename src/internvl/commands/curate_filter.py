"""`internvl curate filter`: keep what is good enough to be learned from. The work is in curate/filter_sets.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from internvl.curate.filters import Rules

if TYPE_CHECKING:
    from internvl.curate.judge import Judge


@dataclass(frozen=True)
class Filter:
    """Write the records that stay, those that go with the reason, and a meta JSON of what stays."""

    meta: Annotated[Path, tyro.conf.Positional]
    """Meta JSON naming several sets, or one JSONL file of records."""
    out: Path
    """New folder: NAME.kept.jsonl, NAME.rejected.jsonl, counts.json, meta.json."""
    rules: Rules = field(default_factory=Rules)
    judge: str = ""
    """Model that is asked for the scores that no field gives: a name, a hub id or a folder; none when empty."""
    quality_prompt: Path | None = None
    """File with what it is asked, with {conversation} in it, instead of our own words."""
    repetition_prompt: Path | None = None
    """Likewise."""
    workers: int = os.cpu_count() or 2
    json: bool = False
    """Counts as JSON on standard output."""


def main(arguments: list[str]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from internvl.curate.filter_sets import filter_sets
    from internvl.data.mixture import read_sets

    asked = tyro.cli(Filter, prog="internvl curate filter", args=arguments)
    sets = read_sets(asked.meta)
    judge = open_judge(asked)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("records", total=sum(len(some.lines) for some in sets))
        reports = filter_sets(
            sets, asked.out, asked.rules, judge, asked.workers, lambda number: progress.advance(task, number)
        )
    if asked.json:
        sys.stdout.write(json.dumps({some.name: some.to_json() for some in reports}, indent=1) + "\n")
        return 0
    _tell(reports, asked.out)
    return 0


def open_judge(asked: Filter) -> Judge | None:
    from internvl.curate.filters import Score
    from internvl.curate.judge import PROMPTS, Judge

    if not asked.judge:
        return None
    from internvl.generate.open_chat import load_chat

    chat = load_chat(asked.judge)

    def ask(prompts: Sequence[str]) -> list[str]:
        return [reply.text for reply in chat.batch(list(prompts), max_new_tokens=8)]

    own: dict[Score, Path | None] = {"quality": asked.quality_prompt, "repetition": asked.repetition_prompt}
    return Judge(ask, {**PROMPTS, **{score: path.read_text(encoding="utf-8") for score, path in own.items() if path}})


def _tell(reports: Sequence[object], out: Path) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    from internvl.curate.filter_sets import Filtered

    console = Console(highlight=False, markup=False)
    table = Table("set", "given", "kept", "rejected", box=SIMPLE_HEAD)
    for some in reports:
        assert isinstance(some, Filtered)
        why = ", ".join(f"{count:,} {reason}" for reason, count in some.rejected.most_common())
        bare = f"; {some.unscored:,} kept without a score" if some.unscored else ""
        table.add_row(some.name, f"{some.given:,}", f"{some.kept:,}", (why or "0") + bare)
    console.print(table)
    written = (out / "meta.json").is_file()
    console.print(f"{out / 'meta.json'} names what was kept" if written else "nothing was kept", soft_wrap=True)
