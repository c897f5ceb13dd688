"""Rehearsals of few blocks say what a rehearsal of all of them does, to the byte: peak, gradients and logits there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl.config import ChatConfig
from internvl.train import rehearse as rehearsals
from internvl.train.depths import Stack, deepen, shallow
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.rehearse import chat_stacks, rehearse
from internvl.train.run import RunConfig
from internvl.train.settings import Part, Schedule, Tokens
from internvl.zoo import CHAT
from test_plan_run import FULL, MEASURES

LORA = {"vision": Part("lora", rank=4), "connector": Part("full"), "language": Part("lora", rank=4)}
BF16 = {"precision": "bf16", "grad_checkpoint": True}
TAIL = {"vision": Part("full", layers_from=-2), "connector": Part("full"), "language": Part("full")}
DROP = {**FULL, "vision": Part("full", drop_path=0.3)}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], bool]] = {
    "full": ("tiny-llama", FULL, (7, 9), False),
    "full, bf16, checkpointing, two micro-batches": ("tiny-qwen2", {**FULL, **BF16, "accumulate": 2}, (6, 8), True),
    "checkpointing": ("tiny-phi3", {**FULL, "grad_checkpoint": True}, (5, 9), False),
    "adapters": ("tiny-6b-qwen2", LORA, (9, 6), True),
    "adapters, bf16, checkpointing, two": ("tiny-llama", {**LORA, **BF16, "accumulate": 2}, (6, 7), False),
    "connector and token rows": ("tiny-internlm2", {"connector": Part("full"), "tokens": Tokens(learn=True)}, (8, 8), 0),
    "last vision blocks, checkpointing": ("tiny-llama", {**TAIL, "grad_checkpoint": True}, (9, 7), False),
    "drop path": ("tiny-llama", DROP, (8, 6), False),
    "a tap before the last block": ("tiny-1.0", FULL, (12, 6), False),
    "queries": ("tiny-1.0-qllama", {"connector": Part("full"), "language": Part("full")}, (12, 7), False),
}  # fmt: skip


def deep(name: str, depths: tuple[int, int]) -> ChatConfig:
    return MEASURES.grown(shallow(CHAT[name], {"vision": depths[0], "language": depths[1]}))


@pytest.mark.parametrize("name", CASES)
def test_few_blocks_say_what_all_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, changes, depths, packed = CASES[name]
    config = deep(model, depths)
    run = RunConfig(schedule=Schedule(steps=1), **changes)
    batch = MEASURES.batch_of(config, 2, 40, 2, 20, packed)
    for tokens in (batch, MEASURES.batch_of(config, 2, 700, 1, 690, packed)):  # another moment is the worst
        whole = rehearse(run, config, byte_tokenizer(), tokens, whole=True)
        assert rehearse(run, config, byte_tokenizer(), tokens) == whole
