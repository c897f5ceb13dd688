"""What an evaluation leaves behind: scores and manifest as JSON, a table, a bar chart. Knows scores only, no model."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.evaluate.intervals import Estimate
from internvl.evaluate.run import Score

if TYPE_CHECKING:
    from rich.table import Table

PACKAGES = ("torch", "transformers", "tokenizers", "pillow", "numpy")


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def scores_json(scores: Sequence[Score], manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {"scores": {one.task: asdict(one) for one in scores}, "manifest": dict(manifest)}


def manifest(settings: Mapping[str, Any], data: Mapping[str, str], prompts: Mapping[str, str]) -> dict[str, Any]:
    """Everything needed to read the numbers later: model, data, prompts, decoding, software, machine, date."""
    return {
        "settings": dict(settings),
        "data": dict(data),
        "prompts": dict(prompts),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in ("internvl", *PACKAGES)}},
        "hardware": hardware(),
        "commit": commit(),
    }


def hardware() -> dict[str, Any]:
    import torch

    found: dict[str, Any] = {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
    return found


def commit() -> str | None:
    """The commit of the source tree, with '+' where tracked files differ from it; None outside git."""
    here = Path(__file__).parent
    try:
        head = _git(here, "rev-parse", "HEAD")
        return head + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    if package == "internvl":
        import internvl

        return internvl.__version__
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or sys.platform


def table(scores: Sequence[Score]) -> Table:
    """task | n | model | blind | majority answer | target, in 80 columns; every interval is in the JSON."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(title="Held-out sets: value and 95 % interval", title_justify="left", box=SIMPLE_HEAD, padding=0)
    for name in ("task", "n", "model", "blind", "majority\nanswer"):
        shown.add_column(name, justify="left" if name == "task" else "right", no_wrap=True)
    shown.add_column("target")
    for one in scores:
        unit = " (nats)" if one.majority is None else ""
        shown.add_row(
            one.task + unit, str(one.n), _with_interval(one.model), _value(one.blind), _value(one.majority), _aim(one)
        )
        parts = dict(one.parts) if one.gain is None else {"gain": one.gain}
        for part, value in parts.items():
            shown.add_row(f"  {part}", str(value.n), _with_interval(value), style="dim")
    return shown


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.2f}–{estimate.high:.2f})"


def _value(estimate: Estimate | None) -> str:
    return "–" if estimate is None else f"{estimate.value:.3f}"


def _aim(score: Score) -> str:
    target = f"{'gain ' if score.majority is None else ''}{score.target:.2f}"
    if score.times_blind > 1:
        target += f", {score.times_blind:g}x blind"
    return target + {True: " met", False: " missed", None: ""}[score.met]


def need_matplotlib() -> None:
    """Asked before the work begins, so that hours of answers are not followed by an import error."""
    if find_spec("matplotlib") is None:
        raise ValueError("the chart needs matplotlib: pip install 'internvl[train]', or pass --no-chart")


def chart(scores: Sequence[Score], path: Path) -> None:
    """Bars of model, blind and majority for each set, with the 95 % interval of the model and the target as a tick."""
    need_matplotlib()
    from matplotlib.figure import Figure

    shares = [one for one in scores if one.gain is None and one.majority is not None]
    losses = [one for one in scores if one.majority is None]
    figure = Figure(figsize=(2.5 + 1.15 * len(scores), 4.2), layout="constrained")
    widths = [max(1, len(part)) for part in (shares, losses) if part]
    panels = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    for panel, part in zip(panels, [part for part in (shares, losses) if part], strict=True):
        _bars(panel, part)
        if part is shares:
            panel.set_ylim(0, 1.05)
            panel.set_ylabel("share of rows")
            panel.legend(loc="upper center", bbox_to_anchor=(0.5, 1.14), ncols=4, frameon=False, fontsize=8)
        else:
            panel.set_ylabel("nats a token (lower is better)")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _bars(panel: Any, scores: Sequence[Score]) -> None:
    places = range(len(scores))
    columns = (("model", "#1f6feb", -0.27), ("blind", "#8c959f", 0.0), ("majority", "#d0d7de", 0.27))
    for name, colour, shift in columns:
        values = [getattr(one, name) for one in scores]
        drawn = [(place + shift, value) for place, value in zip(places, values, strict=True) if value is not None]
        if drawn:
            label = {"blind": "another picture", "majority": "majority answer"}.get(name, name)
            panel.bar([x for x, _ in drawn], [v.value for _, v in drawn], 0.25, color=colour, label=label)
    low = [one.model.value - one.model.low for one in scores]
    high = [one.model.high - one.model.value for one in scores]
    centres = [place - 0.27 for place in places]
    panel.errorbar(centres, [one.model.value for one in scores], [low, high], fmt="none", ecolor="black", lw=0.8)
    aims = [(place, one.target) for place, one in zip(places, scores, strict=True) if one.majority is not None]
    if aims:
        panel.hlines(
            [y for _, y in aims], [x - 0.42 for x, _ in aims], [x + 0.42 for x, _ in aims], "#cf222e", label="target"
        )
    panel.set_xticks(list(places), [f"{one.task}\nn={one.n}" for one in scores], rotation=30, ha="right", fontsize=8)
    panel.spines[["top", "right"]].set_visible(False)
