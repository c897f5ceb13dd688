"""Sets of named drawings in Iconify's JSON: a body of SVG a name, and which emoji it draws where it draws one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from internvl.data import colours
from internvl.data.packaged.common import Found

_TONE = re.compile(r"-(?:light|medium-light|medium|medium-dark|dark)(?:-skin-tone)?$")
"""Emoji of people come in five tones; one is enough."""
_STYLE = re.compile(r"(?:-(?:flat|remix|outline|outlined|fill|filled|line|bold|duo|duotone|alt|\d+))+$")
"""Ends of names that tell how a thing is drawn, not what it is."""
INK = "currentColor"
"""Where a drawing of one colour takes that of the page."""


def read(package: Path, source: str) -> Iterator[Found]:
    """One of a name. Drawings of one colour get one that their name draws: the page's would leave all of them black."""
    folder = next(package.rglob("icons.json")).parent
    listed = _json(folder / "icons.json")
    symbols = _symbols(folder)
    done: set[str] = set()
    for name, drawing in sorted(listed["icons"].items()):
        plain = _STYLE.sub("", name)
        if plain in done or drawing.get("hidden") or (symbols and _TONE.search(name)):
            continue
        done.add(plain)
        yield Found(
            data=_svg({**listed, **drawing}, name).encode(),
            path=f"{name}.svg",
            source=source,
            kind="drawing",
            title=plain.replace("-", " "),
            category="icons",
            series=f"emoji/{symbols[name]}" if name in symbols else "",
        )


def _symbols(folder: Path) -> dict[str, str]:
    """Drawing -> the emoji it draws, without variation mark."""
    path = folder / "chars.json"
    listed: dict[str, str] = _json(path) if path.is_file() else {}
    return {name: "".join(chr(int(code, 16)) for code in codes.split("-") if code != "fe0f")
            for codes, name in listed.items()}  # fmt: skip


def _svg(drawing: dict[str, Any], name: str) -> str:
    left, top = drawing.get("left", 0), drawing.get("top", 0)
    view = f"{left} {top} {drawing.get('width', 16)} {drawing.get('height', 16)}"
    generator = np.random.default_rng(int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big"))
    ink = colours.paint(colours.MEASURED[int(generator.integers(len(colours.MEASURED)))], generator)
    body = drawing["body"].replace(INK, "#{:02x}{:02x}{:02x}".format(*ink))
    space = "http://www.w3.org/2000/svg"
    return f'<svg xmlns="{space}" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="{view}">{body}</svg>'


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
