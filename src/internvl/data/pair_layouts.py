"""Other layouts of captioned pictures as sets of lines: Karpathy's and COCO's JSON, webdataset tars.

An entry of the meta JSON says `"layout": "karpathy" | "coco" | "tar"` (and `"split"`); without it, it is a JSONL file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl.data.captions import read_coco, read_karpathy
from internvl.data.mixture import DataSet, read_sets
from internvl.data.records import Problem
from internvl.data.shards import PICTURE_FIELDS, picture_and_text, read_tar

LAYOUTS = ("jsonl", "karpathy", "coco", "tar")


def read_layouts(meta: str | Path, out: str | Path, problems: list[Problem]) -> list[DataSet]:
    """The sets of a meta JSON; those in other layouts as lines written below `out`, pictures of tars beside them.

    What such a file holds that cannot be used is listed in `problems`.
    """
    sets = read_sets(meta)
    entries = {} if str(meta).endswith(".jsonl") else json.loads(Path(meta).read_bytes())
    return [_lines(data, entries.get(data.name, {}), Path(out), problems) for data in sets]


def _lines(data: DataSet, entry: Mapping[str, Any], out: Path, problems: list[Problem]) -> DataSet:
    layout = entry.get("layout", "jsonl")
    if layout not in LAYOUTS:
        raise ValueError(f"{data.name}: layout {layout!r}; it is one of {', '.join(LAYOUTS)}")
    if layout == "jsonl":
        return data
    folder = out / "read" / "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in data.name)
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "tar":
        lines = _tar(data, folder, problems)
    else:
        split = str(entry.get("split", "train"))
        found = (
            read_karpathy(data.annotation, data.root, split, problems)
            if layout == "karpathy"
            else read_coco(data.annotation, data.root, problems)
        )
        problems.extend(
            Problem(f"{data.annotation}: {path}", "all its captions are empty; write one or remove the picture")
            for path in found.bare_pictures
        )
        lines = ({"image": str(item.path.absolute()), "caption": list(item.captions)} for item in found.items)
    path = folder / "pairs.jsonl"
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return replace(data, annotation=str(path), root="")


def _tar(data: DataSet, folder: Path, problems: list[Problem]) -> Iterator[dict[str, Any]]:
    """Pictures are numbered: names inside a tar may point anywhere."""
    for number, sample in enumerate(read_tar(data.annotation, problems)):
        try:
            content, text = picture_and_text(sample)
        except ValueError as error:
            problems.append(Problem(sample.source, str(error).removeprefix(f"{sample.source}: ")))
            continue
        suffix = next(field for field in PICTURE_FIELDS if field in sample.fields)
        path = (folder / f"{number:08d}.{suffix}").absolute()
        path.write_bytes(content)
        yield {"id": sample.key, "image": str(path), "caption": text}
