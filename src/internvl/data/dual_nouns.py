"""WordNet's drawable nouns as English texts beside the captions of `pocket-dual`: many more words than pictures have.

For the stage that learns from texts alone: `texts.jsonl`, and a meta JSON of each side that names it with the captions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data.lines import Lines
from internvl.data.multilingual import ENGLISH
from internvl.data.names import with_article
from internvl.data.packaged.wordnet import Nouns

FILE, META = "texts.jsonl", "text.json"
REPEATS = {"english": 4.0, "texts": 0.6, "stamps": 0.3, "emoji": 0.2, "quiz": 0.6}
"""repeat_time of text.json: six texts of ten are English, half of them captions."""
HELD_OUT = {"english": 1.0, "languages": 0.1}
"""The same of heldout/text.json: 578 English lines, 1,368 others, the same ones each time."""


def write_texts(folder: Path, nouns: Nouns) -> int:
    """texts.jsonl, text.json and heldout/text.json below what `build_dual.py` made; returns the number of nouns."""
    if not (folder / "english.jsonl").is_file():
        raise ValueError(f"{folder} has no english.jsonl; make it by `internvl data dual --out {folder}`")
    lines = list(noun_lines(nouns))
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (folder / FILE).write_text(text, encoding="utf-8")
    _write_meta(folder, REPEATS)
    _write_meta(folder / "heldout", HELD_OUT)
    return len(lines)


def noun_lines(nouns: Nouns) -> Iterator[dict[str, Any]]:
    """One line a noun: as captions say it, and with what it means."""
    for word, sense in nouns.drawable():
        named = with_article(word)
        captions = [f"{named[0].upper()}{named[1:]}.", f"{word}: {sense.gloss}"]
        yield {"id": f"noun-{word.replace(' ', '_')}", "caption": captions, "language": ENGLISH}


def _write_meta(folder: Path, repeats: dict[str, float]) -> None:
    """Of the sets that are there and have lines."""
    files = {name: folder / f"{name}.jsonl" for name in repeats}
    lengths = {name: len(Lines(str(file))) for name, file in files.items() if file.is_file() and file.stat().st_size}
    meta = {
        name: {"root": "", "annotation": files[name].name, "repeat_time": repeats[name], "length": length}
        for name, length in lengths.items()
    }
    (folder / META).write_text(json.dumps(meta, indent=2) + "\n")
