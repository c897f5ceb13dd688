"""Writes `values.json`, outputs that must not change unnoticed: `python tests/golden/make.py`, then look at the diff.

Weights come from a formula, not from a random generator, so that the values hold for any version of torch. They were
written by this package when it agreed with the recorded outputs of the official code (tests/reference.py).
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from internvl.data.images import normalise
from internvl.data.templates import TEMPLATES, render
from internvl.data.tiling import choose_grid, tile
from internvl.generate.captions import CaptionSearch, caption
from internvl.generate.engine import Engine, Request
from internvl.generate.sampling import Sampling
from internvl.models.build import build, build_dual
from internvl.models.chat import ChatModel
from internvl.models.connector import pixel_shuffle
from internvl.train.alignment import AlignmentBatch, Texts, alignment_losses
from internvl.train.losses import chunked_sum, shift
from internvl.zoo import CHAT, DUAL

FILE = Path(__file__).with_name("values.json")
MODELS = ("tiny-llama", "tiny-qwen2", "tiny-phi3", "tiny-internlm2", "tiny-6b-qwen2")
IMAGE_TOKEN_ID = 9
SIZES = ((448, 448), (800, 1300), (1024, 768), (1920, 1080), (1200, 400), (300, 2000))
MESSAGES = [
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "Hi."},
    {"role": "user", "content": "What is this?"},
]


def model_of(name: str) -> ChatModel:
    """Every weight from its place and the length of its name, as large as trained weights are."""
    model = build(CHAT[name])
    fill(model)
    model.image_token_id = IMAGE_TOKEN_ID
    return model.eval()


def fill(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 0:
                continue  # the logit scale has one initial value
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 0.61803 + len(key)) ** 3
            around = 1.0 if parameter.ndim == 1 and key.endswith("weight") else 0.0
            size = 0.3 if parameter.ndim == 1 else 1.5 / parameter.shape[-1] ** 0.5
            parameter.copy_((around + size * wave).view(parameter.shape))


def picture(width: int, height: int) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([3 * x + 5 * y, 7 * x + y, x * y], -1).astype(np.uint8))


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """Ids with the tokens of two tiles, and the tiles."""
    ids = torch.tensor([[1, 20, 31, *[IMAGE_TOKEN_ID] * 8, 42, 53, 64, 75, 2]])
    tiles = torch.stack([torch.from_numpy(np.array(picture(56, 56).rotate(90 * turn))) for turn in range(2)])
    return ids, tiles.permute(0, 3, 1, 2).contiguous()


def of_model(name: str) -> dict[str, Any]:
    model, (ids, tiles) = model_of(name), inputs()
    with torch.no_grad():
        states = model.vision(normalise(tiles, "imagenet"), -1)
        visual = model.encode_tiles(normalise(tiles, "imagenet"))
        hidden = model.hidden(ids, visual=visual)
        logits = model.language.head(hidden)[0]
        labels = ids.clone()
        labels[:, :11] = -100
        positions, targets, weights = shift(labels, torch.ones(ids.shape))
        learned = hidden.flatten(0, 1)[positions]
        loss = chunked_sum(learned, model.language.head, targets, weights, 4) / weights.sum()
    return {
        "vision": states[1, 5, :6].tolist(),
        "connector": visual[0, 2, :6].tolist(),
        "logits": logits[-1, :8].tolist(),
        "loss": float(loss),
        "greedy": greedy(model, ids[0], tiles),
    }


def greedy(model: ChatModel, ids: torch.Tensor, tiles: torch.Tensor) -> list[int]:
    request = Request(ids, tiles, Sampling(max_new_tokens=8))
    Engine(model).run([request])
    return request.tokens


def dual_inputs() -> AlignmentBatch:
    """Two pictures, each with texts for contrast, matching, captions and a foreign one; padded."""
    _, pictures = inputs()
    ids = torch.arange(3, 3 + 2 * 4 * 8).view(4, 2, 8)
    ids[:, :, 0] = 1
    lengths = torch.tensor([[8, 6], [7, 8], [8, 5], [4, 8]])
    masks = torch.arange(8) < lengths[:, :, None]
    ids = ids * masks
    contrast, match, captions, foreign = (Texts(*pair) for pair in zip(ids, masks, strict=True))
    labels = captions.ids.masked_fill(~captions.mask, -100)
    labels[:, :2] = -100
    return AlignmentBatch(normalise(pictures, "imagenet"), contrast, match, captions, labels, foreign)


def of_dual() -> dict[str, Any]:
    """InternVL-C and -G in small: embeddings, match, the three losses, gradients, a caption by beam search."""
    model, batch = build_dual(DUAL["tiny-dual"]), dual_inputs()
    fill(model)
    losses = alignment_losses(model, batch)
    sum(losses.values()).backward()
    with torch.no_grad():
        images = {head: model.encode_image(batch.pixel_values, head)[1, :6].tolist() for head in ("c", "g")}
        texts = model.encode_text(batch.contrast.ids)[1, :6].tolist()
        match = model.match(batch.pixel_values, batch.match.ids).tolist()
    return {
        **images,
        "texts": texts,
        "match": match,
        "losses": {name: float(loss.detach()) for name, loss in losses.items()},
        "gradients": {
            name: float(parameter.grad.norm())
            for name, parameter in model.named_parameters()
            if name in ("qllama.queries", "logit_scale", "text_projection", "qllama.layers.2.cross.k_proj.weight")
        },
        "caption": caption(model, batch.pixel_values, torch.tensor([1, 20, 31]), 2, CaptionSearch(3, 2, 6)),
    }


def values_without_models() -> dict[str, Any]:
    grid = torch.arange(16.0).view(1, 4, 4, 1)
    return {
        "pixel_shuffle": {v: pixel_shuffle(grid, 0.5, v).flatten().tolist() for v in ("v1", "v2")},
        "grids": {f"{w}x{h}": list(choose_grid(w, h, 1, 12, 448)) for w, h in SIZES},
        "tiles": [
            hashlib.sha256(part.tobytes()).hexdigest()[:16] for part in tile(picture(150, 90), 1, 6, True, 56).tiles
        ],
        "prompts": {name: render(MESSAGES, name) for name in sorted(TEMPLATES)},
    }


if __name__ == "__main__":
    models = {name: of_model(name) for name in MODELS}
    values = {"models": models, "dual": of_dual(), **values_without_models()}
    FILE.write_text(json.dumps(values, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
