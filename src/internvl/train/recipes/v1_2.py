"""InternVL-Chat 1.2 and 1.2-Plus: InternViT-6B without its last three blocks over Yi-34B, one tile a picture.

Tokens are in the v1 order: the official script forgets to say so and would train v2 (docs/parity.md).
"""

from __future__ import annotations

from dataclasses import replace

from internvl.train.recipes import v1_1
from internvl.train.recipes.official import Family, batch, learning, rates, second_full, second_lora
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule

RELEASE = {"": "InternVL-Chat-V1-2"}
PLUS = {"": "InternVL-Chat-V1-2-Plus"}


def pretrain(size: str = "") -> RunConfig:
    """ViT and connector: 4,800 steps of 8,192 samples, 39.3 million in all.

    Source: official docs, internvl1.2 (samples). Not published: rate, decay, drop path, warm-up; they are 1.5's.
    """
    run = replace(v1_1.pretrain(), out="runs/v1_2_pretrain", model="runs/v1_2_base")
    return replace(run, schedule=Schedule(steps=4800, warmup_steps=100))


def sft(size: str = "") -> RunConfig:
    """All parts on 1.2 million samples: rate 1e-5, 512 a step, decay 0.05, drop path 0.4.

    Source: official shell/internvl1.2/hermes2_yi34b/internvl_chat_v1_2_hermes2_yi34b_448_res_finetune.sh.
    """
    run = replace(pretrain(), out="runs/v1_2_sft", model="runs/v1_2_pretrain/model")
    run = batch(rates(learning(run, "vision connector language", drop_path=0.4), 1e-5, 0.05), 512)
    return replace(run, schedule=Schedule(epochs=1, warmup_share=0.03))


def plus(size: str = "") -> RunConfig:
    """1.2-Plus: as v1_2_sft, on 12 million samples and with a system text of its own.

    That text, `Answer the questions.`, belongs into `system_message` of the config.json it starts from.
    Source: model card of InternVL-Chat-V1-2-Plus (samples); its rates were not published and are v1_2_sft's.
    """
    return replace(sft(), out="runs/v1_2_plus")


def finetune(size: str = "") -> RunConfig:
    """Second fine-tuning of 1.2-Plus in full: connector and language model, rate 1e-5, 2,048 positions, no drop path.

    Source: official shell/internvl1.2/2nd_finetune/*_finetune_full.sh.
    """
    return replace(second_full(sft(), 0.0), out="runs/v1_2_finetune", model="OpenGVLab/InternVL-Chat-V1-2-Plus")


def finetune_lora(size: str = "") -> RunConfig:
    """Second fine-tuning of 1.2-Plus by LoRA 16 on the language model, rate 1e-5.

    Source: official shell/internvl1.2/2nd_finetune/*_finetune_lora.sh.
    """
    return replace(second_lora(finetune()), out="runs/v1_2_finetune_lora")


FAMILIES = (
    Family("v1_2_pretrain", pretrain, RELEASE, {"": "InternViT-6B-448px-V1-0"}),
    Family("v1_2_sft", sft, RELEASE),
    Family("v1_2_plus", plus, PLUS),
    Family("v1_2_finetune", finetune, PLUS),
    Family("v1_2_finetune_lora", finetune_lora, PLUS),
)
