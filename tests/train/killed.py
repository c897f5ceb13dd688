"""Runs that are killed at random moments and started again, in forks of one process that has imported everything.

Script: `python killed.py FOLDER COUNT SEED`; prints one line a moment, exits 1 where a run differs from the whole one.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_stage import tiny_run, tiny_stage

from internvl.train import tensors
from internvl.train.log import read_metrics
from internvl.train.loop import train
from internvl.train.settings import Data, Part, Schedule, Watch

STEPS = 4
COMPARED = ("learned", "optimizer", "ema")


def fork(out: Path, behind: bool, at_event: int | None = None) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        torch.set_num_threads(1)
        if at_event is not None:
            die_at(at_event, random.Random(at_event))
        run = tiny_run(
            out,
            vision=Part(),
            language=Part("lora", rank=2, dropout=0.1),
            data=Data(batch_samples=2),
            schedule=Schedule(steps=STEPS, warmup_steps=1),
            save_every=1,
            watch=Watch(ema=0.9, save_behind=behind),
        )
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
        code = 0 if train(run, tiny_stage(run)).finished else 1
    finally:
        os._exit(code)


def die_at(event: int, rng: random.Random) -> None:
    """SIGKILL in the given file operation of this process: before it, or with half a file written."""
    seen = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            seen[0] += 1
            if seen[0] == event:
                if function is save_file:
                    function(*args, **kwargs)
                    os.truncate(args[1], rng.randrange(Path(args[1]).stat().st_size))
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    save_file = tensors.save_file
    tensors.save_file = counted(save_file)
    os.fsync = counted(os.fsync)
    shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]
    Path.rename = counted(Path.rename)  # type: ignore[method-assign]
    Path.replace = counted(Path.replace)  # type: ignore[method-assign]


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def result(out: Path) -> tuple[list[bytes], list[Any]]:
    last = out / "checkpoints" / f"step-{STEPS:08d}"
    lines = [(line["step"], line["loss"]) for line in read_metrics(out / "metrics.jsonl")]
    return [(last / f"{name}.safetensors").read_bytes() for name in COMPARED], lines


def main(folder: Path, count: int, seed: int) -> int:
    rng = random.Random(seed)
    began = time.monotonic()
    assert wait(fork(folder / "whole", False)) == 0
    whole_s = time.monotonic() - began
    expected = result(folder / "whole")
    for moment in range(count):
        out, behind = folder / f"moment{moment}", rng.random() < 0.5
        killed = 0
        while killed < 2:  # twice, then to the end
            if moment % 2 == 0:
                child = fork(out, behind, rng.randrange(1, 60))
            else:
                child = fork(out, behind)
                time.sleep(rng.uniform(0.1, 0.7) * whole_s)
                os.kill(child, signal.SIGKILL)
            code = wait(child)
            killed += 1
            if code == 0:  # it ended before its moment came
                break
            assert code == -signal.SIGKILL, code
        found = sorted(path.name for path in (out / "checkpoints").glob("step-*")) if out.is_dir() else []
        ended = wait(fork(out, behind))
        print(f"moment {moment}: {killed} kills, then from {found[-1] if found else 'nothing'}: {ended}")  # noqa: T201
        if ended or result(out) != expected:
            print(f"moment {moment} differs")  # noqa: T201
            return 1
        shutil.rmtree(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])))
