"""A step that does not end: every rank says where it stands and ends, instead of waiting for the others for hours."""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from internvl.parallel import collectives

EXIT_CODE = 75
"""EX_TEMPFAIL: the run can be started again from its latest checkpoint."""

GRACE_S = 5.0
"""Between a rank's word and its end."""


class Watchdog:
    """A thread that looks whether steps go on; `limit_s` 0 looks at nothing."""

    def __init__(self, out: Path, limit_s: float) -> None:
        self._out, self._limit_s = out, limit_s
        self._lock = threading.Lock()
        self._began_s: float | None = None
        self._step, self._doing, self._names = 0, "", "none yet"
        self._ended = threading.Event()
        self._gives_up = threading.Event()
        self._main = threading.get_ident()

    def __enter__(self) -> Watchdog:
        if self._limit_s:
            threading.Thread(target=self._look, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._gives_up.is_set():  # the end of another rank reached this one first, as an error of its connection
            time.sleep(2 * GRACE_S)
        self._ended.set()

    def begin(self, step: int) -> None:
        """A step begins, and with it its time; it waits for its data."""
        with self._lock:
            self._began_s, self._step, self._doing = time.monotonic(), step, "waiting for its data; the samples before"

    def note(self, names: str) -> None:
        """The step has its samples."""
        with self._lock:
            self._doing, self._names = "its samples", names

    @contextmanager
    def resting(self) -> Iterator[None]:
        """Evaluation, saving and drawing may take as long as they take."""
        with self._lock:
            self._began_s = None
        yield

    def _look(self) -> None:
        while not self._ended.wait(min(1.0, self._limit_s / 4)):
            with self._lock:
                late = self._began_s is not None and time.monotonic() - self._began_s > self._limit_s
            if late:
                self._give_up()

    def _give_up(self) -> None:
        self._gives_up.set()
        frame = sys._current_frames().get(self._main)
        stack = "".join(traceback.format_stack(frame)) if frame is not None else "(not known)\n"
        path = self._out / f"stuck-{collectives.rank()}.txt"
        head = (
            f"rank {collectives.rank()} of {collectives.num_ranks()}: step {self._step} has not ended in "
            f"{self._limit_s:g} s (watch.step_limit_s); {self._doing}: {self._names}"
        )
        path.write_text(f"{head}\n{stack}", encoding="utf-8")
        last = stack.strip().splitlines()[-2:]
        sys.stderr.write(f"internvl train: {head}; it stands at {' '.join(map(str.strip, last))}; more in {path}\n")
        sys.stderr.flush()
        time.sleep(GRACE_S)  # the others are late too: let them speak before this one's end kills them
        os._exit(EXIT_CODE)
