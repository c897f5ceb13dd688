"""Templates: both message forms, content lists, system messages, what is learned."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import internvl
from internvl.data.jinja import chat_template
from internvl.data.templates import TEMPLATES, Turn, find_template, layout, media_of, render, turns_of

text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
turns = st.lists(st.tuples(text, text), min_size=1, max_size=3).map(
    lambda pairs: [Turn(role, said) for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]
)


@given(turns, st.sampled_from(sorted(TEMPLATES)), st.none() | text)
def test_what_is_learned_is_each_answer_and_its_end(given_turns: list[Turn], name: str, system: str | None) -> None:
    template = TEMPLATES[name]
    pieces = layout(given_turns, template, system)
    learned = "".join(piece.text for piece in pieces if piece.learned)
    answers = [turn.text for turn in given_turns if turn.role == "assistant"]
    assert learned == "".join(f"{template.gap}{answer}{template.assistant_end}" for answer in answers)
    assert "".join(piece.text for piece in pieces) == render(given_turns, name, False, system)


@given(turns, st.sampled_from(sorted(TEMPLATES)))
def test_a_prompt_is_the_beginning_of_its_conversation(given_turns: list[Turn], name: str) -> None:
    assert render(given_turns, name, False).startswith(render(given_turns[:-1], name))


def test_the_chinese_template_of_1_1() -> None:
    messages = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "好"}]
    assert render(messages, "internvl_zh", False) == " <human>: 你好 <bot>: 好</s>"
    assert render(messages[:1], "internvl_zh") == " <human>: 你好 <bot>:"


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


def test_vicuna_of_1_0() -> None:
    """official internvl_chat_llava, conversation.py: two separators, a space after questions, </s> after answers."""
    said = [Turn("user", "<image>\nQ"), Turn("assistant", "A"), Turn("user", "R"), Turn("assistant", "B")]
    assert render(said[:1], "v1") == f"{VICUNA} USER: <image>\nQ ASSISTANT:"
    whole = f"{VICUNA} USER: <image>\nQ ASSISTANT: A</s>USER: R ASSISTANT: B</s>"
    assert render(said, "v1", False) == whole
    learned = [piece.text for piece in layout(said, find_template("v1")) if piece.learned]
    assert learned == [" ", "A", "</s>", " ", "B", "</s>"]


def test_plain_of_1_0() -> None:
    """Nothing but what was said, an answer ends with its line."""
    said = [Turn("user", "<image>"), Turn("assistant", "a cat")]
    assert render(said, "plain", False) == "<image>a cat\n"
    learned = [piece.text for piece in layout(said, find_template("plain")) if piece.learned]
    assert learned == ["a cat", "\n"]


def test_phi3_and_hermes() -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert render(messages, "phi3-chat") == "<|system|>\nS<|end|><|user|>\nQ<|end|><|assistant|>\n"
    expected = "<|im_start|>system\nS<|im_end|><|im_start|>user\nQ<|im_end|><|im_start|>assistant\n"
    assert render(messages, "Hermes-2") == render(messages, "internlm2-chat") == expected


def test_stops() -> None:
    assert {name: template.stops for name, template in TEMPLATES.items()} == {
        "internvl_zh": ("</s>",),
        "v1": ("</s>",),
        "plain": ("",),  # captions end with a line; nobody talks in it
        "Hermes-2": ("<|im_end|>", "<|endoftext|>"),
        "internlm2-chat": ("<|im_end|>",),
        "phi3-chat": ("<|end|>",),
        "internvl2_5": ("<|im_end|>",),
    }


def test_system_messages() -> None:
    question = {"role": "user", "content": "Q"}
    own = render([{"role": "system", "content": "mine"}, question], system_message="other")
    assert own.startswith("<|im_start|>system\nmine<|im_end|>\n")
    assert render([question], system_message="other").startswith("<|im_start|>system\nother<|im_end|>\n")
    assert render([question]).startswith("<|im_start|>system\n你是书生·万象")
    with pytest.raises(ValueError, match="not the first message; move it to the front"):
        render([question, {"role": "system", "content": "late"}])


def test_official_and_openai_forms_agree() -> None:
    official = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    parts: list[dict[str, Any]] = [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "Q"}]
    openai = [{"role": "user", "content": parts}, {"role": "assistant", "content": "A"}]
    assert turns_of(official) == turns_of(openai) == [Turn("user", "<image>\nQ"), Turn("assistant", "A")]
    assert media_of(openai) == [("image", "a.jpg")]
    assert media_of(official) == []


def test_several_pictures_of_a_message_are_numbered_through_the_conversation() -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:..."}}
    messages = [
        {"role": "user", "content": [picture, {"type": "text", "text": "one"}]},
        {"role": "assistant", "content": "A"},
        {"role": "user", "content": [picture, picture, {"type": "text", "text": "two"}]},
    ]
    assert [turn.text for turn in turns_of(messages)] == [
        "<image>\none",
        "A",
        "Image-2: <image>\nImage-3: <image>\ntwo",
    ]
    assert media_of(messages) == [("image", "data:...")] * 3


def test_unknown_template_lists_the_names() -> None:
    with pytest.raises(ValueError, match="unknown template 'vicuna'; it is one of internvl_zh, v1, plain, Hermes-2"):
        internvl.render([], template="vicuna")
    with pytest.raises(ValueError, match="unknown template"):
        find_template("")


@pytest.mark.parametrize(
    ("message", "said"),
    [
        ({"role": "tool", "content": ""}, "message 0: role 'tool' is none of"),
        ({"content": "x"}, "message 0: role None"),
        ({"role": "user", "content": 5}, "message 0: content is int"),
        ({"role": "user", "content": [{"type": "audio"}]}, "message 0: a part of type 'audio'"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "message 0: a part of type 'text'"),
    ],
)
def test_bad_messages_are_named(message: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render([message])


CONVERSATIONS = {
    "one question": [{"role": "user", "content": "What?"}],
    "two turns": [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "A \"cup\", 100 %\\n\n and {{ braces }}"},
        {"role": "user", "content": "  Where? "},
    ],
    "system": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "What?"}],
    "parts": [
        {"role": "user", "content": [{"type": "image", "image": "a.jpg"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": "b.jpg"}},
                {"type": "image", "image": "c.jpg"},
                {"type": "text", "text": "Which?"},
            ],
        },
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("system", [None, "", 'Say "yes"\nor\\n no, 你好 {{ x }} {% y %}'])
@pytest.mark.parametrize("open_turn", [True, False])
def test_chat_template_renders_as_the_renderer(
    name: str, conversation: str, system: str | None, open_turn: bool
) -> None:
    """By transformers itself, which is who reads it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = CONVERSATIONS[conversation]
    (theirs,), _ = render_jinja_template(
        [messages], chat_template=chat_template(name, system), add_generation_prompt=open_turn
    )
    assert theirs == render(messages, name, open_turn, system)


def test_chat_template_refuses_a_late_system_message() -> None:
    from jinja2.exceptions import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    late = [{"role": "user", "content": "What?"}, {"role": "system", "content": "Be short."}]
    with pytest.raises(TemplateError, match="not the first message"):
        render_jinja_template([late], chat_template=chat_template("internvl2_5"))
