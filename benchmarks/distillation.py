"""What distillation does to `pocket`'s ViT: 1-nearest-neighbour class accuracy on 213 stamps of 13 classes, held out.

    python benchmarks/distillation.py prepare --out data/distill [--limit 1500]
    internvl train pocket_distill
    python benchmarks/distillation.py score runs/pocket-base runs/pocket_distill/model [--out FILE]

Features, as for any frozen encoder: the tapped state, normalised over its channels; class token, mean over patches, and
both. The teacher's row has its pooled features. Pictures are seen at the model's tile size, on white.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import measure
import numpy as np
import torch
import torch.nn.functional as F

from internvl.compose import open_vision
from internvl.data.images import normalise
from internvl.data.stamp_classes import on_white, read_classes, write_others
from internvl.evaluate.neighbours import nearest_accuracy
from internvl.locate import locate
from internvl.train.teachers import LITE0, open_teacher

BATCH = 16


def tiles_of(paths: Sequence[Path], side: int) -> torch.Tensor:
    return torch.stack([torch.from_numpy(np.asarray(on_white(path, side)).copy()).permute(2, 0, 1) for path in paths])


@torch.inference_mode()
def student_rows(name: str, paths: Sequence[Path], labels: Sequence[str]) -> dict[str, float]:
    vision, seen = open_vision(locate(name))
    assert seen is not None
    parts = []
    for first in range(0, len(paths), BATCH):
        tiles = tiles_of(paths[first : first + BATCH], seen.tile_size)
        states = vision(normalise(tiles, seen.normalize), seen.feature_layer)
        states = F.layer_norm(states, states.shape[-1:])
        parts.append(torch.stack([states[:, 0], states[:, 1:].mean(1)], dim=1))
    both = torch.cat(parts)
    return {
        "class token": nearest_accuracy(both[:, 0], labels),
        "mean of patches": nearest_accuracy(both[:, 1], labels),
        "both": nearest_accuracy(both.flatten(1), labels),
    }


def teacher_row(paths: Sequence[Path], labels: Sequence[str]) -> dict[str, float]:
    teacher = open_teacher(LITE0)
    parts = [
        teacher.states(tiles_of(paths[first : first + BATCH], teacher.side), 1, teacher.grid)[:, 0, 0].float()
        for first in range(0, len(paths), BATCH)
    ]
    return {"both": nearest_accuracy(torch.cat(parts), labels)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    prepare = verbs.add_parser("prepare")
    prepare.add_argument("--out", type=Path, default=Path("data/distill"))
    prepare.add_argument("--limit", type=int)
    score = verbs.add_parser("score")
    score.add_argument("models", nargs="+")
    score.add_argument("--no-teacher", action="store_true")
    score.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.verb == "prepare":
        print(write_others(options.out, limit=options.limit))
        return
    pairs = read_classes()
    paths, labels = [path for path, _ in pairs], [label for _, label in pairs]
    began = time.perf_counter()
    rows = {} if options.no_teacher else {LITE0: teacher_row(paths, labels)}
    rows |= {name: student_rows(name, paths, labels) for name in options.models}
    print(f"{len(paths)} pictures, {len(set(labels))} classes, 1-NN accuracy (leave one out)")
    for name, row in rows.items():
        print(f"{name:<40}" + "  ".join(f"{kind} {value:.3f}" for kind, value in row.items()))
    found = {"pictures": len(paths), "classes": len(set(labels)), "accuracy": rows}
    seconds = round(time.perf_counter() - began, 1)
    print(measure.write("distillation", {**found, "seconds": seconds}, {"torch": torch.__version__}, options.out))


if __name__ == "__main__":
    main()
