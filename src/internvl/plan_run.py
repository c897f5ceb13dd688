"""A training run before it starts: memory of its worst step, tokens, tiles, steps, idle share, time, what would fit.

From the recipe, the model's configuration, and texts and headers of media; memory is rehearsed (train/rehearse.py),
time needs a measured rate. Memory of inference is plan.py's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from internvl.config import ChatConfig
from internvl.convert.layouts import read_config
from internvl.data.loader import BatchSize, Loader
from internvl.load import read_tokenizer
from internvl.locate import locate
from internvl.models.build import build
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import cost
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.rehearse import Memory, rehearse
from internvl.train.run import RunConfig
from internvl.train.settings import Part
from internvl.train.stages.sft import LOSS, Sft, open_loader
from internvl.zoo import CHAT, RELEASED

Transform = Callable[[RunConfig], RunConfig]
PASSING = frozenset(("micro-batches", "--grad-checkpoint", "--data.max-tiles"))
"""Kinds of changes that touch what passes through a step, not what stays."""
GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
LARGEST_CALIBRATED = 1_000_000_000
"""Parameters of a model that is built for real to measure a rate."""
BYTES_NOTE = (
    "the model's tokenizer is not here: texts count a position a byte, several times what they take; give --set "
    "model=FOLDER for the real count"
)


@dataclass(frozen=True)
class Subject:
    """What is planned: the run with the shape and the tokenizer of its model."""

    run: RunConfig
    config: ChatConfig
    tokenizer: Any
    notes: tuple[str, ...] = ()
    """What was assumed."""


@dataclass(frozen=True)
class RunPlan:
    """The run, in numbers; memory in bytes, on each device."""

    memory: Memory
    worst: BatchSize
    worst_learned: int
    worst_sources: tuple[str, ...]
    micro_batches: int
    """Of an epoch."""
    samples: int
    tokens: int
    positions: int
    tiles: int
    steps: int
    steps_per_epoch: int
    idle: float
    """Share of the devices' time in which they wait for the slowest one of a step, by operations."""
    operations: float
    """Of an epoch, all devices together."""
    slowest: float
    """Of an epoch, by the slowest device of each step."""

    @property
    def padding(self) -> float:
        return 1 - self.tokens / self.positions

    def seconds(self, rate: float) -> float:
        """Of the whole run, at `rate` operations a second on each device."""
        return self.slowest / rate * self.steps / self.steps_per_epoch


@dataclass(frozen=True)
class Change:
    """One or two changes that together make it fit."""

    words: str
    price: str
    need: int
    """Bytes on the fullest device."""


def subject(run: RunConfig, release: str = "") -> Subject:
    """Configuration and tokenizer of the run's model, from its folder where it is there."""
    if run.stage != "sft":
        raise ValueError(f"stage {run.stage!r}; `internvl plan` knows runs of stage 'sft'")
    if run.model in CHAT and run.model != "pocket":
        return _with_bytes(run, CHAT[run.model])
    folder = Path(run.model)
    if not (folder / "config.json").is_file():
        if release:
            return _with_bytes(run, RELEASED[release].config)
        folder = locate("pocket" if run.model.startswith("runs/pocket") else run.model)
    config = read_config(folder)
    tokenizer = read_tokenizer(folder, config.language)
    return Subject(run, config, tokenizer) if tokenizer is not None else _with_bytes(run, config)


def plan_run(subject: Subject, gpus: int = 1, device: str = "cuda") -> RunPlan:
    """Everything but time. The worst micro-batch is made for real: labels decide where logits exist."""
    if gpus < 1:
        raise ValueError(f"{gpus} GPUs; at least one is needed")
    run, config = subject.run, subject.config
    loader = _loader(subject)
    sizes = loader.sizes()
    heaviest = cost.heaviest(run, config, sizes)
    batch = loader.make(heaviest)
    share = batch.num_learned / sizes[heaviest].tokens
    work = [cost.operations(run, config, size, round(share * size.tokens)) for size in sizes]
    window = max(run.accumulate, gpus)  # micro-batches of a step; every device has one at least
    slowest = [max(step) for step in _steps(work, window, gpus)]
    schedule = run.schedule
    steps = schedule.steps or math.ceil((schedule.epochs or 1) * len(sizes) / window)
    return RunPlan(
        memory=rehearse(run, config, subject.tokenizer, batch, device),
        worst=sizes[heaviest],
        worst_learned=batch.num_learned,
        worst_sources=batch.sources,
        micro_batches=len(sizes),
        samples=sum(size.samples for size in sizes),
        tokens=sum(size.tokens for size in sizes),
        positions=sum(size.positions for size in sizes),
        tiles=sum(size.tiles for size in sizes),
        steps=max(1, steps),
        steps_per_epoch=math.ceil(len(sizes) / window),
        idle=1 - sum(work) / (gpus * sum(slowest)),
        operations=sum(work),
        slowest=sum(slowest),
    )


def changes(subject: Subject, limit: int, gpus: int = 1, device: str = "cuda", most: int = 3) -> list[Change]:
    """The cheapest changes that make the worst step fit into `limit` bytes a device.

    First those that leave what is learned as it is, then those that do not, then two of them together, each as far as
    it goes.
    """
    found: list[Change] = []
    singles = list(_singles(subject.run))
    strongest = list({_kind(single): single for single in singles}.values())
    pairs = [
        (f"{first[0]}, and {second[0]}", f"{first[1]}; {second[1]}", partial(_both, first[2], second[2]))
        for place, first in enumerate(strongest)
        for second in strongest[place + 1 :]
    ]
    # neither smaller batches nor recomputing get below weights, moments and gradients
    memory = _memory(subject, device)
    hopeless = (
        memory is None or replace(memory, peak=memory.floor, peak_gradients=memory.gradients).on_gpus(gpus) > limit
    )
    settled: set[str] = set()
    tried: list[tuple[str, str, Transform]] = [*singles, *pairs]
    for words, price, change in tried:
        kinds = {_kind(part) for part in words.split(", and ")}
        if len(found) >= most or kinds & settled or (hopeless and kinds <= PASSING):
            continue
        changed = _memory(replace(subject, run=change(subject.run)), device)
        if changed is not None and changed.on_gpus(gpus) <= limit:
            found.append(Change(words, price, changed.on_gpus(gpus)))
            settled |= kinds if len(kinds) == 1 else set()
    return found


