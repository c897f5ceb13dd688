"""Work spread over threads: order, errors, work that spreads work."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.data import resize
from internvl.data import threads as data_threads
from internvl.data.threads import spread


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_order(threads: int, count: int) -> None:
    assert spread(lambda item: item * item, iter(range(count)), threads) == [item * item for item in range(count)]


def test_the_asking_thread_works_too() -> None:
    both = threading.Barrier(2, timeout=20)

    def meet(_: int) -> int:
        both.wait()  # one thread alone would wait here until the barrier breaks
        return threading.get_ident()

    found = set(spread(meet, range(2), 2))
    assert len(found) == 2
    assert threading.get_ident() in found


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("wrong", [0, 5])
def test_an_error_reaches_the_asker_and_ends_the_work(threads: int, wrong: int) -> None:
    done: list[int] = []
    broken = threading.Event()

    def work(item: int) -> None:
        if item == wrong:
            broken.set()
            raise ValueError(f"item {item}")
        if item > wrong:
            broken.wait(20)
        done.append(item)

    with pytest.raises(ValueError, match=f"item {wrong}"):
        spread(work, range(1000), threads)
    # Each other thread may have taken an item before the error, and another while it ended the work.
    assert len(done) <= wrong + 2 * (threads - 1)


def test_work_that_spreads_work_ends() -> None:
    def inner(item: int) -> int:
        return sum(spread(lambda part: part + item, range(4), 2))

    with ThreadPoolExecutor(1) as watched:
        asked = watched.submit(spread, inner, range(20), 2)
        assert asked.result(timeout=20) == [6 + 4 * item for item in range(20)]


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("size", [(96, 64), (130, 70), (31, 200), (96, 200), (200, 64)])
def test_several_grids_at_once(size: tuple[int, int], threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_threads, "_WORTH_THREADS", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (size[1], size[0], 3), np.uint8))
    grids = [np.zeros((rows, columns, 3, 32, 32), np.uint8) for rows, columns in ((2, 3), (1, 1), (3, 1), (1, 4))]
    resize.planes(image, *grids)
    for grid in grids:
        rows, columns = grid.shape[:2]
        expected = np.asarray(image.resize((columns * 32, rows * 32), Image.Resampling.BICUBIC))
        assert np.array_equal(grid.transpose(0, 3, 1, 4, 2).reshape(rows * 32, columns * 32, 3), expected)
