"""Samples per second of one training step of `pocket` (random weights, random records, nothing read from disk).

    python benchmarks/train_throughput.py --batch 256 --steps 30 [--compile] [--how lora|connector|full] [--device cpu]

Prints one line: samples/s, tokens/s, ms a step (median), peak memory, and the share of the matrix-product rate that
the same machine reaches on a large square product in the same run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import torch

from internvl.batch import ChatBatch
from internvl.models.build import build
from internvl.tokens import IGNORE_INDEX, SPECIAL_TOKENS
from internvl.train import optim, trainable
from internvl.train.feed import Feed
from internvl.train.loop import Trainer
from internvl.train.process import choose_device
from internvl.train.recipes import pocket
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Part, Schedule, Tokens
from internvl.train.stages.sft import Sft
from internvl.zoo import CHAT

FIRST_NEW = 49152
TEXT, LEARNED = 46, 22
"""Text positions of a record beside its 64 image positions, and those that are learned (110 in all)."""


class Words:
    """As much of a tokenizer as the stage asks for."""

    def get_vocab(self) -> dict[str, int]:
        return {token: FIRST_NEW + index for index, token in enumerate(SPECIAL_TOKENS)}

    def convert_tokens_to_ids(self, token: str) -> int:
        return self.get_vocab()[token]


class RandomRecords:
    """Batches of one picture of one tile each."""

    def __init__(self, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        length = 64 + TEXT
        ids = torch.randint(10, 49000, (batch, length), generator=generator)
        ids[:, 4:68] = FIRST_NEW + 2
        labels = torch.full_like(ids, IGNORE_INDEX)
        labels[:, -LEARNED:] = ids[:, -LEARNED:]
        self.batch = ChatBatch(
            input_ids=ids,
            labels=labels,
            loss_weights=(labels != IGNORE_INDEX).float(),
            position_ids=torch.arange(length).expand(batch, -1).contiguous(),
            tiles=torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8, generator=generator),
            attention_mask=torch.ones(batch, length, dtype=torch.bool),
            num_samples=batch,
        )

    def __iter__(self) -> Iterator[ChatBatch]:
        while True:
            yield self.batch

    def __len__(self) -> int:
        return 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def describe(self, batch: ChatBatch) -> str:
        return "random records"


def configure(options: argparse.Namespace, out: str) -> RunConfig:
    how = {
        "connector": {"vision": Part(), "language": Part(), "tokens": Tokens(learn=True)},
        "lora": {"vision": Part("lora", rank=64), "language": Part("lora", rank=32), "tokens": Tokens(learn=True)},
        "full": {"vision": Part("full"), "language": Part("full")},
    }[options.how]
    return RunConfig(
        out=out,
        connector=Part("full"),
        data=Data(batch_samples=options.batch),
        schedule=Schedule(steps=10**6),
        optimiser=pocket.pocket_sft().optimiser,
        precision=options.precision,
        compile=options.compile,
        grad_checkpoint=options.checkpoint,
        device=options.device,
        **how,
    )


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a square product."""
    side = 8192 if device.type == "cuda" else 1024
    a = torch.randn(side, side, device=device, dtype=dtype)
    times = []
    for _ in range(8):
        synchronize(device)
        began = time.perf_counter()
        _ = a @ a
        synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * side**3 / statistics.median(times)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--how", choices=["connector", "lora", "full"], default="lora")
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--checkpoint", action="store_true")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory() as out:
        run = configure(options, out)
        model = build(CHAT["pocket"])
        model.image_token_id = FIRST_NEW + 2
        stage = Sft(run, model, Words(), RandomRecords(options.batch), None)  # type: ignore[arg-type]
        trainer = Trainer(run, stage, (), None)
        trainer.learner.train_mode()
        times = []
        with Feed(stage, device) as feed:
            for _ in range(options.steps + 5):
                began = time.perf_counter()
                trainer._advance(feed, 0.0)
                synchronize(device)
                times.append(time.perf_counter() - began)
        step = statistics.median(times[5:])
        trainer._check_finite()
    rate = matrix_rate(device, torch.bfloat16 if run.precision == "bf16" else torch.float32)
    # 2 operations a weight forward and 2 backward; 2 more where the weight itself learns
    per_weight = 6 if options.how == "full" else 4
    decoder = sum(p.numel() for p in model.language.model.model.layers.parameters()) * (64 + TEXT)
    vision = sum(p.numel() for p in model.vision.layers.parameters()) * 257
    head = 49161 * 576 * LEARNED
    seen = 2 if options.how == "connector" else per_weight
    work = options.batch * (per_weight * (decoder + head) + seen * vision)
    line = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "how": options.how,
        "precision": options.precision,
        "compile": options.compile,
        "batch": options.batch,
        "ms_a_step": round(1000 * step, 1),
        "samples_per_s": round(options.batch / step, 1),
        "tokens_per_s": round(options.batch * (64 + TEXT) / step),
        "matrix_share": round(work / step / rate, 3),
        "peak_mb": round(torch.cuda.max_memory_allocated(device) / 2**20) if device.type == "cuda" else None,
        "learned": sum(p.numel() for p in trainer.learner.parameters.values()),
        "groups": len(trainable.groups(trainer.learner)),
        "lr": optim.lr_factor(run, 10, 10**6),
    }
    print(json.dumps(line))


if __name__ == "__main__":
    main()
