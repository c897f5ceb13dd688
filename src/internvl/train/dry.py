"""A recipe in seconds: two steps on a tiny model of its family and generated records, every other setting kept.

It shows that a recipe runs to its exported model: parts, adapters, rates, packing, precision, checkpointing. Sizes and
loss values mean nothing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from internvl.config import ChatConfig
from internvl.train.log import Reporter
from internvl.train.recipes.tiny import COLOURS, byte_tokenizer
from internvl.train.run import RunConfig, differences, to_json
from internvl.train.settings import DUAL_STAGES, Schedule
from internvl.train.stage import Stage
from internvl.zoo import CHAT, DUAL, RELEASED, VIT_TINY, VIT_TINY_6B

STEPS = 2
MOST_SAMPLES, MOST_PAIRS, MOST_ACCUMULATED = 4, 8, 2
PATCHES_PX = 56
"""Of a tiny picture's four patches a side, as InternViT's sixteen take 224 px."""


@dataclass(frozen=True)
class Dry:
    """What a dry run did."""

    model: str
    steps: int
    losses: list[float]
    norm: float
    """Of the last gradient."""
    learns: list[str]
    """Groups of parameters, with their rate and weight decay."""
    changed: list[str]
    """Fields that are not the recipe's: before and after."""


def tiny_like(config: ChatConfig) -> ChatConfig:
    """A tiny model of the family, vision layout, token order, tap, tiling and template of `config`."""
    vision = VIT_TINY_6B if config.vision.qk_norm else VIT_TINY
    depth = vision.depth - 1 - config.feature_layer if config.feature_layer < 0 else vision.depth
    tiny, vision = CHAT[f"tiny-{config.language.family}"], replace(vision, depth=depth)
    return replace(
        config,
        vision=vision,
        queries=None if config.queries is None else replace(DUAL["tiny-dual"], vision=vision),
        language=tiny.language,
        tile_size=tiny.tile_size,
        system_message="Look.",
    )


def write_model(folder: Path, config: ChatConfig, seed: int = 0) -> None:
    """Random weights and a byte-level tokenizer, in the official layout."""
    from internvl.load import save_checkpoint
    from internvl.models.build import build

    tokenizer = byte_tokenizer()
    settings = {**config.language.settings, "vocab_size": len(tokenizer)}
    model = build(replace(config, language=replace(config.language, settings=settings)), seed=seed)
    save_checkpoint(model, tokenizer, folder)


