"""Conversation templates as data, and the one renderer, which marks what is learned.

Knows strings only: tokens, image tokens and labels are encode.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from reprlib import repr as brief
from typing import Any, Literal, NamedTuple

from internvl.tokens import IMAGE_MARK, VIDEO_MARK

Role = Literal["system", "user", "assistant"]

_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_IMAGE_TYPES = ("image", "image_url", "input_image")
_TEXT_TYPES = ("text", "input_text")

# Official internvl/conversation.py; the released text of a checkpoint replaces it through `system_message`.
_SYSTEM_1_5 = (
    "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。"
)
_SYSTEM_2_5 = (
    "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
)
# Official internvl_chat_llava, conversation.py: that of Vicuna 1.1.
_SYSTEM_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@dataclass(frozen=True)
class Template:
    """How turns become one string; a turn is `start + gap + text + end` (`start` alone where the text is empty)."""

    name: str
    system_start: str
    system_message: str
    system_end: str
    user_start: str
    assistant_start: str
    user_end: str
    assistant_end: str
    """Learned with the answer; its stripped text ends generation."""
    assistant_tail: str = ""
    """Follows `assistant_end`, never learned."""
    gap: str = ""
    """Between a start and the text; learned in answers, since a tokenizer joins it to their first word."""
    more_stops: tuple[str, ...] = ()
    strips: bool = False
    """Training strips every text (official preprocess_internlm)."""
    drops_questions: bool = False
    """Training keeps of a question its pictures alone (official preprocess_plain): captions learn from pictures."""
    drops_leading_answer: bool = False
    """Training drops an answer that comes before the first question (official code, all but internvl2_5)."""

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.assistant_end.strip(), *self.more_stops)


def _chatml(name: str, system_message: str, end: str, tail: str = "", **rest: Any) -> Template:
    return Template(
        name=name,
        system_start="<|im_start|>system\n",
        system_message=system_message,
        system_end=end + tail,
        user_start="<|im_start|>user\n",
        assistant_start="<|im_start|>assistant\n",
        user_end=end + tail,
        assistant_end=end,
        assistant_tail=tail,
        **rest,
    )


TEMPLATES: dict[str, Template] = {
    template.name: template
    for template in (
        Template(
            name="internvl_zh",
            system_start="",
            system_message="",
            system_end=" ",
            user_start="<human>:",
            assistant_start="<bot>:",
            user_end=" ",
            assistant_end="</s>",
            gap=" ",
            drops_leading_answer=True,
        ),
        Template(
            name="v1",
            system_start="",
            system_message=_SYSTEM_VICUNA,
            system_end=" ",
            user_start="USER:",
            assistant_start="ASSISTANT:",
            user_end=" ",
            assistant_end="</s>",
            gap=" ",
            drops_leading_answer=True,
        ),
        Template(
            name="plain",
            system_start="",
            system_message="",
            system_end="",
            user_start="",
            assistant_start="",
            user_end="",
            assistant_end="\n",
            drops_questions=True,
            drops_leading_answer=True,
        ),
        _chatml("Hermes-2", _SYSTEM_1_5, "<|im_end|>", more_stops=("<|endoftext|>",), drops_leading_answer=True),
        _chatml("internlm2-chat", _SYSTEM_1_5, "<|im_end|>", strips=True, drops_leading_answer=True),
        Template(
            name="phi3-chat",
            system_start="<|system|>\n",
            system_message=_SYSTEM_1_5,
            system_end="<|end|>",
            user_start="<|user|>\n",
            assistant_start="<|assistant|>\n",
            user_end="<|end|>",
            assistant_end="<|end|>",
            drops_leading_answer=True,
        ),
        _chatml("internvl2_5", _SYSTEM_2_5, "<|im_end|>", "\n"),
    )
}


class Turn(NamedTuple):
    """One message; `text` carries `<image>` and `<video>` marks."""

    role: Role
    text: str
    spelled: bool = False
    """An answer that is learned letter by letter."""


class Piece(NamedTuple):
    """A run of the rendered string."""

    text: str
    learned: bool = False
    is_content: bool = False
    """Written by a user or a model: special tokens in it are only text."""
    takes_images: bool = False
    """Its `<image>` marks stand for pictures."""
    spelled: bool = False
    """Each letter is a token of its own, or several."""


def find_template(template: str | Template) -> Template:
    """The template of this name."""
    if isinstance(template, Template):
        return template
    if template not in TEMPLATES:
        raise ValueError(f"unknown template {template!r}; it is one of {', '.join(TEMPLATES)}")
    return TEMPLATES[template]


def turns_of(messages: Sequence[Mapping[str, Any] | Turn]) -> list[Turn]:
    """Messages in the OpenAI form (`role`, `content`) or the official one (`from`, `value`) as turns."""
    turns: list[Turn] = []
    num_images = 0
    for position, message in enumerate(messages):
        if isinstance(message, Turn):
            turns.append(message)
            continue
        name = message.get("role", message.get("from"))
        if not isinstance(name, str) or name not in _ROLES:
            raise ValueError(f"message {position}: role {brief(name)} is none of {', '.join(_ROLES)}")
        content = message.get("content", message.get("value"))
        if isinstance(content, (list, tuple)):
            text, num_images = _flatten(content, num_images, position)
        elif content is None or isinstance(content, str):
            text = content or ""
        else:
            raise ValueError(
                f"message {position}: content is {type(content).__name__}; give a string or a list of parts"
            )
        turns.append(Turn(_ROLES[name], text))
    return turns


def _flatten(parts: Sequence[Any], num_before: int, position: int) -> tuple[str, int]:
    # One picture is `<image>`, several of a message are told apart by number (official quick start, spec 3.5).
    kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
    several = sum(kind in _IMAGE_TYPES for kind in kinds) > 1
    text, number = "", num_before
    for part, kind in zip(parts, kinds, strict=True):
        if kind in _IMAGE_TYPES:
            number += 1
            text += f"Image-{number}: {IMAGE_MARK}\n" if several else f"{IMAGE_MARK}\n"
        elif kind == "video":
            text += f"{VIDEO_MARK}\n"
        elif kind in _TEXT_TYPES and isinstance(part.get("text"), str):
            text += part["text"]
        else:
            raise ValueError(
                f"message {position}: a part of type {brief(kind)}; parts are text, image, image_url or video"
            )
    return text, number


def media_of(messages: Sequence[Mapping[str, Any] | Turn]) -> list[tuple[Literal["image", "video"], Any]]:
    """Pictures and videos inside OpenAI content lists, in the order of their marks."""
    found: list[tuple[Literal["image", "video"], Any]] = []
    for message in messages:
        content = None if isinstance(message, Turn) else message.get("content")
        for part in content if isinstance(content, (list, tuple)) else ():
            kind = part.get("type")
            if kind in _IMAGE_TYPES:
                source = part.get("image", part.get("image_url"))
                found.append(("image", source["url"] if isinstance(source, Mapping) else source))
            elif kind == "video":
                found.append(("video", part.get("video")))
    return found


def layout(
    turns: Sequence[Turn],
    template: Template,
    system_message: str | None = None,
    add_generation_prompt: bool = False,
) -> list[Piece]:
    """The rendered string in pieces; a leading system turn replaces `system_message`, that the template's own."""
    text = template.system_message if system_message is None else system_message
    if turns and turns[0].role == "system":
        text, turns = turns[0].text, turns[1:]
    pieces = [Piece(template.system_start), Piece(text, is_content=True), Piece(template.system_end)]
    for turn in turns:
        if turn.role == "system":
            raise ValueError("a system message that is not the first message; move it to the front")
        is_answer = turn.role == "assistant"
        pieces.append(Piece(template.assistant_start if is_answer else template.user_start))
        if not turn.text:  # official: an empty text leaves its turn open
            continue
        pieces.append(Piece(template.gap, learned=is_answer))
        pieces.append(Piece(turn.text, is_answer, True, takes_images=not is_answer, spelled=turn.spelled))
        pieces.append(Piece(template.assistant_end if is_answer else template.user_end, learned=is_answer))
        if is_answer:
            pieces.append(Piece(template.assistant_tail))
    if add_generation_prompt:
        pieces.append(Piece(template.assistant_start))
    return [piece for piece in pieces if piece.text]


def render(
    messages: Sequence[Mapping[str, Any] | Turn],
    template: str | Template = "internvl2_5",
    add_generation_prompt: bool = True,
    system_message: str | None = None,
) -> str:
    """The exact prompt of a conversation; pictures stay `<image>` marks."""
    pieces = layout(turns_of(messages), find_template(template), system_message, add_generation_prompt)
    return "".join(piece.text for piece in pieces)
