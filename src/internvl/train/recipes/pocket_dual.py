"""How `pocket-dual` is made on two cores: InternVL-C and -G in small, from packaged base weights.

The ViT is frozen, so each picture is seen once and its features stay in memory; the LLaMA learns through adapters, so
that what ships stays small. `runs/pocket-dual-base` holds the parts as one model in the official layout.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Pairs, Part, Schedule

BASE = "runs/pocket-dual-base"
DATA = "data/pocket_dual"


def pocket_dual_contrastive() -> RunConfig:
    """`pocket-dual`, stage 1: pooling, projection and LoRA 16 on the LLaMA, ViT frozen; two cores.

    Betas and peak of paper 1.0, table 20 (the pictures' 1e-3), half of it for the adapters; no decay: it would pull
    adapters, not weights, to zero. 198 kB of features a picture (bf16). `--schedule.steps None --schedule.over time
    --max-minutes 60` makes it end by the clock. Command: internvl train pocket_dual_contrastive
    """
    return RunConfig(
        out="runs/pocket_dual_contrastive",
        stage="contrastive",
        model=BASE,
        connector=Part("full"),
        language=Part("lora", lr_scale=0.5, rank=16, dropout=0.0),
        data=Data(
            meta=f"{DATA}/meta.json",
            held_out=f"{DATA}/heldout/meta.json",
            held_out_samples=512,
            batch_samples=128,
            on_error="skip",
            features="memory",
        ),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0),
        schedule=Schedule(steps=1500, warmup_share=0.03),
        precision="bf16",
        log_every=10,
        save_every=100,
        eval_every=500,
        pairs=Pairs(area=(1.0, 1.0)),
    )


def pocket_dual_generative() -> RunConfig:
    """`pocket-dual`, stage 2, from stage 1: queries, cross-attention and heads; ViT and LLaMA frozen; two cores.

    Frozen and learned parts, betas and decay as paper 1.0, table 20; peak 5e-4, ten times the paper's, since new parts
    are a thousand times smaller; hard negatives of the batch (BLIP-2), which small data needs.
    Command: internvl train pocket_dual_generative
    """
    run = pocket_dual_contrastive()
    return replace(
        run,
        out="runs/pocket_dual_generative",
        stage="generative",
        model="runs/pocket_dual_contrastive/model",
        language=Part(),
        data=replace(run.data, batch_samples=24, held_out_samples=192),
        optimiser=Optimiser(peak_lr=5e-4, betas=(0.9, 0.98), weight_decay=0.05),
        schedule=Schedule(steps=4000, warmup_share=0.03),
        pairs=replace(run.pairs, negatives="hard"),
    )


def prepare(run: RunConfig) -> None:
    """Assemble the base where a recipe starts from it; ValueError where the pairs or the run before are missing."""
    from internvl.pocket_dual import write_base
    from internvl.train.recipes.pocket import prepare as earlier

    if not Path(run.data.meta).is_file():
        raise ValueError(
            f"{run.data.meta} is not there; `internvl data dual` makes it, or give --data.meta a meta JSON of pairs"
        )
    if run.model == BASE and not (Path(BASE) / "config.json").is_file():
        write_base(Path(BASE), run.seed)
    earlier(run)
