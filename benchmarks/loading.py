"""Opening a model: seconds and peak memory over the weights, each in a fresh process.

    python benchmarks/loading.py [FOLDER] [--rounds 5]

Without a folder, one with the sizes of `pocket` and random bfloat16 weights is written first. "Load" is memory above
what the imports take, at its peak while the folder is opened; "answer" is the peak after a first short answer, when
decoding has laid out its own copy of the language model's matrices. A folder in the type that is asked for is mapped,
not copied: its pages count here once they are touched, and the system may drop them.
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
from internvl.generate.session import load

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


def random_folder(folder: Path) -> None:
    """In a process of its own: the peak of the parent would be inherited."""
    code = (
        "import sys, torch; from internvl.models.build import build; from internvl.zoo import CHAT; "
        "from internvl.load import save_checkpoint; "
        "save_checkpoint(build(CHAT['pocket'], torch.bfloat16), None, sys.argv[1])"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = options.folder
        if folder is None:
            folder = Path(made)
            random_folder(folder)
        rows = measure(folder, options.rounds)
    for row in rows:
        print("  ".join(f"{key}: {value}" for key, value in row.items()))
    print(f"written to {write('loading', {'rounds': options.rounds, 'rows': rows}, {}, options.out)}")


if __name__ == "__main__":
    main()