def _kind(single: tuple[str, str, Transform] | str) -> str:
    """Its first word: micro-batches, or the field."""
    return (single if isinstance(single, str) else single[0]).split()[0]


def more_gpus(memory: Memory, limit: int, gpus: int) -> Change | None:
    """The fewest devices that share weights, gradients and moments so that each has room."""
    for number in GPUS:
        if number > gpus and memory.on_gpus(number) <= limit:
            return Change(f"{number} GPUs that share the weights", "more devices", memory.on_gpus(number))
    return None


def calibrate(subject: Subject) -> float:
    """Operations a second of this machine, from two passes over a middling micro-batch with random weights."""
    run, config = subject.run, subject.config
    if config.num_parameters > LARGEST_CALIBRATED:
        raise ValueError(
            f"a model of {config.num_parameters / 1e9:.1f} billion parameters is not built to be timed; give --rate, "
            "in 10^12 operations a second, as a run of yours reached it"
        )
    loader = _loader(subject)
    sizes = loader.sizes()
    order = sorted(range(len(sizes)), key=lambda number: cost.operations(run, config, sizes[number], 0))
    chosen = order[len(order) // 2]
    batch = loader.make(chosen)
    model = build(config)
    model.image_token_id = token_id(subject.tokenizer, SPECIAL_TOKENS[2])
    run = replace(run, compile=False, data=replace(run.data, features="none"))
    stage = Sft(run, model, subject.tokenizer, loader, None)
    device = torch.device("cuda" if torch.cuda.is_available() and run.device != "cpu" else "cpu")
    learner = stage.begin(run, device)
    learner.train_mode()
    prepared = stage.prepare(batch).to(device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            loss = stage.losses(prepared)[LOSS]
        loss.backward()
        seconds.append(time.perf_counter() - began)
    return cost.operations(run, config, sizes[chosen], batch.num_learned) / statistics.median(seconds[1:])


def _loader(subject: Subject) -> Loader:
    return open_loader(subject.run, subject.tokenizer, subject.config, subject.run.data.meta, learning=True)


def _steps(work: list[float], window: int, gpus: int) -> Iterator[list[float]]:
    """Operations of each device in each step: its micro-batches, dealt in turns."""
    for first in range(0, len(work), window):
        step = work[first : first + window]
        yield [sum(step[rank::gpus]) for rank in range(gpus)]


def _memory(subject: Subject, device: str) -> Memory | None:
    """Of the worst step; None where no sample fits into such a batch."""
    try:
        loader = _loader(subject)
        batch = loader.make(cost.heaviest(subject.run, subject.config, loader.sizes()))
    except ValueError:
        return None
    return rehearse(subject.run, subject.config, subject.tokenizer, batch, device)


def _singles(run: RunConfig) -> Iterator[tuple[str, str, Transform]]:
    """(what, at which price, how), cheapest first."""
    for parts in (2, 4, 8, 16, 32, 64):
        samples, tokens = run.data.batch_samples, run.data.batch_tokens
        if (samples is None or samples >= parts) and (tokens is None or tokens >= 64 * parts):
            words = f"micro-batches of a {parts}th, accumulate {run.accumulate * parts}"
            yield words.replace("2th", "half").replace("a half", "half"), "the same learning", partial(_split, parts)
    if not run.grad_checkpoint:
        yield (
            "--grad-checkpoint",
            "the same learning, about a third more time",
            lambda r: replace(r, grad_checkpoint=True),
        )
    if run.precision == "fp32":
        yield "--precision bf16", "rounded products; faster on most devices", lambda r: replace(r, precision="bf16")
    most = run.data.max_tiles or 12
    while most > 1:
        most = most // 2
        yield f"--data.max-tiles {most}", "fewer details of pictures; faster", partial(_tiles, most)
    if run.vision.learn != "frozen":
        yield "--vision.learn frozen", "the ViT stays", lambda r: replace(r, vision=Part(drop_path=r.vision.drop_path))
    if run.language.learn == "full":
        yield "--language.learn lora", "adapters in place of full weights", lambda r: replace(r, language=Part("lora"))


def _split(parts: int, run: RunConfig) -> RunConfig:
    data = run.data
    smaller: dict[str, Any] = {
        name: None if value is None else max(1, value // parts)
        for name in ("batch_samples", "batch_tokens", "batch_tiles")
        for value in (getattr(data, name),)
    }
    return replace(run, data=replace(data, **smaller), accumulate=run.accumulate * parts)


def _tiles(most: int, run: RunConfig) -> RunConfig:
    return replace(run, data=replace(run.data, max_tiles=most))


def _both(first: Transform, second: Transform, run: RunConfig) -> RunConfig:
    return second(first(run))


def _with_bytes(run: RunConfig, config: ChatConfig) -> Subject:
    """A tokenizer of bytes where the model has none here."""
    tokenizer = byte_tokenizer()
    rows = max(config.language.vocab_size, len(tokenizer))
    settings = {**config.language.settings, "vocab_size": rows}
    return Subject(run, replace(config, language=replace(config.language, settings=settings)), tokenizer, (BYTES_NOTE,))
