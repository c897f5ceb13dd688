"""Attention that learns on a CPU: sdpa beside two plain products, forward and backward, causal, with fewer key heads.

    python benchmarks/attention.py [--rounds 7] [--positions 1024] [--threads 2]

Rows of one length at a time, so many that they hold `--positions` together, in SmolLM2's shape: nine heads of 64, three
of keys. What `models/attention.py` chooses follows from it: products in bfloat16 below LEARNED keys, sdpa in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import in_turns, write
from rich.console import Console
from rich.table import Table
from torch import Tensor

from internvl.models.attention import LEARNED, _masked_products, causal_mask

LENGTHS = (12, 32, 64, 128, 256, 512, 1024, 2048)
HEADS, KEY_HEADS, WIDTH = 9, 3, 64


def passes(rows: int, length: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Forward and backward of both on the same numbers."""
    heads = (HEADS, KEY_HEADS, KEY_HEADS)
    q, k, v = (torch.randn(rows, n, length, WIDTH).to(dtype).requires_grad_() for n in heads)
    mask = causal_mask(length, length, q.device)

    def both(out: Tensor) -> object:
        return torch.autograd.grad(out.sum(), (q, k, v))

    return {
        "sdpa": lambda: both(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)),
        "products": lambda: both(_masked_products(q, k, v, mask, WIDTH**-0.5)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--positions", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    torch.manual_seed(0)
    table, found = Table("type", "rows x length", "sdpa, ms", "products, ms", "times"), []
    for dtype in (torch.bfloat16, torch.float32):
        for length in LENGTHS:
            rows = max(1, asked.positions // length)
            seconds = in_turns(passes(rows, length, dtype), asked.rounds, warm_up=2)
            sdpa, products = (seconds[name]["median"] * 1e3 for name in ("sdpa", "products"))
            name = str(dtype).removeprefix("torch.")
            found.append({"type": name, "rows": rows, "length": length, "seconds": seconds})
            shape = f"{rows} x {length}"
            table.add_row(name, shape, f"{sdpa:.1f}", f"{products:.1f}", f"{sdpa / products:.2f}")
    Console(width=100).print(table)
    settings = {"threads": asked.threads, "rounds": asked.rounds, "products below": LEARNED}
    write("attention", {"settings": settings, "passes": found}, {"torch": torch.__version__})


if __name__ == "__main__":
    main()
