"""OpenMoji drawings with the names that the `emoji` package gives in English, French and Chinese."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from internvl.data.packaged.common import Found

SIDE_PX = 224
_SIGN = re.compile(
    r"arrow|button|(?<!stop )sign$|symbol|mark$|o.clock$|thirty$|suit$|middle finger|square|triangle|circle$", re.I
)
"""Emoji that are signs, not things."""
_ANIMALS = range(0x1F400, 0x1F440)
"""Block of animals: the only joined sequences that are kept (polar bear, black cat); people come in many variants."""


def read(drawings: Path, names: Path) -> Iterator[Found]:
    try:
        import resvg_py
    except ImportError as error:
        raise OSError("drawing emoji needs: pip install 'internvl[packaged]'") from error
    folder = next(drawings.rglob("svg"))
    for plain, entry in named(names):
        path = next((p for p in (_file(folder, entry["symbol"]), _file(folder, plain)) if p.is_file()), None)
        if path is None:
            continue
        yield Found(
            data=bytes(resvg_py.svg_to_bytes(svg_path=str(path), width=SIDE_PX, height=SIDE_PX)),
            path=path.name,
            source="openmoji",
            kind="drawing",
            title=entry["en"],
            names={x: entry[x] for x in ("fr", "zh") if x in entry},
            category="emoji",
            series=f"emoji/{plain[0]}",
        )


def named(names: Path, languages: tuple[str, ...] = ("fr", "zh")) -> Iterator[tuple[str, dict[str, str]]]:
    """Emoji without variation mark, with `symbol` as listed and its names by language, English always."""
    tables: dict[str, dict[str, Any]] = {
        language: json.loads(next(names.rglob(f"emoji{suffix}.json")).read_text(encoding="utf-8"))
        for language, suffix in (("en", ""), *((x, f"_{x}") for x in languages))
    }
    done = set()
    for symbol, entry in sorted(tables["en"].items()):
        plain = symbol.replace("\ufe0f", "")
        joined = len(plain) > 1 and ord(plain[0]) not in _ANIMALS
        if plain in done or joined or _SIGN.search(entry["en"]):
            continue
        done.add(plain)
        other = {x: _words(tables[x][symbol]) for x in languages if symbol in tables[x]}
        yield plain, {"symbol": symbol, "en": _words(entry["en"]), **other}


def languages(names: Path) -> tuple[str, ...]:
    """Codes of the languages that the package knows besides English."""
    return tuple(sorted(path.stem.removeprefix("emoji_") for path in names.rglob("emoji_*.json")))


def plain_symbol(path: str) -> str:
    """The emoji of a picture called after its code points, without variation mark: 1F98A.svg is a fox."""
    codes = path.rsplit(".", 1)[0].split("-")
    return "".join(chr(int(code, 16)) for code in codes).replace("\ufe0f", "")


def _file(folder: Path, symbol: str) -> Path:
    return folder / ("-".join(f"{ord(x):04X}" for x in symbol) + ".svg")


def _words(name: str) -> str:
    return name.strip(":").replace("_", " ").replace("-", " ")
