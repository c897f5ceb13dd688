"""What the benchmark scripts share: calls in turns, what else ran meanwhile, results with date, hardware, commit."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def in_turns(calls: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1) -> dict[str, dict[str, float]]:
    """Seconds of each call, one after the other in every round, so that a disturbance meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    others: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warm_up + rounds):
        for name, call in calls.items():
            busy, own, start = _busy_seconds(), time.process_time(), time.perf_counter()
            call()
            passed = time.perf_counter() - start
            if turn >= warm_up:
                seconds[name].append(passed)
                others[name].append(max(0.0, _busy_seconds() - busy - (time.process_time() - own)) / passed)
    return {
        name: {
            "median": statistics.median(found),
            "min": min(found),
            "max": max(found),
            "cores used by others": round(statistics.median(others[name]), 2),
        }
        for name, found in seconds.items()
    }


def _busy_seconds() -> float:
    """CPU time of everything on this machine; 0 where it does not tell."""
    path = Path("/proc/stat")
    if not path.is_file():
        return 0.0
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, path.read_text().splitlines()[0].split()[1:])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} x {len(names)}" if names else platform.processor()


def commit() -> str:
    here = Path(__file__).parent
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False, cwd=here
    )
    return done.stdout.strip()


def write(name: str, results: Mapping[str, Any], versions: Mapping[str, str], out: Path | None = None) -> Path:
    """results/NAME.json with the circumstances in front."""
    path = out or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    circumstances = {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "commit": commit(),
        "cpu": processor(),
        "load before": [round(value, 2) for value in os.getloadavg()],
        "versions": {"python": platform.python_version(), **versions},
    }
    path.write_text(json.dumps({**circumstances, **results}, indent=1) + "\n", encoding="utf-8")
    return path
