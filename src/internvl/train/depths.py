"""Few blocks in place of many: what rehearsals of a shallow model say about the deep one, to the byte.

Blocks of a stack are alike. What comes and goes between two marks, where a block begins or its gradient arrives, is
then the same at any depth, and what is there at a mark grows by the same with every block more. So bytes at each mark
are linear in the depths, and the peak, which is the largest of them, follows from one shallow model and one deeper by a
block of each stack. Blocks between the first and the last ones lie on a line, whose ends are marked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from internvl.config import ChatConfig, DualConfig
from internvl.train.alive import Blocks, Trace

C = TypeVar("C", ChatConfig, DualConfig)


@dataclass(frozen=True)
class Stack:
    """Blocks of a model, one after the other."""

    name: str
    depth: int
    period: int = 1
    """A block is like the one so many places before it."""
    apart: int = 0
    """Last blocks that are unlike those before them: they alone learn, or they do not run."""

    @property
    def fewest(self) -> int:
        """Blocks that say it all: first, middle and last periods; all where that saves nothing."""
        least = 3 * self.period + self.apart
        fewest = least + max(0, self.depth - least) % self.period
        return fewest if fewest + self.period < self.depth else self.depth

    def places(self, index: int, depth: int) -> tuple[tuple[str, int], ...]:
        """Names of a block, counted from the front below 2 periods and from the back where that is as far at any depth;
        of `fewest` blocks the middle ones have both."""
        if self.fewest == self.depth:
            return ()
        front = index < 2 * self.period
        back = depth - index <= self.fewest - self.period
        return ((self.name, index),) * front + ((self.name, index - depth),) * back


def deepen(stacks: Sequence[Stack], rehearsed: Callable[[Mapping[str, int]], Trace]) -> Trace:
    """The trace of a model of so deep stacks from those that `rehearsed` gives for fewer blocks."""
    few = {stack.name: stack.fewest for stack in stacks}
    first = found = rehearsed(few)
    for stack in stacks:
        if stack.fewest < stack.depth:
            more = rehearsed({**few, stack.name: stack.fewest + stack.period})
            found = found.grown(first, more, (stack.depth - stack.fewest) // stack.period)
    return found


def shallow(config: C, depths: Mapping[str, int]) -> C:
    """The model with so many blocks; what is not named stays."""
    vision, language = config.vision, config.language
    vision = replace(vision, depth=depths.get("vision", vision.depth))
    if "language" in depths:
        kept = {k: v for k, v in language.settings.items() if k != "layer_types"}  # one for each layer, all alike
        language = replace(language, settings={**kept, "num_hidden_layers": depths["language"]})
    beside: dict[str, Any] = {}
    if isinstance(config, ChatConfig) and config.queries is not None:
        beside["queries"] = replace(config.queries, vision=vision)
    return replace(config, vision=vision, language=language, **beside)


def named_blocks(stacks: Sequence[Stack], layers: Mapping[str, nn.ModuleList]) -> Blocks:
    """Blocks of the stacks with their places."""
    return [pair for stack in stacks for pair in _named(stack, layers[stack.name])]


def _named(stack: Stack, blocks: nn.ModuleList) -> Iterator[tuple[nn.Module, tuple[tuple[str, int], ...]]]:
    for index, block in enumerate(blocks):
        if places := stack.places(index, len(blocks)):
            yield block, places
