"""A pass over a micro-batch with random weights, for its time: what `internvl plan --calibrate` measures.

The stages are those of the rehearsals (rehearse_others.py), on tensors that have memory; values do not matter to it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from internvl.batch import ChatBatch, PairBatch, TextBatch
from internvl.config import ChatConfig, DualConfig
from internvl.models.build import build, build_dual
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import trainable
from internvl.train.cells import Cells
from internvl.train.rehearse_others import Following, Placing, Unheard, follower, unread
from internvl.train.run import RunConfig
from internvl.train.stages.distill import Tiles
from internvl.train.stages.sft import Sft
from internvl.train.teachers import Teacher

Trial: TypeAlias = Callable[[], Mapping[str, Tensor]]
"""The losses of a micro-batch; backward is the caller's."""
LARGEST = 1_000_000_000
"""Parameters of a model that is built for real to be timed."""


def middling(work: Sequence[float]) -> int:
    """Number of the one in the middle by operations."""
    return sorted(range(len(work)), key=lambda number: work[number])[len(work) // 2]


def check_size(num_parameters: int) -> None:
    """ValueError for a model that takes too long to build."""
    if num_parameters > LARGEST:
        raise ValueError(
            f"a model of {num_parameters / 1e9:.1f} billion parameters is not built to be timed; give --rate, "
            "in 10^12 operations a second, as a run of yours reached it"
        )


def try_chat(run: RunConfig, config: ChatConfig, tokenizer: Any, batch: ChatBatch, device: torch.device) -> Trial:
    """Stage sft."""
    run = replace(run, compile=False)
    model = build(config)
    model.image_token_id = token_id(tokenizer, SPECIAL_TOKENS[2])
    stage = Sft(run, model, tokenizer, None, None)  # type: ignore[arg-type]
    stage.begin(run, device).train_mode()
    return partial(stage.losses, stage.prepare(batch).to(device))


def try_pairs(run: RunConfig, config: DualConfig, batch: PairBatch, device: torch.device) -> Trial:
    """Stages contrastive and generative."""
    stage = unread(run, build_dual(config))
    stage.begin(replace(run, compile=False), device).train_mode()
    return partial(stage.losses, batch.to(device))


def try_text(run: RunConfig, config: DualConfig, batch: TextBatch, device: torch.device) -> Trial:
    """Stage text."""
    stage = Unheard(run, build_dual(config))
    stage.begin(replace(run, compile=False), device).train_mode()
    stage.targets = torch.zeros(int(batch.english.max()) + 1, config.embed_width, dtype=torch.float16, device=device)
    return partial(stage.losses, batch.to(device))


def try_align(run: RunConfig, config: ChatConfig, batch: Cells, num_words: int, device: torch.device) -> Trial:
    """Stage align."""
    model = build(config).to(device)
    trainable.choose(model, run).train_mode()
    with device:
        stage = Placing(run, model, num_words)
    return partial(stage.losses, batch.to(device))


def try_distill(
    run: RunConfig, config: ChatConfig | DualConfig, teacher: Teacher, num_tiles: int, device: torch.device
) -> Trial:
    """Stage distill; `teacher` has no weights, and gets some where it speaks at every step."""
    if run.distill.features == "none":
        check_size(sum(p.numel() for p in teacher.module.parameters()))
        teacher.module.to_empty(device=device)
        for tensor in (*teacher.module.parameters(), *teacher.module.buffers()):
            tensor.fill_(0.01)
    student, learner, behind = follower(run, config, teacher, device)
    learner.train_mode()
    stage = Following(run, student, teacher, list(behind))
    shape = (num_tiles, 3, student.side, student.side)
    return partial(stage.losses, Tiles(torch.zeros(shape, dtype=torch.uint8, device=device), ()))
