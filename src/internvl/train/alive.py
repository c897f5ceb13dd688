"""Bytes alive while a step runs on tensors without memory (weightless.py): its peak, and what was there at each mark.

Marks are where a block of the model begins and where its gradient arrives; what they are for is depths.py's.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl.models.attention import sdpa_only
from internvl.train.run import RunConfig

Blocks = Sequence[tuple[nn.Module, tuple[Hashable, ...]]]
"""Modules, each with the names that its marks have: none, one or several."""


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the peak of a step, and what the step holds in all."""

    parameters: int
    """Weights as they are kept: what learns in fp32, what is frozen in the run's precision."""
    optimiser: int
    """Two moments a learned number, in fp32."""
    gradients: int
    """Of all that learns; between the micro-batches of a step they stay."""
    peak: int
    """Everything, at the worst moment."""
    peak_gradients: int
    """Gradients that are there at that moment: few at the end of a forward pass, all at the end of a step."""
    peak_logits: int
    """Tensors over the vocabulary at that moment."""
    learned: int
    """Numbers that learn."""
    largest_unit: int
    """Weights of the largest block: what full sharding gathers at a time."""

    @property
    def activations(self) -> int:
        """What else is alive at the peak, logits included: kept for the backward pass, or passing."""
        return self.peak - self.parameters - self.optimiser - self.peak_gradients

    @property
    def floor(self) -> int:
        """What a step holds at its end, whatever passed through it."""
        return self.parameters + self.optimiser + self.gradients

    def on_gpus(self, number: int) -> int:
        """Bytes on each of several devices that share weights, gradients and moments evenly (full sharding).

        Two units are whole at a time: the one that runs and the one that is fetched ahead.
        """
        if number == 1:
            return self.peak
        held = self.parameters + self.optimiser + self.peak_gradients
        return -(-held // number) + 2 * self.largest_unit + self.activations


class Peak(NamedTuple):
    """Bytes at the worst moment after a mark."""

    bytes: int
    gradients: int
    logits: int


@dataclass(frozen=True)
class Trace:
    """A step as it was rehearsed: what it holds, and the peak after each mark, in their order. Bytes, as in Memory."""

    parameters: int
    optimiser: int
    gradients: int
    learned: int
    largest_unit: int
    peaks: Mapping[Hashable, Peak]

    @property
    def memory(self) -> Memory:
        # at the end of a step every gradient is there, and no activation
        floor = Peak(self.parameters + self.optimiser + self.gradients, self.gradients, 0)
        peak = max([*self.peaks.values(), floor], key=lambda some: some.bytes)
        return Memory(self.parameters, self.optimiser, self.gradients, *peak, self.learned, self.largest_unit)

    def grown(self, few: Trace, more: Trace, times: int) -> Trace:
        """With what `more` holds beyond `few`, so many times."""
        assert few.peaks.keys() == more.peaks.keys()

        def grow(value: int, before: int, after: int) -> int:
            return value + times * (after - before)

        return Trace(
            grow(self.parameters, few.parameters, more.parameters),
            grow(self.optimiser, few.optimiser, more.optimiser),
            grow(self.gradients, few.gradients, more.gradients),
            grow(self.learned, few.learned, more.learned),
            self.largest_unit,
            {mark: Peak(*map(grow, peak, few.peaks[mark], more.peaks[mark])) for mark, peak in self.peaks.items()},
        )


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and somebody still holds; tensors over the vocabulary apart."""

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.now = self.logits = self.gradients = 0
        self.peaks: dict[Hashable, Peak] = {}
        self._seen: set[int] = set()
        self._marks: list[Hashable] = []
        self._counts: Counter[Hashable] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        for mark in self._marks:
            if mark not in self.peaks or self.now > self.peaks[mark].bytes:
                self.peaks[mark] = Peak(self.now, self.gradients, self.logits)
        return out

    def mark(self, *names: Hashable) -> None:
        """What comes next comes after a mark of these names; the n-th of a name is another than the first."""
        self._counts.update(names)
        self._marks = [(name, self._counts[name]) for name in names]

    def watch(self, block: nn.Module, names: Sequence[Hashable]) -> None:
        """Marks where it begins, again where it is recomputed, and where its gradient arrives."""
        ends = [(name, "back") for name in names]

        def begins(*_: Any) -> None:
            self.mark(*names)

        def made(_module: nn.Module, _inputs: Any, out: Any) -> None:
            learns = (x for x in tree_leaves(out) if isinstance(x, Tensor) and x.requires_grad)
            first = next(learns, None)
            if first is not None:
                first.register_hook(lambda _: self.mark(*ends))

        block.register_forward_pre_hook(begins)
        block.register_forward_hook(made)

    def hold(self, tensor: Tensor) -> None:
        """Count its storage until nobody has it; views of a counted one add nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        wide = size if tensor.ndim and tensor.shape[-1] == self.vocab_size else 0
        self.now, self.logits = self.now + size, self.logits + wide

        def gone() -> None:
            self._seen.discard(key)
            self.now, self.logits = self.now - size, self.logits - wide

        weakref.finalize(storage, gone)


def trace(
    run: RunConfig,
    learned: Sequence[nn.Parameter],
    held: Iterable[Tensor],
    losses: Callable[[], Mapping[str, Tensor]],
    *,
    given: Iterable[Tensor] = (),
    vocab_size: int = 0,
    largest_unit: int = 0,
    device: str = "cuda",
    blocks: Blocks = (),
) -> Trace:
    """A step over the micro-batch behind `losses`, twice over it where gradients accumulate.

    `held`: weights and whatever else lies on the device throughout, beside what learns and its moments. `given`: what
    is there for the step, such as pixels. `blocks` are marked.
    """
    moments = [torch.zeros_like(p) for p in learned for _ in range(2)]
    live = LiveBytes(vocab_size)
    for tensor in [*held, *learned, *moments]:
        live.hold(tensor)
    fixed = live.now
    for tensor in given:
        live.hold(tensor)
    _count_gradients(learned, live)
    for block, names in blocks:
        live.watch(block, names)
    with live, sdpa_only() if device == "cuda" else nullcontext():
        for _ in range(min(2, run.accumulate)):
            _backward(run, losses, live)
    moment_bytes = sum(m.nbytes for m in moments)
    gradients = sum(p.nbytes for p in learned)
    count = sum(p.numel() for p in learned)
    return Trace(fixed - moment_bytes, moment_bytes, gradients, count, largest_unit, live.peaks)


def _backward(run: RunConfig, losses: Callable[[], Mapping[str, Tensor]], live: LiveBytes) -> None:
    """As the loop does it."""
    live.mark("forward")
    cast = torch.autocast("cpu", torch.bfloat16) if run.precision == "bf16" else nullcontext()
    with cast:
        sums = losses()
    total = torch.stack([value / 2.0 for value in sums.values()]).sum()
    live.mark("backward")
    total.backward()


def _count_gradients(learned: Sequence[Tensor], live: LiveBytes) -> None:
    counted: set[int] = set()

    def count(parameter: Tensor) -> None:
        if id(parameter) not in counted:
            counted.add(id(parameter))
            live.gradients += parameter.nbytes

    for parameter in learned:
        parameter.register_post_accumulate_grad_hook(count)
