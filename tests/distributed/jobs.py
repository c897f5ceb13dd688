"""What ranks do in tests/distributed: runs on a tiny model whose ranks see different kinds of batches."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stage import Records, collate, tiny_run, tiny_stage

from internvl.batch import ChatBatch
from internvl.data.collate import collate_nothing
from internvl.parallel import collectives
from internvl.train.loop import train
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule, Tokens, Watch

KINDS = {"text": 0, "image": 1, "video": 5, "nothing": 0}
WINDOWS = (
    ("image", "text", "video", "nothing"),
    ("text", "text", "nothing", "text"),
    ("nothing", "image", "text", "video"),
    ("video", "text", "image", "text"),
)
"""Two ranks take places 0, 2 and 1, 3: picture beside text, video beside text, nothing beside picture."""


class Mixed(Records):
    """One batch a place of WINDOWS, again and again."""

    def __iter__(self) -> Iterator[ChatBatch]:
        order = [kind for window in WINDOWS for kind in window]
        while True:
            place, self.position = self.position, self.position + 1
            yield mixed(order[place % len(order)], place)


def mixed(kind: str, index: int) -> ChatBatch:
    if kind == "nothing":
        return collate_nothing(0, 56, packed=False)
    whole = collate([4 * index])  # text alone
    batch = replace(whole, sources=(f"{kind}.jsonl:{index}",))
    if not KINDS[kind]:
        return batch
    pictures = collate([4 * index + 1, 4 * index + 2] * (KINDS[kind] // 2) or [4 * index + 1])
    return replace(pictures, sources=tuple(f"{kind}.jsonl:{index}" for _ in range(pictures.num_samples)))


def configured(out: Path, kind: str) -> RunConfig:
    changes: dict[str, Any] = {"grad_checkpoint": True, "watch": Watch(ema=0.5)}
    if kind == "lora":
        changes = {"vision": Part(), "language": Part("lora", rank=2, dropout=0.0), "tokens": Tokens(learn=True)}
    settings: dict[str, Any] = {
        "accumulate": 4,
        "data": Data(batch_samples=2),
        # without a large eps, gradients of nothing but rounding would move weights by whole steps
        "optimiser": Optimiser(peak_lr=1e-2, eps=1e-2),
        "schedule": Schedule(steps=4, warmup_steps=1),
        "keep": 9,
        "eval_every": 4,
    }
    return tiny_run(out, **{**settings, **changes})


def staged(run: RunConfig) -> Any:
    stage = tiny_stage(run)
    stage.loader = Mixed(16, 1)  # type: ignore[assignment]
    return stage


def run_all(folder: Path) -> None:
    """Both kinds of run, from the beginning or from what the folder holds."""
    for kind in ("full", "lora") if collectives.num_ranks() < 4 else ("full",):
        run = configured(folder / f"{kind}-{collectives.num_ranks()}", kind)
        stage = staged(run)
        result = train(run, stage, evaluators=[stage.evaluate])
        assert result.step == 4


def copy(folder: Path) -> None:
    """Run folders that stand where others stood at step 2: copies.txt names them, KIND BEFORE NOW a line."""
    for kind, before, now in map(str.split, (folder / "copies.txt").read_text().splitlines()):
        source, target = folder / f"{kind}-{before}", folder / f"{kind}-{before}-to-{now}"
        (target / "checkpoints").mkdir(parents=True)
        shutil.copytree(source / "checkpoints" / "step-00000002", target / "checkpoints" / "step-00000002")
        (target / "checkpoints" / "latest").write_text("step-00000002\n")
        shutil.copy(source / "run.json", target)


def run_copies(folder: Path) -> None:
    """Folders that hold a checkpoint of another number of ranks: NAME-to-SIZE."""
    found = sorted(folder.glob(f"*-to-{collectives.num_ranks()}"))
    assert found
    for path in found:
        run = configured(path, path.name.split("-")[0])
        run = replace(run, watch=replace(run.watch, save_behind=True))
        assert train(run, staged(run), resume=True).finished


class Own(Mixed):
    """Only the batches of this rank."""

    def dealt(self, rank: int, num_ranks: int) -> Iterator[ChatBatch | None]:
        return (batch for batch in super().dealt(rank, num_ranks) if batch is not None)


def joint(folder: Path) -> None:
    """A stage that deals for itself: nothing is dealt again, and `accumulate` counts each rank's."""
    run = replace(configured(folder / "joint", "full"), accumulate=2)
    stage = staged(run)
    stage.loader, stage.joint = Own(16, 1), True
    train(run, stage)


def stop(folder: Path) -> None:
    """Only the second rank is asked to end; both stop at the same step, saved."""
    run = replace(configured(folder / "stopped", "full"), save_every=0, watch=Watch(save_behind=True))
    stage = staged(run)
    after(stage, 3, lambda: os.kill(os.getpid(), signal.SIGTERM) if collectives.rank() == 1 else None)
    result = train(run, stage)
    assert result.step == 2
    assert not result.finished


def not_finite(folder: Path) -> None:
    """The connector of the second rank says NaN: every rank ends, the second names module and samples."""
    run = configured(folder / "nan", "full")
    stage = staged(run)

    def spoil(*_: Any) -> None:
        if collectives.rank() == 1:
            stage.model.connector.register_forward_hook(lambda _, __, output: output * float("nan"))

    after(stage, 5, spoil)
    place = r"first in the output of connector with .*samples" if collectives.rank() == 1 else "next_token is nan"
    with pytest.raises(ValueError, match=place):
        train(run, stage)


def hang(folder: Path) -> None:
    """The first rank sleeps for ever in step 2."""
    run = replace(configured(folder / "stuck", "full"), watch=Watch(step_limit_s=3.0))
    stage = staged(run)
    after(stage, 3, lambda: time.sleep(3600) if collectives.rank() == 0 else None)
    train(run, stage)


def after(stage: Any, calls: int, act: Any) -> None:
    """Do something in the given call of the stage's losses."""
    inner, count = stage.losses, [0]

    def losses(prepared: Any) -> Any:
        count[0] += 1
        if count[0] == calls:
            act()
        return inner(prepared)

    stage.losses = losses


def gathers(folder: Path) -> None:
    """Small things that ranks tell each other."""
    rank, num_ranks = collectives.rank(), collectives.num_ranks()
    assert collectives.total_on_host([1.0, rank]) == [num_ranks, num_ranks * (num_ranks - 1) / 2]
    dealt = list(collectives.deal_once(range(5)))
    assert len(dealt) == -(-5 // num_ranks)
    own = torch.zeros(5)
    own[[batch for batch, counts in dealt if counts]] = 1
    assert torch.equal(collectives.total(own), torch.ones(5))
    run = configured(folder / "uneven", "full")
    with pytest.raises(ValueError, match=f"accumulate is 3.*{num_ranks} ranks"):
        train(replace(run, accumulate=3), staged(run))
    with pytest.raises(ValueError, match=r"replicas is 3 over"):
        train(replace(run, ranks=replace(run.ranks, replicas=3)), staged(run))
