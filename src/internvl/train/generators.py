"""The state of every random generator of this process, out and in again."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor

from internvl.parallel import collectives


def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors, and plain JSON."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    held = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_initialized():
        several = collectives.num_ranks() > 1  # then the other devices are other ranks' business
        states = [torch.cuda.get_rng_state()] if several else torch.cuda.get_rng_state_all()
        held |= {f"cuda{i}": state for i, state in enumerate(states)}
    plain = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    return held, plain


def restore(held: dict[str, Tensor], plain: dict[str, Any]) -> None:
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, held["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(held["torch"])
    devices = [held[key] for key in sorted(held) if key.startswith("cuda")]
    if devices and torch.cuda.is_available() and collectives.num_ranks() > 1:
        torch.cuda.set_rng_state(devices[0])
    elif devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])
