"""A model on held-out rows: predictions in order and resumable, twice (its picture, another one), then scores.

Reading rows is heldout.py's, what an answer is worth catalog.py's, tables and charts report.py's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from internvl.evaluate.catalog import Task
from internvl.evaluate.heldout import HeldOut, Row, majority
from internvl.evaluate.intervals import Estimate, estimate, estimate_ratio

Result = dict[str, Any]
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Question:
    """What the model is asked for one row."""

    picture: Path
    text: str
    reference: str
    """The answer whose loss is taken; a generated answer never sees it."""


class Subject(Protocol):
    """A model under evaluation."""

    @property
    def settings(self) -> Mapping[str, Any]:
        """Everything that changes what it answers: weights, prompt, precision, decoding. JSON values."""

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]: ...

    def losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """For each reference answer the summed loss in nats and its number of tokens."""


def resumable(
    rows: Sequence[Row],
    path: Path,
    settings: Mapping[str, Any],
    work: Callable[[Sequence[Row]], list[Result]],
    batch: int = 64,
    advance: Advance = lambda _: None,
) -> list[Result]:
    """`work` of every row, in the order of `rows`; what `path` holds is not asked again.

    The first line of the file holds the settings: other settings are an error, never a mixture. A line that an
    interrupted run left half written is dropped.
    """
    if batch < 1:
        raise ValueError(f"batch {batch}: at least 1 row goes at a time")
    results = _open_results(path, settings)
    advance(sum(row.id in results for row in rows))
    todo = [row for row in rows if row.id not in results]
    with path.open("a", encoding="utf-8") as out:
        for chunk in _chunks(todo, batch):
            for row, result in zip(chunk, work(chunk), strict=True):
                results[row.id] = result
                out.write(json.dumps({"id": row.id, **result}, ensure_ascii=False) + "\n")
            out.flush()
            advance(len(chunk))
    return [results[row.id] for row in rows]


def _open_results(path: Path, settings: Mapping[str, Any]) -> dict[str, Result]:
    wanted = json.loads(json.dumps(settings))
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"settings": wanted}, ensure_ascii=False) + "\n", encoding="utf-8")
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if not whole:  # interrupted before its first line was written
        path.unlink()
        return _open_results(path, settings)
    lines = whole.decode("utf-8").removesuffix("\n").split("\n")  # an answer may hold other line separators
    _check_settings(path, json.loads(lines[0]).get("settings", {}), wanted)
    results = {}
    for number, line in enumerate(lines[1:], 2):
        try:
            fields = json.loads(line)
            results[fields.pop("id")] = fields
        except (ValueError, KeyError) as error:
            raise ValueError(f"{path}:{number}: not a prediction; remove the file to ask again") from error
    if len(whole) < len(content):
        with path.open("r+b") as out:
            out.truncate(len(whole))
    return results


def _check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    if found == wanted:
        return
    unlike = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    said = "; ".join(f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} now" for key in unlike)
    raise ValueError(f"{path} holds predictions of another run ({said}); choose another --out or remove the file")


def _chunks(rows: Sequence[Row], size: int) -> Iterator[Sequence[Row]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def predict(
    subject: Subject,
    task: Task,
    held: HeldOut,
    rows: Sequence[Row],
    path: Path,
    *,
    blind: bool = False,
    batch: int = 64,
    advance: Advance = lambda _: None,
) -> list[Result]:
    """Answers (or losses) of one task, with each row's picture or, blind, with another one of the same task."""
    settings = {
        **subject.settings,
        "task": task.name,
        "data": held.sha256,
        "picture": "another" if blind else "its own",
        "max_new_tokens": task.max_new_tokens,
    }

    def work(chunk: Sequence[Row]) -> list[Result]:
        shown = [held.another[row.id] if blind else row.image for row in chunk]
        questions = [
            Question(held.path(image), row.question, row.answer) for image, row in zip(shown, chunk, strict=True)
        ]
        if task.measure == "loss":
            pairs = zip(shown, subject.losses(questions), strict=True)
            return [{"image": image, "loss": loss, "tokens": tokens} for image, (loss, tokens) in pairs]
        answers = zip(shown, subject.answers(questions, task.max_new_tokens), strict=True)
        return [{"image": image, "answer": answer} for image, answer in answers]

    return resumable(rows, path, settings, work, batch, advance)


