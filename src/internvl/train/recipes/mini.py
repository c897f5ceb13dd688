"""Mini-InternVL: its distilled ViT, the two 1.5 models, domain adaptation. The 2.0 models are v2_0's 1b, 2b and 4b."""

from __future__ import annotations

from dataclasses import replace

from internvl.train.recipes.official import (
    Family,
    batch,
    learning,
    packed,
    rates,
    second_full,
    second_lora,
    shared,
)
from internvl.train.run import RunConfig
from internvl.train.settings import Distill, Optimiser, Part, Schedule

RELEASES = {"2b": "Mini-InternVL-Chat-2B-V1-5", "4b": "Mini-InternVL-Chat-4B-V1-5"}
DOMAINS = {"drivelm": (15100, 1), "bdd": (240, 8), "rs": (2500, 8), "medical": (2200, 8)}
"""Domain -> steps, and micro-batches of 8 GPUs in one (official shell/mini_internvl/domain_adaptation)."""
_DECAY = {"2b": 0.01, "4b": 0.05}


def distill(size: str = "") -> RunConfig:
    """InternViT-300M from InternViT-6B: cosine of hidden states, fixed 448 px tiles, one a picture.

    Source: paper Mini-InternVL, section 3.1 (student from CLIP ViT-L/14-336, loss, no tiling). Not published, so
    settings: the last state alone (K), a linear projection from 1,024 to 3,200 wide, and all rates, which are those of
    the ViT in 1.5's pre-training with a batch of 2,048 pictures.
    """
    run = shared("mini_distill", "runs/mini_base")
    run = replace(run, stage="distill", data=replace(run.data, batch_samples=32, grouped=False, max_tiles=1))
    return replace(
        run,
        vision=Part("full", drop_path=0.1),
        connector=Part(),
        optimiser=Optimiser(peak_lr=1e-4, weight_decay=0.05),
        schedule=Schedule(epochs=1, warmup_share=0.03),
        accumulate=2048 // 32,
        distill=Distill("OpenGVLab/InternViT-6B-448px-V1-5", features="none"),
    )


def pretrain(size: str) -> RunConfig:
    """2b: ViT and connector, rate 2e-5, drop path 0.1; 4b: the connector alone, rate 2e-4. 2,048 a step.

    Source: official shell/internvl1.5/internlm2_1_8b and phi3_3_8b, *_pretrain.sh. (The paper has the
    connector alone for both.)
    """
    run = batch(shared(f"mini_pretrain_{size}", f"runs/mini_base_{size}"), 2048)
    run = replace(run, schedule=Schedule(epochs=1, warmup_steps=100))
    if size == "4b":
        return rates(learning(run, "connector"), 2e-4, _DECAY[size])
    return rates(learning(run, "vision connector", drop_path=0.1), 2e-5, _DECAY[size])


def sft(size: str) -> RunConfig:
    """All parts: rate 4e-5, 1,024 a step, 8,192 positions, drop path 0.1.

    Source: official shell/internvl1.5/internlm2_1_8b and phi3_3_8b, *_finetune.sh. (The 4b script starts from its own
    output; here from the pre-training's.)
    """
    run = replace(pretrain(size), out=f"runs/mini_sft_{size}", model=f"runs/mini_pretrain_{size}/model")
    run = replace(run, data=replace(run.data, max_length=8192), schedule=Schedule(epochs=1, warmup_share=0.03))
    return batch(rates(learning(run, "vision connector language", drop_path=0.1), 4e-5, _DECAY[size]), 1024)


def finetune(size: str) -> RunConfig:
    """Second fine-tuning in full: connector and language model, rate 4e-5, 128 a step, 4,096 positions.

    Source: official shell/internvl1.5/2nd_finetune/*_finetune_full.sh.
    """
    run = shared(f"mini_finetune_{size}", f"OpenGVLab/{RELEASES[size]}")
    return rates(second_full(run, 0.1), 4e-5, _DECAY[size])


def finetune_lora(size: str) -> RunConfig:
    """Second fine-tuning by LoRA 16 on the language model, rate 4e-5, 16 a step.

    Source: official shell/internvl1.5/2nd_finetune/*_finetune_lora.sh.
    """
    return replace(second_lora(finetune(size)), out=f"runs/mini_finetune_lora_{size}")


def adapt(key: str) -> RunConfig:
    """Domain adaptation of InternVL2 1b, 2b or 4b: all parts, rate 1e-5, decay 0.01, drop path 0.1, packed rows.

    `key` is `bdd_2b` and the like. General data is mixed in at 1:4 (DriveLM) or 1:1 (BDD) of the domain's, by
    `repeat_time` in the meta JSON. A sample has at most 8,192 positions, a row 16,384. Source: paper Mini-InternVL,
    section 4; official shell/mini_internvl/domain_adaptation (8 GPUs, steps as in DOMAINS).
    """
    domain, size = key.split("_")
    steps, micro = DOMAINS[domain]
    run = packed(shared(f"mini_adapt_{key}", f"OpenGVLab/InternVL2-{size.upper()}"), 8 * micro)
    run = rates(learning(run, "vision connector language", drop_path=0.1), 1e-5, 0.01)
    return replace(run, data=replace(run.data, max_length=8192), schedule=Schedule(steps=steps, warmup_share=0.03))


_NAMES = {"drivelm": "Drivelm", "bdd": "BDD", "rs": "RS", "medical": "Medical"}
ADAPTED = {
    f"{domain}_{size}": f"Mini-InternVL2-{size.upper()}-DA-{name}"
    for domain, name in _NAMES.items()
    for size in ("1b", "2b", "4b")
}
FAMILIES = (
    Family("mini_distill", distill, {"": RELEASES["2b"]}),
    Family("mini_pretrain", pretrain, RELEASES),
    Family("mini_sft", sft, RELEASES),
    Family("mini_finetune", finetune, RELEASES),
    Family("mini_finetune_lora", finetune_lora, RELEASES),
    Family("mini_adapt", adapt, ADAPTED),
)
