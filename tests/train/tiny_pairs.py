"""A tiny dual model, pairs, and runs on them: what the laws of the stages on pairs are tested on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from internvl.train.recipes import v1_0
from internvl.train.run import RunConfig
from internvl.train.settings import Part, Schedule
from internvl.train.stages import open_stage


def write_inputs(folder: Path) -> Path:
    """The model and the pairs of the tiny recipes; held-out pictures have other shades."""
    v1_0.write_tiny_model(folder / "model")
    v1_0.write_tiny_pairs(folder / "pairs.jsonl")
    v1_0.write_tiny_pairs(folder / "held_out.jsonl", 9)
    return folder


def contrastive(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    run = v1_0.tiny_contrastive()
    data = replace(run.data, meta=str(inputs / "pairs.jsonl"), held_out="", batch_samples=8)
    settings: dict[str, Any] = {"schedule": Schedule(steps=6), "save_every": 2, "eval_every": 0, "log_every": 1}
    base = {"out": str(out), "model": str(inputs / "model"), "data": data, "device": "cpu"}
    return replace(run, **{**base, **settings, **changes})


def generative(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    run, pairs = contrastive(inputs, out), v1_0.tiny_generative().pairs
    return replace(run, **{"stage": "generative", "vision": Part(), "language": Part(), "pairs": pairs, **changes})


def learned(run: RunConfig, step: int = 6) -> dict[str, Tensor]:
    return load_file(Path(run.out) / "checkpoints" / f"step-{step:08d}" / "learned.safetensors")


def loss_and_gradients(run: RunConfig, seed: int = 0) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the first batch, from a given state of the generator."""
    stage: Any = open_stage(run)
    learner = stage.begin(run, torch.device("cpu"))
    learner.train_mode()
    batches = stage.batches()
    batch = stage.prepare(next(batches))
    torch.manual_seed(seed)
    losses = {name: value / stage.weights(batch)[name] for name, value in stage.losses(batch).items()}
    sum(losses.values()).backward()  # type: ignore[union-attr]
    grads = {name: p.grad for name, p in learner.parameters.items() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


def held_out(run: RunConfig) -> dict[str, float]:
    """What the untrained model scores on the held-out pairs."""
    stage: Any = open_stage(run)
    stage.begin(run, torch.device("cpu"))
    with torch.no_grad():
        return stage.evaluate(torch.device("cpu"))


def assert_alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, expected in b.items():
        assert_close(a[name], expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()), msg=name)
