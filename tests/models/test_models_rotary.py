"""Rotary angles by the length of each text: neither company nor what came before changes them."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.models.rotary import LengthRotary, sequence_lengths
from tiny import tiny_chat_config, tiny_model


@given(runs=st.lists(st.tuples(st.integers(0, 9), st.integers(1, 6)), min_size=1, max_size=6))
def test_a_sequence_ends_where_positions_stop_counting(runs: list[tuple[int, int]]) -> None:
    positions = [torch.arange(first, first + length) for first, length in runs]
    assume(all(int(a[-1]) + 1 != int(b[0]) for a, b in pairwise(positions)))
    wanted = torch.cat([torch.full((len(run),), int(run[-1]) + 1) for run in positions])
    assert torch.equal(sequence_lengths(torch.cat(positions)[None])[0], wanted)


def angles(model: ChatModel, positions: Tensor) -> Tensor:
    rotary = model.language.model.model.rotary_emb
    assert isinstance(rotary, LengthRotary)
    return torch.stack(rotary(torch.zeros(1), positions))


def lengths_of(family: str) -> tuple[ChatModel, tuple[int, ...]]:
    model = tiny_model(family)
    limit = model.language.model.model.rotary_emb.limit
    return model, (3, limit, limit + 1, 2 * limit, limit)


@pytest.mark.parametrize("family", ["phi3", "internlm2"])
def test_packed_texts_have_the_angles_of_each_alone_in_any_order(family: str) -> None:
    model, lengths = lengths_of(family)
    alone = [angles(model, torch.arange(length)[None]) for length in lengths]
    packed = angles(model, torch.cat([torch.arange(length) for length in lengths])[None])
    assert_close(packed, torch.cat(alone, 2), rtol=0, atol=0)
    assert not torch.equal(alone[1], alone[2][:, :, : lengths[1]])  # the limit is one
    assert torch.equal(alone[1], alone[4])


def test_a_padded_batch_gives_what_each_text_gives() -> None:
    model, generator = tiny_model("phi3"), torch.Generator().manual_seed(0)
    lengths = (20, 128, 140)
    ids = torch.randint(10, 160, (3, 140), generator=generator)
    seen = torch.arange(140) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        batch = model(ids, attention_mask=seen)
        for row, length in enumerate(lengths):
            assert_close(batch[row, :length], model(ids[row : row + 1, :length])[0], rtol=1e-4, atol=1e-5)


def test_plain_scaling_keeps_the_rotary_of_transformers() -> None:
    config = tiny_chat_config("internlm2")
    settings = {key: value for key, value in config.language.settings.items() if key != "rope_scaling"}
    for language in (tiny_chat_config("llama").language, replace(config.language, settings=settings)):
        rotary = build(replace(config, language=language)).language.model.model.rotary_emb
        assert not isinstance(rotary, LengthRotary)
