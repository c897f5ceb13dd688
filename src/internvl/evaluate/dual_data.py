"""Data of the paper's tasks by what a path looks like: class folders, lists, JSON, CSV, tars, parquet.

Pictures inside tars and parquet files are written out once, so that all that follows sees files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl.data.captions import CaptionSet, gather, read_coco, read_karpathy
from internvl.data.clips import read_kinetics, read_msrvtt
from internvl.data.image_text import parse_pair
from internvl.data.labelled import (
    Labelled,
    LabelledSet,
    check_classes,
    read_class_list,
    read_image_folder,
    read_path_list,
    report,
)
from internvl.data.packaged import class_names
from internvl.data.records import Problem
from internvl.data.shards import PICTURE_FIELDS, picture_and_text, read_parquet, read_tar
from internvl.fetch import fetch
from internvl.packages import PACKAGES

TARS = (".tar", ".tar.gz", ".tgz")
_PARTS = re.compile(r"(\d+)")
PLAIN_TEMPLATE = "a photo of a {}."  # CLIP, section 3.1.4


@dataclass(frozen=True)
class Where:
    """A data set on disk, and what its layout leaves open."""

    path: Path
    root: Path | None = None
    """Folder of pictures or videos; that of the file when left out."""
    split: str = "test"
    columns: tuple[str, str] = ("image", "caption")
    """Of parquet files: picture, and caption or class."""
    scratch: Path = Path("pictures")
    """Where pictures from inside archives are put."""

    @property
    def folder(self) -> Path:
        return self.root if self.root is not None else self.path.parent


@dataclass(frozen=True)
class Prompts:
    """Class names and templates of one language, and where they are from."""

    names: tuple[str, ...]
    templates: tuple[str, ...]
    source: str


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith((*TARS, ".parquet"))


def archives(path: Path) -> list[Path]:
    """The file, where it is an archive, or the archives of a folder, shard 2 before shard 10."""
    if not path.is_dir():
        return [path] if is_archive(path) else []
    found = [file for file in path.iterdir() if file.is_file() and is_archive(file) and not file.name.startswith(".")]
    return sorted(found, key=lambda file: [int(part) if part.isdecimal() else part for part in _PARTS.split(file.name)])


def has_class_folders(path: Path) -> bool:
    """Whether a folder is one of class folders: an archive that lies beside them is where they came from."""
    return path.is_dir() and any(child.is_dir() and not child.name.startswith(".") for child in path.iterdir())


def read_pairs(where: Where, problems: list[Problem]) -> tuple[CaptionSet, bool]:
    """Pictures or videos with their captions, and whether they are videos. Bad entries are listed in `problems`."""
    path = where.path
    if archives(path):
        pairs = [(file, _sentences(text)) for file, text in _unpacked(where, "txt", problems)]
        return gather(pairs, str(path), len(problems), problems), False
    if path.suffix.lower() == ".jsonl":
        return gather(list(_lines_of_pairs(where, problems).items()), str(path), len(problems), problems), False
    if path.suffix.lower() == ".csv":
        return read_msrvtt(path, where.folder, problems=problems), True
    if path.suffix.lower() != ".json" or not path.is_file():
        raise ValueError(f"{path}: no data of pairs; give JSON of Karpathy, COCO or MSR-VTT, JSONL, tar, parquet")
    fields = _fields(path)
    if "sentences" in fields:
        return read_msrvtt(path, where.folder, problems=problems), True
    if "annotations" in fields:
        return read_coco(path, where.folder, problems), False
    return read_karpathy(path, where.folder, where.split, problems), False


def _lines_of_pairs(where: Where, problems: list[Problem]) -> dict[Path, list[str]]:
    """The layout that training reads: {"image", "caption"} a line. Lines of one picture are captions of one picture:
    twice among the pictures it would stand beside itself."""
    found: dict[Path, list[str]] = {}
    for number, line in enumerate(where.path.read_bytes().splitlines(), 1):
        source = f"{where.path}:{number}"
        try:
            if line.strip():
                pair = parse_pair(line, str(where.folder), source)
                found.setdefault(Path(pair.path), []).extend(pair.captions)
        except ValueError as error:
            problems.append(Problem(source, str(error).removeprefix(f"{source}: ")))
    return found


def _fields(path: Path) -> set[str]:
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); fetch the file again") from error
    return set(data) if isinstance(data, dict) else set()


def read_classes(where: Where, problems: list[Problem], classes: Sequence[str] | None) -> tuple[LabelledSet, bool]:
    """Pictures or videos with their class, and whether they are videos. Lists of numbers need `classes`."""
    path, shards = where.path, archives(where.path)
    if has_class_folders(path) or (path.is_dir() and not shards):
        return read_image_folder(path), False
    if path.suffix.lower() == ".csv":
        return read_kinetics(path, where.folder, split=where.split, problems=problems), True
    if classes is None:
        raise ValueError(f"{path}: its classes are numbers; say their names with --names")
    if path.suffix.lower() == ".txt":
        found = read_path_list(path, where.folder, classes, problems)
        return found, found.items[0].path.suffix.lower() in (".mp4", ".avi", ".webm", ".mkv", ".mov")
    if not shards:
        raise ValueError(f"{path}: no data of classes; give class folders, a list .txt, Kinetics' .csv, a tar, parquet")
    items = []
    for file, text in _unpacked(where, "cls", problems):
        if str(text).strip().isdecimal() and int(text) < len(classes):
            items.append(Labelled(file, int(text)))
        else:
            report(f"{path}: {file.name}", f"class {text!r} is no number below {len(classes)}", problems)
    if not items:
        first = f"the first problem: {problems[0].source}: {problems[0].message}" if problems else "the file is empty"
        raise ValueError(f"{path}: no picture with a class; {first}")
    return LabelledSet(tuple(classes), tuple(items), len(problems)), False


def _sentences(text: Any) -> list[str]:
    """Of a list its texts; of a text its lines, which is how CLIP benchmark's shards hold several captions."""
    return [str(one) for one in text] if isinstance(text, list) else str(text).splitlines() or [""]


