"""Texts in any language, each with an English one that means the same, as batches without end (dealing.py); resumable.

Lines are those of pictures with captions (image_text.py), read for their words: what is said of one picture means the
same, so its first English caption is the English of its lines in other languages, and an English caption is its own. A
line without a picture is English. No picture is opened. What an encoder says about the English is a stage's affair.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int

from internvl.batch import TextBatch
from internvl.data.contents import Changed, check_state, contents
from internvl.data.dealing import Entry, Epochs, Numbers, fingerprint, part_of
from internvl.data.dual_texts import TEXT_PREFIX, DualTokeniser, pad
from internvl.data.image_text import Pair, parse_pair
from internvl.data.mixture import DataSet, Mixture


@dataclass
class TextLoader:
    """Batches of `samples` texts, those of all ranks together; `state_dict` is the place of the next one.

    All lines are in memory.
    """

    sets: Sequence[DataSet]
    words: DualTokeniser
    samples: int
    seed: int = 0
    shuffle: bool = True
    on_error: Literal["error", "skip"] = "error"
    rank: int = 0
    ranks: int = 1
    changed: Changed = "error"
    english: list[str] = field(default_factory=list, init=False)
    """Every English text that is meant, once."""
    skipped: dict[str, str] = field(default_factory=dict, init=False)
    """Line -> why it is left out: it cannot be read, or no English line has its picture."""
    num_cut: int = field(default=0, init=False)
    """Texts whose end the model does not see."""

    def __post_init__(self) -> None:
        self._own = part_of(self.samples, self.ranks, "texts")
        self._mixture = Mixture(self.sets, self.seed, self.shuffle)
        self._epochs = Epochs(self._mixture, self._meaningful)
        self._epoch = self._place = 0
        self._lines: list[Pair | None] = [self._read(number) for number in range(len(self._mixture))]
        self._sentences: dict[bytes, str] = {}
        for line in self._lines:
            if line is not None and line.path and is_english(line.language):
                self._sentences.setdefault(line.name, line.captions[0])
        self._numbers: dict[str, int] = {}
        self._meant = [self._english_of(number) for number in range(len(self._lines))]
        self.english = list(self._numbers)
        self._usable = np.array([bool(meant) for meant in self._meant])

    def __iter__(self) -> Iterator[TextBatch]:
        """This rank's part of each batch, from where the loader stands, without end."""
        first = self.rank * self._own
        while True:
            entries, self._epoch, self._place = self._epochs.deal(self._epoch, self._place, self.samples)
            yield self._batch(entries[first : first + self._own])

    def once(self) -> Iterator[TextBatch]:
        """One epoch in order, the last batch smaller; the same on every rank; the loader's own place stays."""
        return (self._batch(entries) for entries in self._epochs.once(self.samples))

    def __len__(self) -> int:
        """Batches that cover an epoch."""
        return -(-len(self._epochs) // self.samples)

    def state_dict(self) -> dict[str, Any]:
        own = {"fingerprint": self._fingerprint, "contents": self._contents}
        return {"epoch": self._epoch, "place": self._place, **own}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place of a state; data and settings must be those it was taken with."""
        check_state(state, self._fingerprint, self._contents, self.changed, "sets and seed")
        self._epoch, self._place = int(state["epoch"]), int(state["place"])

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.sets, self.seed, self.shuffle)

    @cached_property
    def _contents(self) -> dict[str, str]:
        return contents(self.sets)

    def _read(self, number: int) -> Pair | None:
        index, position = self._mixture.locate(number)
        data, source = self.sets[index], self._mixture.source(number)
        try:
            return parse_pair(data.lines.read(position), data.root, source, pictured=False)
        except ValueError as error:
            self._leave_out(source, str(error))
            return None

    def _english_of(self, number: int) -> tuple[int, ...]:
        """Numbers of the English texts that a line's captions mean; none where the line is left out."""
        line = self._lines[number]
        if line is None:
            return ()
        if is_english(line.language):
            meant = line.captions
        elif line.path and line.name in self._sentences:
            meant = (self._sentences[line.name],) * len(line.captions)
        else:
            why = "no English line has its picture" if line.path else "it has no picture to tell its English by"
            remedy = "add an English line of that picture, or set data.on_error to skip"
            self._leave_out(line.source, f"{line.source}: {line.language!r}, but {why}; {remedy}")
            return ()
        return tuple(self._numbers.setdefault(text, len(self._numbers)) for text in meant)

    def _leave_out(self, source: str, why: str) -> None:
        if self.on_error == "error":
            raise ValueError(why)
        self.skipped[source] = why

    def _meaningful(self, numbers: Numbers) -> Int[np.ndarray, " kept"]:
        """Those of lines that are not left out."""
        found: Int[np.ndarray, " kept"] = numbers[self._usable[numbers]]
        if not len(found):
            raise ValueError(f"an epoch without a usable line; the last: {list(self.skipped.values())[-1]}")
        return found

    def _batch(self, entries: Sequence[Entry]) -> TextBatch:
        rows, english, translated, sources = [], [], [], []
        for entry in entries:
            line = self._lines[entry.number]
            assert line is not None
            rng = np.random.default_rng([self.seed, entry.epoch, entry.place])
            chosen = int(rng.integers(len(line.captions)))
            row = self.words.row(TEXT_PREFIX + line.captions[chosen])
            self.num_cut += row.is_cut
            rows.append(row.ids)
            english.append(self._meant[entry.number][chosen])
            translated.append(not is_english(line.language))
            sources.append(line.source)
        return TextBatch(pad(rows), torch.tensor(english), torch.tensor(translated), tuple(sources))


def is_english(language: str) -> bool:
    """A line that does not say its language is taken to be English."""
    return language in ("", "en") or language.startswith("en-")
