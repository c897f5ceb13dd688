"""AdamW over the groups of trainable.py, and the learning rate along a run."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from internvl.train.run import RunConfig


def build(groups: list[dict[str, Any]], run: RunConfig) -> torch.optim.AdamW:
    """Fused AdamW: one kernel a group instead of several a parameter, on CPU as on CUDA."""
    settings = run.optimiser
    return torch.optim.AdamW(
        groups, lr=settings.peak_lr, betas=settings.betas, eps=settings.eps, weight_decay=0.0, fused=True
    )


def lr_factor(run: RunConfig, step: int, num_steps: int, elapsed_share: float = 0.0) -> float:
    """Share of the peak for the step after `step` finished ones: linear warm-up, then cosine to 0.

    Over steps, step 0 has lr 1/warm-up and the last step ends just above 0; over time, the share of time decides.
    """
    if run.schedule.over == "time":
        return _factor(elapsed_share, run.schedule.warmup_share)
    warmup = num_warmup(run, num_steps)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def num_steps(run: RunConfig, batches_per_epoch: Callable[[], int]) -> int:
    """Optimiser steps of a run; without end where time decides."""
    schedule = run.schedule
    if schedule.steps is not None:
        return schedule.steps
    if schedule.epochs is not None:
        return max(1, math.ceil(schedule.epochs * batches_per_epoch() / run.accumulate))
    return 2**31


def num_warmup(run: RunConfig, num_steps: int) -> int:
    """Warm-up steps; a share is rounded up, as the official trainer does."""
    given = run.schedule.warmup_steps
    return math.ceil(run.schedule.warmup_share * num_steps) if given is None else given


def set_lr(optimizer: torch.optim.Optimizer, run: RunConfig, factor: float) -> float:
    """Set every group's rate; returns the rate of a group with scale 1."""
    rate = run.optimiser.peak_lr * factor
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate


def endless_warmup(run: RunConfig, num_steps: int) -> str:
    """What to say where the rate never reaches its peak; empty where it does."""
    warmup = num_warmup(run, num_steps)
    if run.schedule.over == "time" or warmup <= num_steps:
        return ""
    return (
        f"schedule.warmup_steps is {warmup} but the run has {num_steps} steps: the rate ends at "
        f"{num_steps / warmup:.0%} of its peak; lower it, or train for longer"
    )


def _factor(share: float, warmup: float) -> float:
    share = min(1.0, max(0.0, share))
    if share < warmup:
        return max(share / warmup, 1e-3)  # the very first step must move
    return 0.5 * (1 + math.cos(math.pi * (share - warmup) / max(1e-9, 1 - warmup)))
