"""Photo to normalised tiles: ours beside transformers' processor that needs no torchvision, in turns, the same pixels.

    python benchmarks/tiling.py [--rounds 15] [--threads 2] [--out benchmarks/results/tiling.json]

Both start from a decoded photo and end with float32 (7, 3, 448, 448): six tiles and a thumbnail. Beside them the limits
of the same run: Pillow's resizes alone, which fix the pixels, and decoding the JPEG. A processor that uses torchvision
makes other pixels (its resize works in 16-bit weights) and needs a torchvision that this torch has no build of.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import PIL
import torch
import transformers
from PIL import Image
from rich.console import Console
from rich.table import Table

from internvl.data.images import STATISTICS, normalise, open_image
from internvl.data.tiling import choose_grid, cut

SIZES = ((1344, 896), (1600, 1088))
MAX_TILES = 6


def photo(width: int, height: int) -> Image.Image:
    """Smooth shapes with noise: JPEG treats it as it treats a photo."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16, width // 16, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return Image.fromarray((smooth + rng.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8))


def interleaved(functions: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each function, called in turns so that a disturbance meets all alike."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name].append(1000 * (time.perf_counter() - start))
    return {
        name: {"median": round(statistics.median(found), 2), "min": round(min(found), 2), "max": round(max(found), 2)}
        for name, found in times.items()
    }


def measure(width: int, height: int, rounds: int) -> dict[str, object]:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    image = photo(width, height)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    content = buffer.getvalue()
    image = open_image(content)
    mean, deviation = STATISTICS["imagenet"]
    processor = GotOcr2ImageProcessorPil(
        size={"height": 448, "width": 448},
        crop_to_patches=True,
        min_patches=1,
        max_patches=MAX_TILES,
        image_mean=list(mean),
        image_std=list(deviation),
    )
    columns, rows = choose_grid(width, height, 1, MAX_TILES)

    def ours() -> torch.Tensor:
        return normalise(cut(image, 1, MAX_TILES))

    def theirs() -> torch.Tensor:
        return processor(images=image, return_tensors="pt")["pixel_values"]

    def resizes() -> None:
        if image.size != (columns * 448, rows * 448):
            image.resize((columns * 448, rows * 448), Image.Resampling.BICUBIC)
        image.resize((448, 448), Image.Resampling.BICUBIC)

    difference = float((ours() - theirs()).abs().max())
    if difference > 1e-5:
        raise SystemExit(f"the two disagree by {difference}: this is not the same work")
    functions = {"ours": ours, "transformers (Pil)": theirs, "Pillow's resizes alone": resizes}
    found = interleaved({**functions, "JPEG decode": lambda: open_image(content)}, rounds)
    return {
        "size": [width, height],
        "grid": [columns, rows],
        "jpeg_bytes": len(content),
        "largest_difference": difference,
        "milliseconds": found,
        "times_faster": round(found["transformers (Pil)"]["median"] / found["ours"]["median"], 2),
        "times_faster_by_minimum": round(found["transformers (Pil)"]["min"] / found["ours"]["min"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "tiling.json")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    results = [measure(*size, asked.rounds) for size in SIZES]
    table = Table(title=f"photo to 7 tiles, float32, ms (median of {asked.rounds}; {asked.threads} threads)")
    names = list(results[0]["milliseconds"])
    for heading in ("photo", *names, "ratio"):
        table.add_column(heading, justify="right")
    for result in results:
        cells = [f"{result['milliseconds'][name]['median']} [{result['milliseconds'][name]['min']}]" for name in names]
        table.add_row("x".join(map(str, result["size"])), *cells, f"{result['times_faster']}x")
    Console().print(table)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    report = {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit.strip(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "threads": asked.threads,
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__, "transformers": transformers.__version__},
        "results": results,
    }
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps(report, indent=1) + "\n")


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


if __name__ == "__main__":
    main()
