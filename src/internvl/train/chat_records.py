"""The records of a run as batches: what `[data]` of a recipe says, for the model that the run trains."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from internvl.config import ChatConfig
from internvl.data.batching import BatchSettings
from internvl.data.encode import Encoder
from internvl.data.loader import Loader
from internvl.data.media import FrameSettings
from internvl.data.mixture import by_square_root, read_sets
from internvl.data.templates import find_template
from internvl.parallel import collectives
from internvl.train.run import RunConfig
from internvl.train.settings import Data


def open_loader(run: RunConfig, tokenizer: Any, config: ChatConfig, path: str, learning: bool) -> Loader:
    """Held-out records are never augmented, shuffled, cut or skipped."""
    data = run.data
    if not path:
        raise ValueError("data.meta is not given; set --data.meta to a meta JSON or a JSONL file")
    config = prompted(config, data)
    sets = read_sets(path)
    if learning and data.shares == "sqrt":
        sets = by_square_root(sets)
    if not learning or data.augment == "off":
        sets = [replace(some, augment=False) for some in sets]
    if not learning and data.held_out_samples is not None:
        share = min(1.0, data.held_out_samples / sum(len(some) for some in sets))
        sets = [replace(some, repeat=max(share, 1 / len(some))) for some in sets]  # one of each set at least
    encoder = Encoder(
        tokenizer,
        config,
        max_length=data.max_length,
        overlong=data.overlong if learning else "error",
        augment=learning and data.augment == "on",
        frames=FrameSettings(min_frames=data.min_frames, max_frames=data.max_frames),
    )
    settings = BatchSettings(
        data.batch_samples,
        data.batch_tokens,
        data.batch_tiles,
        data.grouped,
        data.packed,
        data.weighting,
        packing=data.packing,
    )
    return Loader(
        sets,
        encoder,
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        settings,
        seed=run.seed,
        shuffle=learning,
        workers=data.workers,
        on_error=data.on_error if learning else "error",
        max_rejected=data.max_rejected,
        changed=data.changed,
        quarantine=set_aside(run) if learning and data.on_error == "quarantine" else None,
    )


def set_aside(run: RunConfig) -> Path:
    """The file of rejected records: one a rank, since each begins and goes on with its own."""
    rank = collectives.rank()
    return Path(run.out) / ("quarantine.jsonl" if not rank else f"quarantine-{rank}.jsonl")


def prompted(config: ChatConfig, data: Data) -> ChatConfig:
    """What the data of a run say otherwise than the model; another template comes with its own system text."""
    if data.template is not None:
        find_template(data.template)  # a wrong name is no fault of a record
        config = replace(config, template=data.template, system_message=None)
    given: dict[str, Any] = {"max_tiles": data.max_tiles, "pad_to_square": data.pad_to_square}
    return replace(config, **{name: value for name, value in given.items() if value is not None})
