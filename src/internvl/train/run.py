"""A training run as data: frozen, to and from JSON.

Nothing here touches a model or a file other than `run.json`; recipes build these values, `loop.py` obeys them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from internvl.data.packing import Packing
from internvl.train.settings import PARTS, Data, Distill, Optimiser, Pairs, Part, Ranks, Schedule, Text, Tokens, Watch


@dataclass(frozen=True)
class RunConfig:
    """One run of a stage, fully set."""

    out: str = "runs/run"
    """Folder of this run: run.json, metrics, checkpoints, the trained model."""
    stage: str = "sft"
    model: str = "pocket"
    """Name or folder, as `internvl.load` takes it; `tiny-...` names have random weights."""
    start: tuple[str, ...] = ()
    """`parts` of an earlier run, such as runs/NAME/parts: the connector, adapters and token rows there replace the
    model's, and adapters go on learning as adapters instead of being merged. Of several runs, the mean. Stages sft and
    align."""
    vision: Part = Part()
    connector: Part = Part()
    language: Part = Part()
    tokens: Tokens = Tokens()
    data: Data = Data()
    optimiser: Optimiser = Optimiser()
    schedule: Schedule = Schedule()
    accumulate: int = 1
    """Micro-batches in one step, shared by all ranks; the loss is weighted over all of them, so k x b equals one
    batch of k*b."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast; what learns is kept in fp32, what is frozen in bf16."""
    grad_checkpoint: bool = False
    """Recompute block activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """torch.compile the blocks of the vision and language parts."""
    seed: int = 0
    device: str = "auto"
    """auto: cuda when there is one."""
    log_every: int = 10
    save_every: int = 500
    """Steps between checkpoints; 0 saves at the end only."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    keep: int = 2
    """Latest checkpoints kept, beside the best one."""
    max_minutes: float | None = None
    """Stop cleanly, saved, after this time."""
    export: Literal["last", "best", "ema", "none"] = "last"
    """Which weights become the trained model in `out/model`."""
    pairs: Pairs = Pairs()
    distill: Distill = Distill()
    text: Text = Text()
    ranks: Ranks = Ranks()
    watch: Watch = Watch()

    def __post_init__(self) -> None:
        _check(self)

    def part(self, name: str) -> Part:
        return {"vision": self.vision, "connector": self.connector, "language": self.language}[name]


RESUME_FREE = frozenset(
    ["out", "device", "log_every", "save_every", "eval_every", "keep", "max_minutes", "export", "data.workers"]
    + [f"data.{name}" for name in ("features", "features_folder", "held_out", "held_out_samples", "worst_first")]
    + ["distill.features", "distill.features_folder"]
    + [f"data.{name}" for name in ("on_error", "max_rejected", "changed")]
    + [f"ranks.{f.name}" for f in fields(Ranks)]
    + [f"watch.{f.name}" for f in fields(Watch) if f.name != "ema"]
)
"""Fields that may change when a run goes on: they do not change what was learned, or only what stopped it."""


def _check(run: RunConfig) -> None:
    schedule = run.schedule
    if (schedule.steps is None) == (schedule.epochs is None) and schedule.over == "steps":
        raise ValueError(
            f"schedule.steps is {schedule.steps} and schedule.epochs is {schedule.epochs}; give exactly one of them"
        )
    if schedule.over == "time" and run.max_minutes is None:
        raise ValueError("schedule.over is 'time' but max_minutes is not given; set --max-minutes")
    if schedule.over == "time" and schedule.warmup_steps is not None:
        raise ValueError(
            "schedule.over is 'time' counts warm-up as a share; set schedule.warmup_share, not warmup_steps"
        )
    _check_signs(run)
    _check_shares(run)
    if run.data.packing != Packing() and not (run.data.packed and run.data.batch_tokens):
        raise ValueError(
            "data.packing is set, but rows are filled by it only with --data.packed and --data.batch-tokens: set both"
        )
    _check_watch(run)
    for name in PARTS:
        _check_part(run, name)
    if run.connector.learn == "lora":
        raise ValueError("connector.learn is 'lora'; the connector is small: use full or frozen")


def _check_signs(run: RunConfig) -> None:
    """Below 0, some of these would turn a gradient or a weight round in silence."""
    schedule = run.schedule
    positive: dict[str, float | None] = {
        "accumulate": run.accumulate,
        "data.batch_samples": run.data.batch_samples,
        "log_every": run.log_every,
        "keep": run.keep,
        "data.held_out_samples": run.data.held_out_samples,
        "schedule.steps": schedule.steps,
        "schedule.epochs": schedule.epochs,
        "max_minutes": run.max_minutes,
        "optimiser.peak_lr": run.optimiser.peak_lr,
        "ranks.replicas": run.ranks.replicas,
        "watch.sample_tokens": run.watch.sample_tokens,
        "text.temperature": run.text.temperature,
        "data.batch_tokens": run.data.batch_tokens,
        "data.batch_tiles": run.data.batch_tiles,
        "data.max_length": run.data.max_length,
        "data.max_tiles": run.data.max_tiles,
        "data.min_frames": run.data.min_frames,
        "optimiser.eps": run.optimiser.eps,
    }
    for name, value in positive.items():
        if value is not None and not value > 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    least: dict[str, float | None] = {
        "optimiser.clip": run.optimiser.clip,
        "optimiser.weight_decay": run.optimiser.weight_decay,
        "schedule.warmup_steps": schedule.warmup_steps,
        "data.workers": run.data.workers,
        "save_every": run.save_every,
        "eval_every": run.eval_every,
        "watch.step_limit_s": run.watch.step_limit_s,
        "watch.samples": run.watch.samples,
        "tokens.lr_scale": run.tokens.lr_scale,
    }
    for name, value in least.items():
        if value is not None and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be at least 0")


