"""The JSONL line as a dataclass, checked; every complaint says file and line (spec 5.2).

Opens no picture: that is encode.py's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from internvl.data.images import Source
from internvl.data.templates import Turn, turns_of
from internvl.tokens import IMAGE_MARK, VIDEO_MARK

Kind = Literal["text", "image", "images", "video"]

KNOWN_FIELDS = frozenset(
    (
        "id",
        "conversations",
        "image",
        "video",
        "clip",
        "length",
        "width",
        "height",
        "width_list",
        "height_list",
        "regions",
    )
)


@dataclass(frozen=True)
class Record:
    """One conversation and its media; marks in its questions and `images` agree in number."""

    turns: tuple[Turn, ...]
    images: tuple[Source, ...] = ()
    video: str | None = None
    clip: tuple[float, float] | None = None
    """Start and end in seconds of the part of the video that is meant."""
    source: str = "record"
    """File and line, for messages."""
    id: str = ""
    ignored: tuple[str, ...] = ()
    """Fields of the line that nothing here reads."""

    @property
    def kind(self) -> Kind:
        if self.video is not None:
            return "video"
        return "text" if not self.images else "image" if len(self.images) == 1 else "images"


@dataclass(frozen=True)
class Problem:
    """A line that could not be used."""

    source: str
    message: str


def read_records(path: str | Path, root: str = "", problems: list[Problem] | None = None) -> Iterator[Record]:
    """The records of a JSONL file, media paths below `root`; with `problems`, bad lines are listed, not raised."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip(b"\r\n"):
                continue
            source = f"{path}:{number}"
            try:
                yield parse_line(line, root, source)
            except ValueError as error:
                if problems is None:
                    raise
                problems.append(Problem(source, str(error)))


def parse_line(line: bytes, root: str = "", source: str = "line") -> Record:
    """The record of one line."""
    try:
        data = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{source}: not a JSON line ({error}); repair or remove it") from error
    if not isinstance(data, dict):
        raise ValueError(f"{source}: a JSON {type(data).__name__}; a record is an object with `conversations`")
    return parse_record(data, root, source)


def parse_record(data: Mapping[str, Any], root: str = "", source: str = "record") -> Record:
    """The record of an official JSONL object."""
    turns = _turns(data.get("conversations"), source)
    images = _paths(data, "image", root, source)
    videos = _paths(data, "video", root, source)
    if videos and (images or len(videos) > 1):
        raise ValueError(f"{source}: {len(videos)} videos and {len(images)} images; one video, or images alone")
    turns = _with_marks(turns, len(images), len(videos), source)
    return Record(
        turns=turns,
        images=tuple(images),
        video=videos[0] if videos else None,
        clip=_clip(data.get("clip"), source),
        source=source,
        id=str(data.get("id", "")),
        ignored=tuple(sorted(set(data) - KNOWN_FIELDS)),
    )


def _turns(conversations: Any, source: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f"{source}: no `conversations`; a record needs a question and an answer")
    if not all(isinstance(turn, dict) for turn in conversations):
        raise ValueError(f"{source}: `conversations` holds something else than objects with `from` and `value`")
    try:
        turns = turns_of(conversations)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    spoken = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in spoken]
    if any(first == second for first, second in pairwise(roles)) or "system" in roles:
        raise ValueError(f"{source}: roles {', '.join(roles)}; questions and answers must alternate")
    if "user" not in roles or roles[-1] != "assistant":
        raise ValueError(
            f"{source}: roles {', '.join(roles) or 'none'}; a record has a question and ends with an answer"
        )
    for position, turn in enumerate(spoken):
        if not turn.text.strip():
            raise ValueError(f"{source}: turn {position} ({turn.role}) is empty; write its text or remove the record")
    return tuple(turns)


def _paths(data: Mapping[str, Any], field: str, root: str, source: str) -> list[str]:
    value = data.get(field)
    paths = [value] if isinstance(value, str) else (value or [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"{source}: `{field}` is {value!r}; give a path or a list of paths")
    return [os.path.join(root, path) for path in paths if path]


def _clip(value: Any, source: str) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    if not numbers or not 0 <= value[0] < value[1] < math.inf:
        raise ValueError(f"{source}: `clip` is {value!r}; give [start, end] in seconds")
    return float(value[0]), float(value[1])


def _with_marks(turns: tuple[Turn, ...], num_images: int, num_videos: int, source: str) -> tuple[Turn, ...]:
    """Turns whose questions have one mark a medium; a single medium without one is put first, as officially."""
    for mark, expected in ((IMAGE_MARK, num_images), (VIDEO_MARK, num_videos)):
        marks = sum(turn.text.count(mark) for turn in turns if turn.role == "user")
        if marks == 0 and expected == 1:
            first = next(i for i, turn in enumerate(turns) if turn.role == "user")
            marked = Turn("user", f"{mark}\n{turns[first].text}")
            turns = (*turns[:first], marked, *turns[first + 1 :])
        elif marks != expected:
            noun = "images" if mark == IMAGE_MARK else "videos"
            raise ValueError(f"{source}: {marks} {mark} marks in the questions but {expected} {noun}; make them equal")
    return turns
