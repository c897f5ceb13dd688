"""Training a segmenter and scoring it on ADE20K's layout; both go on after a kill.

Every step's draws follow from seed and step, so a resumed run sees what an uninterrupted one would have seen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from internvl.data.images import open_image
from internvl.data.labelled import Masked, read_mask
from internvl.data.records import Problem
from internvl.data.sheet import Panel, Section
from internvl.evaluate.segment import Confusion, slide
from internvl.evaluate.segment_settings import SegmentSettings
from internvl.evaluate.segmenter import (
    IGNORED,
    Segmenter,
    groups,
    overlay,
    palette,
    rate_at,
    scaled_pixels,
    training_crop,
)
from internvl.models.heads import resize

SCORED_AT_ONCE = 50
"""Test pictures between two saves of the counts."""
Advance = Callable[[int], None]


def fit(
    model: Segmenter,
    data: Sequence[Masked],
    num_classes: int,
    settings: SegmentSettings,
    folder: Path,
    identity: str,
    *,
    reduce_zero: bool = True,
    advance: Advance = lambda count: None,
    stop: int | None = None,
) -> None:
    """AdamW on random crops, in place; `folder/segmenter.safetensors` is the state, and where a run goes on.

    `stop` ends earlier, saved: the rest is another call's.
    """
    chosen = _few(data, settings)
    optimiser = torch.optim.AdamW(groups(model, settings), lr=settings.learning_rate, betas=(0.9, 0.999))
    path = folder / "segmenter.safetensors"
    done = _resume(path, model, optimiser, identity)
    advance(done)
    model.train()
    last = settings.iterations if stop is None else min(stop, settings.iterations)
    device = next(model.head.parameters()).device
    for step in range(done, last):
        rng = np.random.default_rng((settings.seed, step))
        rows = rng.integers(len(chosen), size=settings.train_batch)
        crops = [_crop(chosen[int(row)], num_classes, settings.crop_px, rng, reduce_zero) for row in rows]
        pixels = torch.stack([crop for crop, _ in crops]).to(device)
        truth = torch.stack([mask for _, mask in crops]).to(device)
        for group in optimiser.param_groups:
            group["lr"] = settings.learning_rate * group["scale"] * rate_at(step, settings)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed((settings.seed * 1_000_003 + step) % (1 << 31))
            loss = _loss(model, pixels, truth, settings)
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
        if (step + 1) % settings.save_every == 0 or step + 1 == last:
            _save(path, model, optimiser, step + 1, identity)
        advance(1)


def _few(data: Sequence[Masked], settings: SegmentSettings) -> list[Masked]:
    if settings.share == 1:
        return list(data)
    order = np.random.default_rng(settings.seed).permutation(len(data))[: max(1, len(data) // settings.share)]
    return [data[int(place)] for place in order]


def _crop(
    item: Masked, num_classes: int, side: int, rng: np.random.Generator, reduce_zero: bool
) -> tuple[Tensor, Tensor]:
    return training_crop(*_opened(item, num_classes, reduce_zero), side, rng)


def _opened(item: Masked, num_classes: int, reduce_zero: bool) -> tuple[Image.Image, Tensor]:
    """Picture and mask; ValueError unless they are of one size."""
    picture, mask = open_image(item.picture), read_mask(item.mask, num_classes, reduce_zero=reduce_zero)
    if tuple(mask.shape) != (picture.height, picture.width):
        raise ValueError(
            f"{item.mask}: a mask of {mask.shape[1]} x {mask.shape[0]} px for a picture of {picture.width} x "
            f"{picture.height}; unpack the archive again"
        )
    return picture, mask


def _loss(model: Segmenter, pixels: Tensor, truth: Tensor, settings: SegmentSettings) -> Tensor:
    """Cross-entropy over all pixels, those not scored counted as 0 (mmsegmentation); the auxiliary one counts less."""
    main, second = model.both(pixels)
    loss = F.cross_entropy(resize(main, truth), truth, ignore_index=IGNORED, reduction="none").mean()
    if second is None:
        return loss
    other = F.cross_entropy(resize(second, truth), truth, ignore_index=IGNORED, reduction="none").mean()
    return loss + settings.auxiliary_weight * other


def _save(path: Path, model: Segmenter, optimiser: torch.optim.Optimizer, step: int, identity: str) -> None:
    tensors = {f"model.{key}": x for key, x in model.learned().items()}
    for number, state in optimiser.state_dict()["state"].items():
        tensors |= {f"adam.{number}.{name}": torch.as_tensor(x) for name, x in state.items()}
    whole = {key: x.detach().cpu().clone().contiguous() for key, x in tensors.items()}
    _write(path, whole, {"step": str(step), "identity": identity})


def _write(path: Path, tensors: dict[str, Tensor], said: dict[str, str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.part")
    save_file(tensors, str(scratch), metadata=said)
    os.replace(scratch, path)


def _resume(path: Path, model: Segmenter, optimiser: torch.optim.Optimizer, identity: str) -> int:
    """Steps done; model and optimiser as they were then."""
    tensors, said = _read(path, identity)
    if not said:
        return 0
    learned = {k.removeprefix("model."): x for k, x in tensors.items() if k.startswith("model.")}
    missing, unknown = model.load_state_dict(learned, strict=False)
    if unknown or [key for key in missing if key in model.learned()]:
        raise ValueError(f"{path}: of another segmenter ({[*missing, *unknown][:3]}); remove the file")
    state: dict[int, dict[str, Any]] = {}
    for key, x in tensors.items():
        if key.startswith("adam."):
            _, number, name = key.split(".", 2)
            state.setdefault(int(number), {})[name] = x
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(said["step"])


def _read(path: Path, identity: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        return {}, {}
    try:
        with safe_open(str(path), framework="pt") as file:
            said = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); remove the file to begin again") from error
    if said.get("identity") != identity:
        raise ValueError(f"{path}: of another run; give another --out, or remove the file to begin again")
    return tensors, said


@torch.inference_mode()
def predict(model: Segmenter, picture: Image.Image, settings: SegmentSettings) -> Tensor:
    """Class of every pixel of a picture at its own size."""
    device = next(model.head.parameters()).device
    pixels = scaled_pixels(picture, settings.crop_px, model.patch_size).to(device)
    scores = slide(model, pixels, crop=settings.crop_px, stride=settings.stride_px, multiple=model.patch_size)
    sized = F.interpolate(scores, (picture.height, picture.width), mode="bilinear", align_corners=False)
    return sized.argmax(1)[0].cpu()


def score(
    model: Segmenter,
    data: Sequence[Masked],
    num_classes: int,
    settings: SegmentSettings,
    folder: Path,
    identity: str,
    *,
    reduce_zero: bool = True,
    advance: Advance = lambda count: None,
) -> tuple[Confusion, list[Problem]]:
    """Counts over all test pictures, and what could not be used; `folder/confusion.safetensors` is where it goes on."""
    model.eval()
    confusion, path = Confusion(num_classes), folder / "confusion.safetensors"
    tensors, said = _read(path, identity)
    done, broken = int(said.get("done", 0)), [Problem(*pair.split("\t", 1)) for pair in _lines(said.get("broken", ""))]
    if said:
        confusion.counts, confusion.num_ignored = tensors["counts"], int(said["ignored"])
    advance(done)
    for place in range(done, len(data)):
        try:
            picture, truth = _opened(data[place], num_classes, reduce_zero)
            confusion.add(predict(model, picture, settings), truth)
        except (ValueError, OSError) as error:
            broken.append(Problem(str(data[place].picture), " ".join(str(error).split())))
        if (place + 1) % SCORED_AT_ONCE == 0 or place + 1 == len(data):
            lines = "\n".join(f"{one.source}\t{one.message}" for one in broken)
            said = {"identity": identity, "done": str(place + 1), "ignored": str(confusion.num_ignored)}
            _write(path, {"counts": confusion.counts.clone()}, {**said, "broken": lines})
        advance(1)
    return confusion, broken


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line]


def examples(
    model: Segmenter,
    data: Sequence[Masked],
    num_classes: int,
    settings: SegmentSettings,
    shown: int = 6,
    reduce_zero: bool = True,
) -> Section:
    """Pictures, their truth and what was predicted, in the same colours."""
    model.eval()
    colours, panels = palette(num_classes), []
    for place in sorted({round(n) for n in np.linspace(0, len(data) - 1, min(shown, len(data)))}):
        item = data[place]
        try:
            picture, truth = _opened(item, num_classes, reduce_zero)
            said = predict(model, picture, settings)
        except (ValueError, OSError):  # named by `score` already
            continue
        panels.append(Panel(picture, ((item.picture.name, "black"),)))
        panels.append(Panel(overlay(picture, truth, colours), (("truth", "black"),)))
        panels.append(Panel(overlay(picture, said, colours), (("predicted", "blue"),)))
    return Section("pictures, truth and prediction; places that are not scored keep their colours", tuple(panels))


def protocol(settings: SegmentSettings, taps: Sequence[int]) -> dict[str, Any]:
    """Every setting that changes the score."""
    own = ("weight_decay", "layer_decay", "drop_path")
    kept = {k: v for k, v in asdict(settings).items() if k != "save_every"}
    return {**kept, **{name: getattr(settings, name) for name in own}, "taps": list(taps)}
