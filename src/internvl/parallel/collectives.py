"""What ranks tell each other: gather with gradient, sums. One process, or no process group: the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def is_lead() -> bool:
    """True on the one rank that writes and speaks for all."""
    return rank() == 0


def barrier() -> None:
    """Wait for every rank."""
    total_on_host([0.0])


def total_on_host(values: Sequence[float]) -> list[float]:
    """Sums over ranks of a few numbers, the same ones on every rank; by gloo, so that no device waits."""
    if num_ranks() == 1:
        return list(values)
    summed = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(summed)
    return summed.tolist()


def deal_once(batches: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """This rank's share of a finite stream, as many for every rank; with False comes a filler that does not count."""
    group: list[T] = []
    for batch in batches:
        group.append(batch)
        if len(group) == num_ranks():
            yield group[rank()], True
            group = []
    if group:
        yield (group[rank()], True) if rank() < len(group) else (group[0], False)


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
