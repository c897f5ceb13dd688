"""`internvl convert`: write a model in the official or the native layout, and check that it still says the same."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Convert:
    """Write a model in the official or the native layout; InternVL-C and -G in the official one or as a .pth."""

    source: Annotated[str, tyro.conf.Positional]
    """A folder of either layout, a hub id, a folder of adapters that names its model, or a name such as pocket; or an
    original internvl_c_*.pth."""
    target: Annotated[Path, tyro.conf.Positional]
    """The folder to write; it must be empty or not there. Of InternVL-C also NAME.pth, the original names."""
    layout: Literal["official", "native"] = "official"
    """official: what vLLM, SGLang and lmdeploy read; native: what transformers reads."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Number type to write; stored keeps that of every tensor."""
    adapters: tuple[Path, ...] = ()
    """Adapter folders (peft layout) to add, one after the other."""
    apart: bool = False
    """Write adapters, also those that wrap the source, below TARGET/adapters instead of folding them in."""
    image_token_id: int | None = None
    """Id of <IMG_CONTEXT>, where the source has no tokenizer."""
    vision_tower: str | None = None
    """Of an InternVL-Chat 1.0 as released: the folder (or hub id) of its InternViT or InternVL-G."""
    tile_size: int | None = None
    """Of the same: side of a picture in pixels; the default is 448 where the tower's name says so, else 336."""
    allow_pickle: bool = False
    """Of the same: read pytorch_model*.bin, which those releases are, by torch's restricted unpickler."""
    like: str | None = None
    """Sizes of an original .pth: a name such as InternVL-C-13B-224px (the default), or a folder of that model."""
    check: bool = True
    """Open what was written and compare logits with the source on a random text and picture; needs the memory of
    one model. --no-check for those that are too large for it."""
    tolerance: float = 0.0
    """Largest difference of logits that passes; nothing is written above it."""
    dry_run: bool = False
    """List the keys that would be written and where they come from; write nothing."""
    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Convert, args=arguments, prog="internvl convert")
    import torch

    from internvl.opened import FirstGeneration
    from internvl.rewrite import Wanted, convert, describe, plan_keys
    from internvl.rewrite_dual import is_dual_source

    dtype = None if asked.dtype == "stored" else getattr(torch, asked.dtype)
    if is_dual_source(asked.source):
        return _dual(asked, dtype)
    first = FirstGeneration(asked.vision_tower, asked.tile_size, asked.allow_pickle)
    wanted = Wanted(asked.layout, dtype, asked.adapters, asked.apart, asked.image_token_id, first=first)
    if asked.dry_run:
        sys.stdout.write(describe(plan_keys(asked.source, wanted), asked.json) + "\n")
        return 0
    with _bar() as progress:
        written = convert(
            asked.source, asked.target, wanted, check=asked.check, tolerance=asked.tolerance, progress=progress
        )
    result: dict[str, object] = {"source": asked.source, "from": written.source_layout}
    result |= {"target": str(asked.target), "to": asked.layout, "parameters": f"{written.parameters:,}"}
    if written.logit_difference is not None:
        result["max_logit_difference"] = written.logit_difference
    if written.merge_change is not None:
        result["merging_moved_logits"] = written.merge_change
    lines = json.dumps(result, indent=2) if asked.json else "\n".join(f"{k:<21} {v}" for k, v in result.items())
    sys.stdout.write(lines + "\n")
    return 0


def _dual(asked: Convert, dtype: torch.dtype | None) -> int:
    from internvl.rewrite_dual import convert_dual

    if asked.layout == "native" or asked.adapters or asked.apart or asked.dry_run:
        raise ValueError(
            f"{asked.source} is InternVL-C or -G: there is no native layout, and no --adapters, --apart, --dry-run; "
            "leave them out"
        )
    written = convert_dual(
        asked.source, asked.target, dtype=dtype, like=asked.like, check=asked.check, tolerance=asked.tolerance
    )
    result: dict[str, object] = {"source": asked.source, "from": written.source_layout}
    result |= {"target": str(asked.target), "to": written.target_layout, "parameters": f"{written.parameters:,}"}
    if written.difference is not None:
        result["max_embedding_difference"] = written.difference
    lines = json.dumps(result, indent=2) if asked.json else "\n".join(f"{k:<24} {v}" for k, v in result.items())
    sys.stdout.write(lines + "\n")
    return 0


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    """A bar of bytes on standard error; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("writing", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
