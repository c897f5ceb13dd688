"""Lists of videos: Kinetics' CSV, MSR-VTT's JSON and CSV, and which frames their protocols look at.

Frames are decoded by media.py; lists of `PATH NUMBER` are labelled.py's.
"""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from internvl.data.captions import CaptionSet, field_of, gather, load_list, said_splits
from internvl.data.labelled import Labelled, LabelledSet, check_classes, report
from internvl.data.media import parts
from internvl.data.records import Problem


def read_kinetics(
    path: str | Path,
    root: str | Path,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    pattern: str = "{youtube_id}_{time_start:06d}_{time_end:06d}.mp4",
    problems: list[Problem] | None = None,
) -> LabelledSet:
    """The official CSV (label, youtube_id, time_start, time_end, split); videos lie below `root` as `pattern` says.

    Classes are the labels in alphabetical order, or `classes` in its order. Videos that are not there (many of
    YouTube's are gone) are left out, counted, and named in `problems`; the score then belongs to what is left.
    """
    every = list(_rows(path, ("label", "youtube_id", "time_start", "time_end"), problems))
    rows = [row for row in every if _in(row[1], split)]
    if every and not rows:
        splits = Counter(row.get("split", "") for _, row in every)
        raise ValueError(f"{path}: no video of split {split!r}; there are {said_splits(splits)}: choose one")
    names = check_classes(sorted({row["label"] for _, row in rows}) if classes is None else classes, str(path))
    numbers = {name: number for number, name in enumerate(names)}
    items, left_out = [], 0
    for number, row in rows:
        try:
            if row["label"] not in numbers:
                raise ValueError(f"label {row['label']!r} is none of the {len(names)} classes; add it to the list")
            video = Path(root, _clip_name(pattern, row))
        except ValueError as error:
            left_out += 1
            report(f"{path}:{number}", str(error), problems)
            continue
        if video.is_file():
            items.append(Labelled(video, numbers[row["label"]]))
        else:
            left_out += 1
            if problems is not None:
                problems.append(Problem(f"{path}:{number}", f"{video}: no such video; fetch it, or score without it"))
    if not items:
        raise ValueError(f"{path}: none of {len(rows)} videos lies below {root} as {pattern!r}; check root and pattern")
    return LabelledSet(names, tuple(items), left_out)


def _in(row: dict[str, str], split: str | None) -> bool:
    return split is None or row.get("split") == split


def _clip_name(pattern: str, row: dict[str, str]) -> str:
    seconds = row["time_start"], row["time_end"]
    if not all(one.isdecimal() for one in seconds):
        raise ValueError(f"time_start and time_end are {seconds}; whole seconds are needed")
    return pattern.format(
        label=row["label"], youtube_id=row["youtube_id"], time_start=int(seconds[0]), time_end=int(seconds[1])
    )


def _rows(
    path: str | Path, fields: Sequence[str], problems: list[Problem] | None
) -> Iterator[tuple[int, dict[str, str]]]:
    """Line number and fields of each row of a CSV file."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        absent = [field for field in fields if field not in (reader.fieldnames or ())]
        if absent:
            raise ValueError(f"{path}:1: no column {absent[0]!r} in {reader.fieldnames}; this is not that list")
        while True:
            try:
                row = next(reader)
            except StopIteration:
                return
            except (csv.Error, UnicodeDecodeError) as error:
                raise ValueError(f"{path}:{reader.line_num}: not a line of CSV in UTF-8: {error}") from error
            if any(not row[field] for field in fields):
                report(f"{path}:{reader.line_num}", "a field is missing; complete or remove the line", problems)
                continue
            yield reader.line_num, {field: value for field, value in row.items() if isinstance(value, str)}


def read_msrvtt(
    path: str | Path,
    root: str | Path,
    names: Sequence[str] | None = None,
    suffix: str = ".mp4",
    problems: list[Problem] | None = None,
) -> CaptionSet:
    """MSR-VTT: the 1K test CSV (video_id, sentence), or MSRVTT_data.json (all videos, 20 sentences each).

    Videos lie below `root` as VIDEO_ID.mp4; `names` keeps only these, in this order.
    """
    sentences: dict[str, list[str]] = {}
    left_out = 0
    if Path(path).suffix.lower() == ".csv":
        for _, row in _rows(path, ("video_id", "sentence"), problems):
            sentences.setdefault(row["video_id"], []).append(row["sentence"])
    else:
        for number, entry in enumerate(load_list(path, "sentences")):
            try:
                sentences.setdefault(field_of(entry, "video_id", str), []).append(field_of(entry, "caption", str))
            except ValueError as error:
                left_out += 1
                report(f"{path}: sentences[{number}]", str(error), problems)
    chosen = list(sentences) if names is None else list(names)
    unknown = [name for name in chosen if name not in sentences]
    if unknown:
        raise ValueError(f"{path}: no sentence for {unknown[0]!r} ({len(unknown)} such); give names of this file")
    return gather([(Path(root, name + suffix), sentences[name]) for name in chosen], str(path), left_out, problems)


def protocol_frames(length: int, count: int) -> list[int]:
    """Frames of the MSR-VTT protocol: middles of `count` stretches of ceil(length / count) frames.

    One frame: the centre frame. Where the rounding leaves fewer than `count` (the official script stops there), the
    middles of `count` equal parts; a video shorter than `count` repeats its last frame. Source: test_msrvtt.py.
    """
    if length < 1 or count < 1:
        raise ValueError(f"{count} frames of a video of {length}; both must be at least 1")
    stretch = -(-length // count)
    chosen = list(range(stretch // 2, length, stretch))
    return chosen if len(chosen) == count else parts(length, count, None)
