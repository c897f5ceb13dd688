"""What a caller may say, as one form: messages whose text holds the `<image>` marks, and the pictures in their order.

Official history (marks in strings), OpenAI content lists and our own `Reply.messages` all end here; a question
without marks gets those of its pictures (spec: official quick start).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from internvl.data.images import Source
from internvl.data.templates import media_of, turns_of
from internvl.tokens import IMAGE_MARK

Message = Mapping[str, Any]


def conversation(
    question: str | Sequence[Message], images: Sequence[Source], history: Sequence[Message] = ()
) -> tuple[list[Message], list[Source]]:
    """Messages (`role`, `content`, and `images` where it has some) and all pictures."""
    new = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
    messages = [*history, *new]
    if not any(message.get("role", message.get("from")) in ("user", "human") for message in messages):
        raise ValueError(f"{len(messages)} messages and no question among them; give at least one of role user")
    if isinstance(images, (str, bytes)):
        raise ValueError(f"images is {type(images).__name__}; give a list: images=[{images!r:.60}]")
    if any(kind == "video" for kind, _ in media_of(messages)):
        return _with_video(messages, images)
    texts = [turn.text for turn in turns_of(messages)]
    roles = [turn.role for turn in turns_of(messages)]
    own = [_own_images(message) for message in messages]
    waiting = list(images)
    missing = [text.count(IMAGE_MARK) - len(given) for text, given in zip(texts, own, strict=True)]
    missing = [0 if role != "user" and not given else n for n, role, given in zip(missing, roles, own, strict=True)]
    if sum(missing) == 0 and waiting and min(missing) == 0:
        last = max(at for at, role in enumerate(roles) if role == "user")
        texts[last] = _marks(len(waiting), sum(map(len, own))) + texts[last]
        missing[last] = len(waiting)
    if min(missing) < 0 or sum(missing) != len(waiting):
        marks = sum(missing) + sum(map(len, own))
        raise ValueError(
            f"{marks} {IMAGE_MARK} marks but {len(waiting) + sum(map(len, own))} images; make them equal, "
            "or leave the marks out"
        )
    out: list[Message] = []
    for role, text, given, count in zip(roles, texts, own, missing, strict=True):
        shown = [*given, *waiting[:count]]
        waiting = waiting[count:]
        out.append({"role": role, "content": text, **({"images": shown} if shown else {})})
    return out, [image for message in out for image in message.get("images", ())]


def _own_images(message: Message) -> list[Source]:
    inside = [source for kind, source in media_of([message]) if kind == "image" and source is not None]
    return [*inside, *message.get("images", ())]


def _marks(count: int, before: int) -> str:
    if count == 1:
        return f"{IMAGE_MARK}\n"
    return "".join(f"Image-{before + number}: {IMAGE_MARK}\n" for number in range(1, count + 1))


def _with_video(messages: list[Any], images: Sequence[Source]) -> tuple[list[Message], list[Source]]:
    """Messages with videos go to the encoder as they are."""
    if images or any(message.get("images") for message in messages):
        raise ValueError("a video beside a list of images; put the pictures into the content lists too")
    return messages, []
