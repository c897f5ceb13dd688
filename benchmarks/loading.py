"""Opening a model: seconds and peak memory over the weights, each in a fresh process.

    python benchmarks/loading.py [FOLDER] [--rounds 3]

Without a folder, one with the sizes of `pocket` and random bfloat16 weights is written first. "Load" is memory above
what the imports take, at its peak while the folder is opened; "answer" is the peak after a first short answer, when
decoding has laid out its own copy of the language model's matrices. A folder in the type that is asked for is mapped,
not copied: its pages count here once they are touched, and the system may drop them.

Beside it transformers' `from_pretrained` on the same weights in the native layout, in turns with ours: the model alone,
every page of it touched. Imports are done before the clock starts, by opening a tiny model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import write

DTYPES = ("float32", "bfloat16", "int4")
PROBE = """
import json, resource, sys, time
import torch
from internvl.generate.engine import Request
from internvl.generate.sampling import Sampling
from internvl.generate.open_chat import load_chat as load

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
request = lambda: Request(torch.arange(5, 40), sampling=Sampling(max_new_tokens=4))
load("tiny-llama", dtype=sys.argv[2]).engine.run([request()])  # what is imported when first used, is
bare, start = peak(), time.perf_counter()
chat = load(sys.argv[1], dtype=sys.argv[2])
seconds, loaded = time.perf_counter() - start, peak()
weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in chat.model.parameters()}.values())
start = time.perf_counter()
chat.engine.run([request()])
print(json.dumps({
    "weights": weights,
    "load seconds": seconds,
    "first answer seconds": time.perf_counter() - start,
    "load bytes": loaded - bare,
    "answer bytes": peak() - bare,
}))
"""


OPENING = """
import json, resource, sys, time
import torch
from internvl.load import load_checkpoint
from transformers import AutoModelForImageTextToText

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
dtype = getattr(torch, sys.argv[4])
ways = {
    "internvl": lambda folder: load_checkpoint(folder, dtype=dtype).model,
    "transformers": lambda folder: AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype),
}
opened = ways[sys.argv[3]]
opened(sys.argv[2])
bare, start = peak(), time.perf_counter()
model = opened(sys.argv[1])
with torch.no_grad():
    touched = sum(float(parameter.sum()) for parameter in model.parameters())
seconds = time.perf_counter() - start
weights = sum({tensor.data_ptr(): tensor.nbytes for tensor in model.parameters()}.values())
print(json.dumps({"seconds": seconds, "peak over weights": (peak() - bare) / weights}))
"""
WAYS = ("internvl", "transformers")


def random_folder(folder: Path, name: str = "pocket", layout: str = "official") -> None:
    """In a process of its own: the peak of the parent would be inherited."""
    code = (
        "import sys, torch; from internvl.models.build import build; from internvl.zoo import CHAT; "
        "from internvl.load import save_checkpoint; "
        "model = build(CHAT[sys.argv[2]], torch.bfloat16); model.image_token_id = 9; "
        "save_checkpoint(model, None, sys.argv[1], sys.argv[3])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder), name, layout], check=True)


def probe(folder: Path, dtype: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", PROBE, str(folder), dtype], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(folder: Path, rounds: int) -> list[dict[str, Any]]:
    rows = []
    for dtype in DTYPES:
        runs = [probe(folder, dtype) for _ in range(rounds)]
        median = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        rows.append(
            {
                "dtype": dtype,
                "weights MB": round(median["weights"] / 1e6),
                "load seconds": round(median["load seconds"], 2),
                "first answer seconds": round(median["first answer seconds"], 2),
                "load peak over weights": round(median["load bytes"] / median["weights"], 2),
                "answer peak over weights": round(median["answer bytes"] / median["weights"], 2),
            }
        )
    return rows


def side_by_side(rounds: int) -> list[dict[str, Any]]:
    """Medians of ours and transformers', in turns, on one native folder of random weights."""
    rows = []
    with tempfile.TemporaryDirectory() as made:
        large, small = Path(made) / "large", Path(made) / "small"
        random_folder(large, "pocket", "native")
        random_folder(small, "tiny-llama", "native")
        for dtype in ("float32", "bfloat16"):
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(rounds):
                for way in WAYS:
                    command = [sys.executable, "-c", OPENING, str(large), str(small), way, dtype]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    runs[way].append(json.loads(done.stdout.splitlines()[-1]))
            for way, found in runs.items():
                median = {key: round(statistics.median(run[key] for run in found), 2) for key in found[0]}
                rows.append({"dtype": dtype, "opened by": way, **median})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder
        if folder is None:
            folder = Path(made)
            random_folder(folder)
        rows = measure(folder, options.rounds)
    results = {"rounds": options.rounds, "rows": rows, "side by side": side_by_side(options.rounds)}
    for row in (*rows, *results["side by side"]):
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    print(f"written to {write('loading', results, {}, options.out)}")


if __name__ == "__main__":
    main()