def _unpacked(where: Where, text_field: str, problems: list[Problem]) -> Iterator[tuple[Path, Any]]:
    """Pictures as files and what is said of them. Names in archives are not trusted: files are numbered."""
    for shard in archives(where.path):
        folder = where.scratch / shard.name
        folder.mkdir(parents=True, exist_ok=True)
        for number, (content, text) in enumerate(_samples(shard, where.columns, text_field, problems)):
            file = folder / f"{number:08d}.jpg"  # Pillow goes by the content
            if not file.is_file() or file.read_bytes() != content:  # a shard may have changed since
                file.write_bytes(content)
            yield file, text


def _samples(
    shard: Path, columns: tuple[str, str], text_field: str, problems: list[Problem]
) -> Iterator[tuple[bytes, Any]]:
    if shard.suffix.lower() == ".parquet":
        picture, text = columns
        for row in read_parquet(shard, columns, problems=problems):
            if isinstance(row[picture], bytes):
                yield row[picture], row[text]
            else:
                report(str(shard), f"column {picture!r} holds no bytes; name another with --columns", problems)
        return
    for sample in read_tar(shard, problems):
        try:
            yield picture_and_text(sample, text_field, PICTURE_FIELDS)
        except ValueError as error:
            problems.append(Problem(sample.source, str(error).removeprefix(f"{sample.source}: ")))


def read_prompts(
    names: str | None,
    templates: str | None,
    language: str,
    folders: Sequence[str] = (),
    order: Path | None = None,
) -> Prompts:
    """Class names out of a file, of a benchmark of the package (imagenet1k) or of the folders; templates likewise.

    `order` is a file with a folder's name first on each line, in the order of the names: of them those of the folders
    are taken (ImageNet-A and -R have 200 of 1,000 classes). Names of files must differ; those of the package are read
    as published. ValueError where names are those of the folders, but in another order: every label would be wrong.
    """
    found = _read_prompts(names, templates, language, folders)
    if order is not None:
        found = replace(found, names=_picked(found, order, folders))
    said, wanted = ([name.casefold().replace("_", " ") for name in group] for group in (found.names, folders))
    if said != wanted and sorted(said) == sorted(wanted):
        place = next(n for n, pair in enumerate(zip(said, wanted, strict=True)) if pair[0] != pair[1])
        raise ValueError(
            f"{found.source}: class {place} is {found.names[place]!r}, but that folder is {folders[place]!r}; folders "
            "count in alphabetical order: leave out --names, or write the names in that order"
        )
    return found


def _picked(found: Prompts, order: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names of the folders, in their order."""
    listed = [line.split()[0] for line in _lines(order, "no folder; write the name of one first on each line")]
    if len(listed) != len(found.names):
        raise ValueError(f"{order}: {len(listed)} lines for {len(found.names)} names ({found.source}); one a name")
    places = {name: place for place, name in enumerate(listed)}
    unknown = [name for name in folders if name not in places]
    if unknown or not folders:
        raise ValueError(
            f"{order}: {len(unknown)} of {len(folders)} class folders are not listed, such as {unknown[:3]}; give the "
            "list that goes with the names (ImageNet's LOC_synset_mapping.txt with imagenet1k)"
        )
    return tuple(found.names[places[name]] for name in folders)


def _read_prompts(names: str | None, templates: str | None, language: str, folders: Sequence[str]) -> Prompts:
    lines = None if templates is None else _templates(templates, language)
    if names is None:
        if not folders:
            raise ValueError("no class names; give --names, a file or a benchmark such as imagenet1k")
        spelled = check_classes([folder.replace("_", " ") for folder in folders], "class folders")
        return Prompts(spelled, lines or (PLAIN_TEMPLATE,), "folders" if templates is None else f"folders, {templates}")
    if Path(names).is_file():
        return Prompts(
            read_class_list(names), lines or (PLAIN_TEMPLATE,), names if templates is None else f"{names}, {templates}"
        )
    package = PACKAGES[class_names.PACKAGE]
    listed = class_names.read(fetch(package.name), names, language)
    source = f"{package.name} {package.version}" if lines is None else f"{package.name} names, {templates}"
    return Prompts(listed.names, lines or listed.templates, source)


def _templates(given: str, language: str) -> tuple[str, ...]:
    if Path(given).is_file():
        return _lines(Path(given))
    return class_names.read(fetch(class_names.PACKAGE), given, language).templates


def _lines(path: Path, missing: str = "no template; write one a line, with {} for the name") -> tuple[str, ...]:
    lines = tuple(line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip())
    if not lines:
        raise ValueError(f"{path}: {missing}")
    return lines
