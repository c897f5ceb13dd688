"""WordNet's nouns: which words name a thing that can be drawn, and which words mean the same. Reads two text files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

DEPICTABLE = frozenset({3, 5, 6, 8, 13, 17, 18, 19, 20})
"""Lexicographer files (lexnames(5WN)): tops, animal, artifact, body, food, object, person, phenomenon, plant."""
PERSON = 18
GROUPS = {
    3: "thing", 5: "animal", 6: "object", 8: "body part", 13: "food", 17: "object", 18: "person", 19: "object",
    20: "plant",
}  # fmt: skip
NUM_SENSES = 3
"""Senses are ordered by frequency; a rarer sense says little about a picture's title."""


@dataclass(frozen=True)
class Sense:
    kind: int
    """Number of the lexicographer file."""
    words: tuple[str, ...]
    parents: tuple[int, ...]
    instance: bool = False
    """One certain thing: Africa, Jupiter."""
    gloss: str = ""
    """What it is, in English, without examples."""

    def certain(self, word: str) -> bool:
        """Whether `word` in this sense is a proper name."""
        return self.instance or (" " not in word and word.capitalize() in self.words)


class Nouns:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def _offsets(self) -> dict[str, list[int]]:
        found = {}
        for line in (self.folder / "index.noun").read_text().splitlines():
            if line.startswith(" "):
                continue
            part = line.split()
            count = int(part[2])
            found[part[0].replace("_", " ")] = [int(x) for x in part[-count:]]
        return found

    @cached_property
    def _exceptions(self) -> dict[str, str]:
        lines = (self.folder / "noun.exc").read_text().splitlines()
        return {line.split()[0].replace("_", " "): line.split()[1].replace("_", " ") for line in lines if line}

    @cached_property
    def _data(self) -> bytes:
        return (self.folder / "data.noun").read_bytes()

    @cache  # noqa: B019 one instance lives as long as the process
    def sense(self, offset: int) -> Sense:
        head, _, told = self._data[offset : self._data.index(b"\n", offset)].decode().partition(" | ")
        line = head.split()
        num_words = int(line[3], 16)
        words = tuple(line[4 + 2 * i].replace("_", " ") for i in range(num_words))
        rest = line[5 + 2 * num_words :]
        parents = tuple(int(rest[i + 1]) for i in range(0, len(rest) - 3, 4) if rest[i] in ("@", "@i"))
        return Sense(int(line[1]), words, parents, "@i" in rest, told.split(";")[0].strip())

    def base(self, word: str) -> str:
        """Singular of a noun; the word itself where WordNet knows no other."""
        if word in self._exceptions:
            return self._exceptions[word]
        if word in self._offsets and not word.endswith("s"):
            return word
        for end, other in (
            ("ies", "y"),
            ("ves", "f"),
            ("ches", "ch"),
            ("shes", "sh"),
            ("xes", "x"),
            ("ses", "s"),
            ("s", ""),
        ):
            single = word.removesuffix(end) + other
            if word.endswith(end) and len(single) > 2 and single in self._offsets and not word.endswith("ss"):
                return single
        return word

    def knows(self, word: str) -> bool:
        return word in self._offsets

    @cached_property
    def english(self) -> frozenset[str]:
        """Every single word of WordNet, any part of speech."""
        found = set(self._offsets)
        for part in ("verb", "adj", "adv"):
            lines = (self.folder / f"index.{part}").read_text().splitlines()
            found.update(line.split(" ", 1)[0].replace("_", " ") for line in lines)
        return frozenset(found)

    def is_english(self, word: str) -> bool:
        """Whether a word, or what it is made from, is in WordNet."""
        parts = word.removesuffix("'s").split("-")
        return all(self._in_any_form(part) for part in parts)

    def _in_any_form(self, word: str) -> bool:
        forms = [word, self.base(word)]
        for end in ("ing", "ed", "d", "er", "s"):
            if word.endswith(end):
                stem = word.removesuffix(end)
                forms += [stem, stem + "e", stem[:-1]]
        return any(form in self.english for form in forms)

    def drawable(self) -> Iterator[tuple[str, Sense]]:
        """Every word, no proper name, whose most frequent meaning can be drawn and is called so first; by alphabet."""
        for word, offsets in self._offsets.items():
            sense = self.sense(offsets[0])
            if sense.kind in DEPICTABLE and word == sense.words[0] and not sense.certain(word):
                yield word, sense

    def depicted(self, word: str, kinds: frozenset[int] = frozenset()) -> Sense | None:
        """The likeliest sense that can be drawn; `kinds` are preferred where the folder of a picture says so."""
        senses = [self.sense(offset) for offset in self._offsets.get(word, [])[: NUM_SENSES + 2 * bool(kinds)]]
        first = frozenset(sense.kind for sense in senses[:1])
        for wanted in (kinds, DEPICTABLE & first, DEPICTABLE - {PERSON}, DEPICTABLE):
            for sense in senses:
                if sense.kind in wanted:
                    return sense
        return None

    def synonyms(self, sense: Sense) -> list[str]:
        """Words whose most frequent meaning is this one, so that none accepts an answer about something else."""
        plain = [word for word in sense.words if "(" not in word and word == word.lower()]
        return [word for word in plain if self.sense(self._offsets[word][0]) == sense]

    def wider(self, sense: Sense, depth: int = 8) -> list[str]:
        """Words of all wider terms, nearest first: eagle gives bird of prey, bird, ..."""
        found: dict[str, None] = {}
        layer = list(sense.parents)
        for _ in range(depth):
            above = [self.sense(offset) for offset in layer]
            found |= dict.fromkeys(word for term in above for word in term.words)
            layer = [offset for term in above for offset in term.parents]
        return list(found)

    def is_a(self, sense: Sense, word: str) -> bool:
        """Whether `word` is one of the wider terms of a sense: a polar bear is a bear, a teddy bear is not."""
        return word in self.wider(sense, 6)
