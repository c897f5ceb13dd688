"""A run that ends in the middle of a step, as by a kill that no handler sees."""

from __future__ import annotations

from typing import Any

import pytest

from internvl.train.loop import train
from internvl.train.run import RunConfig
from internvl.train.stages import open_stage


def break_off(run: RunConfig, calls: int, stage: Any = None) -> None:
    """Train until the losses were asked for `calls` times; the next time the run ends. `stage`: that of the run."""
    stage = stage or open_stage(run)
    inner, count = stage.losses, [0]

    def losses(prepared: Any) -> Any:
        count[0] += 1
        if count[0] > calls:
            raise RuntimeError("killed")
        return inner(prepared)

    stage.losses = losses
    with pytest.raises(RuntimeError, match="killed"):
        train(run, stage)
