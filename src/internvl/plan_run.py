"""A training run before it starts: memory of its worst step, tokens, tiles, steps, idle share, time, what would fit.

From the recipe, the model's configuration, and texts and headers of media; memory is rehearsed (train/rehearse.py),
time needs a measured rate. Memory of inference is plan.py's.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from internvl.config import ChatConfig, DualConfig
from internvl.convert.dual import from_official
from internvl.convert.files import read_json
from internvl.convert.layouts import read_config
from internvl.data.loader import BatchSize
from internvl.generate.opening import is_dual_name
from internvl.load import read_tokenizer
from internvl.locate import locate
from internvl.train import remedies
from internvl.train.alive import Memory
from internvl.train.outlook import ChatOutlook, Outlook
from internvl.train.outlook_pairs import PairOutlook
from internvl.train.outlook_pictures import AlignOutlook, DistillOutlook
from internvl.train.outlook_texts import TextOutlook
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.run import RunConfig
from internvl.train.settings import DUAL_STAGES
from internvl.train.trials import check_size
from internvl.zoo import CHAT, DUAL, RELEASED

PLANNED = ("sft", "align", "distill", *DUAL_STAGES)
GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
BYTES_NOTE = (
    "the model's tokenizer is not here: texts count a position a byte, several times what they take; give --set "
    "model=FOLDER for the real count"
)


@dataclass(frozen=True)
class Subject:
    """What is planned: the run with the shape and the tokenizer of its model."""

    run: RunConfig
    config: ChatConfig | DualConfig
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
    if run.stage not in PLANNED:
        raise ValueError(f"stage {run.stage!r}; `internvl plan` knows runs of the stages {', '.join(PLANNED)}")
    if run.stage in DUAL_STAGES or (run.stage == "distill" and _names_dual(run.model)):
        return _dual_subject(run)
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


def _names_dual(model: str) -> bool:
    """Whether it is InternVL-C or -G; a run of `pocket-dual` is known by its name before it has left anything."""
    return is_dual_name(model) or ("pocket-dual" in model.replace("_", "-") and not Path(model).exists())


def _dual_subject(run: RunConfig) -> Subject:
    """Of a dual model; where its folder is not here, the release of that size, or `pocket-dual`."""
    if run.model in DUAL and run.model != "pocket-dual":
        return _with_bytes(run, DUAL[run.model])
    folder = Path(run.model)
    if not (folder / "config.json").is_file():
        if "pocket-dual" not in run.model.replace("_", "-"):
            return _with_bytes(run, DUAL["InternVL-14B-224px"])
        folder = locate("pocket-dual")
    config = from_official(read_json(folder / "config.json"), folder / "config.json")
    tokenizer = read_tokenizer(folder, config.language)
    return Subject(run, config, tokenizer) if tokenizer is not None else _with_bytes(run, config)


def open_outlook(subject: Subject, gpus: int = 1) -> Outlook:
    """What the subject's stage has before it, on so many devices."""
    run, config, tokenizer = subject.run, subject.config, subject.tokenizer
    if run.stage == "distill":
        return DistillOutlook(run, config)
    if isinstance(config, DualConfig):
        return (TextOutlook if run.stage == "text" else PairOutlook)(run, config, tokenizer, gpus)
    return (ChatOutlook if run.stage == "sft" else AlignOutlook)(run, config, tokenizer)


