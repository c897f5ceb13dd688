"""Ranks for tests without a start of the interpreter each: one process imports everything, then forks the ranks.

Run as a script: `python forked.py MODULE FOLDER SIZE:FUNCTION[=EXIT_CODE] ...`. A forked child may use autograd
because this process never does.
"""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path


def run_ranks(module: str, folder: Path, *jobs: str, limit_s: float = 120.0) -> str:
    """Run jobs such as "2:check" (two ranks, each calls MODULE.check(FOLDER)); their output. Fails as they fail."""
    here = Path(__file__)
    paths = [str(here.parent), str(here.parents[1]), str(here.parents[1] / "train"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, str(here), module, str(folder), *jobs],
        env=environment,
        capture_output=True,
        text=True,
        timeout=limit_s,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def _fork(function: Callable[[Path], None], folder: Path, size: int) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = []
    for rank in range(size):
        child = os.fork()
        if child:
            children.append(child)
            continue
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
        code = 1
        try:
            from internvl.parallel.launch import joined

            with joined("cpu", timeout_s=60):
                function(folder)
            code = 0
        finally:  # a child must never run on into the parent's work
            if code:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def main(module: str, folder: str, *jobs: str) -> int:
    functions = importlib.import_module(module)
    for job in jobs:
        size, name = job.partition("=")[0].split(":")
        codes = _fork(getattr(functions, name), Path(folder), int(size))
        if any(code != int(job.partition("=")[2] or 0) for code in codes):
            print(f"{job}: exit codes {codes}", flush=True)  # noqa: T201
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
