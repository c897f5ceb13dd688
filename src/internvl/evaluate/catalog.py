"""The held-out tasks of `pocket`: what is measured on each answer, how long an answer may be, and the target."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from internvl.evaluate.ground import IOU_HIT, answer_iou
from internvl.evaluate.heldout import Row
from internvl.evaluate.vqa import contains, exact_match, verbatim_match

Measures = dict[str, float]


def measure_exact(answer: str, row: Row) -> Measures:
    return {"exact match": float(exact_match(answer, row.accept))}


def measure_verbatim(answer: str, row: Row) -> Measures:
    return {
        "exact as written": float(verbatim_match(answer, row.accept)),
        "ignoring case": float(verbatim_match(answer, row.accept, ignore_case=True)),
    }


def measure_box(answer: str, row: Row) -> Measures:
    if row.box is None:
        raise ValueError(f"row {row.id!r} of {row.task} has no box; build the set again")
    overlap = answer_iou(answer, row.box)
    return {f"IoU >= {IOU_HIT}": float(overlap >= IOU_HIT), "mean IoU": overlap}


def measure_name(answer: str, row: Row) -> Measures:
    named = float(contains(answer, row.accept))
    if row.name_seen is None:
        return {"named": named}
    return {"named": named, "name seen" if row.name_seen else "name not seen": named}


@dataclass(frozen=True)
class Task:
    """A held-out set and its score."""

    name: str
    measure: Callable[[str, Row], Measures] | Literal["loss"]
    """Numbers of one answer, the score first; "loss": the reference answer's loss, nothing is generated."""
    metric: str
    target: float
    """Least score wanted (project goals); for losses, least gain in nats a token over another picture."""
    max_new_tokens: int = 0
    times_blind: float = 1.0
    """The score must also be this many times the one with another picture."""


CATALOG = {
    task.name: task
    for task in (
        Task("easy_vqa", measure_exact, "exact match", 0.95, 16),
        Task("scenes_yesno", measure_exact, "exact match", 0.90, 16),
        Task("scenes_colour", measure_exact, "exact match", 0.90, 16),
        Task("scenes_count", measure_exact, "exact match", 0.70, 16),
        Task("scenes_position", measure_exact, "exact match", 0.85, 16),
        Task("scenes_box", measure_box, f"IoU >= {IOU_HIT}", 0.60, 64),
        Task("words", measure_verbatim, "exact as written", 0.60, 48),
        Task("naming", measure_name, "named", 0.45, 24, times_blind=3.0),
        Task("captions", "loss", "loss, nats a token", 0.80),
    )
}


def find_task(name: str) -> Task:
    if name not in CATALOG:
        raise ValueError(f"no task {name!r}; it is one of {', '.join(CATALOG)}")
    return CATALOG[name]