def plan_run(subject: Subject, gpus: int = 1, device: str = "cuda") -> RunPlan:
    """Everything but time."""
    if gpus < 1:
        raise ValueError(f"{gpus} GPUs; at least one is needed")
    run, outlook = subject.run, open_outlook(subject, gpus)
    sizes, work, worst = outlook.sizes(), outlook.work(), outlook.worst()
    window = run.accumulate if outlook.joint else max(run.accumulate, gpus)  # every device has one at least
    steps_of = ([w / gpus] * gpus for w in work) if outlook.joint else _steps(work, window, gpus)
    slowest = [max(step) for step in steps_of]
    schedule = run.schedule
    steps = schedule.steps or math.ceil((schedule.epochs or 1) * len(sizes) / window)
    return RunPlan(
        memory=outlook.memory(device),
        worst=worst.size,
        worst_learned=worst.learned,
        worst_sources=worst.sources,
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


def changes(
    subject: Subject, limit: int, gpus: int = 1, device: str = "cuda", most: int = 3, memory: Memory | None = None
) -> list[Change]:
    """The cheapest changes that make the worst step fit into `limit` bytes a device; `memory` is that of the run as it
    is, where it is known.

    First those that leave what is learned as it is, then those that do not, then two of them together, each as far as
    it goes.
    """
    found: list[Change] = []
    singles = list(remedies.singles(subject.run))
    strongest = list({remedies.kind(single): single for single in singles}.values())
    pairs = [
        (f"{first[0]}, and {second[0]}", f"{first[1]}; {second[1]}", partial(remedies.both, first[2], second[2]))
        for place, first in enumerate(strongest)
        for second in strongest[place + 1 :]
    ]
    # neither smaller batches nor recomputing get below weights, moments and gradients
    memory = memory or _memory(subject, device, gpus)
    hopeless = (
        memory is None or replace(memory, peak=memory.floor, peak_gradients=memory.gradients).on_gpus(gpus) > limit
    )

    @cache
    def need(change: remedies.Transform) -> int | None:
        """Bytes on the fullest device; None where no batch can be made."""
        changed = _memory(replace(subject, run=change(subject.run)), device, gpus)
        return None if changed is None else changed.on_gpus(gpus)

    def is_vain(kind: str) -> bool:
        """Whether a kind of change does not suffice by itself even as far as it goes."""
        least = next((need(change) for words, _, change in strongest if remedies.kind(words) == kind), None)
        return least is not None and least > limit

    settled: set[str] = set()
    tried: list[tuple[str, str, remedies.Transform]] = [*singles, *pairs]
    for words, price, change in tried:
        kinds = {remedies.kind(part) for part in words.split(", and ")}
        if len(found) >= most or kinds & settled or (hopeless and kinds <= remedies.PASSING):
            continue
        if len(kinds) == 1 and is_vain(*kinds):
            continue
        bytes_needed = need(change)
        if bytes_needed is not None and bytes_needed <= limit:
            found.append(Change(words, price, bytes_needed))
            settled |= kinds if len(kinds) == 1 else set()
    return found


def more_gpus(memory: Memory, limit: int, gpus: int) -> Change | None:
    """The fewest devices that share weights, gradients and moments so that each has room."""
    for number in GPUS:
        if number > gpus and memory.on_gpus(number) <= limit:
            return Change(f"{number} GPUs that share the weights", "more devices", memory.on_gpus(number))
    return None


def calibrate(subject: Subject, gpus: int = 1) -> float:
    """Operations a second of this machine, from passes over a middling micro-batch with random weights."""
    run = subject.run
    check_size(subject.config.num_parameters)
    device = torch.device("cuda" if torch.cuda.is_available() and run.device != "cpu" else "cpu")
    losses, operations = open_outlook(subject, gpus).trial(device)
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
            total = torch.stack(list(losses().values())).sum()
        total.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return operations / statistics.median(seconds[1:])


def _steps(work: list[float], window: int, gpus: int) -> Iterator[list[float]]:
    """Operations of each device in each step: its micro-batches, dealt in turns."""
    for first in range(0, len(work), window):
        step = work[first : first + window]
        yield [sum(step[rank::gpus]) for rank in range(gpus)]


def _memory(subject: Subject, device: str, gpus: int) -> Memory | None:
    """Of the worst step; None where no sample fits into such a batch."""
    try:
        return open_outlook(subject, gpus).memory(device)
    except ValueError:
        return None


def _with_bytes(run: RunConfig, config: ChatConfig | DualConfig) -> Subject:
    """A tokenizer of bytes where the model has none here."""
    tokenizer = byte_tokenizer()
    rows = max(config.language.vocab_size, len(tokenizer))
    settings = {**config.language.settings, "vocab_size": rows}
    return Subject(run, replace(config, language=replace(config.language, settings=settings)), tokenizer, (BYTES_NOTE,))
