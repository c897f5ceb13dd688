"""Sets of pairs through the rules of pairs.py: what stays, what goes and why, and how many of each."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.curate.pairs import PairFilter, PairRules
from internvl.data.image_text import Pair, parse_pair
from internvl.data.mixture import DataSet
from internvl.data.records import Problem

Similarities = Callable[[Sequence[Pair]], list[list[float]]]
"""Of each caption of each pair with its picture."""
PAIRS_AT_ONCE = 32


@dataclass
class Counted:
    """One set: pairs in, pairs that stay, pairs that go by reason, and captions left out of pairs that stay."""

    name: str
    given: int = 0
    kept: int = 0
    rejected: Counter[str] = field(default_factory=Counter)
    captions_left_out: int = 0

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "rejected": dict(sorted(self.rejected.items()))}


def filter_pairs(
    sets: Sequence[DataSet],
    out: Path,
    rules: PairRules,
    *,
    against: Sequence[DataSet] = (),
    similarities: Similarities | None = None,
    problems: Sequence[Problem] = (),
    on_progress: Callable[[int], None] = lambda number: None,
) -> list[Counted]:
    """Write NAME.kept.jsonl, NAME.rejected.jsonl (source, reason), counts.json and meta.json below `out`.

    Every line given is kept or rejected. Pairs that look like a picture of `against` go; `problems`, of other layouts,
    count as unreadable. Lines that stay are as they were, but for captions that were left out.
    """
    if (out / "meta.json").exists():
        raise ValueError(f"{out} already holds filtered sets; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    judge = PairFilter(rules)
    for data in against:
        for position in range(len(data.lines)):
            judge.hold_out(parse_pair(data.lines.read(position), data.root, data.source(position)))
    reports = [
        _filter_set(data, name, out, judge, similarities, on_progress)
        for data, name in zip(sets, file_names(sets), strict=True)
    ]
    if isinstance(similarities, GivenVectors):
        similarities.finish()
    if problems:
        _write(out / "layouts.rejected.jsonl", [{"source": p.source, "reason": p.message} for p in problems])
        reports.append(Counted("layouts", len(problems), 0, Counter(unreadable=len(problems))))
    _write_json(out / "counts.json", [report.to_json() for report in reports])
    meta = {
        name: {
            "root": os.path.abspath(data.root) if data.root else "",
            "annotation": f"{name}.kept.jsonl",
            "repeat_time": data.repeat,
            "length": report.kept,
        }
        for data, name, report in zip(sets, file_names(sets), reports, strict=False)
        if report.kept
    }
    _write_json(out / "meta.json", meta)
    return reports


def _filter_set(
    data: DataSet,
    name: str,
    out: Path,
    judge: PairFilter,
    similarities: Similarities | None,
    on_progress: Callable[[int], None],
) -> Counted:
    report, kept, rejected = Counted(name), [], []
    for line, source, pair, why, scores in _read(data, similarities):
        report.given += 1
        on_progress(1)
        like = ""
        if pair is not None:
            try:
                captions, why, like = judge.judge(pair, scores)
            except (ValueError, OSError) as error:
                captions, why, like = (), "unreadable", str(error)
            if not why:
                report.kept += 1
                report.captions_left_out += len(pair.captions) - len(captions)
                kept.append(_line(line, pair, captions))
                continue
        else:
            why, like = "unreadable", why
        report.rejected[why] += 1
        rejected.append({"source": source, "reason": why, **({"detail": like} if like else {})})
    _write(out / f"{name}.kept.jsonl", kept)
    _write(out / f"{name}.rejected.jsonl", rejected)
    return report


def _read(
    data: DataSet, similarities: Similarities | None
) -> Iterator[tuple[bytes, str, Pair | None, str, list[float] | None]]:
    """Line, source, pair (or why there is none), similarities: some lines at a time, for those who compute them."""
    for start in range(0, len(data.lines), PAIRS_AT_ONCE):
        some: list[tuple[bytes, str, Pair | None, str]] = []
        for position in range(start, min(start + PAIRS_AT_ONCE, len(data.lines))):
            line, source = data.lines.read(position), data.source(position)
            try:
                some.append((line, source, parse_pair(line, data.root, source), ""))
            except ValueError as error:
                some.append((line, source, None, str(error)))
        pairs = [pair for _, _, pair, _ in some if pair is not None]
        scores = iter(similarities(pairs) if similarities is not None and pairs else [])
        for line, source, pair, why in some:
            yield line, source, pair, why, next(scores, None) if pair is not None else None


def _line(line: bytes, pair: Pair, captions: tuple[str, ...]) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(line)
    return content if captions == pair.captions else {**content, "caption": list(captions)}


class GivenVectors:
    """Similarities from vectors in the order of the lines that are pairs, and of their captions one after the other.

    Lines that are no pair have none; a picture that cannot be opened has its place.
    """

    def __init__(self, images: Float[Tensor, "pairs embed"], texts: Float[Tensor, "captions embed"]) -> None:
        self.images, self.texts = (torch.nn.functional.normalize(x.float(), dim=-1) for x in (images, texts))
        self.place = self.caption = 0

    def __call__(self, pairs: Sequence[Pair]) -> list[list[float]]:
        found = []
        for pair in pairs:
            some = self.texts[self.caption : self.caption + len(pair.captions)]
            if self.place >= len(self.images) or len(some) < len(pair.captions):
                raise ValueError(
                    f"{pair.source}: {len(self.images)} vectors of pictures and {len(self.texts)} of captions end "
                    "here; give one for each line that is a pair and each of its captions, in the order of the sets"
                )
            found.append((some @ self.images[self.place]).tolist())
            self.place, self.caption = self.place + 1, self.caption + len(some)
        return found

    def finish(self) -> None:
        """ValueError where vectors are left: they were of other lines."""
        if (self.place, self.caption) != (len(self.images), len(self.texts)):
            raise ValueError(
                f"{len(self.images)} vectors of pictures and {len(self.texts)} of captions for {self.place} pairs with "
                f"{self.caption} captions; give one for each line that is a pair and each of its captions: lines that "
                "are none, and empty captions, have no vector"
            )


def file_names(sets: Sequence[DataSet]) -> list[str]:
    """A name of a file for each set, no two alike."""
    names: list[str] = []
    for data in sets:
        stem = data.name or Path(data.annotation).stem
        plain = "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)
        tries = (plain, *(f"{plain}-{number}" for number in range(1, len(sets) + 1)))
        names.append(next(name for name in tries if name not in names))
    return names


def _write(path: Path, lines: Sequence[Any]) -> None:
    scratch = path.with_name(f".{path.name}.part")
    with open(scratch, "w", encoding="utf-8") as file:
        file.writelines(_dumped(line) + "\n" for line in lines)
    scratch.replace(path)


def _dumped(line: Any) -> str:
    """As JSON; half surrogate pairs, which a field that nobody reads may have, stay as they were spelled."""
    text = json.dumps(line, ensure_ascii=False)
    return json.dumps(line) if any("\ud800" <= sign <= "\udfff" for sign in text) else text


def _write_json(path: Path, content: Any) -> None:
    scratch = path.with_name(f".{path.name}.part")
    scratch.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    scratch.replace(path)
