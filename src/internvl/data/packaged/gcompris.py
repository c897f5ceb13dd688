"""Photos and drawn words of GCompris out of its Qt resource files (Debian: gcompris-qt-data)."""

from __future__ import annotations

import json
import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

from internvl.data.packaged.common import Found, set_of
from internvl.data.packaged.qt import Messages

_LANG = "gcompris/src/activities/lang/resource/"
_ABSTRACT_LESSONS = ("color", "number", "verb", "adjective")
_RELATIVES = set_of("brother sister son friend family dad child")
_BOARD = {"explore_monuments": "monument", "explore_world_animals": "animal", "explore_farm_animals": "animal"}


def read(root: Path) -> Iterator[Found]:
    for board in _BOARD:
        yield from _explore(root, board)
    yield from _categories(root)
    yield from _words(root)


def resources(root: Path, name: str) -> dict[str, bytes]:
    """Files inside a Qt binary resource file (format of Qt's rcc, versions 1 to 3, plain or zlib)."""
    blob = (root / f"usr/share/gcompris-qt/rcc/{name}.rcc").read_bytes()
    if blob[:4] != b"qres":
        raise ValueError(f"{name}.rcc: not a Qt resource file")
    version, tree, data, names = struct.unpack(">IIII", blob[4:20])
    size = 14 if version < 2 else 22
    found: dict[str, bytes] = {}
    stack = [(0, "")]
    while stack:
        node, prefix = stack.pop()
        place = tree + node * size
        name_at, flags = struct.unpack(">IH", blob[place : place + 6])
        path = "/".join(filter(None, (prefix, _label(blob, names + name_at)))) if node else ""
        if flags & 2:
            count, first = struct.unpack(">II", blob[place + 6 : place + 14])
            stack += [(first + k, path) for k in range(count)]
            continue
        (offset,) = struct.unpack(">I", blob[place + 10 : place + 14])
        (length,) = struct.unpack(">I", blob[data + offset : data + offset + 4])
        raw = blob[data + offset + 4 : data + offset + 4 + length]
        if not flags & 4:  # zstd: only scripts are packed so
            found[path] = zlib.decompress(raw[4:]) if flags & 1 else raw
    return found


def _label(blob: bytes, place: int) -> str:
    (length,) = struct.unpack(">H", blob[place : place + 2])
    return blob[place + 6 : place + 6 + 2 * length].decode("utf-16-be")


def _explore(root: Path, board: str) -> Iterator[Found]:
    files = resources(root, board)
    for path, text in sorted(files.items()):
        if not re.search(r"board\d+\.qml$", path):
            continue
        for block in re.split(r"\n\s*\},?\s*\{|\btab\s*:\s*\[", text.decode("utf-8"))[1:]:
            images = re.findall(r'"image2?"\s*:\s*"qrc:/([^"]+\.webp)"', block)
            title, caption = _translated(block, "title"), _translated(block, "text")
            if images and images[-1] in files:
                yield Found(
                    data=files[images[-1]],
                    path=images[-1],
                    source="gcompris",
                    kind="photo",
                    title=title,
                    captions=(caption,) if caption else (),
                    keywords=(_BOARD[board],),
                    category=_BOARD[board],
                    series=f"gcompris/{title}",
                )


def _translated(block: str, key: str) -> str:
    found = re.search(rf'"?{key}"?\s*:\s*qsTr\((".*?"(?:\s*\+\s*".*?")*)\)', block, re.S)
    return re.sub(r'"\s*\+\s*"', "", found[1])[1:-1].replace('\\"', '"') if found else ""


def _categories(root: Path) -> Iterator[Found]:
    for path, data in sorted(resources(root, "categorization").items()):
        found = re.search(r"resource/images/([^/]+)/([^/]+?)\d*\.webp$", path)
        if found and found[1] not in ("alphabets", "numbers"):
            title = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", found[2])
            monument = found[1] == "monuments"
            yield Found(
                data=data,
                path=path,
                source="gcompris",
                kind="photo",
                title={"dam": "dam", "solar": "solar panel", "geothermal": "power plant", "plier": "pliers",
                       "others": ""}.get(title, title),
                keywords=(found[1],),
                category="monument" if monument else found[1],
                series=f"gcompris/{path}",
            )  # fmt: skip


def _words(root: Path) -> Iterator[Found]:
    files = resources(root, "lang")
    tables = {x: json.loads(files[f"{_LANG}content-{of}.json"]) for x, of in (("fr", "fr"), ("zh", "zh_CN"))}
    for path, key, lesson, word in _word_items(files):
        yield Found(
            data=files[path],
            path=path,
            source="gcompris",
            kind="drawing",
            title=word,
            names={x: table[key] for x, table in tables.items() if table.get(key)},
            category=lesson,
            series=f"gcompris/{word}",
        )


def words_by_language(root: Path) -> dict[str, dict[str, str]]:
    """Path of a drawn word -> language as the package spells it -> the word."""
    files = resources(root, "lang")
    found = {name: re.search(r"content-(.+)\.json$", name) for name in files}
    tables = {match[1]: json.loads(files[name]) for name, match in sorted(found.items()) if match}
    return {
        path: {language: table[key] for language, table in tables.items() if table.get(key)}
        for path, key, _, _ in _word_items(files)
    }


def translations(root: Path) -> dict[str, Messages]:
    """Language as the package spells it -> its translations of titles and texts."""
    files = sorted((root / "usr/share/gcompris-qt/translations").glob("gcompris_*.qm"))
    return {path.stem.removeprefix("gcompris_"): Messages(path.read_bytes(), str(path)) for path in files}


def _word_items(files: dict[str, bytes]) -> Iterator[tuple[str, str, str, str]]:
    """Path of the picture, key in the tables of languages, lesson, English word."""
    for chapter in json.loads(files[_LANG + "words_sample.json"]):
        for lesson in chapter["content"]:
            if any(word in lesson["name"].lower() for word in _ABSTRACT_LESSONS):
                continue
            for item in lesson["content"]:
                path = f"{_LANG}words_sample/{item['image']}"
                if path in files and item["description"] not in _RELATIVES:
                    key = Path(item["voice"]).name.replace("$CA", "ogg")
                    yield path, key, lesson["name"].lower(), item["description"]
