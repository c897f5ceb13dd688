"""Work on pixels spread over threads: Pillow and numpy release the interpreter lock.

Own threads, since those of torch wait in a busy loop: where other work shares the cores, that costs more than it gains.
The thread that asks works too: were it to sleep, Linux would often wake two helpers on one core and leave its own idle
for the whole of a resize (26 ms in place of 17 for a photo on two cores).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from functools import lru_cache
from typing import TypeVar

import torch

_Item = TypeVar("_Item")
_Made = TypeVar("_Made")
_WORTH_THREADS = 1 << 17
"""Pixels, read or made, below which one thread is as fast."""


def threads_for(num_pixels: int) -> int:
    """As many threads as torch may use (one in the workers of a loader), one where there is little to do."""
    return torch.get_num_threads() if num_pixels > _WORTH_THREADS else 1


def spread(work: Callable[[_Item], _Made], items: Iterable[_Item], threads: int) -> list[_Made]:
    """What the work makes of each item, in order; whoever is free takes the next. An error ends the work of all.

    Work may itself spread work: nobody waits for a helper that has not begun.
    """
    items = list(items)
    if min(threads, len(items)) < 2:
        return [work(item) for item in items]
    made: dict[int, _Made] = {}
    left = deque(range(len(items)))

    def take() -> None:
        try:
            while True:
                try:
                    place = left.popleft()
                except IndexError:
                    return
                made[place] = work(items[place])
        finally:
            left.clear()

    helpers = [_pool(os.getpid(), threads - 1).submit(take) for _ in range(min(threads, len(items)) - 1)]
    try:
        take()
    finally:
        begun = [helper for helper in helpers if not helper.cancel()]
        wait(begun)
    for helper in begun:
        helper.result()
    return [made[place] for place in range(len(items))]


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: the threads of a parent do not live on in a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"pixels-{process}")
