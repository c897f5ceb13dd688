"""A tiny chat model under evaluation: same answers and losses in every company, equal to the model's own logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy

from internvl.data.images import normalise
from internvl.evaluate import subject as module
from internvl.evaluate.run import Question
from internvl.evaluate.subject import ChatSubject, weights_sha256
from internvl.generate.session import Chat
from internvl.tokens import IGNORE_INDEX, IMAGE_TOKEN
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def chat() -> Chat:
    tokenizer = tiny_tokenizer()
    model = tiny_model(
        "llama", vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    ).eval()
    return Chat(model, tokenizer, max_rows=4)


@pytest.fixture
def questions(tmp_path: Path) -> list[Question]:
    made = []
    for index, (size, colour) in enumerate([((200, 60), "red"), ((60, 130), "blue"), ((60, 60), "green")]):
        Image.new("RGB", size, colour).save(tmp_path / f"{index}.png")
        made.append(
            Question(tmp_path / f"{index}.png", "What is it" + " now" * (20 - 10 * index) + "?", f"It is {colour}.")
        )
    return made


def test_answers_are_those_of_the_chat(chat: Chat, questions: list[Question]) -> None:
    together = ChatSubject(chat).answers(questions, max_new_tokens=6)
    assert together == [answer for one in questions for answer in ChatSubject(chat).answers([one], max_new_tokens=6)]
    said = [chat.chat(one.text, [one.picture], max_new_tokens=6).text for one in questions]
    assert together == said
    assert any(said)


def test_losses_are_those_of_full_logits_in_any_company(
    chat: Chat, questions: list[Question], monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = ChatSubject(chat)
    together = subject.losses(questions)
    lengths = [len(subject._sample(question).input_ids) for question in questions]
    assert lengths != sorted(lengths)
    monkeypatch.setitem(module.POSITIONS_AT_ONCE, "cpu", 1)
    alone = subject.losses(questions)
    for question, (loss, tokens), (single, _) in zip(questions, together, alone, strict=True):
        sample = subject._sample(question)
        pixels = normalise(sample.tiles, chat.config.normalize)
        logits = chat.logits(sample.input_ids[None], pixels)[0]
        plain = cross_entropy(logits[:-1], sample.labels[1:], ignore_index=IGNORE_INDEX, reduction="sum")
        assert loss == pytest.approx(plain.item(), rel=1e-4)
        assert single == pytest.approx(loss, rel=1e-4)
        assert tokens == sample.num_learned >= len(question.reference)


def test_another_picture_changes_the_loss_and_nothing_else(chat: Chat, questions: list[Question]) -> None:
    subject = ChatSubject(chat)
    other = replace(questions[0], picture=questions[2].picture)
    (loss, tokens), (blind, blind_tokens) = subject.losses([questions[0], other])
    assert tokens == blind_tokens
    assert loss != blind


def test_settings_tell_models_apart(chat: Chat) -> None:
    settings = ChatSubject(chat).settings
    assert settings == ChatSubject(chat, batch=1).settings
    assert settings["tiles"] != ChatSubject(chat, max_tiles=1).settings["tiles"]
    other = tiny_model("llama", vocab_size=len(chat.tokenizer))
    same = tiny_model("llama", vocab_size=len(chat.tokenizer))
    assert weights_sha256(other) == weights_sha256(same) == settings["weights"]
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    assert weights_sha256(other) != weights_sha256(same)
    assert weights_sha256(same.to(torch.bfloat16)) != settings["weights"]


def test_prompts_are_exact_and_the_mark_stands_once(chat: Chat) -> None:
    subject = ChatSubject(chat)
    assert subject.prompt("What?").endswith("<|im_start|>user\n<image>\nWhat?<|im_end|>\n<|im_start|>assistant\n")
    assert subject.prompt("<image>\nWhat?") == subject.prompt("What?")


def test_groups_keep_order_and_the_limit() -> None:
    sizes = [3, 1, 5, 9, 2, 2]
    groups = list(module._groups(list(range(6)), sizes, 6))
    assert [index for group in groups for index in group] == list(range(6))
    assert groups == [[0, 1], [2], [3], [4, 5]]
