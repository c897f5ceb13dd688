"""`internvl embed`: pictures of a folder, or lines of a file, to a file of unit vectors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from internvl.generate.embed import Made

SHOWN = 20
"""Broken items that are named on the terminal; the file names all."""
LEFT_OUT = 3
"""Exit code where the output is whole but for items that could not be used."""


@dataclass(frozen=True)
class Embed:
    """Unit vectors of all pictures of a folder, or of all lines of a text file, by a dual model (InternVL-C, -G).

    A run that was killed goes on from the parts beside the output when it is called again. Broken pictures and empty
    lines are left out, named, and make the exit code 3.
    """

    model: tyro.conf.Positional[str]
    """Checkpoint folder in the official layout, or hub id."""
    source: tyro.conf.Positional[Path]
    """A folder of pictures, searched with its subfolders, or a text file, one text a line."""
    out: Path
    """.safetensors or .parquet."""
    head: Literal["c", "g"] = "c"
    """c: pooled patches; g: with the pooled queries of QLLaMA. Texts are the same for both."""
    fit: Literal["squash", "crop"] = "squash"
    """squash: the whole picture made square (retrieval); crop: its middle (classification)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: bfloat16 where the hardware computes it, else float32."""
    batch: int = 32
    """Pictures or texts that go together."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """Counts and broken items as JSON on standard output."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Embed, args=arguments, prog="internvl embed")
    from internvl.generate.dual import Dual
    from internvl.generate.embed import embed, read_source
    from internvl.generate.embedded import check_out

    check_out(asked.out)  # before the model is loaded
    source = read_source(asked.source)
    dual = Dual.open(asked.model, device=asked.device, dtype=asked.dtype)
    with bar("embedding", len(source.names)) as advance:
        made = embed(
            dual, asked.model, source, asked.out, head=asked.head, fit=asked.fit, batch=asked.batch, advance=advance
        )
    _say(asked, made, source.kind)
    return LEFT_OUT if made.broken else 0


@contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on standard error; what comes out takes the number of items done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)


def _say(asked: Embed, made: Made, kind: str) -> None:
    facts, vectors = made.embedded.facts, made.embedded.vectors
    if asked.json:
        said = {
            "out": str(asked.out),
            "embedded": len(vectors),
            "width": vectors.shape[1],
            "kind": kind,
            "model": facts.model,
            "fingerprint": facts.fingerprint,
            "head": facts.head,
            "parts_found": made.resumed,
            "long_texts": made.long,
            "broken": [asdict(problem) for problem in made.broken],
        }
        sys.stdout.write(json.dumps(said, ensure_ascii=False) + "\n")
        return
    found = f", {made.resumed} parts found" if made.resumed else ""
    sys.stdout.write(f"{asked.out}: {len(vectors)} {kind}, {vectors.shape[1]} wide, head {facts.head}{found}\n")
    if made.long:
        sys.stdout.write(f"{made.long} texts have more than 80 tokens; the model saw their beginning\n")
    if made.broken:
        sys.stdout.write(f"left out: {len(made.broken)}\n")
    for problem in made.broken[:SHOWN]:
        sys.stdout.write(f"  {problem.source}: {problem.message}\n")
    if len(made.broken) > SHOWN:
        sys.stdout.write(f"  and {len(made.broken) - SHOWN} more; --json names all\n")
