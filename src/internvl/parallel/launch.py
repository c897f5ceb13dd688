"""Where a process stands among the ranks: torchrun's environment, its device, its group; and starting ranks here.

Several machines are torchrun's business (docs/ranks.md). What ranks compute together is shard.py's.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist

GRACE_S = 20.0
"""After the first rank failed, the others may end by themselves, and say where they stand, for so long."""


@dataclass(frozen=True)
class Place:
    """One rank among all, by the variables that torchrun sets."""

    rank: int = 0
    num_ranks: int = 1
    local_rank: int = 0
    """Among the ranks of this machine; the number of its GPU."""


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """ValueError where the variables contradict each other."""
    if "RANK" not in environment and "WORLD_SIZE" not in environment:
        return Place()
    try:
        rank, num_ranks = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local = int(environment.get("LOCAL_RANK", rank))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"RANK is {environment.get('RANK')!r} and WORLD_SIZE is {environment.get('WORLD_SIZE')!r}; torchrun sets "
            "both to numbers: start by torchrun or --nproc, or unset them"
        ) from error
    if not 0 <= rank < num_ranks:
        raise ValueError(f"RANK is {rank} but WORLD_SIZE is {num_ranks}; ranks count from 0")
    return Place(rank, num_ranks, local)


@contextmanager
def joined(device: str = "auto", timeout_s: float = 3600.0) -> Iterator[Place]:
    """Inside, the ranks are one group: gloo for what is on the host, NCCL for what is on GPUs. Alone: nothing."""
    here = place()
    if here.num_ranks == 1 or dist.is_initialized():
        yield here
        return
    on_gpu = torch.cuda.is_available() and device != "cpu"
    if on_gpu:
        count = torch.cuda.device_count()
        if here.local_rank >= count:
            raise ValueError(
                f"rank {here.rank} is number {here.local_rank} of this machine, which has {count} GPUs; "
                f"start at most {count} ranks a machine, or use --device cpu"
            )
        torch.cuda.set_device(here.local_rank)
    else:
        spread_cores(int(os.environ.get("LOCAL_WORLD_SIZE", here.num_ranks)))
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
        rank=here.rank,
        world_size=here.num_ranks,
        timeout=timedelta(seconds=timeout_s),
    )
    try:
        yield here
    finally:
        dist.destroy_process_group()


def spread_cores(num_local: int) -> None:
    """Ranks of one machine share its cores, unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // num_local))


def start(arguments: Sequence[str], num_ranks: int) -> int:
    """Run `internvl ARGUMENTS` in `num_ranks` processes of this machine; the exit code of the first that failed.

    Signals go on to all of them. When one fails the others get GRACE_S to end, then they are killed.
    """
    if num_ranks < 1:
        raise ValueError(f"--nproc is {num_ranks}; it must be at least 1")
    command = [sys.executable, "-m", "internvl.cli", *arguments]
    shared = {
        **os.environ,
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    ranks = [
        subprocess.Popen(command, env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(num_ranks)
    ]

    def forward(number: int, _: FrameType | None) -> None:
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return _wait(ranks)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    failed: tuple[int, float] | None = None
    while any(process.poll() is None for process in ranks):
        codes = [process.returncode for process in ranks]
        if failed is None and any(codes):
            failed = next(code for code in codes if code), time.monotonic()
        if failed is not None and time.monotonic() - failed[1] > GRACE_S:
            break
        time.sleep(0.05)
    code = failed[0] if failed is not None else next((p.returncode for p in ranks if p.returncode), 0)
    return 128 - code if code < 0 else code  # as a shell reports a signal


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
