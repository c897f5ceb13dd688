"""Segmentation on a plain ViT: linear probe, few-shot, UperNet on a frozen or a trained encoder; its pictures.

Source: InternVL paper, table 23; official segmentation/configs/intern_vit_6b and mmsegmentation 0.30. The training is
segment_train.py's, scores are segment.py's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from internvl.data.images import normalise
from internvl.evaluate.segment_settings import SegmentSettings
from internvl.models.heads import AuxiliarySegmenter, FeaturePyramid, LinearSegmenter, UperNet, feature_map
from internvl.models.internvit import InternViT

TASKS = {"linear": "linear probe", "head": "head tuning", "full": "full tuning"}


def task_of(settings: SegmentSettings) -> str:
    """As evaluate/catalog.py spells it."""
    if settings.kind == "few":
        return f"few-shot segmentation, {'all' if settings.share == 1 else f'1/{settings.share}'} of the pictures"
    return f"segmentation, {TASKS[settings.kind]}"


IGNORED = 255
MAX_CLASS_SHARE = 0.75  # of the pixels of a training crop; ten draws are tried (official `cat_max_ratio`)
BRIGHTNESS, CONTRAST, SATURATION, HUE = (
    32,
    (0.5, 1.5),
    (0.5, 1.5),
    18,
)  # mmsegmentation PhotoMetricDistortion; degrees / 2


class Segmenter(nn.Module):
    """Pixels to class scores at the size of the finest map; frozen encoders stay in evaluation mode."""

    def __init__(self, vision: InternViT, num_classes: int, settings: SegmentSettings) -> None:
        super().__init__()
        config = vision.config
        if settings.crop_px % config.patch_size:
            raise ValueError(f"crops of {settings.crop_px} px; they must be a multiple of {config.patch_size}")
        self.learns, self.one_map, self.patch_size = settings.encoder_learns, settings.one_map, config.patch_size
        if self.learns:
            if next(vision.parameters()).dtype != torch.float32:
                raise ValueError(f"kind {settings.kind!r} adds small steps to weights and needs --dtype float32")
            vision = _copied(vision, settings.drop_path)
        self.vision = vision.requires_grad_(self.learns)
        width, depth = config.width, config.depth
        if self.one_map:  # frozen: of 48 blocks the 45th, official index 44; where the encoder learns its last
            self.taps: tuple[int, ...] = (depth if self.learns else max(depth - 3, 1),)
            self.head: nn.Module = LinearSegmenter(width, num_classes)
            return
        self.taps = tuple(max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4))  # 11, 23, 35, 47 of 0 to 47
        self.neck = FeaturePyramid(width)
        self.head = UperNet([width] * 4, settings.upernet_width, num_classes)
        tap = 2 if self.learns else 1
        self.auxiliary = AuxiliarySegmenter(width, settings.upernet_width, num_classes, tap)

    def train(self, mode: bool = True) -> Segmenter:
        super().train(mode)
        if not self.learns:
            self.vision.eval()
        return self

    def maps(self, pixels: Float[Tensor, "pictures 3 height width"]) -> list[Float[Tensor, "pictures dim _ _"]]:
        rows, columns = (side // self.patch_size for side in pixels.shape[-2:])
        with torch.set_grad_enabled(self.learns and torch.is_grad_enabled()):
            states = self.vision.taps(pixels, self.taps)
        return [feature_map(state[:, 1:].float(), rows, columns) for state in states]

    def forward(self, pixels: Float[Tensor, "pictures 3 height width"]) -> Float[Tensor, "pictures classes _ _"]:
        maps = self.maps(pixels)
        out: Tensor = self.head(maps if self.one_map else self.neck(maps))
        return out

    def both(self, pixels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scores, and those of the auxiliary head, which only training looks at."""
        maps = self.maps(pixels)
        if self.one_map:
            return self.head(maps), None
        levels = self.neck(maps)
        return self.head(levels), self.auxiliary(levels)

    def learned(self) -> dict[str, Tensor]:
        """What training changes: of a frozen encoder nothing."""
        state = self.state_dict()
        return state if self.learns else {k: x for k, x in state.items() if not k.startswith("vision.")}


def _copied(vision: InternViT, drop_path: float) -> InternViT:
    copy = InternViT(replace(vision.config, drop_path=drop_path))
    copy.load_state_dict(vision.state_dict())
    return copy.to(next(vision.parameters()).device)


def layer_level(name: str, depth: int) -> int:
    """How deep a parameter lies: embeddings 0, block i from 0 at i + 1, heads depth + 1."""
    if name.startswith("vision.embeddings."):
        return 0
    if name.startswith("vision.layers."):
        return int(name.split(".")[2]) + 1
    return depth + 1


def groups(model: Segmenter, settings: SegmentSettings) -> list[dict[str, object]]:
    """One parameter a group: its share of the rate, and weight decay, which biases, norms and positions go without."""
    depth = model.vision.config.depth
    made: list[dict[str, object]] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            bare = parameter.ndim == 1 or "embeddings." in name
            scale = settings.layer_decay ** (depth + 1 - layer_level(name, depth))
            decay = 0.0 if bare else settings.weight_decay
            made.append({"params": [parameter], "weight_decay": decay, "scale": scale})
    return made


