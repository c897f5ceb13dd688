"""Pictures with a class or a mask: class folders, class lists, lists of paths, the ADE20K layout.

Only names and paths are read here; pictures are opened by images.py when they are needed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from PIL import Image
from torch import Tensor

from internvl.data.images import DEFAULT_LIMITS, Limits
from internvl.data.records import Problem

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".jp2")
ADE_CLASSES = 150
IGNORED = 255
"""Value of pixels that are not scored; ADE20K's own 0, "other", becomes it (official `reduce_zero_label`)."""


@dataclass(frozen=True)
class Labelled:
    """A picture or video and its class."""

    path: Path
    label: int


@dataclass(frozen=True)
class LabelledSet:
    """Classes in the order of their numbers, and what belongs to them."""

    classes: tuple[str, ...]
    items: tuple[Labelled, ...]
    left_out: int = 0
    """Files that are not pictures, or lines that could not be used."""


@dataclass(frozen=True)
class Masked:
    """A picture and the picture of its classes."""

    picture: Path
    mask: Path


def check_classes(names: Sequence[str], source: str) -> tuple[str, ...]:
    """The names without outer spaces; ValueError where one is empty or stands twice, with its places."""
    stripped = [name.strip() for name in names]
    if not stripped:
        raise ValueError(f"{source}: no class; give at least one name")
    for number, name in enumerate(stripped, 1):
        if not name:
            raise ValueError(f"{source}:{number}: an empty class name; write the name or remove the line")
    twice = [name for name, count in Counter(stripped).items() if count > 1]
    if twice:
        places = [str(number) for number, name in enumerate(stripped, 1) if name == twice[0]]
        raise ValueError(
            f"{source}: class {twice[0]!r} stands {len(places)} times, at {', '.join(places)} "
            f"({len(twice)} such names); two classes of one name cannot be told apart: rename or merge them"
        )
    return tuple(stripped)


def read_class_list(path: str | Path) -> tuple[str, ...]:
    """One class name a line, the first is class 0. Blank lines at the end are no classes."""
    lines = _text(path).rstrip().splitlines()
    return check_classes(lines, str(path))


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error}); save it as UTF-8") from error


def read_image_folder(root: str | Path, classes: Sequence[str] | None = None) -> LabelledSet:
    """ROOT/CLASS/.../picture: folders in alphabetical order are the classes, or those of `classes` in its order.

    Folders that are all numbers (ImageNet-V2: 0 to 999) are in the order of the numbers: they are labels. Other files
    are left out and counted; hidden ones are not looked at. ValueError for a class without a picture and for a folder
    that `classes` does not name.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the one that holds a folder for each class")
    found = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not found and classes is None:
        raise ValueError(f"{folder}: no folder in it; a folder for each class is needed, with its pictures inside")
    if all(name.isdecimal() for name in found):
        found.sort(key=int)
    names = check_classes(found if classes is None else classes, str(folder))
    unknown, absent = sorted(set(found) - set(names)), [name for name in names if name not in found]
    if unknown or absent:
        raise ValueError(
            f"{folder}: {len(unknown)} folders are no class {unknown[:3]}, {len(absent)} classes have no folder "
            f"{absent[:3]}; make folders and class list agree"
        )
    items, left_out = [], 0
    for label, name in enumerate(names):
        files = sorted(path for path in (folder / name).rglob("*") if path.is_file() and not path.name.startswith("."))
        pictures = [path for path in files if path.suffix.lower() in PICTURES]
        if not pictures:
            raise ValueError(f"{folder / name}: {len(files)} files, none is a picture; remove the folder or fill it")
        items += [Labelled(path, label) for path in pictures]
        left_out += len(files) - len(pictures)
    return LabelledSet(names, tuple(items), left_out)


def read_path_list(
    path: str | Path, root: str | Path, classes: Sequence[str], problems: list[Problem] | None = None
) -> LabelledSet:
    """Lines of `PATH NUMBER` (ImageNet's val.txt, the usual Kinetics lists), paths below `root`.

    The number is what follows the last space or comma. With `problems`, bad lines are listed, not raised.
    """
    names = check_classes(classes, "classes")
    items = []
    left_out = 0
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            items.append(_path_and_number(line, Path(root), len(names)))
        except ValueError as error:
            left_out += 1
            report(f"{path}:{number}", str(error), problems)
    if not items:
        raise ValueError(f"{path}: no usable line ({left_out} bad); a line is a path, a space and the class number")
    return LabelledSet(names, tuple(items), left_out)


def _path_and_number(line: str, root: Path, num_classes: int) -> Labelled:
    place, _, number = line.strip().replace("\t", " ").replace(",", " ").rpartition(" ")
    if not place or not number.isdecimal():
        raise ValueError(f"{line.strip()!r}: not a path and a class number; write them with a space between")
    if int(number) >= num_classes:
        raise ValueError(f"class {number}, but there are {num_classes}; count classes from 0")
    return Labelled(root / line.strip()[: len(place)].strip(), int(number))


def report(source: str, message: str, problems: list[Problem] | None) -> None:
    """By policy: to the list, or raised."""
    if problems is None:
        raise ValueError(f"{source}: {message}")
    problems.append(Problem(source, message))


def read_ade20k(root: str | Path, split: str = "validation") -> tuple[Masked, ...]:
    """ROOT/images/SPLIT/*.jpg and ROOT/annotations/SPLIT/*.png of the same names (ADEChallengeData2016).

    ValueError where a picture has no mask or a mask no picture.
    """
    pictures = _by_stem(Path(root) / "images" / split, (".jpg", ".jpeg", ".png"))
    masks = _by_stem(Path(root) / "annotations" / split, (".png",))
    lonely = sorted(pictures.keys() ^ masks.keys())
    if lonely:
        kind = "no mask" if lonely[0] in pictures else "no picture"
        raise ValueError(
            f"{root}, {split}: {lonely[0]!r} has {kind} ({len(lonely)} such of {len(pictures)} pictures and "
            f"{len(masks)} masks); unpack the archive again"
        )
    return tuple(Masked(pictures[stem], masks[stem]) for stem in sorted(pictures))


def _by_stem(folder: Path, suffixes: Iterable[str]) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; ADE20K has images/SPLIT and annotations/SPLIT")
    found = {path.stem: path for path in folder.iterdir() if path.suffix.lower() in suffixes}
    if not found:
        raise ValueError(f"{folder}: holds no {' or '.join(suffixes)}; unpack the archive again")
    return found


def read_mask(
    path: str | Path, num_classes: int = ADE_CLASSES, *, reduce_zero: bool = True, limits: Limits = DEFAULT_LIMITS
) -> Int64[Tensor, "height width"]:
    """Class of every pixel, 255 where it is not scored. `reduce_zero` (ADE20K): 0 is not scored, class 1 becomes 0."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.width * image.height > limits.pixels:
                raise ValueError(f"{image.width} x {image.height} px; the limit is {limits.pixels}")
            if image.mode not in ("L", "P"):
                raise ValueError(f"mode {image.mode}; a mask is grey or has a palette, one byte a pixel")
            values = torch.from_numpy(np.array(image)).long()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a usable mask: {error}; unpack the archive again") from error
    if reduce_zero:
        values = torch.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
    wrong = (values != IGNORED) & (values >= num_classes)
    if bool(wrong.any()):
        raise ValueError(
            f"{path}: class {int(values[wrong].max())} of {num_classes} in {int(wrong.sum())} pixels; "
            "give the number of classes, or set reduce_zero as the masks are numbered"
        )
    return values
