"""How far the ViT of a chat model names pictures by itself: each takes the name of the nearest training picture.

    python benchmarks/nearest_names.py [--model pocket] [--data data/pocket] [--most 6000]

Features are the class token beside the mean of the patches, standardised, compared by cosine; at most six pictures of a
name are shown. A picture is right if the name holds an accepted answer, as `internvl evaluate` counts naming. It tells
whether naming waits for the ViT or for the language model. Deterministic, so one run; 27 ms a picture.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from measure import write
from torch import Tensor

from internvl.data.images import normalise, open_image
from internvl.data.tiling import single
from internvl.evaluate.vqa import contains
from internvl.load import load_checkpoint
from internvl.models.internvit import InternViT

MOST_OF_A_NAME = 6


@torch.inference_mode()
def features(vit: InternViT, paths: Sequence[Path], side: int) -> Tensor:
    """(pictures, 2 x width)"""
    parts = []
    for start in range(0, len(paths), 16):
        tiles = torch.cat([single(open_image(path), side) for path in paths[start : start + 16]])
        with torch.autocast("cpu", torch.bfloat16):
            tokens = vit(normalise(tiles)).float()
        parts.append(torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], dim=-1))
    return torch.cat(parts)


def shown(data: Path, most: int) -> list[tuple[Path, str]]:
    """Training pictures of one thing each, and its name; few of a name, spread over the file."""
    seen: Counter[str] = Counter()
    pairs = []
    for line in (data / "pictures.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for region in record.get("regions", [])[:1]:
            seen[region["text"]] += 1
            if seen[region["text"]] <= MOST_OF_A_NAME:
                pairs.append((data / record["image"], region["text"]))
    count = min(most, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="pocket")
    parser.add_argument("--data", type=Path, default=Path("data/pocket"), help="what `internvl data build` made")
    parser.add_argument("--most", type=int, default=6000, help="training pictures")
    parser.add_argument("--limit", type=int, default=None, help="held-out pictures")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    model = load_checkpoint(asked.model).model
    held = [json.loads(line) for line in (asked.data / "heldout" / "naming.jsonl").read_text().splitlines()]
    held, pairs = held[: asked.limit], shown(asked.data, asked.most)
    side = model.config.tile_size
    known = features(model.vision, [path for path, _ in pairs], side)
    asked_of = features(model.vision, [asked.data / row["image"] for row in held], side)
    middle, spread = known.mean(0), known.std(0) + 1e-6
    nearest = (
        F.normalize((asked_of - middle) / spread, dim=-1) @ F.normalize((known - middle) / spread, dim=-1).T
    ).argmax(1)
    right = [contains(pairs[int(place)][1], row["accept"]) for place, row in zip(nearest, held, strict=True)]
    share = sum(right) / len(right)
    print(
        f"{share:.3f} of {len(held)} held-out pictures have the name of the nearest of {len(pairs)} training pictures"
    )
    found = {"model": asked.model, "training pictures": len(pairs), "held-out pictures": len(held), "named": share}
    write("nearest_names", found, {"torch": torch.__version__}, asked.out)


if __name__ == "__main__":
    main()
