"""One tile through InternViT (384 wide, 12 blocks): ours, transformers', plain attention, on the same weights.

Side by side in one process, in turns; medians. Ours is what answers run, a fused copy of the weights; what learns runs
the readable module. Beside them the limit: what the matrix products and the attention of the same shapes take alone.
Run it on a quiet machine: python benchmarks/vision.py [--side 448]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import InternVLVisionConfig, InternVLVisionModel

from internvl.config import VisionConfig
from internvl.convert.keys import expand
from internvl.convert.native import native_rules
from internvl.models.choose import choose_vision
from internvl.models.internvit import InternViT
from internvl.models.layers import rows_by_matrix
from internvl.zoo import CHAT

CONFIG = VisionConfig(width=384, depth=12, heads=6, mlp_width=1536, image_size=448)
RESULTS = Path(__file__).parent / "results" / "vision.json"


def peer(ours: InternViT, attention: str) -> InternVLVisionModel:
    """transformers' vision tower with our weights; "eager" is attention by plain matrix products."""
    config = InternVLVisionConfig(
        hidden_size=CONFIG.width,
        num_hidden_layers=CONFIG.depth,
        num_attention_heads=CONFIG.heads,
        intermediate_size=CONFIG.mlp_width,
        attention_bias=True,
    )
    model = InternVLVisionModel._from_config(config, attn_implementation=attention)
    state, ours_state = {}, {f"vision.{key}": value for key, value in ours.state_dict().items()}
    for entry in expand(native_rules(CHAT["tiny-llama"]), ours_state):
        tensors = entry.to_disk([ours_state[key] for key in entry.ours])
        state |= {k.removeprefix("model.vision_tower."): v for k, v in zip(entry.disk, tensors, strict=True)}
    model.load_state_dict(state)
    return model.to(next(ours.parameters()).dtype).eval()


def parts(dtype: torch.dtype, length: int, best: Callable[[Callable[[], Any]], float]) -> float:
    """Seconds of the linear layers and of the attention products alone, each by its fastest kernel here."""
    width, heads = CONFIG.width, CONFIG.heads
    seconds = 0.0
    for new, old in ((3 * width, width), (width, width), (CONFIG.mlp_width, width), (width, CONFIG.mlp_width)):
        x, weight = torch.randn(length, old).to(dtype), torch.randn(new, old).to(dtype)
        seconds += min(best(partial(F.linear, x, weight)), best(partial(rows_by_matrix, x, weight)))
    q = torch.randn(heads, length, width // heads).to(dtype)
    weights = torch.randn(heads, length, length).to(dtype)
    columns, keys = q.transpose(0, 1).flatten(1), q.reshape(-1, width // heads)
    flat, values = weights.transpose(0, 1).flatten(1), q.transpose(1, 2).reshape(-1, length)
    plain = best(partial(torch.matmul, q, q.transpose(1, 2))) + best(partial(torch.matmul, weights, q))
    grouped = best(partial(rows_by_matrix, columns, keys, groups=heads))
    grouped += best(partial(rows_by_matrix, flat, values, groups=heads))
    products = min(plain, grouped) + best(weights.exp2_ if dtype == torch.float32 else weights.exp_)
    return CONFIG.depth * (seconds + products)


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(dtype: torch.dtype, repeats: int, tiles: int, side: int) -> dict[str, Any]:
    torch.manual_seed(0)
    module = InternViT(CONFIG)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    module = module.to(dtype).eval()
    models = {
        "ours": choose_vision(module),
        "ours, as it learns": module,
        "transformers": peer(module, "sdpa"),
        "plain products": peer(module, "eager"),
    }
    x = torch.randn(tiles, 3, side, side).to(dtype)
    length = (side // CONFIG.patch_size) ** 2 + 1
    with torch.inference_mode():
        outputs = {name: model(x) for name, model in models.items()}
        wanted = outputs["plain products"].last_hidden_state.float()
        difference = (outputs["ours"].float() - wanted).abs().max().item() / wanted.std().item()
        seconds: dict[str, list[float]] = {name: [] for name in models}
        for _ in range(repeats):
            for name, model in models.items():
                seconds[name].append(timed(partial(model, x)))
        limit = parts(dtype, length, lambda call: min(timed(call) for _ in range(3 + repeats)))
    ms = {name: 1000 * statistics.median(values) / tiles for name, values in seconds.items()}
    better = min(ms["transformers"], ms["plain products"])
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "ms per tile": {name: round(value, 1) for name, value in ms.items()},
        "spread ms": {
            n: [round(1000 * min(v) / tiles, 1), round(1000 * max(v) / tiles, 1)] for n, v in seconds.items()
        },
        "times transformers": round(ms["transformers"] / ms["ours"], 2),
        "times better peer": round(better / ms["ours"], 2),
        "parts alone ms": round(1000 * limit, 1),
        "share of the rate of the parts": round(1000 * limit / ms["ours"], 2),
        "largest difference in standard deviations": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--tiles", type=int, default=1)
    parser.add_argument("--side", type=int, default=448, help="pixels of a tile")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    cpu = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    rows = [measure(dtype, asked.repeats, asked.tiles, asked.side) for dtype in (torch.float32, torch.bfloat16)]
    print(
        f"{'':10}{'ours':>10}{'learns':>10}{'transf.':>10}{'plain':>10}{'parts':>10}"
        "   ms a tile; times transformers, the better peer"
    )
    for row in rows:
        ms = row["ms per tile"].values()
        print(
            f"{row['dtype']:10}" + "".join(f"{value:10.1f}" for value in ms) + f"{row['parts alone ms']:10.1f}"
            f"   {row['times transformers']:.2f}, {row['times better peer']:.2f}; "
            f"{100 * row['share of the rate of the parts']:.0f} % of the parts' rate"
        )
    asked.out.parent.mkdir(exist_ok=True)
    result = {
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": f"{cpu[0] if cpu else platform.processor()}, {asked.threads} threads",
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "tiles": asked.tiles,
        "side": asked.side,
        "repeats": asked.repeats,
        "load before": [round(value, 2) for value in os.getloadavg()],
        "rows": rows,
    }
    asked.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
