"""How far an encoder names pictures by itself, without any language model.

    python benchmarks/nearest_names.py [--model pocket] [--data data/pocket] [--sets pictures] [--most 6000] [--ridge]

The ViT of a chat model or of `pocket-dual`, or `efficientnet-lite0`, the packaged CNN that knows ImageNet's classes; of
several, their features side by side. Features are the class token beside the mean of the patches, standardised. Each
picture takes the name of the nearest training picture by cosine; at most six pictures of a name are shown. With
`--ridge` (needs `internvl fetch judges`) also the name that a ridge from features to a sentence encoder's vectors puts
nearest, and how often it finds, of four held-out pictures, the one that a name is of: what questions about scenes ask.
A picture is right if the name holds an accepted answer, as `internvl evaluate` counts naming. It tells whether naming
waits for the ViT or for the language model. Deterministic, so one run; 27 ms a picture.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from measure import write
from ridge import Ridge
from torch import Tensor

from internvl.data.images import normalise, open_image
from internvl.data.tiling import single
from internvl.evaluate.vqa import contains
from internvl.generate.opening import is_dual_name
from internvl.load import load_checkpoint
from internvl.load_dual import load_dual
from internvl.models.internvit import InternViT
from internvl.train.sentences import open_sentences
from internvl.train.teachers import open_teacher

MOST_OF_A_NAME = 6
STRENGTH = 2000.0
"""Of the ridge; not tuned, so a better one may name a little more."""
PICTURES, DRAWS = 4, 20
"""To choose one from, and how often others are drawn for it."""

SIDE = 224
Encode = Callable[[Tensor], Tensor]
"""uint8 tiles -> (pictures, width)"""


def encoder(name: str) -> Encode:
    if name == "efficientnet-lite0":
        teacher = open_teacher(name)
        return lambda tiles: teacher.states(tiles, 1, 7)[:, 0, 0].float()
    vit: InternViT = (load_dual(name) if is_dual_name(name) else load_checkpoint(name)).model.vision

    def tokens(tiles: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            said = vit(normalise(tiles)).float()
        return torch.cat([said[:, 0], said[:, 1:].mean(1)], dim=-1)

    return tokens


@torch.inference_mode()
def features(encode: Encode, paths: Sequence[Path]) -> Tensor:
    parts = []
    for start in range(0, len(paths), 16):
        parts.append(encode(torch.cat([single(open_image(path), SIDE) for path in paths[start : start + 16]])))
    return torch.cat(parts)


def shown(files: Sequence[Path], most: int) -> list[tuple[Path, str]]:
    """Training pictures of one thing each, and its name; few of a name, spread over the files."""
    seen: Counter[str] = Counter()
    pairs = []
    for file in files:
        for record in map(json.loads, file.read_text(encoding="utf-8").splitlines()):
            if len(record.get("regions", [])) == 1:
                name = record["regions"][0]["text"]
                seen[name] += 1
                if seen[name] <= MOST_OF_A_NAME:
                    pairs.append((file.parent / record["image"], name))
    count = min(most, len(pairs))
    return [pairs[number * len(pairs) // count] for number in range(count)]


def by_ridge(known: Tensor, names: list[str], asked_of: Tensor, held: list[dict[str, Any]]) -> dict[str, float]:
    """Shares of right names among all of training, and of right pictures among a few whose names training knows."""
    sentences = open_sentences()
    fit = Ridge(known, sentences.encode(names), STRENGTH)
    pictures = fit.pictures(asked_of)
    options = sorted(set(names))
    best = (pictures @ fit.texts(sentences.encode(options)).T).argmax(1)
    right = [contains(options[int(place)], row["accept"]) for place, row in zip(best, held, strict=True)]
    says = pictures @ fit.texts(sentences.encode([_bare(row["answer"]) for row in held])).T
    seen = [place for place, row in enumerate(held) if row["name_seen"]]
    drawn, found = random.Random(0), []
    for place in seen * DRAWS:
        others = [n for n in seen if not set(held[n]["accept"]) & set(held[place]["accept"])]
        among = drawn.sample(others, PICTURES - 1)
        found.append(bool((says[place, place] > says[among, place]).all()))
    return {"named by ridge": sum(right) / len(right), f"chosen of {PICTURES}": sum(found) / len(found)}


def _bare(answer: str) -> str:
    return answer.removeprefix("a ").removeprefix("an ")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["pocket"])
    parser.add_argument("--data", type=Path, default=Path("data/pocket"), help="what `internvl data build` made")
    parser.add_argument(
        "--sets", nargs="+", default=["pictures"], help="of training pictures: NAME.jsonl in --data, or a path"
    )
    parser.add_argument("--most", type=int, default=6000, help="training pictures")
    parser.add_argument("--limit", type=int, default=None, help="held-out pictures")
    parser.add_argument("--ridge", action="store_true")
    parser.add_argument("--out", type=Path, default=None)
    asked = parser.parse_args()
    held = [json.loads(line) for line in (asked.data / "heldout" / "naming.jsonl").read_text().splitlines()]
    files = [path if (path := Path(name)).suffix else asked.data / f"{name}.jsonl" for name in asked.sets]
    held, pairs = held[: asked.limit], shown(files, asked.most)
    encoders = [encoder(name) for name in asked.model]
    known = torch.cat([features(encode, [path for path, _ in pairs]) for encode in encoders], dim=-1)
    asked_of = torch.cat([features(encode, [asked.data / row["image"] for row in held]) for encode in encoders], dim=-1)
    middle, spread = known.mean(0), known.std(0) + 1e-6
    nearest = (
        F.normalize((asked_of - middle) / spread, dim=-1) @ F.normalize((known - middle) / spread, dim=-1).T
    ).argmax(1)
    right = [contains(pairs[int(place)][1], row["accept"]) for place, row in zip(nearest, held, strict=True)]
    share = sum(right) / len(right)
    print(
        f"{share:.3f} of {len(held)} held-out pictures have the name of the nearest of {len(pairs)} training pictures"
    )
    names = {name for _, name in pairs}
    can = sum(any(contains(name, row["accept"]) for name in names) for row in held) / len(held)
    print(f"{can:.3f} have a name that some training picture has")
    found: dict[str, Any] = {
        "model": " + ".join(asked.model),
        "sets": " + ".join(path.stem for path in files),
        "training pictures": len(pairs),
        "held-out pictures": len(held),
    }
    found |= {"named": share, "named if all were told apart": can}
    if asked.ridge:
        shares = by_ridge(known, [name for _, name in pairs], asked_of, held)
        print(", ".join(f"{key} {value:.3f}" for key, value in shares.items()))
        found |= shares
    write("nearest_names", found, {"torch": torch.__version__}, asked.out)


if __name__ == "__main__":
    main()
