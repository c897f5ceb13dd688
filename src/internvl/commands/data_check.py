"""`internvl data check`: is every record of a meta JSON usable, and what is in it. The work is in data/check.py."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from internvl.data.encode import Encoder


@dataclass(frozen=True)
class Check:
    """Look at every record as training would: exit code 1 when something is wrong."""

    meta: Annotated[Path, tyro.conf.Positional]
    """Meta JSON naming several sets, or one JSONL file of records."""
    model: str = "pocket"
    """Its tokenizer, template and tiles say how long a record is: a folder, a hub id or `pocket`."""
    max_length: int = 8192
    """Positions of one sample, as `data.max_length` of training."""
    max_tiles: int | None = None
    """Tiles of one image before the thumbnail; the model's own number when not given."""
    max_frames: int = 32
    """Of a video, as `data.max_frames` of training."""
    overlong: Literal["error", "cut"] = "error"
    """As `data.overlong` of training: is a record that is too long wrong, or only told of."""
    decode: bool = False
    """Read every pixel and frame, not headers alone."""
    allow: tuple[str, ...] = ()
    """Findings that do not count as wrong, such as same_line or repeats."""
    workers: int = os.cpu_count() or 2
    json: bool = False
    """The whole report as JSON on standard output."""
    html: Path | None = None
    """Write the report as a page to this file."""
    listed: int = 20
    """Findings that the terminal lists."""


def open_encoder(
    model: str, max_length: int | None, max_tiles: int | None, overlong: Literal["error", "cut"] = "error"
) -> Encoder:
    """How a model's records are encoded; no weight of it is read."""
    from internvl.data.encode import Encoder
    from internvl.load import read_tokenizer
    from internvl.opened import open_checkpoint

    opened = open_checkpoint(model)
    tokenizer = read_tokenizer(opened.folder, opened.config.language)
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer; put its tokenizer.json beside the weights")
    config = opened.config if max_tiles is None else replace(opened.config, max_tiles=max_tiles)
    return Encoder(tokenizer, config, max_length=max_length, overlong=overlong)


def run(asked: Check) -> int:
    from rich.console import Console
    from rich.progress import Progress

    from internvl.data.check import Checks, check
    from internvl.data.media import FrameSettings
    from internvl.data.mixture import read_sets
    from internvl.data.report import tell, to_html

    sets = read_sets(asked.meta)
    frames = FrameSettings(min_frames=min(8, asked.max_frames), max_frames=asked.max_frames)
    encoder = replace(open_encoder(asked.model, asked.max_length, asked.max_tiles, asked.overlong), frames=frames)
    errors = Console(stderr=True)
    with Progress(console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("records", total=sum(some.length or 0 for some in sets) or None)
        report = check(sets, encoder, Checks(asked.decode, workers=asked.workers), lambda n: progress.advance(task, n))
    wrong = report.wrong(asked.allow)
    if asked.html is not None:
        asked.html.write_text(to_html(report, f"Data check: {asked.meta.name}"), encoding="utf-8")
    if asked.json:
        sys.stdout.write(json.dumps({**report.to_json(), "wrong": wrong}, indent=1) + "\n")
        return int(wrong > 0)
    console = Console(highlight=False, markup=False)
    tell(report, console, asked.listed)
    given, accepted = (sum(getattr(some, name) for some in report.sets) for name in ("given", "accepted"))
    verdict = f"{wrong:,} wrong" if wrong else "nothing wrong"
    console.print(f"{given:,} records given = {accepted:,} accepted + {given - accepted:,} rejected; {verdict}")
    return int(wrong > 0)
