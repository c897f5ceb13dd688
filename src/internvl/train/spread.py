"""A learner on several ranks: its model sharded as the run says, what learns named as before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from internvl.parallel import collectives, shard
from internvl.train.feed import Item
from internvl.train.run import RunConfig
from internvl.train.stage import Stage
from internvl.train.trainable import ROWS, Learner

MODEL = "model"
SEEING = ("vision.", "connector.")
"""Parts that only pictures reach."""


def micro_batches(run: RunConfig, stage: Stage) -> int:
    """Of one step, this rank's; ValueError where the ranks cannot share them evenly."""
    num_ranks = collectives.num_ranks()
    if num_ranks == 1 or stage.joint:
        return run.accumulate
    if run.accumulate % num_ranks:
        raise ValueError(
            f"accumulate is {run.accumulate} micro-batches a step, which {num_ranks} ranks cannot share evenly; set "
            f"--accumulate to a multiple of {num_ranks} (and divide data.batch_samples, to learn from as much a step)"
        )
    return run.accumulate // num_ranks


def spread(learner: Learner, device: torch.device) -> tuple[Learner, shard.Whole]:
    """Shard the model, which lies on the host; the learner afterwards, and the module to call it through."""
    run = learner.run
    if run.data.features != "none":
        raise ValueError(
            f"data.features is {run.data.features!r} over {collectives.num_ranks()} ranks, where each would look at "
            "other tiles; set data.features to none, or use one rank"
        )
    parts: dict[str, nn.Module] = {MODEL: learner.model}
    if learner.rows is not None:
        parts[ROWS] = learner.rows
    whole = shard.Whole(parts)
    ranks = run.ranks
    low = run.precision == "bf16"
    shard.shard(whole, device, replicas=ranks.replicas, low=low, reshard=ranks.reshard, offload=ranks.offload)
    found = dict(whole.named_parameters())
    learned = {name: found[name if name.startswith(f"{ROWS}.") else f"{MODEL}.{name}"] for name in learner.parameters}
    return replace(learner, parameters=learned), whole


def window_weights(window: Sequence[Item], step: int) -> tuple[dict[str, float], float]:
    """Weight of each loss, and the number of tiles, over the micro-batches of all ranks in one step.

    No weights where every sample of every rank was left out; one process never sees such batches.
    """
    own = {name: sum(item.weights[name] for item in window) for name in window[0].weights}
    tiles = float(sum(item.sizes["tiles"] for item in window))
    learned_from = float(any(item.names or item.sizes["samples"] for item in window))
    *summed, num_tiles, num_ranks = collectives.total_on_host([*own.values(), tiles, learned_from])
    if not num_ranks:
        return {}, 0.0
    weights = dict(zip(own, summed, strict=True))
    for name, weight in weights.items():
        if weight <= 0:
            raise ValueError(
                f"step {step}: no learned token for loss {name!r} in {'; '.join(item.names for item in window)}; raise "
                "data.max_length, or look at their labels"
            )
    return weights, num_tiles


def settle(learner: Learner, num_tiles: float) -> None:
    """Gradients of a step as one process has them.

    Without a tile on any rank what only pictures reach stands still, as it does on a process that never ran it.
    """
    if collectives.num_ranks() == 1:
        return
    for name, parameter in learner.parameters.items():
        if not num_tiles and name.startswith(SEEING):
            parameter.grad = None
    shard.average_gradients(list(learner.parameters.values()))


def plainly(function: Callable[..., Any], *args: Any) -> Any:
    """What stands for the whole on one process."""
    return function(*args)


def rest(call: Callable[..., Any]) -> None:
    """After an evaluation: give back what was gathered for it."""
    if isinstance(call, shard.Whole):
        shard.give_back(call)


def agree(stop: Sequence[int], elapsed_s: float) -> tuple[bool, float]:
    """Whether any rank was asked to stop, and the first rank's clock: every rank then does the same."""
    asked, seconds = collectives.total_on_host([float(len(stop)), elapsed_s if collectives.is_lead() else 0.0])
    return asked > 0, seconds
