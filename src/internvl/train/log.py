"""What a run tells: metrics in JSONL, progress on a terminal, the loss curve. Numbers come from the loop."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from internvl.parallel import collectives
from internvl.train.track import Tracker

Number = float | int | str

CURVE_EVERY_S = 60.0
"""Least time between two drawings of the loss curve, which takes half a second."""


class Metrics:
    """`metrics.jsonl`: one line a logged step or evaluation; trackers are told too. `samples.jsonl` beside it."""

    def __init__(self, path: Path, step: int, trackers: Sequence[Tracker] = ()) -> None:
        """Continue after `step`: lines that a killed run wrote beyond it go."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._samples, self._trackers = path.with_name("samples.jsonl"), trackers
        for file in (path, *([self._samples] if self._samples.is_file() else [])):
            kept = [line for line in read_metrics(file) if line["step"] <= step]
            file.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.write(line)

    def write_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """What the model answered at an evaluation."""
        if samples:
            with self._samples.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps({"step": step, **x}, ensure_ascii=False) + "\n" for x in samples)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


class Meter:
    """Counts and seconds since the last reading."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.counts: dict[str, int] = {}
        self.waited_s, self.began_s = 0.0, time.perf_counter()

    def add(self, sizes: Mapping[str, int], waited_s: float) -> None:
        """Counts of a micro-batch, and the seconds that the step waited for it."""
        for name, count in sizes.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self.waited_s += waited_s

    def read(self) -> dict[str, float]:
        """Rates over all ranks since the last reading, which begins anew."""
        seconds = max(1e-9, time.perf_counter() - self.began_s)
        kinds = ("samples", "tokens", "tiles", "learned")
        summed = collectives.total_on_host([float(self.counts[name]) for name in kinds])
        counts = dict(zip(kinds, summed, strict=True))
        line = {f"{name}_per_s": round(counts[name] / seconds, 3) for name in kinds[:3]}
        line["learned_share"] = round(counts["learned"] / max(1.0, counts["tokens"]), 5)
        line["data_wait_share"] = round(self.waited_s / seconds, 4)
        line |= packing(self.counts)
        self._clear()
        return line


def packing(counts: Mapping[str, int]) -> dict[str, float]:
    """Fill of packed rows, samples and tiles a row, idle share of ranks by tokens and by tiles; none without rows."""
    if not counts.get("room"):
        return {}
    rows = counts["rows"]
    return {
        "fill": round(counts["tokens"] / counts["room"], 4),
        "samples_per_row": round(counts["samples"] / rows, 3),
        "tiles_per_row": round(counts["tiles"] / rows, 3),
        "idle_tokens": round(1 - counts["company_tokens"] / max(1, counts["longest"]), 4),
        "idle_tiles": round(1 - counts["company_tiles"] / counts["most_tiles"], 4) if counts["most_tiles"] else 0.0,
    }


def memory_mb(device: torch.device) -> float:
    """Peak memory: allocated on CUDA since the start, resident in the process elsewhere."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
    if os.name != "posix":
        return 0.0
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def silent() -> Console:
    """Where ranks speak that are not the first."""
    return Console(stderr=True, quiet=True, force_terminal=False)


class Reporter:
    """A progress bar on a terminal, plain lines elsewhere."""

    def __init__(self, num_steps: int, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, TextColumn("{task.description}"), console=self.console, transient=True)
        self._task = self._bar.add_task("", total=num_steps)

    def begin(self, step: int) -> None:
        self.step(step)
        if self.console.is_terminal:
            self._bar.start()

    def table(self, lines: Sequence[tuple[str, str, int, int]]) -> None:
        """What learns and what is frozen, in parameters."""
        table = Table("part", "how", "learned", "frozen")
        for part, how, learned, frozen in lines:
            table.add_row(part, how, f"{learned:,}", f"{frozen:,}")
        self.console.print(table)

    def step(self, step: int) -> None:
        self._bar.update(self._task, completed=step)

    def line(self, line: Mapping[str, Any]) -> None:
        text = "  ".join(f"{key} {_short(value)}" for key, value in line.items() if key in SHOWN)
        if self.console.is_terminal and "loss" in line:  # evaluations stay on the screen
            self._bar.update(self._task, description=text)
        else:
            self.console.print(text, highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()


SHOWN = (
    "step",
    "loss",
    "lr",
    "grad_norm",
    "samples_per_s",
    "data_wait_share",
    "fill",
    "skipped",
    "cut",
    "held_out_loss",
    "held_out_nearest",
)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


class Curve:
    """`loss.png` of a run, drawn by the first rank."""

    def __init__(self, out: Path, reporter: Reporter) -> None:
        self._out, self._reporter = out, reporter
        self._drawn_s = time.monotonic()

    def draw_if_due(self) -> None:
        """Once in CURVE_EVERY_S."""
        if time.monotonic() - self._drawn_s > CURVE_EVERY_S:
            self.draw()

    def draw(self) -> None:
        self._drawn_s = time.monotonic()
        if not collectives.is_lead():
            return
        if importlib.util.find_spec("matplotlib") is None:
            self._reporter.say("no loss.png, which needs: pip install 'internvl[train]'")
        else:
            draw_curve(self._out / "metrics.jsonl", self._out / "loss.png")


def draw_curve(metrics: Path, picture: Path) -> None:
    """The loss over steps, the held-out loss beside it, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(metrics)
    figure = Figure(figsize=(6, 3.5), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, style in (("loss", "-"), ("held_out_loss", "o--")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=name.replace("_", " "), linewidth=1, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss, nats")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    partial = picture.with_name(f".{picture.name}.partial")
    figure.savefig(partial, format="png")
    partial.replace(picture)


def _short(value: Number) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