def write_records(path: Path) -> None:
    """Pictures of several shapes, two pictures in one record, text alone: what a mixture has."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        picture = path.parent / f"{name}.png"
        Image.new("RGB", (56 * (1 + number % 3), 56 * (1 + number % 2)), colour).save(picture)
        turns = [{"from": "human", "value": "<image>\nColour?"}, {"from": "gpt", "value": name}]
        region = {"text": name, "box": [100, 100, 900, 900]}
        lines.append({"id": name, "image": picture.name, "conversations": turns, "regions": [region]})
    both = [lines[0]["image"], lines[1]["image"]]
    turns = [{"from": "human", "value": "<image>\n<image>\nSame?"}, {"from": "gpt", "value": "no"}]
    lines.append({"id": "both", "image": both, "conversations": turns})
    turns = [{"from": "human", "value": "One and two?"}, {"from": "gpt", "value": "three"}]
    lines.append({"id": "text", "conversations": turns})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def shrink(run: RunConfig, model: str, records: Path, out: Path) -> RunConfig:
    """The run on this model and these records, in two steps; every other setting as it is."""
    data, samples = run.data, run.data.batch_samples
    schedule = run.schedule
    teacher = run.distill.teacher
    return replace(
        run,
        out=str(out),
        model=model,
        start=(),
        data=replace(
            data,
            meta=str(records),
            held_out="",
            batch_samples=None if samples is None else min(samples, MOST_SAMPLES),
            workers=0,
            features_folder="",
        ),
        accumulate=min(run.accumulate, MOST_ACCUMULATED),
        schedule=Schedule(STEPS, None, schedule.warmup_steps, schedule.warmup_share),
        compile=False,
        device="cpu",
        log_every=1,
        save_every=0,
        eval_every=0,
        max_minutes=None,
        distill=replace(run.distill, teacher="tiny-6b-llama" if teacher else "", features_folder=""),
    )


def shrink_dual(run: RunConfig, folder: Path) -> RunConfig:
    """The same for a run over pairs or texts, on `tiny-dual` and colours, which are written where they are missing."""
    from internvl.train.recipes import tiny_text, v1_0

    model, teacher = folder / "tiny-dual", folder / "teacher"
    records = folder / "records" / ("texts.jsonl" if run.stage == "text" else "pairs.jsonl")
    if not model.is_dir():
        v1_0.write_tiny_model(model)
    if run.stage == "text" and not teacher.is_dir():
        tiny_text.write_tiny_teacher(teacher)
    if not records.is_file():
        (tiny_text.write_tiny_texts if run.stage == "text" else v1_0.write_tiny_pairs)(records)
    small = shrink(run, str(model), records, folder / "out")
    pairs = replace(run.pairs, output_head="")  # the tiny model has one
    if pairs.side is not None:
        pairs = replace(pairs, side=VIT_TINY.patch_size * (pairs.side // PATCHES_PX))
    return replace(
        small,
        data=replace(small.data, batch_samples=MOST_PAIRS),
        pairs=pairs,
        text=replace(run.text, teacher=str(teacher) if run.stage == "text" else run.text.teacher),
    )


def dry_run(run: RunConfig, release: str, folder: Path) -> Dry:
    """Two steps and the export, in `folder`, whose model and records are taken where they are there already.

    The shape is that of `release`, or of a name such as pocket; stages on InternVL-C and -G take `tiny-dual`.
    """
    from internvl.train.checkpoint import replace_text
    from internvl.train.loop import Trainer
    from internvl.train.stages import open_stage

    if run.stage in DUAL_STAGES or release in DUAL:
        name, small = "dual", shrink_dual(run, folder)
    else:
        name, small = _shrink_chat(run, release, folder)
    replace_text(folder / "out" / "run.json", json.dumps(to_json(small), indent=2) + "\n")
    stage: Stage = open_stage(small)
    seen = Quiet()
    trainer = Trainer(small, stage, (), seen)
    try:
        trainer.fit()
    finally:
        trainer.close()
    groups = [f"{g['part']} rate {g['lr_scale'] * small.optimiser.peak_lr:g}" for g in trainer.optimizer.param_groups]
    return Dry(
        f"tiny-{name}", trainer.step, seen.losses, seen.norm, list(dict.fromkeys(groups)), differences(run, small)
    )


def _shrink_chat(run: RunConfig, release: str, folder: Path) -> tuple[str, RunConfig]:
    config = tiny_like(RELEASED[release].config if release in RELEASED else CHAT[release or "pocket"])
    name = f"{config.language.family}-{'6b' if config.vision.qk_norm else '300m'}-{config.template}"
    name += f"{config.feature_layer}-{config.pixel_shuffle}-{config.tokens_per_tile}"
    model, records = folder / name, folder / "records" / "records.jsonl"
    if not model.is_dir():
        write_model(model, config)
    if not records.is_file():
        write_records(records)
    return name, shrink(run, str(model), records, folder / "out")


class Quiet(Reporter):
    """A reporter that keeps the numbers and prints nothing."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norm = 0.0

    def begin(self, step: int) -> None: ...

    def table(self, lines: Any) -> None: ...

    def step(self, step: int) -> None: ...

    def line(self, line: Any) -> None:
        if "loss" in line:
            self.losses.append(float(line["loss"]))
            self.norm = float(line["grad_norm"])

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...
