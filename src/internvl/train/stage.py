"""What a stage must offer the loop: a model, data, and losses of a batch."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from internvl.train.run import RunConfig
    from internvl.train.trainable import Learner


class Prepared(Protocol):
    """A micro-batch ready for the device; ChatBatch-like."""

    def pin_memory(self) -> Prepared: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> Prepared: ...


class Stage(Protocol):
    """A kind of training: it holds a model and its data, and turns a batch into named sums of losses."""

    coefficients: Mapping[str, float]
    """Loss name -> its factor in the total."""
    joint: bool
    """A micro-batch is one over all ranks, of which `batches` gives this rank's rows; else each is one rank's alone."""

    def begin(self, run: RunConfig, device: torch.device) -> Learner:
        """The model on the device, with what learns chosen; on several ranks the host, from where it is sharded."""

    def batches(self) -> Generator[Any, None, None]:
        """Endless micro-batches on the host, from the cursor on; closing it ends the worker processes.

        Unless `joint`, the same order on every rank: `feed.py` deals, and None may stand for another rank's batch.
        """

    def cursor(self) -> dict[str, Any]:
        """Plain JSON: where the data stands after the batch that was yielded last."""

    def seek(self, cursor: Mapping[str, Any]) -> None: ...

    def batches_per_epoch(self) -> int: ...

    def prepare(self, batch: Any) -> Prepared:
        """Host work; runs in a thread ahead of the step, so it draws no random number."""

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Loss name -> sum of weights of this batch, known before the model runs."""

    def losses(self, prepared: Any) -> Mapping[str, Float[Tensor, ""]]:
        """Loss name -> weighted sum over a batch; the loop divides by the weights of the whole window of all ranks.

        On several ranks every part runs and stays in the graph, whatever the batch holds.
        """

    def sizes(self, batch: Any) -> Mapping[str, int]:
        """Counts of a batch: samples, tokens, learned, tiles."""

    def describe(self, batch: Any) -> str:
        """Names the samples of a batch, for error messages."""

    def lost(self) -> tuple[int, Mapping[str, str]]:
        """How many samples were cut so far; file and line of each record left out, and why."""

    def evaluate(self, device: torch.device) -> Mapping[str, float]:
        """Numbers on held-out records; none where there are none."""

    def export(self, learner: Learner, out: Path) -> None:
        """Write folders below `out`: the trained model, and what learned beside it."""


@runtime_checkable
class NamesWorst(Protocol):
    """A stage that knows the sizes of its micro-batches before it makes them."""

    def worst(self) -> Any:
        """The micro-batch of this epoch that takes the most memory; the cursor stays."""