def rate_at(step: int, settings: SegmentSettings) -> float:
    """Share of the peak: up from a millionth in a line, down to 0 in a line (mmcv `poly`, power 1)."""
    falling = 1 - step / settings.iterations
    if step < settings.warmup:
        return falling * (1 - (1 - step / settings.warmup) * (1 - 1e-6))
    return falling


def training_crop(
    picture: Image.Image, mask: Tensor, side: int, rng: np.random.Generator
) -> tuple[Float[Tensor, "3 side side"], Tensor]:
    """Resized to 0.5 to 2 times the crop, cut, flipped, its colours distorted; empty places are 0, not scored."""
    shorter = side * rng.uniform(0.5, 2.0)
    scale = shorter / min(picture.size)
    width, height = (max(1, round(edge * scale)) for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    mask = _nearest(mask, height, width)
    top, left = _place(mask, side, rng)
    picture = picture.crop((left, top, min(left + side, width), min(top + side, height)))
    mask = mask[top : top + side, left : left + side]
    if rng.random() < 0.5:
        picture, mask = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT), mask.flip(1)
    pixels = normalise(torch.from_numpy(distorted(np.array(picture), rng)).permute(2, 0, 1)[None].contiguous())[0]
    missing = (0, side - mask.shape[1], 0, side - mask.shape[0])
    return F.pad(pixels, missing), F.pad(mask, missing, value=IGNORED)


def _nearest(mask: Tensor, height: int, width: int) -> Tensor:
    out: Tensor = F.interpolate(mask[None, None].float(), (height, width), mode="nearest")[0, 0].long()
    return out


def _place(mask: Tensor, side: int, rng: np.random.Generator) -> tuple[int, int]:
    """Where to cut: of ten draws the first where no class fills more than three quarters."""
    height, width = mask.shape
    place = (0, 0)
    for _ in range(10):
        place = (int(rng.integers(max(height - side, 0) + 1)), int(rng.integers(max(width - side, 0) + 1)))
        part = mask[place[0] : place[0] + side, place[1] : place[1] + side]
        counts = torch.bincount(part[part != IGNORED], minlength=2)
        if int((counts > 0).sum()) > 1 and float(counts.max() / counts.sum()) < MAX_CLASS_SHARE:
            break
    return place


def distorted(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Brightness, contrast, saturation and hue, each at even odds; contrast before or after the colours."""
    x = picture.astype(np.float32)
    if rng.random() < 0.5:
        x = np.clip(x + rng.uniform(-BRIGHTNESS, BRIGHTNESS), 0, 255)
    first = rng.random() < 0.5
    contrast = rng.uniform(*CONTRAST) if rng.random() < 0.5 else 1.0
    x = np.clip(x * contrast, 0, 255) if first else x
    colours = np.array(Image.fromarray(x.astype(np.uint8)).convert("HSV")).astype(np.float32)
    if rng.random() < 0.5:
        colours[..., 1] = np.clip(colours[..., 1] * rng.uniform(*SATURATION), 0, 255)
    if rng.random() < 0.5:
        colours[..., 0] = (colours[..., 0] + rng.uniform(-HUE, HUE) * 256 / 180) % 256
    x = np.array(Image.fromarray(colours.astype(np.uint8), "HSV").convert("RGB")).astype(np.float32)
    return (x if first else np.clip(x * contrast, 0, 255)).astype(np.uint8)


def scaled_pixels(picture: Image.Image, crop: int, multiple: int) -> Float[Tensor, "1 3 height width"]:
    """The shorter side as long as a window (the longer at most four), both rounded up to whole patches."""
    shorter, longer = min(picture.size), max(picture.size)
    scale = min(crop / shorter, 4 * crop / longer)
    width, height = (math.ceil(max(1, round(edge * scale)) / multiple) * multiple for edge in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return normalise(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].contiguous())


def palette(num_classes: int) -> list[tuple[int, int, int]]:
    """A colour a class, far apart in hue for neighbours in number."""
    colours = []
    for place in range(num_classes):
        hsv = (int(place * 0.618034 * 256) % 256, 200 - 40 * (place % 3), 230 - 50 * (place // 3 % 2))
        red, green, blue = Image.new("HSV", (1, 1), hsv).convert("RGB").getpixel((0, 0))  # type: ignore[misc]
        colours.append((int(red), int(green), int(blue)))
    return colours


def overlay(picture: Image.Image, classes: Tensor, colours: Sequence[tuple[int, int, int]]) -> Image.Image:
    """Class colours over a picture; places without a class stay as they are."""
    table = np.array([*colours, (0, 0, 0)], dtype=np.float32)
    known = (classes != IGNORED).numpy()[..., None]
    painted = table[np.where(known[..., 0], classes.numpy(), len(colours))]
    base = np.array(picture).astype(np.float32)
    return Image.fromarray(np.where(known, 0.45 * base + 0.55 * painted, base).astype(np.uint8))
