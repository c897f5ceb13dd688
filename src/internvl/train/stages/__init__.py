"""Stages by name; each module is one."""

from __future__ import annotations

from internvl.train.run import RunConfig
from internvl.train.stages import sft

STAGES = {"sft": sft.open_sft}


def open_stage(run: RunConfig) -> sft.Sft:
    """The stage that `run` names, with its model and data open."""
    if run.stage not in STAGES:
        raise ValueError(f"no stage {run.stage!r}; it is one of {', '.join(STAGES)}")
    return STAGES[run.stage](run)
