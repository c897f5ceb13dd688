"""The lines of metrics.jsonl for TensorBoard and Weights & Biases, where a run asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from internvl.train.run import RunConfig, to_json


class Tracker(Protocol):
    def write(self, line: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_trackers(run: RunConfig, step: int) -> list[Tracker]:
    """Those that `run.watch.trackers` names, going on after `step`."""
    kinds: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}
    return [kinds[name](run, step) for name in run.watch.trackers]


class TensorBoard:
    """Event files in `out/tensorboard`."""

    def __init__(self, run: RunConfig, step: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ValueError("watch.trackers names tensorboard, which needs: pip install 'internvl[track]'") from error
        folder = str(Path(run.out) / "tensorboard")
        self._writer: Any = SummaryWriter(folder, purge_step=step + 1 if step else None)

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """One run of Weights & Biases a folder; a resumed run goes on in it. Its variables choose project and account."""

    def __init__(self, run: RunConfig, step: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ValueError("watch.trackers names wandb, which needs: pip install 'internvl[track]'") from error
        kept = Path(run.out) / "wandb_id.txt"
        known = kept.read_text(encoding="utf-8").strip() if kept.is_file() else None
        self._run: Any = wandb.init(
            dir=run.out, name=Path(run.out).name, config=to_json(run), id=known, resume="allow" if known else None
        )
        if known is None:
            kept.write_text(f"{self._run.id}\n", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(_numbers(line), step=line["step"])

    def close(self) -> None:
        self._run.finish()


def _numbers(line: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in line.items() if name != "step" and isinstance(value, int | float)}
