"""Held-out rows: DIR/heldout/<task>.jsonl read and checked, its hash, a nested sample, another picture for each row."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from internvl.evaluate.ground import Box


@dataclass(frozen=True)
class Row:
    """One question about one picture."""

    id: str
    image: str
    """Path relative to the data folder."""
    question: str
    answer: str
    accept: tuple[str, ...]
    """Answers that count as right; `answer` is one of them."""
    task: str
    box: Box | None = None
    """The true box on the 0..1000 grid."""
    name_seen: bool | None = None
    """Whether training showed other pictures of the same name."""


@dataclass(frozen=True)
class HeldOut:
    """One task's rows, in the order of its file."""

    root: Path
    task: str
    rows: tuple[Row, ...]
    sha256: str
    """Of the file and of every picture it names."""
    another: Mapping[str, str]
    """Row id -> a picture of the same task that is not the row's, by content."""

    def path(self, image: str) -> Path:
        return self.root / image

    def sample(self, limit: int | None) -> tuple[Row, ...]:
        """`limit` rows, the same ones every time and a part of any larger sample; file order stays."""
        if limit is None or limit >= len(self.rows):
            return self.rows
        if limit < 1:
            raise ValueError(f"limit {limit}: at least 1 row is needed; leave the limit out for all")
        chosen = sorted(self.rows, key=lambda row: hashlib.sha256(row.id.encode()).digest())[:limit]
        kept = {row.id for row in chosen}
        return tuple(row for row in self.rows if row.id in kept)


def available(root: Path) -> list[str]:
    """Names of the tasks that the data folder holds."""
    folder = root / "heldout"
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; build the sets with: internvl data build --out {root}")
    return sorted(path.stem for path in folder.glob("*.jsonl"))


def read_heldout(root: Path, task: str) -> HeldOut:
    path = root / "heldout" / f"{task}.jsonl"
    if not path.is_file():
        raise ValueError(f"{path} does not exist; {root} holds: {', '.join(available(root)) or 'no task'}")
    rows = read_rows(path, task)
    content = {image: _sha256(root / image, path) for image in sorted({row.image for row in rows})}
    whole = hashlib.sha256(path.read_bytes())
    for image, digest in content.items():
        whole.update(f"{image} {digest}\n".encode())
    return HeldOut(root, task, rows, whole.hexdigest(), another_picture(rows, content))


def read_rows(path: Path, task: str) -> tuple[Row, ...]:
    rows: dict[str, Row] = {}
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = _row(json.loads(line), task)
            except ValueError as error:
                raise ValueError(f"{path}:{number}: {error}") from error
            if row.id in rows:
                raise ValueError(f"{path}:{number}: id {row.id!r} stands twice; make ids unique")
            rows[row.id] = row
    if not rows:
        raise ValueError(f"{path} holds no rows; build the set again")
    return tuple(rows.values())


def another_picture(rows: Sequence[Row], content: Mapping[str, str]) -> dict[str, str]:
    """Row id -> another picture: distinct pictures in the order of their hashes, each gives way to the next.

    A cycle of at least two has no fixed point, and the order of hashes has nothing to do with what is shown. Empty
    where the task has one picture only.
    """
    by_content = {content[row.image]: row.image for row in rows}
    cycle = sorted(by_content)
    if len(cycle) < 2:
        return {}
    following = dict(zip(cycle, cycle[1:] + cycle[:1], strict=True))
    return {row.id: by_content[following[content[row.image]]] for row in rows}


@dataclass(frozen=True)
class Majority:
    """The answer of someone who never looks, and where it was counted."""

    answer: str
    source: str


def majority(root: Path, task: str, rows: Sequence[Row]) -> Majority:
    """The answer that most rows accept, of DIR/train/<task>.jsonl, or of the held-out rows where that is absent.

    For boxes the median of each side, which no box of the set need have.
    """
    path = root / "train" / f"{task}.jsonl"
    counted, source = (read_rows(path, task), "training answers") if path.is_file() else (rows, "held-out answers")
    boxes = [row.box for row in counted if row.box is not None]
    if boxes:
        sides = [sorted(side)[len(boxes) // 2] for side in zip(*boxes, strict=True)]
        return Majority(f"[[{', '.join(f'{side:g}' for side in sides)}]]", source)
    ((answer, _),) = Counter(one for row in counted for one in dict.fromkeys(row.accept)).most_common(1)
    return Majority(answer, source)


def _row(fields: Any, task: str) -> Row:
    if not isinstance(fields, dict):
        raise ValueError(f"a row is a JSON object, not {type(fields).__name__}")
    for key in ("id", "image", "question", "answer"):
        if not isinstance(fields.get(key), str) or not fields[key]:
            raise ValueError(f"{key!r} must be a text that is not empty, it is {fields.get(key)!r}")
    if fields.get("task", task) != task:
        raise ValueError(f"task {fields['task']!r} in the file of {task!r}; move the row")
    accept = fields.get("accept") or [fields["answer"]]
    if not isinstance(accept, list) or not all(isinstance(one, str) for one in accept):
        raise ValueError(f"'accept' must be a list of texts, it is {accept!r}")
    box = fields.get("box")
    if box is not None and (not isinstance(box, list) or len(box) != 4 or not _on_grid(box)):
        raise ValueError(f"'box' must be four numbers in 0..1000 with x1 < x2 and y1 < y2, it is {box!r}")
    return Row(
        id=fields["id"],
        image=fields["image"],
        question=fields["question"],
        answer=fields["answer"],
        accept=tuple(accept),
        task=task,
        box=None if box is None else (box[0], box[1], box[2], box[3]),
        name_seen=fields.get("name_seen"),
    )


def _on_grid(box: list[Any]) -> bool:
    if not all(isinstance(side, int | float) and 0 <= side <= 1000 for side in box):
        return False
    return bool(box[0] < box[2] and box[1] < box[3])


def _sha256(image: Path, source: Path) -> str:
    if not image.is_file():
        raise ValueError(f"{source} names {image}, which does not exist; build the set again")
    return hashlib.sha256(image.read_bytes()).hexdigest()
