"""A training run as data: frozen dataclasses, to and from JSON, and what a stage must offer the loop.

Nothing here touches a model or a file other than `run.json`; recipes build these values, `loop.py` obeys them.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar, get_type_hints, runtime_checkable

from internvl.data.packing import Packing

if TYPE_CHECKING:
    import torch
    from jaxtyping import Float
    from torch import Tensor

    from internvl.train.trainable import Learner

PARTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class Part:
    """How one part of the model learns."""

    learn: Literal["frozen", "full", "lora"] = "frozen"
    lr_scale: float = 1.0
    """Multiplies the peak learning rate for this part."""
    rank: int = 16
    """Of the adapters, when learn is lora."""
    alpha: int | None = None
    """Adapter scale; twice the rank when not given (official wrap_llm_lora)."""
    dropout: float = 0.05
    """Before each adapter (official wrap_llm_lora)."""
    layers_from: int = 0
    """First block that learns: -4 is the last four (official `unfreeze_vit_layers`). Language and vision, full only."""
    drop_path: float | None = None
    """Stochastic depth of the last block of the vision part, rising from 0 (official `drop_path_rate`); None: the
    model's own."""
    layer_decay: float = 1.0
    """Factor on the rate from each block to the one before it; the embeddings come before the first block (BEiT)."""


@dataclass(frozen=True)
class Tokens:
    """The rows of the added special tokens in the token table, beside a language model that is frozen or adapted."""

    learn: bool = False
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Data:
    """What is learned from, and how it is cut into batches."""

    meta: str = ""
    """Meta JSON naming several sets, or one JSONL file of records."""
    held_out: str = ""
    """JSONL or meta JSON never trained on; its loss is the held-out loss."""
    held_out_samples: int | None = None
    """How many of them, the same ones each time, of every set in proportion; all when not given."""
    batch_samples: int | None = 16
    """Most samples in one micro-batch."""
    batch_tokens: int | None = None
    """Most positions in one micro-batch, padding included."""
    batch_tiles: int | None = None
    """Most tiles in one micro-batch."""
    grouped: bool = False
    """Samples of like length together (official `group_by_length`)."""
    packed: bool = False
    """One row of many samples, each attending to itself only, instead of padded rows."""
    workers: int = 0
    max_length: int = 8192
    """Positions of one sample (official `max_seq_length`)."""
    overlong: Literal["error", "cut"] = "error"
    """A longer sample ends the run, or loses its end (the official way)."""
    on_error: Literal["error", "skip", "quarantine"] = "error"
    """A record that cannot be used ends the run; or is left out, counted and named in `skipped.txt`; or is also
    written to `quarantine.jsonl`, whole, with file, line and reason."""
    max_tiles: int | None = None
    """Tiles of one image before the thumbnail; the model's own number when not given."""
    weighting: Literal["token", "sample", "square"] = "square"
    """Weight of a learned token among x of its sample: 1, 1/x, 1/sqrt(x) (paper 2.5, section 3.4)."""
    augment: Literal["as_given", "on", "off"] = "as_given"
    """JPEG re-encoding of tiles: as each set of the meta JSON says, or all, or none (paper 2.5, section 3.4)."""
    features: Literal["none", "memory", "disk"] = "none"
    """Keep the features of each tile while the vision part is frozen, so that it is seen once."""
    features_folder: str = ""
    """Where features are kept on disk; inside the run's folder when empty."""
    packing: Packing = field(default_factory=Packing)
    """How packed rows are filled, when `packed` and `batch_tokens` are set."""
    worst_first: bool = False
    """Run the largest micro-batch of the epoch once before training, and forget it: an out-of-memory shows at once."""
    max_rejected: float = 0.01
    """Largest share of records left out before the run ends: of an epoch, or of all given so far if that is more."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW (official scripts: 0.9, 0.999, 1e-8; clipping is the trainer's default)."""

    peak_lr: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """On matrices only; biases, norms and other vectors never decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class Schedule:
    """How long, and the learning rate along the way: linear warm-up, then cosine to 0."""

    steps: int | None = None
    """Optimiser steps; either this or epochs."""
    epochs: float | None = None
    warmup_steps: int | None = None
    """Replaces `warmup_share` when given."""
    warmup_share: float = 0.03
    over: Literal["steps", "time"] = "steps"
    """time: progress is elapsed / max_minutes, so that a time-boxed run ends at 0 (its resume is not bit-exact)."""


@dataclass(frozen=True)
class Pairs:
    """Training on pictures with captions: the stages `contrastive` and `generative` of InternVL 1.0."""

    micro_batch: int | None = None
    """Pairs embedded at a time; the loss is that of the whole batch, whatever fits into memory (gradient caching)."""
    side: int | None = None
    """Of a picture in pixels; the model's own when not given."""
    area: tuple[float, float] = (0.5, 1.0)
    """Least and greatest share of a picture in a random crop (official internvl_g dataset.py); 1 1: squashed whole."""
    mask_share: float = 0.0
    """Of the patches, left out of the vision encoder at random."""
    drop_path: float = 0.0
    """Of a vision encoder that learns."""
    drop_path_schedule: Literal["uniform", "linear"] = "uniform"
    """uniform as the paper (1.0, appendix A.3), linear as the official code."""
    max_scale: float | None = 100.0
    """The learned factor of the logits is kept at or below it (CLIP, section 2.5); official code has no bound."""
    negatives: Literal["random", "hard"] = "random"
    """Of matching: a caption of any other picture (official code), or the most similar of the batch (BLIP-2)."""
    output_head: str = ""
    """Folder of the LLaMA whose output head InternVL-G takes where the run begins with InternVL-C alone."""