def _check_shares(run: RunConfig) -> None:
    if not all(0 <= beta < 1 for beta in run.optimiser.betas):
        raise ValueError(f"optimiser.betas are {run.optimiser.betas}; each lies in [0, 1), such as 0.9 and 0.999")
    if not 0 <= run.schedule.warmup_share <= 1:
        raise ValueError(f"schedule.warmup_share is {run.schedule.warmup_share}; it is a share of the steps, 0 to 1")
    if run.data.min_frames > run.data.max_frames:
        raise ValueError(
            f"data.min_frames is {run.data.min_frames} and data.max_frames {run.data.max_frames}; lower the one or "
            "raise the other"
        )
    if run.start and run.stage not in ("sft", "align"):
        raise ValueError(
            f"start is {', '.join(run.start)}, but stage {run.stage!r} cannot begin with parts; give --model alone"
        )
    if not 0 <= run.data.told <= 1:
        raise ValueError(f"data.told is {run.data.told}; it is a share of the records, 0 to 1")
    if run.data.told and (run.stage != "sft" or run.data.packed):
        rows = "packed rows" if run.data.packed else f"stage {run.stage!r}"
        raise ValueError(f"data.told is {run.data.told}, but {rows} cannot be told; set --data.told 0")
    if not 0 <= run.data.max_rejected <= 1:
        raise ValueError(f"data.max_rejected is {run.data.max_rejected}; it is a share of the records, 0 to 1")


def _check_watch(run: RunConfig) -> None:
    if not 0 <= run.watch.ema < 1:
        raise ValueError(f"watch.ema is {run.watch.ema}; a decay lies in [0, 1): 0 for none, or such as 0.999")
    if run.export == "ema" and not run.watch.ema:
        raise ValueError("export is 'ema' but watch.ema is 0; set --watch.ema 0.999, or export the last or the best")


def _check_part(run: RunConfig, name: str) -> None:
    part = run.part(name)
    if not part.lr_scale >= 0:
        raise ValueError(f"{name}.lr_scale is {part.lr_scale}; it must be at least 0")
    if part.rank < 1:
        raise ValueError(f"{name}.rank is {part.rank}; it must be at least 1")
    for field, share in (("dropout", part.dropout), ("drop_path", part.drop_path or 0.0)):
        if not 0 <= share < 1:
            raise ValueError(f"{name}.{field} is {share}; it lies in [0, 1)")
    if name != "vision" and part.drop_path is not None:
        raise ValueError("drop_path is given for connector or language; only the vision part drops paths")
    if not 0 < part.layer_decay <= 1:
        raise ValueError(f"{name}.layer_decay is {part.layer_decay}; it lies in (0, 1]: 1 for none, or such as 0.9")
    if part.layers_from and (part.learn != "full" or name == "connector"):
        raise ValueError(
            f"{name}.layers_from is {part.layers_from} but {name}.learn is {part.learn!r}; it chooses among the "
            "blocks of a vision or language part that is full"
        )


# --- JSON -------------------------------------------------------------------------------------------------------------

T = TypeVar("T")


def to_json(run: RunConfig) -> dict[str, Any]:
    return asdict(run)


def from_json(text: Mapping[str, Any]) -> RunConfig:
    """The inverse of `to_json`; ValueError names a field that does not exist."""
    return _build(RunConfig, text, "")


def read_run(path: Path) -> RunConfig:
    """A run from its `run.json`, or from the folder that holds it."""
    path = path / "run.json" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist; --run takes the run.json that a run wrote, or its folder")
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg})") from error


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """Fields that would change what a resumed run learns, with both values."""
    before, after = _flat(to_json(old)), _flat(to_json(new))
    return [f"{k}: {before[k]!r} -> {after[k]!r}" for k in after if k not in RESUME_FREE and before[k] != after[k]]


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _build(kind: type[T], tree: Mapping[str, Any], where: str) -> T:
    hints = get_type_hints(kind)
    known = {f.name: f for f in fields(kind)}  # type: ignore[arg-type]
    if unknown := sorted(set(tree) - set(known)):
        raise ValueError(f"{where}{unknown[0]} is no field of {kind.__name__}; it has {', '.join(known)}")
    values: dict[str, Any] = {}
    for name, value in tree.items():
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            values[name] = _build(hint, value, f"{where}{name}.")
        else:
            values[name] = tuple(value) if isinstance(value, list) else value
    return kind(**values)
