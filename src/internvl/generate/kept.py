"""Rows that are costly to compute, kept on disk in parts: a run that was killed goes on where it stopped.

A part appears whole or not at all, and always holds the same items: what is read back is what one run would have made.
What a row is (a vector, the tokens of a picture, a caption) is the callers'.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internvl.data.records import Problem
from internvl.data.threads import spread

PART = 512
"""Items of a part: what a kill may cost."""
_Prepared = TypeVar("_Prepared")
Advance = Callable[[int], None]


@dataclass(frozen=True)
class Kept:
    """What could be computed, in the order of the items."""

    rows: Tensor
    """(items, ...); without an item that could be used, empty. Of captions: their bytes, see `texts`."""
    texts: tuple[str, ...]
    """Where the rows are texts; else empty."""
    places: Tensor
    """Which item each row belongs to."""
    broken: tuple[Problem, ...]
    """Items that could not be used, by name."""

    def at(self, items: Sequence[Any]) -> list[Any]:
        """Those of the items that have a row."""
        return [items[place] for place in self.places.tolist()]


def keep(
    folder: Path,
    names: Sequence[str],
    settings: Mapping[str, Any],
    prepare: Callable[[int], _Prepared],
    compute: Callable[[list[_Prepared]], Tensor | list[str]],
    *,
    batch: int = 32,
    part: int = PART,
    threads: int = 1,
    advance: Advance = lambda count: None,
) -> Kept:
    """Rows of all items: those on disk are read, the others computed, `batch` at a time, and written part by part.

    `prepare(place)` opens an item; its ValueError or OSError makes the item a broken one, which is named and left out.
    ValueError where the folder holds rows of other names or settings.
    """
    if batch < 1 or part < 1:
        raise ValueError(f"batch {batch}, parts of {part}; both must be at least 1")
    _claim(folder, {**settings, "names": _digest(names), "count": len(names), "part": part})
    found = []
    for start in range(0, len(names), part):
        path = folder / f"part-{start // part:06d}.safetensors"
        if not path.is_file():
            places = range(start, min(start + part, len(names)))
            _write(path, *_part(places, names, prepare, compute, batch, threads, advance))
        else:
            advance(min(part, len(names) - start))
        found.append(_read(path))
    rows = [part_rows for part_rows, _, _, _ in found if len(part_rows)]
    return Kept(
        rows=torch.cat(rows) if rows else torch.empty(0),
        texts=tuple(text for _, texts, _, _ in found for text in texts),
        places=torch.cat([places for _, _, places, _ in found]) if found else torch.empty(0, dtype=torch.long),
        broken=tuple(Problem(*problem) for _, _, _, broken in found for problem in broken),
    )


def num_kept(folder: Path) -> int:
    """Parts that are there."""
    return len(list(folder.glob("part-*.safetensors")))


def _digest(names: Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Write down whose rows these are, or compare."""
    wanted, path = json.loads(json.dumps(identity)), folder / "kept.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        scratch = path.with_name(".kept.json.part")
        scratch.write_text(json.dumps(wanted, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        os.replace(scratch, path)
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); remove the folder to compute again") from error
    unlike = [key for key in sorted({*there, *wanted}) if there.get(key) != wanted.get(key)]
    if unlike:
        said = "; ".join(f"{key}: {there.get(key)!r} there, {wanted.get(key)!r} now" for key in unlike)
        raise ValueError(f"{folder} holds rows of another run ({said}); give another output or remove the folder")


def _part(
    places: Sequence[int],
    names: Sequence[str],
    prepare: Callable[[int], _Prepared],
    compute: Callable[[list[_Prepared]], Tensor | list[str]],
    batch: int,
    threads: int,
    advance: Advance,
) -> tuple[list[Tensor], list[str], list[int], list[list[str]]]:
    def opened(place: int) -> _Prepared | Problem:
        try:
            return prepare(place)
        except (ValueError, OSError) as error:
            return Problem(names[place], str(error))

    rows: list[Tensor] = []
    texts: list[str] = []
    used: list[int] = []
    broken: list[list[str]] = []
    for start in range(0, len(places), batch):
        some = list(places[start : start + batch])
        ready = spread(opened, some, threads)
        good = [(place, item) for place, item in zip(some, ready, strict=True) if not isinstance(item, Problem)]
        broken += [[item.source, item.message] for item in ready if isinstance(item, Problem)]
        if good:
            made = compute([item for _, item in good])
            if len(made) != len(good):
                raise ValueError(f"{len(good)} items gave {len(made)} rows; one each is needed")
            if isinstance(made, Tensor):
                rows.append(made.detach().cpu())
            else:
                texts += made
            used += [place for place, _ in good]
        advance(len(some))
    return rows, texts, used, broken


def _write(path: Path, rows: list[Tensor], texts: list[str], used: list[int], broken: list[list[str]]) -> None:
    tensors = {"places": torch.tensor(used, dtype=torch.long)}
    if rows:
        tensors["rows"] = torch.cat(rows).contiguous()
    said = json.dumps({"texts": texts, "broken": broken}).encode()
    tensors["said"] = torch.frombuffer(bytearray(said), dtype=torch.uint8)
    scratch = path.with_name(f".{path.name}.part")
    save_file(tensors, str(scratch))
    os.replace(scratch, path)


def _read(path: Path) -> tuple[Tensor, list[str], Tensor, list[list[str]]]:
    try:
        with safe_open(str(path), framework="pt") as file:
            rows = file.get_tensor("rows") if "rows" in file.keys() else torch.empty(0)  # noqa: SIM118
            places, said = file.get_tensor("places"), json.loads(bytes(file.get_tensor("said").tolist()))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove the file to compute its items again") from error
    return rows, said["texts"], places, said["broken"]
