"""InternVL-Chat 1.5: dynamic tiles, InternLM2-20B; and its variant over Yi-34B, whose weights were not released."""

from __future__ import annotations

from dataclasses import replace

from internvl.train.recipes.official import Family, batch, learning, rates, second_full, second_lora, shared
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule

RELEASES = {"20b": "InternVL-Chat-V1-5", "34b": "InternVL2-40B"}
"""Size of the language model -> shape. The variant over Yi-34B has that of InternVL2-40B."""


def pretrain(size: str = "20b") -> RunConfig:
    """20b: ViT and connector, rate 1e-5, drop path 0.2; 34b: the connector alone, rate 1e-4.

    2,048 samples a step, 100 warm-up steps, 4,096 positions, 12 tiles. Data by kind: captions 53.9 %, large OCR 32.0 %,
    small OCR 8.9 %, detection 5.2 % (paper 1.5, table 1a). Source: official shell/internvl1.5.
    """
    run = batch(shared(f"v1_5_pretrain_{size}", f"runs/v1_5_base_{size}"), 2048)
    run = replace(run, schedule=Schedule(epochs=1, warmup_steps=100))
    if size == "34b":
        return rates(learning(run, "connector"), 1e-4, 0.05)
    return rates(learning(run, "vision connector", drop_path=0.2), 1e-5, 0.05)


def sft(size: str = "20b") -> RunConfig:
    """All parts on 5.1 million samples: rate 2e-5, 1,024 a step, drop path 0.4.

    Source: official shell/internvl1.5/*_finetune.sh; paper 2.5 (samples).
    """
    run = replace(pretrain(size), out=f"runs/v1_5_sft_{size}", model=f"runs/v1_5_pretrain_{size}/model")
    run = batch(rates(learning(run, "vision connector language", drop_path=0.4), 2e-5, 0.05), 1024)
    return replace(run, schedule=Schedule(epochs=1, warmup_share=0.03))


def finetune(size: str = "20b") -> RunConfig:
    """Second fine-tuning in full: connector and language model, rate 2e-5, 128 a step, 4,096 positions.

    Source: official shell/internvl1.5/2nd_finetune/*_finetune_full.sh.
    """
    return replace(second_full(sft(size), 0.4), out=f"runs/v1_5_finetune_{size}", model="OpenGVLab/InternVL-Chat-V1-5")


def finetune_lora(size: str = "20b") -> RunConfig:
    """Second fine-tuning by LoRA 16 on the language model, rate 2e-5, 16 a step.

    Source: official shell/internvl1.5/2nd_finetune/*_finetune_lora.sh.
    """
    return replace(second_lora(finetune(size)), out=f"runs/v1_5_finetune_lora_{size}")


_RELEASED = {"20b": RELEASES["20b"]}
FAMILIES = (
    Family("v1_5_pretrain", pretrain, RELEASES, {"20b": "InternViT-6B-448px-V1-2", "34b": "InternViT-6B-448px-V1-5"}),
    Family("v1_5_sft", sft, RELEASES),
    Family("v1_5_finetune", finetune, _RELEASED),
    Family("v1_5_finetune_lora", finetune_lora, _RELEASED),
)
