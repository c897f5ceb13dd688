"""What the stages of InternVL-C and -G share: a loader of joint batches, where it stands, what begins, what is left.

What is loaded is pairs.py's and text.py's; what learns, and from which losses, is a stage's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.data.mixture import DataSet, by_square_root, read_sets
from internvl.load_dual import LoadedDual
from internvl.models.contrastive import DualModel
from internvl.train import dual
from internvl.train.run import RunConfig
from internvl.train.stage import Prepared
from internvl.train.trainable import Learner


class Named(Prepared, Protocol):
    """A batch that knows its lines."""

    @property
    def sources(self) -> tuple[str, ...]: ...


B = TypeVar("B", bound=Named)
Made = TypeVar("Made", bound=Named, covariant=True)


class Loader(Protocol[Made]):
    """This rank's part of joint batches, without end, from where it stands."""

    skipped: dict[str, str]
    """File and line of what is left out, and why."""
    num_cut: int

    def __iter__(self) -> Iterator[Made]: ...

    def __len__(self) -> int:
        """Batches that cover an epoch."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class DualStage(ABC, Generic[B]):
    """A stage over joint batches of all ranks."""

    coefficients: Mapping[str, float]
    joint = True
    loader: Loader[B]

    def __init__(self, run: RunConfig, loaded: LoadedDual) -> None:
        self.run, self.model, self.tokenizer = run, loaded.model, loaded.tokenizer

    @abstractmethod
    def wanted(self, name: str) -> bool:
        """Whether a parameter can learn in this stage."""

    def begin(self, run: RunConfig, device: torch.device) -> dual.DualLearner:
        self.model.to(device)
        learner = dual.choose(self.model, run, self.wanted)
        self.model.checkpoint(run.grad_checkpoint)
        if run.compile:
            for block in (*self.model.vision.layers, *self.model.qllama.layers):
                block.compile()
        return learner

    def batches(self) -> Generator[B, None, None]:
        yield from self.loader

    def cursor(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def seek(self, cursor: Mapping[str, Any]) -> None:
        self.loader.load_state_dict(cursor)

    def batches_per_epoch(self) -> int:
        return len(self.loader)

    def prepare(self, batch: B) -> B:
        return batch

    def weights(self, batch: B) -> dict[str, float]:
        """Every loss counts once a sample."""
        return dict.fromkeys(self.coefficients, float(self.sizes(batch)["samples"]))

    @abstractmethod
    def losses(self, prepared: B) -> Mapping[str, Float[Tensor, ""]]:
        """Loss name -> its sum over this rank's samples; a mean over the joint batch counts once a sample."""

    @abstractmethod
    def sizes(self, batch: B) -> dict[str, int]:
        """Counts of a batch: samples, tokens, learned, tiles."""

    def describe(self, batch: B) -> str:
        return ", ".join(batch.sources)

    def lost(self) -> tuple[int, Mapping[str, str]]:
        return self.loader.num_cut, self.loader.skipped

    @abstractmethod
    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Numbers on held-out lines, the same on every rank; none where there are none."""

    def export(self, learner: Learner[DualModel], out: Path) -> None:
        dual.export(learner, self.tokenizer, out)


def with_tokenizer(run: RunConfig, loaded: LoadedDual) -> LoadedDual:
    """The model, if it can read."""
    if loaded.tokenizer is None:
        raise ValueError(f"{run.model} has no tokenizer; put its tokenizer.json or tokenizer.model beside the weights")
    return loaded


def sets_of(run: RunConfig, learning: bool) -> list[DataSet]:
    """What is learned from, in the shares that the run says; or what is held out."""
    sets = read_sets(run.data.meta if learning else run.data.held_out)
    return by_square_root(sets) if learning and run.data.shares == "sqrt" else sets


def check_dual(run: RunConfig, what: str) -> None:
    """ValueError for settings that have no meaning for stages of dual models, which learn from `what`."""
    data, pairs = run.data, run.pairs
    if not data.meta:
        raise ValueError(f"data.meta is not given; set --data.meta to a meta JSON or a JSONL file of {what}")
    if data.batch_tokens is not None or data.batch_tiles is not None:
        raise ValueError(f"data.batch_tokens and data.batch_tiles have no meaning for {what}; set data.batch_samples")
    if run.tokens.learn:
        raise ValueError("tokens.learn is on; dual models have no added tokens: use --tokens.no-learn")
    if pairs.micro_batch is not None and pairs.micro_batch < 1:
        raise ValueError(f"pairs.micro_batch is {pairs.micro_batch}; it must be at least 1")
    if data.on_error == "quarantine":
        raise ValueError(f"data.on_error is 'quarantine'; stages on {what} know error, and skip, which names each line")