@dataclass(frozen=True)
class Distill:
    """From a large vision encoder to the model's vision part (paper Mini-InternVL, section 3.1): stage `distill`."""

    teacher: str = ""
    """Chat, InternVL-C/-G or InternViT folder, hub id, tiny-* name, or efficientnet-lite0."""
    layers: int = 1
    """Last hidden states that are compared (the paper's K, which it does not state)."""
    projection: Literal["linear", "mlp"] = "linear"
    """From the student's width to the teacher's behind a LayerNorm, one a hidden state, thrown away afterwards."""
    projection_lr_scale: float = 1.0
    fit: int = 0
    """Pictures, the first ones: their mean state is taken away from the teacher's (that of a CNN is large and hides
    what tells pictures apart), and a ridge regression on them starts a linear projection. 0: neither, as the paper."""
    relation: float = 0.0
    """Weight of a second loss: similarities between the tiles of a batch are the teacher's (not in the paper)."""
    class_weight: float = 1.0
    """Of the class token, beside 1 for the mean over all patches."""
    features: Literal["memory", "disk", "none"] = "memory"
    """Keep what the teacher says about each tile, so that it sees each one once."""
    features_folder: str = ""
    """Where they are kept on disk; inside the run's folder when empty."""
    flip: bool = False
    """Every other time a tile is seen mirrored; both views are kept."""


@dataclass(frozen=True)
class Ranks:
    """How the model lies on several ranks (docs/ranks.md); one rank needs none of it."""

    replicas: int = 1
    """Copies of the model, each in shards over ranks / replicas ranks; as many as there are ranks: no sharding."""
    reshard: bool = True
    """Free the gathered weights of a block after its forward pass: less memory, one more gathering."""
    offload: bool = False
    """Shards and optimiser state on the host, where GPUs are too small."""


@dataclass(frozen=True)
class Watch:
    """What a run keeps and tells beside what it learns."""

    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; 0 keeps none. `--export ema` exports it."""
    step_limit_s: float = 1800.0
    """A step that takes longer ends every rank, each naming its last samples and its stack; 0 waits for ever."""
    save_behind: bool = False
    """Write checkpoints beside training; costs a copy of what is written."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the lines of metrics.jsonl go too."""
    samples: int = 0
    """Held-out records answered at every evaluation, into samples.jsonl."""
    sample_tokens: int = 48
    """Most tokens of such an answer."""


