"""One question with its answer, and how people and InternVL word questions. What is asked is `questions.py`'s."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from internvl.data.scenes import Box

Task = str
SHORT = "Answer the question using a single word or phrase."
"""InternVL's own suffix of questions with short answers (official internvl_chat/eval/vqa)."""
SHORT_TASKS = ("yesno", "colour", "count", "position")


@dataclass(frozen=True)
class Asked:
    task: Task
    question: str
    answer: str
    accept: tuple[str, ...] = ()
    box: Box | None = None


def pick(options: tuple[str, ...] | list[str], generator: np.random.Generator) -> str:
    return options[int(generator.integers(len(options)))]


def with_suffix(asked: Asked, generator: np.random.Generator, share: float = 0.2) -> str:
    """The question, a fifth of the short ones with InternVL's suffix."""
    if asked.task.removeprefix("scenes_") in SHORT_TASKS and generator.random() < share:
        return f"{asked.question}\n{SHORT}"
    return asked.question


def lower(text: str, generator: np.random.Generator) -> str:
    """Now and then as people type: no capital, no question mark."""
    draw = generator.random()
    if draw < 0.12:
        return text[0].lower() + text[1:]
    return (text[0].lower() + text[1:]).rstrip("?.") if draw < 0.18 else text
