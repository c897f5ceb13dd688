"""`internvl evaluate`: a model on held-out sets beside its baselines; predictions, scores and chart in a folder."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from internvl.commands import evaluate_dual
from internvl.commands.evaluate_options import RUNS, TASKS

if TYPE_CHECKING:
    from internvl.evaluate.heldout import HeldOut
    from internvl.evaluate.run import Score
    from internvl.evaluate.subject import ChatSubject


@dataclass(frozen=True)
class Evaluate:
    """Score a chat model on the held-out sets of a data folder.

    Tasks of dual models (InternVL-C, -G) have words of their own before the model: internvl evaluate zero-shot,
    retrieval, captions, probe, segment; and compare, for their results. Each has its --help.

    Each set is asked twice: with its own pictures and, blind, with another picture of the same set. Interrupted runs
    go on where they stopped when called again.
    """

    model: tyro.conf.Positional[str]
    """Name ("pocket") or checkpoint folder."""
    data: Path
    """Folder that `internvl data` built; the sets are its heldout/<task>.jsonl."""
    tasks: tuple[str, ...] = ()
    """Sets to score; all that the folder holds when left out."""
    limit: int | None = None
    """Rows of each set, the same ones every time; all when left out."""
    device: Literal["cpu", "cuda"] | None = None
    """cuda where there is one, when left out."""
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """auto: bfloat16 where the hardware computes it, else float32."""
    quantiser: Literal["auto", "own", "torchao"] = "auto"
    """What rounds to int8 and int4; torchao is an extra."""
    max_tiles: int | None = None
    """Most tiles of a picture; the model's own number when left out."""
    batch: int = 64
    """Questions that go together; changes the time, not the answers."""
    out: Path | None = None
    """Folder for predictions, scores.json, manifest.json and scores.png; one for each model and setting under
    runs/evaluate when left out."""
    blind: bool = True
    """Ask also with another picture; half the time without."""
    chart: bool = True
    """Draw scores.png."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Scores and manifest as JSON on standard output instead of the table."""


def main(arguments: list[str]) -> int:
    if arguments and arguments[0] in TASKS:
        return evaluate_dual.main(arguments[0], arguments[1:])
    asked = tyro.cli(Evaluate, args=arguments, prog="internvl evaluate")
    from internvl.evaluate import report

    if asked.chart:
        report.need_matplotlib()
    held = _held_out(asked)
    subject = _subject(asked)
    out = asked.out or _default_out(asked.model, {**subject.settings, "data": {one.task: one.sha256 for one in held}})
    prompts = {one.task: subject.prompt(one.rows[0].question) for one in held}
    facts = report.manifest(subject.settings, {one.task: one.sha256 for one in held}, prompts)
    facts["model"] = asked.model
    report.write_json(out / "manifest.json", facts)
    scores = _scores(asked, subject, held, out)
    report.write_json(out / "scores.json", report.scores_json(scores, facts))
    if asked.chart:
        report.chart(scores, out / "scores.png")
    _show(asked, scores, facts, out)
    return 0


def _held_out(asked: Evaluate) -> list[HeldOut]:
    from internvl.evaluate.catalog import CATALOG, find_task
    from internvl.evaluate.heldout import available, read_heldout

    there = available(asked.data)
    names = asked.tasks or [name for name in CATALOG if name in there]
    if not names:
        raise ValueError(f"{asked.data / 'heldout'} holds none of {', '.join(CATALOG)}; build it with internvl data")
    return [read_heldout(asked.data, find_task(name).name) for name in dict.fromkeys(names)]


def _subject(asked: Evaluate) -> ChatSubject:
    from internvl.evaluate.subject import open_subject

    return open_subject(
        asked.model,
        device=asked.device,
        dtype=asked.dtype,
        max_tiles=asked.max_tiles,
        batch=asked.batch,
        quantiser=asked.quantiser,
    )


def _default_out(model: str, identity: dict[str, object]) -> Path:
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
    return RUNS / f"{Path(model).name}-{digest[:8]}"


def _scores(asked: Evaluate, subject: ChatSubject, held: Sequence[HeldOut], out: Path) -> list[Score]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from internvl.evaluate.catalog import find_task
    from internvl.evaluate.run import evaluate

    columns = (TextColumn("{task.description:<16}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    scores = []
    with Progress(*columns, console=Console(stderr=True)) as progress:
        for one in held:
            total = len(one.sample(asked.limit)) * (2 if asked.blind else 1)
            bar = progress.add_task(one.task, total=total)
            scores.append(
                evaluate(
                    subject,
                    find_task(one.task),
                    one,
                    out,
                    limit=asked.limit,
                    blind=asked.blind,
                    batch=asked.batch,
                    advance=lambda rows, bar=bar: progress.advance(bar, rows),  # type: ignore[misc]
                )
            )
    return scores


def _show(asked: Evaluate, scores: Sequence[Score], facts: dict[str, object], out: Path) -> None:
    from internvl.evaluate import report

    if asked.json:
        sys.stdout.write(json.dumps(report.scores_json(scores, facts), ensure_ascii=False) + "\n")
        return
    from rich.console import Console

    console = Console()
    console.print(report.table(scores))
    for one in scores:
        if one.majority_answer is not None:
            said = f"{one.task}: majority answer {one.majority_answer!r} ({one.majority_source})"
            console.print(said, style="dim", highlight=False, markup=False)
    console.print(f"written to {out}", highlight=False, markup=False)
