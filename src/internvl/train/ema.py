"""A moving average of what learns (Polyak averaging), in float32, sharded as the parameters are."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from internvl.parallel.shard import local


class Ema:
    """`average` follows the parameters: average = decay * average + (1 - decay) * parameter, after each step."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.average: dict[str, Tensor] = {}
        if decay:
            self.average = {name: p.detach().float().clone() for name, p in parameters.items()}
        self._pairs = [(local(x), local(parameters[name].detach())) for name, x in self.average.items()]

    @torch.no_grad()
    def update(self) -> None:
        for average, parameter in self._pairs:
            average.lerp_(parameter.float(), 1 - self.decay)
