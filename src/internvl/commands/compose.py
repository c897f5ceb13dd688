"""`internvl compose`: a new chat model from a vision encoder and a language model."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from internvl.compose import Composed

STAGE1_RATE = 2e-4
"""Peak learning rate of the connector warm-up (paper 2.5, table 3)."""


@dataclass(frozen=True)
class Compose:
    """A new chat model from a vision encoder and a language model."""

    target: Annotated[Path, tyro.conf.Positional]
    """The folder to write (official layout); it must be empty or not there."""
    vision: Path
    """A folder of InternViT or InternVL-G, or a chat checkpoint whose vision part is taken; or pocket-dual, pocket."""
    language: Path
    """A Llama, Qwen2, Phi-3 or InternLM2 folder with its tokenizer, or a chat checkpoint; or pocket."""
    connector: Path | None = None
    """A chat checkpoint whose connector is carried over; a fresh one without it."""
    template: str | None = None
    """Conversation template; the default fits the language model's family."""
    tile_size: int | None = None
    """Side of a tile in pixels; the default is what the vision part was trained with."""
    max_tiles: int = 12
    """Most tiles of a picture, without the thumbnail."""
    form: Literal["2", "1.0"] = "2"
    """2: 1.2 and later; 1.0: all patches of one square, behind the queries of an InternVL-G."""
    dtype: Literal["stored", "float32", "bfloat16", "float16"] = "stored"
    """Number type to write; stored is that of the language model."""
    seed: int = 0
    """Of the fresh connector and of new embedding rows."""
    json: bool = False
    """Print the result as JSON."""


def main(arguments: list[str]) -> int:
    asked = tyro.cli(Compose, args=arguments, prog="internvl compose")
    import torch

    from internvl.compose import Parts, compose
    from internvl.locate import locate

    dtype = None if asked.dtype == "stored" else getattr(torch, asked.dtype)
    parts = Parts(
        vision=locate(asked.vision),
        language=locate(asked.language),
        form=asked.form,
        connector=asked.connector,
        template=asked.template,
        tile_size=asked.tile_size,
        max_tiles=asked.max_tiles,
        dtype=dtype,
        seed=asked.seed,
    )
    result = _result(compose(parts, asked.target), asked.target)
    lines = json.dumps(result, indent=2, ensure_ascii=False)
    sys.stdout.write((lines if asked.json else _text(result)) + "\n")
    return 0


def next_command(target: Path, has_rows: bool = True) -> list[str]:
    """Words of the stage-1 command: the connector learns, and the rows of the new tokens where they have some."""
    words = ["internvl", "train", "pocket_connector", "--model", str(target), "--data.meta", "meta.json"]
    words += ["--data.held-out", "held_out.jsonl", "--optimiser.peak-lr", f"{STAGE1_RATE:g}"]
    words += [] if has_rows else ["--tokens.no-learn"]
    return [*words, "--out", f"runs/{target.name}-stage1"]


def _result(composed: Composed, target: Path) -> dict[str, object]:
    config = composed.config
    return {
        "target": str(target),
        "parameters": dict(composed.parameters),
        "vocabulary": [composed.old_rows, config.language.vocab_size],
        "added_tokens": dict(composed.added),
        "template": config.template,
        "tile": {"pixels": config.tile_size, "tokens": config.tokens_per_tile, "most": config.max_tiles},
        "next": shlex.join(next_command(target, config.image_marks)),
    }


def _text(result: dict[str, object]) -> str:
    def words(value: object) -> str:
        if isinstance(value, dict):
            return ", ".join(f"{key} {part:,}" for key, part in value.items()) or "none"
        return " -> ".join(f"{part:,}" for part in value) if isinstance(value, list) else str(value)

    return "\n".join(f"{key:<13} {words(value)}" for key, value in result.items())
