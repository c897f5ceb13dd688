"""A run that begins with what others exported as their `parts`: connector, adapters and token rows, or their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from internvl.train.run import RunConfig

if TYPE_CHECKING:
    from internvl.models.chat import ChatModel

CONNECTOR, EMBEDDINGS = "connector.safetensors", "embeddings.safetensors"
"""Files in the `parts` of a run; beside them a folder of adapters for each adapted part."""


@torch.no_grad()
def begin_from(folders: Sequence[str], model: ChatModel, run: RunConfig, rows: nn.Module | None) -> None:
    """Values of one folder, or the mean of several. ValueError for what would find no place in the run."""
    from internvl.models import adapters  # needs peft, an extra

    found = 0
    if paths := _in_all(folders, CONNECTOR):
        _give(model.connector, adapters.mean(paths), paths[0])
        found += 1
    if paths := _in_all(folders, EMBEDDINGS):
        if rows is None:
            raise ValueError(
                f"{paths[0]}: token rows, but tokens.learn is off; set --tokens.learn, or move the file away"
            )
        _give(rows, adapters.mean(paths), paths[0])
        found += 1
    for part in ("vision", "language"):
        paths = _in_all(folders, part)
        if paths and run.part(part).learn != "lora":
            raise ValueError(
                f"{paths[0]}: adapters, but {part}.learn is {run.part(part).learn!r}; set --{part}.learn lora, or "
                "--model to the merged model of that run"
            )
        if paths:
            adapters.fill(model, paths, part)
            found += 1
    if not found:
        raise ValueError(f"start is {', '.join(folders)}, where there are no parts; give the folder `parts` of a run")


def _give(module: nn.Module, values: Mapping[str, Tensor], path: Path) -> None:
    own = dict(module.named_parameters())
    for name in sorted(own.keys() | values.keys()):
        mine, given = (tuple(side[name].shape) if name in side else None for side in (own, values))
        if mine != given:
            raise ValueError(
                f"{path}: {name} is {given or 'not there'}, in this run's model it is {mine or 'not there'}; give the "
                "parts of a run of the same model, or the --model of that run"
            )
        own[name].copy_(values[name])


def _in_all(folders: Sequence[str], name: str) -> list[Path]:
    """The path of this name in every folder, or in none."""
    paths = [Path(folder) / name for folder in folders]
    there = [path for path in paths if path.exists()]
    if there and len(there) < len(paths):
        (missing, *_) = (path for path in paths if path not in there)
        raise ValueError(
            f"{missing} is not there but {there[0]} is; a mean is taken of runs that learned the same parts"
        )
    return there
