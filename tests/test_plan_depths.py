"""Rehearsals of few blocks say what a rehearsal of all of them does, to the byte: peak, gradients and logits there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl.batch import TextBatch
from internvl.config import ChatConfig, DualConfig
from internvl.plan_run import Subject, changes, open_outlook, subject
from internvl.train.alive import Memory, Peak, Trace
from internvl.train.cells import Cells
from internvl.train.depths import Stack, deepen, shallow
from internvl.train.outlook_joint import blank_texts
from internvl.train.outlook_pairs import PairOutlook
from internvl.train.recipes import tiny_text, v1_0
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.rehearse import chat_stacks, rehearse
from internvl.train.rehearse_others import rehearse_align, rehearse_pairs, rehearse_text
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Pairs, Part, Schedule, Tokens
from internvl.zoo import CHAT, DUAL
from test_plan_run import FULL, MEASURES

LORA = {"vision": Part("lora", rank=4), "connector": Part("full"), "language": Part("lora", rank=4)}
BF16 = {"precision": "bf16", "grad_checkpoint": True}
ROWS = {"connector": Part("full"), "tokens": Tokens(learn=True)}
TAIL = {"vision": Part("full", layers_from=-2), "connector": Part("full"), "language": Part("full")}
DROP = {**FULL, "vision": Part("full", drop_path=0.3)}
CASES: dict[str, tuple[str, dict[str, Any], tuple[int, int], bool]] = {
    "full": ("tiny-llama", FULL, (7, 9), False),
    "full, bf16, checkpointing, two micro-batches": ("tiny-qwen2", {**FULL, **BF16, "accumulate": 2}, (6, 8), True),
    "checkpointing": ("tiny-phi3", {**FULL, "grad_checkpoint": True}, (5, 9), False),
    "adapters": ("tiny-6b-qwen2", LORA, (9, 6), True),
    "adapters, bf16, checkpointing, two": ("tiny-llama", {**LORA, **BF16, "accumulate": 2}, (6, 7), False),
    "connector and token rows": ("tiny-internlm2", ROWS, (8, 8), False),
    "last vision blocks, checkpointing": ("tiny-llama", {**TAIL, "grad_checkpoint": True}, (9, 7), False),
    "drop path": ("tiny-llama", DROP, (8, 6), False),
    "a tap before the last block": ("tiny-1.0", FULL, (12, 6), False),
    "queries": ("tiny-1.0-qllama", {"connector": Part("full"), "language": Part("full")}, (12, 7), False),
}  # fmt: skip


def deep(name: str, depths: tuple[int, int]) -> ChatConfig:
    config: ChatConfig = MEASURES.grown(shallow(CHAT[name], {"vision": depths[0], "language": depths[1]}))
    return config


@pytest.mark.parametrize("name", CASES)
def test_few_blocks_say_what_all_do(name: str) -> None:
    model, changes, depths, packed = CASES[name]
    config = deep(model, depths)
    run = RunConfig(schedule=Schedule(steps=1), **changes)
    batch = MEASURES.batch_of(config, 2, 40, 2, 20, packed)
    for tokens in (batch, MEASURES.batch_of(config, 2, 700, 1, 690, packed)):  # another moment is the worst
        whole = rehearse(run, config, byte_tokenizer(), tokens, whole=True)
        assert rehearse(run, config, byte_tokenizer(), tokens) == whole


# dual models


def of_pairs(folder: Path, stage: str, **changes: Any) -> RunConfig:
    run = v1_0.tiny_contrastive() if stage == "contrastive" else v1_0.tiny_generative()
    data = Data(meta=str(folder / "pairs.jsonl"), batch_samples=6)
    base: dict[str, Any] = {"model": "tiny-dual", "data": data, "device": "cpu", "stage": stage, "pairs": Pairs()}
    return replace(run, **{**base, **changes})


PAIRS: dict[str, tuple[str, dict[str, Any], tuple[int, int]]] = {
    "masked, in pieces": ("contrastive", {"pairs": Pairs(micro_batch=4, mask_share=0.5)}, (6, 8)),
    "generative, last blocks": ("generative", {**TAIL, "grad_checkpoint": True}, (8, 10)),
    "generative, an odd depth": ("generative", {}, (5, 11)),
    "retrieval, hard, in pieces": (
        "generative",
        {**FULL, "precision": "bf16", "pairs": Pairs(losses="retrieval", negatives="hard", micro_batch=4)},
        (6, 10),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_few_blocks_of_a_dual_model(tmp_path: Path, name: str) -> None:
    """Every second block of QLLaMA looks at the picture."""
    stage, changes, depths = PAIRS[name]
    v1_0.write_tiny_pairs(tmp_path / "pairs.jsonl")
    run = of_pairs(tmp_path, stage, **changes)
    about = subject(run)
    assert isinstance(about.config, DualConfig)
    outlook = open_outlook(replace(about, config=shallow(about.config, {"vision": depths[0], "language": depths[1]})))
    assert isinstance(outlook, PairOutlook)
    batch = outlook.blank(outlook.parts[0])
    whole = rehearse_pairs(run, outlook.config, batch, outlook.side, whole=True)
    assert rehearse_pairs(run, outlook.config, batch, outlook.side) == whole


def test_few_blocks_of_texts_and_of_alignment(tmp_path: Path) -> None:
    """One part runs; of the other, weights alone are there."""
    config = shallow(DUAL["tiny-dual"], {"vision": 8, "language": 9})
    run = replace(tiny_text.tiny_text(), model="tiny-dual", language=Part("lora"), grad_checkpoint=True)
    batch = TextBatch(blank_texts(np.array([5, 9, 7])), torch.zeros(3, dtype=torch.long), torch.zeros(3).bool())
    assert rehearse_text(run, config, batch, 11) == rehearse_text(run, config, batch, 11, whole=True)
    chat = deep("tiny-llama", (9, 6))
    run = RunConfig(stage="align", schedule=Schedule(steps=1), vision=Part("full"), connector=Part("full"))
    looked, tokens = torch.arange(5), torch.zeros(5, dtype=torch.long)
    pixels = torch.zeros(2, 3, chat.tile_size, chat.tile_size, dtype=torch.uint8)
    nothing = torch.zeros(5)
    cells = Cells(pixels, (), (), tokens, looked, tokens, nothing, looked, torch.zeros(5, 4), nothing, ("", ""))
    assert rehearse_align(run, chat, cells, 7) == rehearse_align(run, chat, cells, 7, whole=True)


# depths


@given(st.integers(1, 40), st.integers(1, 4), st.integers(0, 5))
def test_blocks_that_say_it_all(depth: int, period: int, apart: int) -> None:
    """Both depths have the same places, and none of the places is of two blocks."""
    stack = Stack("some", depth, period, apart)
    few, more = stack.fewest, stack.fewest + stack.period
    assert few <= depth
    if few == depth:
        assert not any(stack.places(index, depth) for index in range(depth))
        return
    assert (depth - few) % period == 0
    found = [[place for index in range(some) for place in stack.places(index, some)] for some in (few, more)]
    assert all(len(set(places)) == len(places) for places in found)
    assert set(found[0]) == set(found[1])
    assert all(stack.places(index, more) for index in range(more))


def test_shallow_models_need_no_more_than_they_have() -> None:
    """Where blocks are not alike, or too few to save any, all are rehearsed."""
    seen: list[int] = []

    def rehearsed(depths: Any) -> Trace:
        seen.append(depths["some"])
        return Trace(depths["some"], 0, 0, 0, 0, {"mark": Peak(7 + 2 * depths["some"], 1, 0)})

    assert deepen([Stack("some", 4)], rehearsed).parameters == 4
    assert deepen([Stack("some", 90)], rehearsed).memory.peak == 187
    assert seen == [4, 3, 4]
    first = RunConfig(schedule=Schedule(steps=1), **{**FULL, "vision": Part("full", layers_from=3)})
    config = deep("tiny-llama", (9, 9))
    assert [stack.name for stack in chat_stacks(first, config)] == ["language"]
    kinds = {"layer_types": ["full_attention"] * 8 + ["sliding_attention"]}
    unlike = replace(config, language=replace(config.language, settings={**config.language.settings, **kinds}))
    assert [stack.name for stack in chat_stacks(first, unlike)] == []


def test_a_kind_of_change_that_never_suffices_is_rehearsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    about = Subject(
        RunConfig(schedule=Schedule(steps=1), data=Data(batch_samples=64), **FULL), CHAT["tiny-llama"], None
    )
    seen: list[RunConfig] = []

    def memory(some: Subject, *_: Any) -> Memory:
        seen.append(some.run)
        return Memory(10, 20, 10, 100, 10, 0, 10, 1)

    monkeypatch.setattr("internvl.plan_run._memory", memory)
    as_it_is = Memory(10, 20, 10, 200, 10, 0, 10, 1)
    assert changes(about, 90, memory=as_it_is) == []
    assert {run.accumulate for run in seen} == {1, 64}
    assert about.run not in seen
    assert len(seen) == len({repr(run) for run in seen})
