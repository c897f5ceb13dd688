"""The contrastive loss of one process: ours in tiles, open_clip's full matrix, and rows in chunks with recomputation.

One process, the same vectors, loss and gradients of both sides and of the scale, in turns. Memory is the growth of the
process's peak (VmHWM) over what it held before, loss and gradients included. Where open_clip is not installed, its loss
is re-derived from its definition (two matrices of all pairs, cross-entropy of each); the results say which was run.

    python benchmarks/contrastive_loss.py                 # 4,096 and 16,384 pairs
    python benchmarks/contrastive_loss.py --large         # and 65,536 by ours alone: the full matrix would take 80 GB
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import in_turns, write
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from internvl.train.contrast import contrast

WIDTH, SCALE = 768, 1 / 0.07  # of InternVL-C; CLIP's initial temperature
CHUNK = 512
LARGE = 65_536
SLOW = 8_192
"""Pairs above which the chunked loss is run once: its time is that pass."""
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def full(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Both matrices and the mean of their cross-entropies, as open_clip's ClipLoss computes them on one process."""
    wanted = torch.arange(len(images))
    return (F.cross_entropy(scale * images @ texts.T, wanted) + F.cross_entropy(scale * texts @ images.T, wanted)) / 2


def chunked(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """Rows of 512 of each matrix in turn, made again in the backward pass."""

    def part(rows: Tensor, others: Tensor, scale: Tensor, start: int) -> Tensor:
        wanted = torch.arange(start, start + len(rows))
        return F.cross_entropy(scale * rows @ others.T, wanted, reduction="sum")

    total = images.new_zeros(())
    for rows, others in ((images, texts), (texts, images)):
        for start in range(0, len(rows), CHUNK):
            piece = rows[start : start + CHUNK]
            total = total + checkpoint(part, piece, others, scale, start, use_reentrant=False)
    return total / (2 * len(images))


def open_clip_loss() -> tuple[str, Loss]:
    """open_clip's own ClipLoss, its one file loaded alone (the package asks for torchvision); else re-derived."""
    found = find_spec("open_clip")
    if found is None or not found.submodule_search_locations:
        return "plain full loss, re-derived from open_clip's definition", full
    spec = spec_from_file_location("open_clip_loss", Path(found.submodule_search_locations[0]) / "loss.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return "open_clip ClipLoss", module.ClipLoss()


def work(loss: Loss, images: Tensor, texts: Tensor, scale: Tensor) -> float:
    for x in (images, texts, scale):
        x.grad = None
    value = loss(images, texts, scale)
    value.backward()
    return float(value.detach())


def status(name: str) -> int:
    """Bytes, as Linux states them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise ValueError(f"/proc/self/status has no {name}; this benchmark needs Linux")


def peak(call: Callable[[], float]) -> tuple[int, float, float]:
    """Growth of the peak in bytes, seconds, and the value."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, start = status("VmRSS"), time.perf_counter()
    value = call()
    return status("VmHWM") - before, time.perf_counter() - start, value


def measure(pairs: int, rounds: int, losses: dict[str, Loss]) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(pairs)
    images, texts = (F.normalize(torch.randn(pairs, WIDTH, generator=draw), dim=1).requires_grad_() for _ in range(2))
    scale = torch.tensor(SCALE, requires_grad=True)
    found: dict[str, Any] = {}
    for name, loss in losses.items():
        images.grad = texts.grad = scale.grad = None  # gradients of the loss before are no memory of this one's start
        memory, seconds, value = peak(partial(work, loss, images, texts, scale))
        once = {"median": seconds, "min": seconds, "max": seconds}
        found[name] = {"peak MiB": round(memory / 2**20, 1), "loss": value, "seconds": once, "passes timed": 1}
    timed = {
        n: partial(work, loss, images, texts, scale) for n, loss in losses.items() if n != "chunked" or pairs <= SLOW
    }
    for name, seconds in (in_turns(timed, rounds, warm_up=0) if rounds else {}).items():
        found[name] |= {"seconds": seconds, "passes timed": rounds}
    return found


def ratios(found: dict[str, Any]) -> dict[str, float]:
    ours = found["ours"]
    made = {"difference of losses": abs(ours["loss"] - found["open_clip"]["loss"])}
    for name in found.keys() - {"ours"}:
        made[f"memory, ours to {name}"] = round(ours["peak MiB"] / found[name]["peak MiB"], 4)
        made[f"time, ours to {name}"] = round(ours["seconds"]["median"] / found[name]["seconds"]["median"], 3)
    return dict(sorted(made.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[4_096, 16_384])
    parser.add_argument("--rounds", type=int, default=5, help="timed passes after that of memory; 0: that one is timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--chunked-up-to", type=int, default=16_384, help="pairs; it takes longest by far")
    parser.add_argument("--large", action="store_true", help=f"{LARGE} pairs by ours alone")
    parser.add_argument("--out", type=Path, help="results/contrastive_loss.json when left out")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    said, peer = open_clip_loss()
    losses: dict[str, Loss] = {"ours": contrast, "open_clip": peer, "chunked": chunked}
    measure(512, 1, losses)  # threads and kernels are there before anything is timed
    results: dict[str, Any] = {"peer": said, "threads": asked.threads, "rounds": asked.rounds, "width": WIDTH}
    for pairs in asked.pairs:
        some = {name: loss for name, loss in losses.items() if name != "chunked" or pairs <= asked.chunked_up_to}
        found = measure(pairs, asked.rounds, some)
        results[str(pairs)] = {**found, "ratios": ratios(found)}
        print(pairs, json.dumps(results[str(pairs)]["ratios"]), flush=True)
    if asked.large:
        results[str(LARGE)] = measure(LARGE, asked.rounds, {"ours": contrast})
        print(LARGE, json.dumps(results[str(LARGE)]["ours"]))
    print(f"peer: {said}; written to {write('contrastive_loss', results, {'torch': torch.__version__}, asked.out)}")


if __name__ == "__main__":
    main()
