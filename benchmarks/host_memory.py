"""Host memory of the data path over a long run: does it grow with the records that have passed?

    python benchmarks/host_memory.py [--samples 20000] [--workers 2] [--records 2000]

Batches are made and thrown away; every 250 samples the memory of the process and its workers is read (proportional
set size, shared pages counted once in all) and a line is laid through it after the first quarter. A share of the
records is damaged, so that rejecting them is measured too. "MB a day" is the slope at the measured speed.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from measure import write
from PIL import Image

from internvl.data.batching import BatchSettings
from internvl.data.encode import Encoder
from internvl.data.loader import Loader
from internvl.data.mixture import read_sets
from internvl.load import read_tokenizer
from internvl.opened import open_checkpoint

EVERY = 250
"""Samples between two readings."""
PICTURES = 50


def make_set(folder: Path, records: int, damaged: float) -> Path:
    """Records of one picture each, some of whose files are not there."""
    rng = np.random.default_rng(0)
    for number in range(PICTURES):
        pixels = rng.integers(0, 256, (15, 20, 3), np.uint8)
        side = int(rng.integers(200, 500))
        Image.fromarray(pixels).resize((side, side * 3 // 4)).save(folder / f"{number}.jpg")
    lines = []
    for number in range(records):
        name = "gone" if rng.random() < damaged else str(int(rng.integers(PICTURES)))
        turns = [
            {"from": "human", "value": f"<image>\nWhat is picture {number}?"},
            {"from": "gpt", "value": "It shows " + "a coloured field, " * int(rng.integers(1, 30))},
        ]
        lines.append(json.dumps({"id": number, "image": f"{name}.jpg", "conversations": turns}))
    path = folder / "set.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def memory_mb() -> float:
    """Of this process and its children, pages that they share counted once."""
    here = os.getpid()
    children = Path(f"/proc/{here}/task/{here}/children").read_text().split()
    return sum(_pss_kb(int(pid)) for pid in (here, *children)) / 1024


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # it ended meanwhile
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    opened = open_checkpoint(options.model)
    encoder = Encoder(read_tokenizer(opened.folder, opened.config.language), opened.config, augment=True)
    loader = Loader(
        read_sets(make_set(folder, options.records, options.damaged)),
        encoder,
        0,
        BatchSettings(samples=8),
        workers=options.workers,
        on_error="quarantine",
        quarantine=folder / "quarantine.jsonl",
    )
    readings: list[tuple[int, float]] = []
    start, batches = time.perf_counter(), iter(loader)
    while loader.ledger.num_given < options.samples:
        next(batches)
        if loader.ledger.num_given >= EVERY * (len(readings) + 1):
            readings.append((loader.ledger.num_given, memory_mb()))
    seconds = time.perf_counter() - start
    batches.close()  # type: ignore[attr-defined]
    samples, used = np.asarray(readings).T
    late = samples > options.samples / 4
    slope, first = np.polyfit(samples[late], used[late], 1)
    ledger = loader.ledger
    return {
        "samples": options.samples,
        "workers": options.workers,
        "accepted": ledger.num_accepted,
        "rejected": ledger.num_rejected,
        "given": ledger.num_given,
        "samples per second": round(options.samples / seconds, 1),
        "MB after a quarter": round(float(first + slope * options.samples / 4), 1),
        "MB at the end": round(float(used[-1]), 1),
        "kB per 1000 samples": round(float(slope) * 1000 * 1024, 1),
        "MB a day": round(float(slope) * options.samples / seconds * 86400, 1),
        "spread MB": round(float(np.std(used[late] - first - slope * samples[late])), 2),
        "readings": [[int(count), round(value, 1)] for count, value in readings],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--records", type=int, default=2_000)
    parser.add_argument("--damaged", type=float, default=0.01, help="share of records whose picture is missing")
    parser.add_argument("--model", default="pocket", help="its tokenizer and tiles; no weight is read")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        found = measure(options, Path(made))
    for key, value in found.items():
        if key != "readings":
            print(f"{key}: {value}")
    print(f"written to {write('host_memory', found, {}, options.out)}")


if __name__ == "__main__":
    main()
