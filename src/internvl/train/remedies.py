"""Changes to a run that take less memory, the cheapest first: what each costs, and how it is made. No tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from internvl.train.run import RunConfig
from internvl.train.settings import DUAL_STAGES, Part

Transform = Callable[[RunConfig], RunConfig]
PASSING = frozenset(("micro-batches", "--pairs.micro-batch", "--grad-checkpoint", "--data.max-tiles"))
"""Kinds of changes that touch what passes through a step, not what stays."""


def singles(run: RunConfig) -> Iterator[tuple[str, str, Transform]]:
    """(what, at which price, how), cheapest first."""
    if run.stage in DUAL_STAGES:
        yield from _pieces(run)
    for parts in (2, 4, 8, 16, 32, 64) if run.stage not in DUAL_STAGES else ():
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
    while most > 1 and run.stage in ("sft", "distill"):
        most = most // 2
        yield f"--data.max-tiles {most}", "fewer details of pictures; faster", partial(_tiles, most)
    if run.vision.learn != "frozen" and run.stage != "distill":
        yield "--vision.learn frozen", "the ViT stays", lambda r: replace(r, vision=Part(drop_path=r.vision.drop_path))
    if run.language.learn == "full":
        yield "--language.learn lora", "adapters in place of full weights", lambda r: replace(r, language=Part("lora"))


def _pieces(run: RunConfig) -> Iterator[tuple[str, str, Transform]]:
    """Fewer pairs or texts embedded at a time."""
    size = run.pairs.micro_batch or run.data.batch_samples or 16
    while size > 1:
        size = -(-size // 2)
        yield f"--pairs.micro-batch {size}", "the same learning, one more forward pass", partial(_piece, size)


def _piece(size: int, run: RunConfig) -> RunConfig:
    return replace(run, pairs=replace(run.pairs, micro_batch=size))


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


def both(first: Transform, second: Transform, run: RunConfig) -> RunConfig:
    return second(first(run))


def kind(single: tuple[str, str, Transform] | str) -> str:
    """Its first word: micro-batches, or the field."""
    return (single if isinstance(single, str) else single[0]).split()[0]