@dataclass(frozen=True)
class RunConfig:
    """One run of a stage, fully set."""

    out: str = "runs/run"
    """Folder of this run: run.json, metrics, checkpoints, the trained model."""
    stage: str = "sft"
    model: str = "pocket"
    """Name or folder, as `internvl.load` takes it; `tiny-...` names have random weights."""
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
    + [f"data.{name}" for name in ("on_error", "max_rejected")]
    + [f"ranks.{f.name}" for f in fields(Ranks)]
    + [f"watch.{f.name}" for f in fields(Watch) if f.name != "ema"]
)
"""Fields that may change when a run goes on: they do not change what was learned, or only what stopped it."""


class Prepared(Protocol):
    """A micro-batch ready for the device; ChatBatch-like."""

    def pin_memory(self) -> Prepared: ...

    def to(self, device: torch.device, non_blocking: bool = False) -> Prepared: ...


class Stage(Protocol):
    """A kind of training: it holds a model and its data, and turns a batch into named sums of losses."""

    coefficients: Mapping[str, float]
    """Loss name -> its factor in the total."""
    joint: bool
    """A micro-batch is one over all ranks, of which `batches` gives this rank's rows; else each is one rank's alone."""

    def begin(self, run: RunConfig, device: torch.device) -> Learner:
        """The model on the device, with what learns chosen; on several ranks the host, from where it is sharded."""

    def batches(self) -> Generator[Any, None, None]:
        """Endless micro-batches on the host, from the cursor on; closing it ends the worker processes.

        Unless `joint`, the same order on every rank: `feed.py` deals, and None may stand for another rank's batch.
        """

    def cursor(self) -> dict[str, Any]:
        """Plain JSON: where the data stands after the batch that was yielded last."""

    def seek(self, cursor: Mapping[str, Any]) -> None: ...

    def batches_per_epoch(self) -> int: ...

    def prepare(self, batch: Any) -> Prepared:
        """Host work; runs in a thread ahead of the step, so it draws no random number."""

    def weights(self, batch: Any) -> Mapping[str, float]:
        """Loss name -> sum of weights of this batch, known before the model runs."""

    def losses(self, prepared: Any) -> Mapping[str, Float[Tensor, ""]]:
        """Loss name -> weighted sum over a batch; the loop divides by the weights of the whole window of all ranks.

        On several ranks every part runs and stays in the graph, whatever the batch holds.
        """

    def sizes(self, batch: Any) -> Mapping[str, int]:
        """Counts of a batch: samples, tokens, learned, tiles."""

    def describe(self, batch: Any) -> str:
        """Names the samples of a batch, for error messages."""

    def lost(self) -> tuple[int, Mapping[str, str]]:
        """How many samples were cut so far; file and line of each record left out, and why."""

    def evaluate(self, device: torch.device) -> Mapping[str, float]:
        """Numbers on held-out records; none where there are none."""

    def export(self, learner: Learner, out: Path) -> None:
        """Write folders below `out`: the trained model, and what learned beside it."""


@runtime_checkable
class NamesWorst(Protocol):
    """A stage that knows the sizes of its micro-batches before it makes them."""

    def worst(self) -> Any:
        """The micro-batch of this epoch that takes the most memory; the cursor stays."""


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
    }
    for name, value in positive.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}; it must be above 0")
    if not 0 <= run.data.max_rejected <= 1:
        raise ValueError(f"data.max_rejected is {run.data.max_rejected}; it is a share of the records, 0 to 1")
    if not 0 <= run.data.max_rejected <= 1:
        raise ValueError(f"data.max_rejected is {run.data.max_rejected}; it is a share of the records, 0 to 1")
    _check_watch(run)
    for name in PARTS:
        _check_part(run, name)
    if run.connector.learn == "lora":
        raise ValueError("connector.learn is 'lora'; the connector is small: use full or frozen")


def _check_watch(run: RunConfig) -> None:
    if not 0 <= run.watch.ema < 1:
        raise ValueError(f"watch.ema is {run.watch.ema}; a decay lies in [0, 1): 0 for none, or such as 0.999")
    if run.export == "ema" and not run.watch.ema:
        raise ValueError("export is 'ema' but watch.ema is 0; set --watch.ema 0.999, or export the last or the best")


def _check_part(run: RunConfig, name: str) -> None:
    part = run.part(name)
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
