"""Losses and gradients that are not numbers: which step, which samples, and the first module where it shows."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvl.parallel import collectives
from internvl.parallel.shard import local
from internvl.train.checkpoint import replace_text
from internvl.train.feed import Item

Locate = Callable[[Sequence[Item]], Sequence[str]]
"""Runs the micro-batches of a step again and says where numbers end."""


@dataclass(frozen=True)
class Step:
    """What one step left on the device, not read yet."""

    number: int
    losses: Mapping[str, Tensor]
    """This rank's shares; their sum over ranks is the loss."""
    norm: Tensor
    names: str
    window: tuple[Item, ...] = ()
    """Kept until the step is checked, to be run again."""


class Guard:
    """The steps since the last logged line."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._steps: list[Step] = []
        self._values: dict[int, list[float]] = {}

    def add(self, step: Step) -> None:
        self._steps.append(step)

    def __len__(self) -> int:
        return len(self._steps)

    def check(self, locate: Locate) -> None:
        """Name the first step since the last look whose loss or gradient is not a number. Every rank calls it."""
        unchecked = [step for step in self._steps if step.number not in self._values]
        if not unchecked:
            return
        losses = collectives.total(torch.stack([torch.stack([*step.losses.values()]) for step in unchecked]))
        norms = torch.stack([step.norm.to(losses) for step in unchecked])
        rows = torch.cat([losses, norms[:, None]], dim=1).tolist()  # one copy from the device
        for step, row in zip(unchecked, rows, strict=True):
            bad = [
                f"{n} is {x}" for n, x in zip([*step.losses, "gradient norm"], row, strict=True) if not math.isfinite(x)
            ]
            if bad:
                raise ValueError(self._sentence(step, bad, locate(step.window)))
            self._values[step.number] = row
        self._steps = [replace(step, window=()) for step in self._steps]

    def take(self) -> tuple[dict[str, float], float]:
        """Mean loss by name over the checked steps, and the last norm; begins anew."""
        rows = [self._values[step.number] for step in self._steps]
        means = {name: sum(row[i] for row in rows) / len(rows) for i, name in enumerate(self._steps[0].losses)}
        self._steps, self._values = [], {}
        return means, rows[-1][-1]

    def _sentence(self, step: Step, bad: Sequence[str], where: Sequence[str]) -> str:
        suffix = "" if collectives.is_lead() else f"-{collectives.rank()}"
        listing = self._out / f"not_finite{suffix}.txt"
        replace_text(listing, "\n".join([*where, *step.names.replace("; ", ", ").split(", ")]) + "\n")
        return (
            f"step {step.number}: {', '.join(bad)}; {where[0] if where else 'not seen again on a second pass'}; "
            f"samples: {textwrap.shorten(step.names, 300)} (all in {listing}); the latest checkpoint is from before: "
            "lower optimiser.peak_lr, or look at these samples"
        )


def locate(model: nn.Module, window: Sequence[Item], backward: Callable[[Item], None]) -> list[str]:
    """Run each micro-batch forward and backward; the first module of each whose output or gradient is not finite."""
    wrong = [name for name, p in model.named_parameters() if not bool(local(p.detach()).isfinite().all())]
    if wrong:
        return [f"the weights are not finite already, first {wrong[0]}"]
    found = []
    for item in window:
        with watched(model) as seen:
            backward(item)
        found += [f"first in {seen[0]} with {item.names}"] if seen else []
    return found


@contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Inside, modules whose output, or the gradient of it, is not finite are named in the order they are met."""
    seen: list[str] = []

    def note(what: str, value: Tensor) -> None:
        if not bool(value.detach().isfinite().all()):
            seen.append(what)

    def forward(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                note(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(note, f"the gradient at the output of {name}"))

    hooks = [m.register_forward_hook(partial(forward, name)) for name, m in model.named_modules() if name]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
