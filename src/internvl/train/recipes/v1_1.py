"""InternVL-Chat 1.1: the first chat model, InternViT-6B at 448 px over a Chinese LLaMA2-13B.

Published are the parts that learn and the number of samples (official docs, internvl1.1); rates are 1.2's.
"""

from __future__ import annotations

from dataclasses import replace

from internvl.train.recipes.official import Family, batch, learning, rates, shared
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule

RELEASE = {"": "InternVL-Chat-V1-1"}


def pretrain(size: str = "") -> RunConfig:
    """ViT and connector on 72 million image-text pairs; one tile a picture.

    Source: official docs, internvl1.1 (parts, pairs). Not published, so settings: rate 1e-5, decay 0.05, drop path 0.2
    and 100 warm-up steps as 1.5 has them, 8,192 pairs a step as 1.2 has them, 2,048 positions.
    """
    run = shared("v1_1_pretrain", "runs/v1_1_base")
    run = replace(run, data=replace(run.data, max_length=2048, max_tiles=1))
    run = batch(learning(run, "vision connector", drop_path=0.2), 8192)
    return replace(run, schedule=Schedule(epochs=1, warmup_steps=100))


def sft(size: str = "") -> RunConfig:
    """Connector and language model on about 6 million samples, from v1_1_pretrain.

    Source: official docs, internvl1.1 (parts, samples). Not published: rate, decay, batch, warm-up are 1.2's.
    """
    run = replace(pretrain(), out="runs/v1_1_sft", model="runs/v1_1_pretrain/model")
    run = batch(rates(learning(run, "connector language"), 1e-5, 0.05), 512)
    return replace(run, schedule=Schedule(epochs=1, warmup_share=0.03))


FAMILIES = (Family("v1_1_pretrain", pretrain, RELEASE), Family("v1_1_sft", sft, RELEASE))
