"""`internvl plan` against the allocator: peak memory of a training step, rehearsed and measured on this machine.

    python benchmarks/plan.py [--models tiny pocket] [--out FILE]

Measured: a real step with random weights after one that made AdamW's moments; what torch's CPU allocator handed out and
took back is summed over time by the profiler, beside what was held before. Neither side knows of the other.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from internvl.batch import ChatBatch
from internvl.config import ChatConfig
from internvl.models.build import build
from internvl.tokens import IGNORE_INDEX, SPECIAL_TOKENS, token_id
from internvl.train import optim, trainable
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.rehearse import rehearse
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Part, Schedule, Tokens
from internvl.train.stages import open_stage
from internvl.train.stages.sft import Sft
from internvl.train.trainable import Learner
from internvl.zoo import CHAT

FULL = {"vision": Part("full"), "connector": Part("full"), "language": Part("full")}
LORA = {"vision": Part("lora", rank=16), "connector": Part("full"), "language": Part("lora", rank=16)}
CONNECTOR = {"connector": Part("full"), "tokens": Tokens(learn=True)}
CASES: dict[str, dict[str, Any]] = {
    "full": FULL,
    "full, checkpointing": {**FULL, "grad_checkpoint": True},
    "full, bf16": {**FULL, "precision": "bf16"},
    "full, bf16, checkpointing, two micro-batches": {
        **FULL, "precision": "bf16", "grad_checkpoint": True, "accumulate": 2
    },
    "adapters": LORA,
    "adapters, bf16, checkpointing": {**LORA, "precision": "bf16", "grad_checkpoint": True},
    "connector": CONNECTOR,
}  # fmt: skip


def grown(config: ChatConfig) -> ChatConfig:
    """With room for the byte-level tokenizer's words."""
    rows = max(config.language.vocab_size, len(byte_tokenizer()))
    return replace(config, language=replace(config.language, settings={**config.language.settings, "vocab_size": rows}))


def batch_of(config: ChatConfig, rows: int, text: int, tiles: int, learned: int, packed: bool = False) -> ChatBatch:
    """Rows of `tiles` tiles and `text` other positions each; packed: the same rows one after another."""
    seen = tiles * config.tokens_per_tile
    ids = torch.full((rows, seen + text), 70)
    ids[:, 2 : 2 + seen] = token_id(byte_tokenizer(), SPECIAL_TOKENS[2])
    labels = torch.full_like(ids, IGNORE_INDEX)
    labels[:, -learned:] = 70
    places = torch.arange(seen + text).expand(rows, -1).contiguous()
    pixels = torch.zeros(rows * tiles, 3, config.tile_size, config.tile_size, dtype=torch.uint8)
    if packed:
        bounds = torch.arange(0, ids.numel() + 1, ids.shape[1], dtype=torch.int32)
        ids, labels, places = (x.reshape(1, -1) for x in (ids, labels, places))
        return ChatBatch(ids, labels, (labels > 0).float(), places, pixels, None, bounds, rows)
    return ChatBatch(ids, labels, (labels > 0).float(), places, pixels, torch.ones_like(ids).bool(), None, rows)


def measured(run: RunConfig, config: ChatConfig, batch: ChatBatch) -> int:
    """Bytes at the peak of a real step on the CPU."""
    model = build(config)
    model.image_token_id = token_id(byte_tokenizer(), SPECIAL_TOKENS[2])
    stage = Sft(run, model, byte_tokenizer(), None, None)  # type: ignore[arg-type]
    learner = stage.begin(run, torch.device("cpu"))
    learner.train_mode()
    prepared = stage.prepare(batch)
    return peak_of(run, learner, lambda: stage.losses(prepared), [*model.parameters(), *model.buffers()])


def peak_of(
    run: RunConfig, learner: Learner, losses: Callable[[], Mapping[str, Tensor]], held: Iterable[Tensor]
) -> int:
    """Bytes at the peak of a real step on the CPU, `held` and what learns among them."""
    optimizer = optim.build(trainable.groups(learner), run)

    def step() -> None:
        for _ in range(run.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=run.precision == "bf16"):
                loss = torch.stack([*losses().values()]).sum()
            loss.backward()
        torch.nn.utils.clip_grad_norm_(list(learner.parameters.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    known = [*held, *learner.parameters.values()]
    known += [value for state in optimizer.state.values() for value in state.values()]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in known}.values()) + max(_running(seen))


def measured_stage(run: RunConfig) -> tuple[int, Any, Any]:
    """Bytes at the peak of a step over the first batch of a run of another stage; the stage, and that batch."""
    stage: Any = open_stage(run)
    learner = stage.begin(run, torch.device("cpu"))
    learner.train_mode()
    batch = stage.prepare(next(stage.batches()))
    beside = [*stage.model.parameters(), *stage.model.buffers()]
    beside += [x for x in vars(batch).values() if isinstance(x, Tensor)]
    if run.stage == "distill":
        beside += [*stage.teacher.module.parameters()]
    if run.stage == "text":
        beside += [stage.targets, batch.texts.ids, batch.texts.mask]
    return peak_of(run, learner, lambda: stage.losses(batch), beside), stage, batch


def _running(seen: Any) -> Iterator[int]:
    """Bytes handed out so far, less those taken back, after every event of the allocator."""
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    total = 0
    yield total
    for event in sorted(events, key=lambda event: event.start_ns()):
        total += event.nbytes()
        yield total


def compare(config: ChatConfig, batch: ChatBatch, packed: bool, **changes: Any) -> tuple[int, int]:
    """(rehearsed, measured) bytes of one case."""
    settings = {"schedule": Schedule(steps=10), "data": Data(packed=packed), "device": "cpu", **changes}
    run = RunConfig(**settings)
    return rehearse(run, config, byte_tokenizer(), batch, "cpu").peak, measured(run, config, batch)


def main() -> None:
    import measure

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny", "pocket"], choices=["tiny", "pocket"])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for model in options.models:
        config = grown(CHAT["tiny-llama" if model == "tiny" else model])
        sizes = (4, 60, 4, 20) if model == "tiny" else (2, 60, 1, 30)
        cases = CASES if model == "tiny" else {k: v for k, v in CASES.items() if "two" not in k}
        for name, changes in cases.items():
            for packed in (False, True) if model == "tiny" else (False,):
                planned, found = compare(config, batch_of(config, *sizes, packed), packed, **changes)
                row = f"{model}, {name}{', packed' if packed else ''}"
                rows[row] = {"planned_mib": round(planned / 2**20, 2), "measured_mib": round(found / 2**20, 2)}
                rows[row]["ratio"] = round(planned / found, 4)
                print(
                    f"{row:<62}{rows[row]['planned_mib']:>10} {rows[row]['measured_mib']:>10} {rows[row]['ratio']:.3f}"
                )
    print(measure.write("plan", {"peaks": rows}, {"torch": torch.__version__}, options.out))


if __name__ == "__main__":
    main()
