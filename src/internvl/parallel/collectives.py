"""What ranks tell each other: gather with gradient, sums. One process, or no process group: the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """(rows, ...) of every rank, in the order of ranks: (ranks * rows, ...). All ranks call it with as many rows.

    The gradient is that of the sum of all ranks' losses (official GatherLayer), so averaging the gradients of the
    parameters over ranks, as data-parallel training does, gives that of the mean loss.
    """
    if num_ranks() == 1:
        return x
    out: Tensor = _Gather.apply(x)
    return out


def check_equal_rows(x: Tensor) -> None:
    """ValueError on every rank where ranks bring different numbers of rows: a gather would hang or mix them up."""
    if num_ranks() == 1:
        return
    counts = [torch.zeros(1, dtype=torch.int64, device=x.device) for _ in range(num_ranks())]
    dist.all_gather(counts, torch.tensor([len(x)], device=x.device))
    rows = [int(count) for count in counts]
    if len(set(rows)) > 1:
        raise ValueError(f"ranks bring {rows} rows; they must be equal: drop the last, smaller batch")


def total(x: Tensor) -> Tensor:
    """Sum over ranks, without gradient."""
    summed = x.detach().clone()
    if num_ranks() > 1:
        dist.all_reduce(summed)
    return summed


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.rows = len(x)
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(num_ranks())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # Summed whole and cut: gloo has no reduce-scatter.
        whole = total(grads[0].contiguous())
        return whole.narrow(0, rank() * ctx.rows, ctx.rows)
