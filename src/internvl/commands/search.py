"""`internvl search`: what of an embedded folder or text file is nearest to a text or a picture."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from internvl.data.sheet import Panel, Section
    from internvl.generate.embedded import Embedded
    from internvl.generate.search import Found


@dataclass(frozen=True)
class Search:
    """The best matches of texts or pictures among what `internvl embed` made, with cosines."""

    embedded: tyro.conf.Positional[Path]
    """A file that `internvl embed` wrote."""
    queries: tyro.conf.Positional[tuple[str, ...]]
    """Texts, or paths of pictures; one or more."""
    model: str | None = None
    """The model that made the file, where it is no longer where the file says. Another one is refused."""
    head: Literal["c", "g"] | None = None
    """Insist on vectors of this head; that of the file when left out."""
    top: int = 10
    """Hits of each query."""
    text: bool = False
    """Read the queries, also those that end like pictures."""
    index: Literal["auto", "exact", "faiss", "hnswlib"] = "auto"
    """auto: faiss where it is installed, else exact in blocks; hnswlib is approximate."""
    sheet: Path | None = None
    """Draw the hits: .html (any script) or .png."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Hits as JSON on standard output."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Search, args=arguments, prog="internvl search")
    from internvl.data.sheet import check_sheet, write_sheet
    from internvl.generate.dual import Dual
    from internvl.generate.embedded import check_same, read_embedded
    from internvl.generate.search import is_picture, search

    if asked.sheet is not None:
        check_sheet(asked.sheet)
    for query in asked.queries:  # before the model is loaded
        _ = asked.text or is_picture(query)
    embedded = read_embedded(asked.embedded)
    dual = Dual.open(asked.model or embedded.facts.model, device=asked.device, dtype=asked.dtype)
    check_same(embedded, dual, asked.head)
    found = search(dual, embedded, asked.queries, asked.top, index=asked.index, text=asked.text)
    if asked.sheet is not None:
        write_sheet(asked.sheet, f"{asked.embedded.name}, {embedded.facts.model}", sections(found, embedded))
    if asked.json:
        said = {"embedded": str(asked.embedded), "model": embedded.facts.model, "head": embedded.facts.head}
        sys.stdout.write(json.dumps({**said, "found": [asdict(one) for one in found]}, ensure_ascii=False) + "\n")
        return 0
    for one in found:
        sys.stdout.write(f"{one.kind} {one.query}\n")
        sys.stdout.writelines(f"  {hit.score:+.4f}  {hit.name}\n" for hit in one.hits)
    if asked.sheet is not None:
        sys.stdout.write(f"drawn: {asked.sheet}\n")
    return 0


def sections(found: Sequence[Found], embedded: Embedded) -> list[Section]:
    """The hits of each query as panels; a query that is a picture stands first."""
    from internvl.data.sheet import Panel, Section

    return [
        Section(
            f"{one.kind}: {one.query}",
            (
                *([_panel(Path(one.query), "query", "black")] if one.kind == "picture" else []),
                *(
                    _panel(Path(embedded.facts.source, hit.name), f"{hit.score:+.4f} {hit.name}", "blue")
                    if embedded.facts.kind == "pictures"
                    else Panel(None, ((f"{hit.score:+.4f}", "blue"), (hit.name, "black")))
                    for hit in one.hits
                ),
            ),
        )
        for one in found
    ]


def _panel(path: Path, line: str, colour: str) -> Panel:
    """A picture that moved away since is said, not fatal: the hits are right all the same."""
    from internvl.data.images import open_image
    from internvl.data.sheet import Panel

    try:
        return Panel(open_image(path), ((line, colour),))
    except (ValueError, OSError) as error:
        return Panel(None, ((line, colour), (str(error), "red")))
