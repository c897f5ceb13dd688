"""Work on pixels spread over threads: Pillow and numpy release the interpreter lock.

Own threads, since those of torch wait in a busy loop: where other work shares the cores, that costs more than it gains.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
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
    """What the work makes of each item, in order."""
    return [work(item) for item in items] if threads == 1 else list(_pool(os.getpid(), threads).map(work, items))


@lru_cache(maxsize=4)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """One pool a process: the threads of a parent do not live on in a fork."""
    return ThreadPoolExecutor(threads, thread_name_prefix=f"pixels-{process}")
