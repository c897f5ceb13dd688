"""`internvl curate pairs`: keep the pairs that are worth learning from. The work is in curate/pair_sets.py."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from internvl.curate.pairs import REASONS, PairRules

if TYPE_CHECKING:
    from internvl.curate.pair_sets import Counted, Similarities


@dataclass(frozen=True)
class Pairs:
    """Write the pairs that stay, those that go with the reason, and a meta JSON of what stays."""

    meta: Annotated[Path, tyro.conf.Positional]
    """Meta JSON naming several sets (`layout`: jsonl, karpathy, coco, tar), or one JSONL file of pairs."""
    out: Path
    """New folder: NAME.kept.jsonl, NAME.rejected.jsonl, counts.json, meta.json."""
    rules: PairRules = field(default_factory=PairRules)
    against: Path | None = None
    """Meta JSON (`layout` as above) or JSONL of evaluation pairs: what looks like one of their pictures goes."""
    vectors: Path | None = None
    """safetensors with `images` and `texts`: a vector for each line that is a pair and each of its captions, in the
    order of the sets."""
    model: str = ""
    """InternVL-C that makes these vectors instead: a name, a hub id or a folder."""
    json: bool = False
    """Counts as JSON on standard output."""


def main(arguments: list[str]) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from internvl.curate.pair_sets import filter_pairs
    from internvl.data.pair_layouts import read_layouts
    from internvl.data.records import Problem

    asked = tyro.cli(Pairs, prog="internvl curate pairs", args=arguments)
    if asked.rules.least_similarity is not None and asked.vectors is None and not asked.model:
        raise ValueError("least_similarity is set but there are no vectors; give --vectors or --model")
    problems: list[Problem] = []
    sets = read_layouts(asked.meta, asked.out, problems)
    unseen: list[Problem] = []
    against = read_layouts(asked.against, asked.out / "against", unseen) if asked.against is not None else []
    if unseen:
        raise ValueError(
            f"{unseen[0].source}: {unseen[0].message} ({len(unseen)} such in {asked.against}); what cannot be read "
            "cannot be held out: repair or remove it"
        )
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("pairs", total=sum(len(some.lines) for some in sets))
        reports = filter_pairs(
            sets,
            asked.out,
            asked.rules,
            against=against,
            similarities=open_similarities(asked),
            problems=problems,
            on_progress=lambda number: progress.advance(task, number),
        )
    if asked.json:
        sys.stdout.write(json.dumps([report.to_json() for report in reports], indent=1) + "\n")
    else:
        _tell(reports, asked.out)
    return 0


def open_similarities(asked: Pairs) -> Similarities | None:
    """Given vectors, those of a model, or none."""
    if asked.vectors is not None:
        from internvl.convert.files import open_file
        from internvl.curate.pair_sets import GivenVectors

        file = open_file(asked.vectors)
        if missing := {"images", "texts"} - set(file.shapes):
            raise ValueError(f"{asked.vectors}: no {min(missing)!r}; it holds {', '.join(sorted(file.shapes))}")
        return GivenVectors(file.get("images"), file.get("texts"))
    if not asked.model:
        return None
    from internvl.curate.pair_vectors import model_vectors

    return model_vectors(asked.model)


def _tell(reports: Sequence[Counted], out: Path) -> None:
    for report in reports:
        sys.stdout.write(f"{report.name}: {report.given} pairs in, {report.kept} out\n")
        for reason, count in report.rejected.most_common():
            sys.stdout.write(f"  {count:>8} {reason}: {REASONS[reason]}\n")
        if report.captions_left_out:
            sys.stdout.write(f"  {report.captions_left_out:>8} captions left out of pairs that stay\n")
    sys.stdout.write(f"{out / 'meta.json'}\n")
