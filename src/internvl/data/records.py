"""The JSONL line as a dataclass, checked; every complaint says file and line (spec 5.2).

Opens no picture: that is encode.py's.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from reprlib import repr as brief
from typing import Any, Literal

from internvl.data.images import Source
from internvl.data.templates import Turn, turns_of
from internvl.tokens import IMAGE_MARK, VIDEO_MARK

Kind = Literal["text", "image", "images", "video"]
Reason = Literal[
    "json", "fields", "roles", "empty", "marks", "text", "missing", "unreadable", "too_long", "no_answer", "budget"
]
"""Why a record cannot be used: no JSON object; a field of the wrong type; turns out of order; an empty turn; marks that
do not agree with the media; text that is no Unicode; a file that is not there, or damaged; more tokens than
`max_length`; nothing to learn; more than a batch may hold."""

_LONGEST_S = 1e7
"""Seconds, four months: what is beyond is no place in a video, and its frame number may be no number at all."""
_SHOWN = 600
"""Characters of a message that are kept: a path or a value in it can be of any length."""


class RecordError(ValueError):
    """A record that cannot be used, and why in one word."""

    def __init__(self, reason: Reason, message: str) -> None:
        super().__init__(message)
        self.reason: Reason = reason


def reason_of(error: ValueError | OSError) -> Reason:
    """The word for any error that making a sample of a record may raise."""
    if isinstance(error, RecordError):
        return error.reason
    return "missing" if isinstance(error, FileNotFoundError) else "unreadable"


def place_of(source: str) -> tuple[str, int | str]:
    """File of a record and its line, its row, or the name of its member."""
    path, _, place = source.rpartition(":")
    number = place.removeprefix(" row ")
    return path, int(number) if number.isdecimal() else place.strip()


def printable(message: object) -> str:
    """A message for a terminal and a file: one line, no control characters, no half of a character, not endless."""
    text = str(message)
    text = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


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
        "spelled",
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
    reason: str = "fields"
    """One word, for lines of chat records one of `Reason`."""


def read_records(path: str | Path, root: str = "", problems: list[Problem] | None = None) -> Iterator[Record]:
    """The records of a JSONL file, media paths below `root`; with `problems`, bad lines are listed, not raised."""
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip(b"\r\n"):
                continue
            source = f"{path}:{number}"
            try:
                yield parse_line(line, root, source)
            except RecordError as error:
                if problems is None:
                    raise
                problems.append(Problem(source, str(error), error.reason))


def parse_line(line: bytes, root: str = "", source: str = "line") -> Record:
    """The record of one line."""
    return parse_record(load_line(line, source), root, source)


def load_line(line: bytes, source: str = "line") -> dict[str, Any]:
    """The JSON object of one line, which is UTF-8: of bytes, json would guess among five encodings, line by line."""
    try:
        data = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecordError("json", f"{source}: not a JSON line ({error}); repair or remove it") from error
    if not isinstance(data, dict):
        raise RecordError("json", f"{source}: a JSON {type(data).__name__}; a record is an object with `conversations`")
    return data


def parse_record(data: Mapping[str, Any], root: str = "", source: str = "record") -> Record:
    """The record of an official JSONL object."""
    turns = _turns(data.get("conversations"), source)
    images = _paths(data, "image", root, source)
    videos = _paths(data, "video", root, source)
    if videos and (images or len(videos) > 1):
        raise RecordError(
            "marks", f"{source}: {len(videos)} videos and {len(images)} images; one video, or images alone"
        )
    turns = _with_marks(turns, len(images), len(videos), source)
    if _spelled(data.get("spelled"), source):
        turns = tuple(turn._replace(spelled=turn.role == "assistant") for turn in turns)
    return Record(
        turns=turns,
        images=tuple(images),
        video=videos[0] if videos else None,
        clip=_clip(data.get("clip"), source),
        source=source,
        id=str(data["id"]) if isinstance(data.get("id"), (str, int, float)) else "",
        ignored=tuple(sorted(set(data) - KNOWN_FIELDS)),
    )


def _turns(conversations: Any, source: str) -> tuple[Turn, ...]:
    if not isinstance(conversations, list) or not conversations:
        raise RecordError("fields", f"{source}: no `conversations`; a record needs a question and an answer")
    if not all(isinstance(turn, dict) for turn in conversations):
        raise RecordError(
            "fields", f"{source}: `conversations` holds something else than objects with `from` and `value`"
        )
    try:
        turns = turns_of(conversations)
    except ValueError as error:
        raise RecordError("fields", f"{source}: {error}") from error
    spoken = turns[1:] if turns[0].role == "system" else turns
    roles = [turn.role for turn in spoken]
    if any(first == second for first, second in pairwise(roles)) or "system" in roles:
        raise RecordError("roles", f"{source}: roles {', '.join(roles)}; questions and answers must alternate")
    if "user" not in roles or roles[-1] != "assistant":
        said = f"roles {', '.join(roles) or 'none'}; a record has a question and ends with an answer"
        raise RecordError("roles", f"{source}: {said}")
    _check_texts(turns, spoken, source)
    return tuple(turns)


def _check_texts(turns: Sequence[Turn], spoken: Sequence[Turn], source: str) -> None:
    for position, turn in enumerate(spoken):
        if not turn.text.strip():
            said = f"turn {position} ({turn.role}) is empty; write its text or remove the record"
            raise RecordError("empty", f"{source}: {said}")
    for turn in turns:
        try:
            turn.text.encode()
        except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which no tokenizer reads
            said = f"a {turn.role} turn is no Unicode at character {error.start}; repair or remove it"
            raise RecordError("text", f"{source}: {said}") from error


def _paths(data: Mapping[str, Any], field: str, root: str, source: str) -> list[str]:
    value = data.get(field)
    paths = [value] if isinstance(value, str) else (value or [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise RecordError("fields", f"{source}: `{field}` is {brief(value)}; give a path or a list of paths")
    return [os.path.join(root, path) for path in paths if path]


def _clip(value: Any, source: str) -> tuple[float, float] | None:
    if value is None:
        return None
    numbers = isinstance(value, list) and len(value) == 2 and all(isinstance(v, (int, float)) for v in value)
    if not numbers or not 0 <= value[0] < value[1] <= _LONGEST_S:
        raise RecordError("fields", f"{source}: `clip` is {brief(value)}; give [start, end] in seconds")
    return float(value[0]), float(value[1])


def _spelled(value: Any, source: str) -> bool:
    if value is not None and not isinstance(value, bool):
        raise RecordError("fields", f"{source}: `spelled` is {brief(value)}; give true or false")
    return bool(value)


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
            said = f"{marks} {mark} marks in the questions but {expected} {noun}; make them equal"
            raise RecordError("marks", f"{source}: {said}")
    return turns
