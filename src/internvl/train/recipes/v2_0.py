"""InternVL 2.0. Only second fine-tuning was published as scripts; the two stages before it are assumptions.

Stages are those of paper Mini-InternVL, section 3.2 (the connector, then everything); their numbers are the scripts'
of Mini-InternVL 1.5 and 1.5 (docs/parity.md).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from internvl.train.recipes.official import Family, batch, learning, rates, second_full, second_lora, shared
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule


@dataclass(frozen=True)
class Size:
    """What second fine-tuning changes with the size (official shell/internvl2.0/2nd_finetune)."""

    release: str
    peak_lr: float
    weight_decay: float
    drop_path: float


SIZES = {
    "1b": Size("InternVL2-1B", 4e-5, 0.01, 0.1),
    "2b": Size("InternVL2-2B", 4e-5, 0.01, 0.1),
    "4b": Size("InternVL2-4B", 4e-5, 0.01, 0.1),
    "8b": Size("InternVL2-8B", 4e-5, 0.05, 0.1),
    "26b": Size("InternVL2-26B", 2e-5, 0.05, 0.4),
    "40b": Size("InternVL2-40B", 2e-5, 0.05, 0.4),
    "76b": Size("InternVL2-Llama3-76B", 2e-5, 0.05, 0.4),
}
RELEASES = {size: row.release for size, row in SIZES.items()}


def stage1(size: str) -> RunConfig:
    """The connector alone.

    Source: paper Mini-InternVL, section 3.2 (what learns). Not published: rate 2e-4, 2,048 a step, 100 warm-up steps
    and 4,096 positions are those of Mini-InternVL-4B 1.5, which learns the same part.
    """
    run = batch(shared(f"v2_0_stage1_{size}", f"runs/v2_0_base_{size}"), 2048)
    run = rates(learning(run, "connector"), 2e-4, SIZES[size].weight_decay)
    return replace(run, schedule=Schedule(epochs=1, warmup_steps=100))


def stage2(size: str) -> RunConfig:
    """All parts on 7.3 million samples.

    Source: papers Mini-InternVL, section 3.2, and 2.5 (parts, samples). Not published: rate, decay and drop path are
    those of second fine-tuning, 1,024 a step and 8,192 positions those of Mini-InternVL 1.5.
    """
    row = SIZES[size]
    run = replace(stage1(size), out=f"runs/v2_0_stage2_{size}", model=f"runs/v2_0_stage1_{size}/model")
    run = batch(learning(run, "vision connector language", row.drop_path), 1024)
    run = rates(replace(run, data=replace(run.data, max_length=8192)), row.peak_lr, row.weight_decay)
    return replace(run, schedule=Schedule(epochs=1, warmup_share=0.03))


def finetune(size: str) -> RunConfig:
    """Second fine-tuning in full: connector and language model, 128 a step, 4,096 positions, 6 tiles.

    Source: official shell/internvl2.0/2nd_finetune/*_finetune_full.sh.
    """
    row = SIZES[size]
    run = shared(f"v2_0_finetune_{size}", f"OpenGVLab/{row.release}")
    run = replace(run, data=replace(run.data, max_tiles=6))
    return rates(second_full(run, row.drop_path), row.peak_lr, row.weight_decay)


def finetune_lora(size: str) -> RunConfig:
    """Second fine-tuning by LoRA 16 on the language model, 16 a step.

    Source: official shell/internvl2.0/2nd_finetune/*_finetune_lora.sh. (The COCO tutorial has rank 128, 512 a step.)
    """
    return replace(second_lora(finetune(size)), out=f"runs/v2_0_finetune_lora_{size}")


FAMILIES = (
    Family("v2_0_stage1", stage1, RELEASES),
    Family("v2_0_stage2", stage2, RELEASES),
    Family("v2_0_finetune", finetune, RELEASES),
    Family("v2_0_finetune_lora", finetune_lora, RELEASES),
)
