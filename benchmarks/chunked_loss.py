"""The loss behind a large vocabulary: plain logits, chunks computed twice, and chunks with gradients made on the way.

    python benchmarks/chunked_loss.py [--tokens 1024] [--vocab 49161] [--chunk 256] [--rounds 5] [--device cpu]

Loss and gradients of hidden states and of the table (as in full training), and of hidden states alone (a frozen table,
as with adapters), on the same numbers in turns. Memory is the growth of the peak over what the inputs take: of a
process of its own on a CPU, of the allocator on a GPU. Beside it the largest difference of a gradient from the plain.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from measure import in_turns, write
from rich.console import Console
from rich.table import Table

from internvl.train.losses import chunked_sum, linear_sum, weighted_sum

Loss = Callable[[], torch.Tensor]


def inputs(
    options: argparse.Namespace, learns: bool
) -> tuple[torch.Tensor, torch.nn.Linear, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.width, generator=generator)
    head = torch.nn.Linear(options.width, options.vocab, bias=False)
    torch.nn.init.normal_(head.weight, std=0.02, generator=generator)
    labels = torch.randint(0, options.vocab, (options.tokens,), generator=generator)
    weights = torch.rand(options.tokens, generator=generator)
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    head = head.to(device, dtype).requires_grad_(learns)
    return hidden.to(device, dtype).requires_grad_(), head, labels.to(device), weights.to(device)


def losses(options: argparse.Namespace, learns: bool) -> tuple[dict[str, Loss], list[torch.Tensor]]:
    hidden, head, labels, weights = inputs(options, learns)

    def called(x: torch.Tensor) -> torch.Tensor:
        return head(x)

    calls: dict[str, Loss] = {
        "plain": lambda: weighted_sum(head(hidden), labels, weights),
        "chunks, logits twice": lambda: chunked_sum(hidden, called, labels, weights, options.chunk),
        "chunks, gradients on the way": lambda: linear_sum(hidden, head.weight, labels, weights, options.chunk),
    }
    return calls, [hidden, *([head.weight] if learns else [])]


def peak_mb(options: argparse.Namespace, learns: bool, name: str) -> float:
    """Growth of the peak over the inputs, in a process that has done nothing else."""
    if options.device != "cpu":
        calls, learned = losses(options, learns)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        torch.autograd.grad(calls[name](), learned)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak, args=(options, learns, name, sender))
    process.start()
    found = float(receiver.recv())
    process.join()
    return found


def _peak(options: argparse.Namespace, learns: bool, name: str, sender: object) -> None:
    torch.set_num_threads(options.threads)
    calls, learned = losses(options, learns)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew: making the inputs had its own
    before = _memory("VmRSS")
    torch.autograd.grad(calls[name](), learned)
    sender.send((_memory("VmHWM") - before) / 2**10)  # type: ignore[attr-defined]


def _memory(field: str) -> int:
    """KiB that /proc tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("tokens", 1024), ("width", 576), ("vocab", 49161), ("chunk", 256), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    table = Table("gradients of", "loss", "ms", "x plain", "peak MB", "x plain", "largest difference")
    results: dict[str, object] = {}
    for learns in (True, False):
        what = "hidden states and table" if learns else "hidden states"
        calls, learned = losses(options, learns)

        def timed(call: Loss, learned: list[torch.Tensor] = learned) -> tuple[torch.Tensor, ...]:
            grads = torch.autograd.grad(call(), learned)
            if options.device != "cpu":
                torch.cuda.synchronize()
            return grads

        exact = timed(calls["plain"])
        off = {
            n: max(float((a - b).abs().max()) for a, b in zip(timed(c), exact, strict=True)) for n, c in calls.items()
        }
        seconds = in_turns({name: lambda call=call: timed(call) for name, call in calls.items()}, options.rounds)
        peaks = {name: peak_mb(options, learns, name) for name in calls}
        for name in calls:
            ratio = seconds[name]["median"] / seconds["plain"]["median"]
            share = peaks[name] / peaks["plain"]
            cells = (f"{1000 * seconds[name]['median']:.0f}", f"{ratio:.2f}", f"{peaks[name]:.0f}", f"{share:.2f}")
            table.add_row(what, name, *cells, f"{off[name]:.1e}")
        results[what] = {n: {**seconds[n], "peak MB": round(peaks[n], 1), "difference": off[n]} for n in calls}
    Console(width=120).print(table)
    settings = {k: v for k, v in vars(options).items() if k != "out"}
    if options.out:
        write("chunked_loss", {"settings": settings, **results}, {"torch": torch.__version__}, options.out)


if __name__ == "__main__":
    began = time.perf_counter()
    main()
    print(f"{time.perf_counter() - began:.0f} s")
