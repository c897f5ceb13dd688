"""The process that trains: its device, and being asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from internvl.parallel.launch import place


def choose_device(name: str) -> torch.device:
    """`auto` is cuda where there is one; among several ranks each takes its own."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r} but torch sees no CUDA device; use --device cpu")
    if name == "cuda" and place().num_ranks > 1:
        return torch.device("cuda", place().local_rank)
    return torch.device(name)


@contextmanager
def stop_on_signal() -> Iterator[list[int]]:
    """A list that is empty until the process is asked to end; the second Ctrl-C interrupts at once."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, _: object) -> None:
        if number == signal.SIGINT and received:
            raise KeyboardInterrupt
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
