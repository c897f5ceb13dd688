"""InternVL 2.5: three stages on packed rows, and progressive scaling (paper 2.5, sections 3.2 and 3.3, table 3).

The ViT learns under a small language model only (stage 1.5 of 8b and 26b); every other size takes that ViT and warms up
a connector. So 1b, 2b and 4b begin with the ViT of 8b's stage 1.5, 38b and 78b with 26b's.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from internvl.train.recipes.official import Family, learning, packed, rates, second_full, second_lora, shared
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule

ROWS, ROW = 512, 16384
"""Packed rows a step, and positions in one (official shell/internvl2.5)."""


@dataclass(frozen=True)
class Size:
    """A column of paper 2.5, table 3; steps of stage 2 and weight decay from shell/internvl2.5/stage2."""

    release: str
    vision: str
    """Encoder that stage 1 starts from."""
    stage1_tokens: float
    """Billions."""
    stage2_steps: int
    peak_lr: float
    weight_decay: float
    drop_path: float
    stage1_5_tokens: float = 0.0
    """Billions; 0: this size has no such stage."""


_SMALL, _LARGE = "InternViT-300M-448px-V2_5", "InternViT-6B-448px-V2_5"
SIZES = {
    "1b": Size("InternVL2_5-1B", _SMALL, 191, 22000, 4e-5, 0.01, 0.1),
    "2b": Size("InternVL2_5-2B", _SMALL, 277, 22000, 4e-5, 0.01, 0.1),
    "4b": Size("InternVL2_5-4B", _SMALL, 164, 11000, 4e-5, 0.01, 0.1),
    "8b": Size("InternVL2_5-8B", "InternViT-300M-448px", 22, 5500, 4e-5, 0.05, 0.1, 76),
    "26b": Size("InternVL2_5-26B", "InternViT-6B-448px-V1-5", 31, 5500, 2e-5, 0.05, 0.4, 146),
    "38b": Size("InternVL2_5-38B", _LARGE, 107, 5500, 2e-5, 0.05, 0.4),
    "78b": Size("InternVL2_5-78B", _LARGE, 76, 5500, 2e-5, 0.05, 0.4),
}
RELEASES = {size: row.release for size, row in SIZES.items()}
VISION = {size: row.vision for size, row in SIZES.items()}


def stage1(size: str) -> RunConfig:
    """The connector alone: rate 2e-4, 512 rows a step, 100 warm-up steps, no drop path.

    Source: paper 2.5, table 3; official shell/internvl2.5/stage1. Steps follow from the tokens of the table: the
    scripts have 100,000, a placeholder.
    """
    row = SIZES[size]
    run = packed(shared(f"v2_5_stage1_{size}", f"runs/v2_5_base_{size}"), ROWS)
    run = rates(learning(run, "connector"), 2e-4, row.weight_decay)
    return replace(run, schedule=Schedule(steps=_steps(row.stage1_tokens, ROWS), warmup_steps=100))


def stage1_5(size: str) -> RunConfig:
    """ViT and connector, 8b and 26b only: rate 1e-5, 1,024 rows a step; this makes the ViT of all other sizes.

    Source: paper 2.5, section 3.2 and table 3; official shell/internvl2.5/stage1.5. Steps follow from the tokens.
    """
    row = SIZES[size]
    run = replace(stage1(size), out=f"runs/v2_5_stage1_5_{size}", model=f"runs/v2_5_stage1_{size}/model")
    run = rates(learning(run, "vision connector", row.drop_path), 1e-5, row.weight_decay)
    steps = _steps(row.stage1_5_tokens, 2 * ROWS)
    return replace(run, accumulate=2 * ROWS, schedule=Schedule(steps=steps, warmup_steps=100))


def stage2(size: str) -> RunConfig:
    """All parts, 512 rows a step, after stage 1, or 1.5 where there is one; 16.3 million samples.

    Source: paper 2.5, table 3; official shell/internvl2.5/stage2.
    """
    row = SIZES[size]
    before = "stage1_5" if row.stage1_5_tokens else "stage1"
    run = replace(stage1(size), out=f"runs/v2_5_stage2_{size}", model=f"runs/v2_5_{before}_{size}/model")
    run = rates(learning(run, "vision connector language", row.drop_path), row.peak_lr, row.weight_decay)
    return replace(run, schedule=Schedule(steps=row.stage2_steps, warmup_share=0.03))


def finetune(size: str) -> RunConfig:
    """Second fine-tuning in full: connector and language model, 128 a step, 8,192 positions, 6 tiles.

    Source: official shell/internvl2.5/2nd_finetune/*_finetune_full.sh.
    """
    row = SIZES[size]
    run = shared(f"v2_5_finetune_{size}", f"OpenGVLab/{row.release}")
    run = replace(run, data=replace(run.data, max_tiles=6, max_length=8192))
    return rates(second_full(run, row.drop_path), row.peak_lr, row.weight_decay)


def finetune_lora(size: str) -> RunConfig:
    """Second fine-tuning by LoRA 16 on the language model, 16 a step.

    Source: official shell/internvl2.5/2nd_finetune/*_finetune_lora.sh.
    """
    return replace(second_lora(finetune(size)), out=f"runs/v2_5_finetune_lora_{size}")


def _steps(billions: float, rows: int) -> int:
    """Steps that see so many tokens, rows counted as full."""
    return round(billions * 1e9 / (rows * ROW))


FAMILIES = (
    Family("v2_5_stage1", stage1, RELEASES, VISION),
    Family("v2_5_stage1_5", stage1_5, {size: row.release for size, row in SIZES.items() if row.stage1_5_tokens}),
    Family("v2_5_stage2", stage2, RELEASES),
    Family("v2_5_finetune", finetune, RELEASES),
    Family("v2_5_finetune_lora", finetune_lora, RELEASES),
)
