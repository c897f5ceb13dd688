"""What comes back from a chat. No computation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internvl.generate.answers import Region

Message = Mapping[str, Any]
"""`role` and `content` (a string or an OpenAI list of parts); `images` holds the pictures of marks in a string."""


@dataclass(frozen=True)
class Usage:
    """What an answer took."""

    prompt_tokens: int
    """Image tokens included."""
    image_tokens: int
    tiles: int
    new_tokens: int
    seconds_to_first_token: float
    """From the encoded prompt on; pictures included."""
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """After the first one."""
        rest = self.seconds - self.seconds_to_first_token
        return (self.new_tokens - 1) / rest if self.new_tokens > 1 and rest > 0 else 0.0


@dataclass(frozen=True)
class Reply:
    """An answer, and the conversation up to it: give `messages` plus a question to go on."""

    text: str
    boxes: tuple[Region, ...]
    """In pixels of the last picture of the conversation, and on the 0..1000 grid."""
    usage: Usage
    finish_reason: str
    messages: tuple[Message, ...]
    masks: tuple[Any, ...] = ()
    """Chat models without a mask head give none."""
    logprobs: tuple[float, ...] = ()

    def __str__(self) -> str:
        return self.text
