"""The largest micro-batch before the first step: what does not fit shows at once, not after hours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from internvl.train import log
from internvl.train.feed import Item
from internvl.train.stage import NamesWorst

if TYPE_CHECKING:
    from internvl.train.loop import Trainer


def attempt(trainer: Trainer) -> None:
    """Forward and backward over the largest micro-batch of the epoch; nothing of it stays, no number is drawn."""
    stage, run, device = trainer.stage, trainer.run, trainer.device
    if not isinstance(stage, NamesWorst):
        raise ValueError(
            f"data.worst_first is on, but stage {run.stage!r} cannot name its largest micro-batch; leave it off"
        )
    batch = stage.worst()
    sizes, weights = stage.sizes(batch), dict(stage.weights(batch))
    said = f"{sizes['tokens']} tokens and {sizes['tiles']} tiles in {sizes['samples']} samples"
    item = Item(stage.prepare(batch), weights, sizes, "", {})
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # the optimiser makes its moments at its first step only: their place is taken meanwhile
        moments = () if trainer.optimizer.state else range(2)
        room = [torch.empty_like(parameter) for parameter in trainer.parameters for _ in moments]
        try:
            for _ in range(min(2, run.accumulate)):  # gradients of the first stay beside the second
                trainer._backward(item, weights, {name: torch.zeros((), device=device) for name in weights})
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"the largest micro-batch of the epoch ({said}) does not fit: {error}; see `internvl plan`"
            ) from error
        del room
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.reporter.say(f"the largest micro-batch ({said}) fits; peak {log.memory_mb(device):,.0f} MB")
