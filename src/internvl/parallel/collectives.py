"""What ranks tell each other: rows with their gradient, sums. One process, or no process group: the identity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_ALONE = ContextVar("alone", default=False)


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _ALONE.get() else 1


def rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


@contextmanager
def alone() -> Iterator[None]:
    """Inside, in this thread, there is one rank: for what every rank computes whole and alike, such as a held-out loss.

    Sharded weights are gathered all the same, so every rank goes through it.
    """
    before = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(before)


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


def largest_on_host(value: int) -> int:
    """The largest of all ranks' numbers."""
    if num_ranks() == 1:
        return value
    found = torch.tensor([value])
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


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


def take(x: Tensor, index: Tensor) -> Tensor:
    """Rows of `gather(x)` by number, each sent by the rank that has it and nothing else: (len(index), ...).

    All ranks call it, with as many rows of x and any number of wanted ones. The gradient is as that of `gather`.
    """
    if num_ranks() == 1:
        return x[index]
    out: Tensor = _Take.apply(x, index)
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


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        owner = index // len(x)
        order = owner.argsort(stable=True)
        wanted = torch.bincount(owner, minlength=num_ranks())
        given = torch.empty_like(wanted)
        dist.all_to_all_single(given, wanted)
        ctx.counts = wanted.tolist(), given.tolist()
        rows = _sent(index[order] % len(x), *ctx.counts)
        ctx.save_for_backward(rows, order)
        ctx.num_rows = len(x)
        out = x.new_empty(len(index), *x.shape[1:])
        out[order] = _sent(x[rows], ctx.counts[1], ctx.counts[0])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, order = ctx.saved_tensors
        returned = _sent(grads[0][order], *ctx.counts)
        return returned.new_zeros(ctx.num_rows, *returned.shape[1:]).index_add_(0, rows, returned), None


def _sent(x: Tensor, to: list[int], back: list[int]) -> Tensor:
    """Rows of x, `to[r]` of them to each rank r in turn; what comes from them, `back[r]` each."""
    out = x.new_empty(sum(back), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), output_split_sizes=back, input_split_sizes=to)
    return out
