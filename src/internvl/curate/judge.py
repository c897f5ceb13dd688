"""Scores of 0 to 10 asked from a language model: quality, and freedom from repetition (paper 2.5, section 4.3).

The paper's prompts are not published; these are ours, and a file may replace them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from internvl.curate.filters import Score, parse_score
from internvl.data.records import Record
from internvl.tokens import IMAGE_MARK, VIDEO_MARK

PLACE = "{conversation}"
PROMPTS: dict[Score, str] = {
    "quality": (
        "Below is a conversation from a training set. Judge the answers: are they correct, complete, clear and to the "
        "point of the question?\n\n" + PLACE + "\n\nGive one number from 0 (worthless) to 10 (excellent). "
        "Write the number alone."
    ),
    "repetition": (
        "Below is a conversation from a training set. Judge the answers for repetition: the same words, sentences or "
        "steps again and again.\n\n" + PLACE + "\n\nGive one number from 0 (nothing but repetition) to 10 (none). "
        "Write the number alone."
    ),
}
_LONGEST = 12_000
"""Characters of a conversation that a model is shown: its beginning and its end."""


@dataclass(frozen=True)
class Judge:
    """A model that reads texts, and what it is asked."""

    ask: Callable[[Sequence[str]], Sequence[str]]
    """Prompts to answers, in their order."""
    prompts: Mapping[Score, str] = field(default_factory=lambda: PROMPTS)

    def __post_init__(self) -> None:
        for score, prompt in self.prompts.items():
            if PLACE not in prompt:
                raise ValueError(f"the prompt for {score} has no {PLACE}; say where the conversation goes")

    def scores(self, asked: Sequence[tuple[Record, Score]]) -> list[float | None]:
        """One score for each; None where the answer holds none."""
        return [parse_score(answer) for answer in self.ask([self.prompt(*some) for some in asked])]

    def prompt(self, record: Record, score: Score) -> str:
        text = "\n".join(f"{turn.role}: {turn.text}" for turn in record.turns if turn.role != "system")
        text = text.replace(IMAGE_MARK, "(picture)").replace(VIDEO_MARK, "(video)")
        if len(text) > _LONGEST:
            text = f"{text[: _LONGEST // 2]}\n...\n{text[-_LONGEST // 2 :]}"
        return self.prompts[score].replace(PLACE, text)
