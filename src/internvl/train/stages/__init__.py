"""Stages by name; each module is one."""

from __future__ import annotations

from collections.abc import Callable

from internvl.train.run import RunConfig
from internvl.train.stage import Stage
from internvl.train.stages import align, contrastive, distill, generative, sft, text

STAGES: dict[str, Callable[[RunConfig], Stage]] = {
    "sft": sft.open_sft,
    "align": align.open_align,
    "contrastive": contrastive.open_contrastive,
    "generative": generative.open_generative_stage,
    "distill": distill.open_distill,
    "text": text.open_text,
}


def open_stage(run: RunConfig) -> Stage:
    """The stage that `run` names, with its model and data open."""
    if run.stage not in STAGES:
        raise ValueError(f"no stage {run.stage!r}; it is one of {', '.join(STAGES)}")
    return STAGES[run.stage](run)
