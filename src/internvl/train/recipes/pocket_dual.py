"""How `pocket-dual` is made on two cores: InternVL-C and -G in small, from packaged base weights.

The ViT first learns from a CNN what pictures show, the text side from a sentence encoder what words mean. Then the ViT
is frozen, so each picture is seen once and its features stay in memory; the LLaMA learns through adapters, so that what
ships stays small. `runs/pocket-dual-base` holds the parts as one model in the official layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl.train.run import RunConfig
from internvl.train.settings import Data, Distill, Optimiser, Pairs, Part, Schedule, Text

BASE = "runs/pocket-dual-base"
DATA = "data/pocket_dual"


def pocket_dual_distill() -> RunConfig:
    """`pocket-dual`, before stage 1: LoRA 16 on the ViT learns from EfficientNet-Lite0, on two cores.

    Not in paper 1.0, whose ViT begins at random; the loss is Mini-InternVL's. The package's ViT was tuned for saliency,
    and captions are told apart better by what Lite0 says (docs/pocket-dual.md). Random parts of 40 % and more, mirrored
    or not: four thousand pictures are few. Command: internvl train pocket_dual_distill
    """
    return RunConfig(
        out="runs/pocket_dual_distill",
        stage="distill",
        model=BASE,
        vision=Part("lora", rank=16, dropout=0.0),
        data=Data(meta=f"{DATA}/english.jsonl", batch_samples=64, max_tiles=1, augment="off"),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(over="time", warmup_share=0.05),
        max_minutes=18.0,
        precision="bf16",
        log_every=10,
        save_every=50,
        distill=Distill("efficientnet-lite0", fit=512, relation=4.0, features="none", flip=True, area=(0.4, 1.0)),
    )


def pocket_dual_text() -> RunConfig:
    """`pocket-dual`, before stage 1: LoRA 16 on the LLaMA and its projection learn from all-MiniLM-L6-v2; two cores.

    Not in paper 1.0, whose LLaMA knows what sentences mean; arXiv 2004.09813 in all languages at once, in half an hour
    by the clock. From what pocket_dual_distill leaves, whose ViT it carries along. Betas as stage 1.
    Command: internvl train pocket_dual_text
    """
    return RunConfig(
        out="runs/pocket_dual_text",
        stage="text",
        model="runs/pocket_dual_distill/model",
        connector=Part("full"),
        language=Part("lora", rank=16, dropout=0.0),
        data=Data(
            meta=f"{DATA}/text.json",
            held_out=f"{DATA}/heldout/text.json",
            batch_samples=256,
            on_error="skip",
        ),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        schedule=Schedule(over="time", warmup_share=0.05),
        max_minutes=30.0,
        precision="bf16",
        log_every=10,
        save_every=100,
        eval_every=100,
        text=Text(),
    )


def pocket_dual_contrastive() -> RunConfig:
    """`pocket-dual`, stage 1: pooling, projection and LoRA 16 on the LLaMA, ViT frozen; two cores, twenty minutes.

    From what pocket_dual_text leaves; `--model runs/pocket-dual-base` is without it. Betas and peak of paper 1.0, table
    20 (the pictures' 1e-3), 0.3 of it for the adapters; no decay: it would pull adapters, not weights, to zero. 198 kB
    of features a picture (bf16). Command: internvl train pocket_dual_contrastive
    """
    return RunConfig(
        out="runs/pocket_dual_contrastive",
        stage="contrastive",
        model="runs/pocket_dual_text/model",
        connector=Part("full"),
        language=Part("lora", lr_scale=0.3, rank=16, dropout=0.0),
        data=Data(
            meta=f"{DATA}/meta.json",
            held_out=f"{DATA}/heldout/meta.json",
            held_out_samples=512,
            batch_samples=128,
            on_error="skip",
            features="memory",
        ),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        schedule=Schedule(over="time", warmup_share=0.03),
        max_minutes=20.0,
        precision="bf16",
        log_every=10,
        save_every=100,
        eval_every=500,
        pairs=Pairs(area=(1.0, 1.0)),
    )


def pocket_dual_generative() -> RunConfig:
    """`pocket-dual`, stage 2, from stage 1: queries, cross-attention and heads; ViT and LLaMA frozen; two cores.

    Frozen and learned parts, betas and decay as paper 1.0, table 20; peak 1e-3, twenty times the paper's, since new
    parts are a thousand times smaller. English alone, and foreign texts as the official code draws them: a third of the
    rows that negatives of the batch take, so more pairs in twenty minutes.
    Command: internvl train pocket_dual_generative
    """
    run = pocket_dual_contrastive()
    return replace(
        run,
        out="runs/pocket_dual_generative",
        stage="generative",
        model="runs/pocket_dual_contrastive/model",
        language=Part(),
        data=replace(run.data, meta=f"{DATA}/english.jsonl", batch_samples=48, held_out_samples=192),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.98), weight_decay=0.05),
    )


def prepare(run: RunConfig) -> None:
    """Assemble the base where a recipe starts from it; ValueError where the pairs or the run before are missing."""
    from internvl.pocket_dual import write_base
    from internvl.train.recipes.pocket import prepare as earlier

    if not Path(run.data.meta).is_file():
        made, of = ("texts", "texts") if run.stage == "text" else ("dual", "pairs")
        raise ValueError(
            f"{run.data.meta} is not there; `internvl data {made}` makes it, or give --data.meta a meta JSON of {of}"
        )
    if run.model == BASE and not (Path(BASE) / "config.json").is_file():
        write_base(Path(BASE), run.seed)
    earlier(run)