@dataclass(frozen=True)
class Score:
    """One task: the model beside the one that sees another picture and the one that never looks."""

    task: str
    metric: str
    n: int
    num_pictures: int
    model: Estimate
    blind: Estimate | None
    majority: Estimate | None
    majority_answer: str | None
    majority_source: str | None
    target: float
    times_blind: float
    gain: Estimate | None
    """Losses only: nats a token by which the right picture helps; the target is about this number."""
    met: bool | None
    """None where the target speaks of the blind score and that was not run."""
    parts: Mapping[str, Estimate]
    """Further numbers of the same answers."""


def score(
    task: Task, held: HeldOut, rows: Sequence[Row], own: Sequence[Result], blind: Sequence[Result] | None
) -> Score:
    if task.measure == "loss":
        return _score_losses(task, rows, own, blind)
    model, parts = _measure(task, rows, [result["answer"] for result in own])
    other = None if blind is None else _measure(task, rows, [result["answer"] for result in blind])[0]
    common = majority(held.root, task.name, held.rows)
    return Score(
        task=task.name,
        metric=task.metric,
        n=len(rows),
        num_pictures=len({row.image for row in rows}),
        model=model,
        blind=other,
        majority=_measure(task, rows, [common.answer] * len(rows))[0],
        majority_answer=common.answer,
        majority_source=common.source,
        target=task.target,
        times_blind=task.times_blind,
        gain=None,
        met=_met(task, model, other),
        parts=parts,
    )


def _measure(task: Task, rows: Sequence[Row], answers: Sequence[str]) -> tuple[Estimate, dict[str, Estimate]]:
    assert callable(task.measure)
    columns: dict[str, list[float]] = {}
    for row, answer in zip(rows, answers, strict=True):
        for name, value in task.measure(answer, row).items():
            columns.setdefault(name, []).append(value)
    estimates = {name: estimate(values) for name, values in columns.items()}
    return estimates.pop(task.metric), estimates


def _met(task: Task, model: Estimate, blind: Estimate | None) -> bool | None:
    if model.value < task.target:
        return False
    if task.times_blind == 1.0:
        return True
    return None if blind is None else model.value >= task.times_blind * blind.value


def _score_losses(task: Task, rows: Sequence[Row], own: Sequence[Result], blind: Sequence[Result] | None) -> Score:
    losses, tokens = [one["loss"] for one in own], [one["tokens"] for one in own]
    other = gain = None
    if blind is not None:
        other = estimate_ratio([one["loss"] for one in blind], [one["tokens"] for one in blind])
        gain = estimate_ratio([b["loss"] - loss for b, loss in zip(blind, losses, strict=True)], tokens)
    return Score(
        task=task.name,
        metric=task.metric,
        n=len(rows),
        num_pictures=len({row.image for row in rows}),
        model=estimate_ratio(losses, tokens),
        blind=other,
        majority=None,
        majority_answer=None,
        majority_source=None,
        target=task.target,
        times_blind=task.times_blind,
        gain=gain,
        met=None if gain is None else gain.value >= task.target,
        parts={},
    )


def evaluate(
    subject: Subject,
    task: Task,
    held: HeldOut,
    out: Path,
    *,
    limit: int | None = None,
    blind: bool = True,
    batch: int = 64,
    advance: Advance = lambda _: None,
) -> Score:
    """Predictions under out/predictions, then the score of one task."""
    if blind and not held.another:
        raise ValueError(f"{task.name} has one picture only, blind needs two; add pictures or pass --no-blind")
    rows = held.sample(limit)
    folder = out / "predictions"
    own = predict(subject, task, held, rows, folder / f"{task.name}.jsonl", batch=batch, advance=advance)
    other = None
    if blind:
        path = folder / f"{task.name}.blind.jsonl"
        other = predict(subject, task, held, rows, path, blind=True, batch=batch, advance=advance)
    return score(task, held, rows, own, other)
