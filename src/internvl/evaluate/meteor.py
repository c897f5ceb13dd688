"""METEOR 1.5 of one sentence against one: alignment by stages of word matching, weighted F-measure, fragmentation.

Stages are functions from a word to what must be equal. The exact stage is built in; a stemmer can be handed in. The
Java program's synonym and paraphrase tables are not here (parity.md).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

# METEOR 1.5, English, tuned for ranking (Denkowski and Lavie 2014, table 1); the COCO toolkit uses these.
ALPHA, BETA, GAMMA, DELTA = 0.85, 0.20, 0.60, 0.75
WEIGHT_EXACT, WEIGHT_STEM = 1.0, 0.6
BEAM = 40
"""Alignments kept at each word, as in the Java program."""
_FREQUENT = (
    "a about after all also an and any are as at be because been before being but by can could did do does down for "
    "from had has have he her here him his how i if in into is it its just like may me more most my no not now of on "
    "one only or other our out over said same she should so some such than that the their them then there these they "
    "this those through to two up upon us was we were what when where which while who will with would you your "
    "'s n't 're 've 'll 'd 'm"
)
FUNCTION_WORDS = frozenset(_FREQUENT.split())
"""Frequent words, which count a third of others. Ours: the program's own list is not public in text form."""

Stage = tuple[float, Callable[[str], Hashable]]
"""Weight of a match, and what two words must have in common."""
EXACT: Stage = (WEIGHT_EXACT, str)


@dataclass(frozen=True)
class _Path:
    """A partial alignment, left to right over the reference."""

    used: frozenset[int] = frozenset()
    pairs: tuple[tuple[int, int, int], ...] = ()
    """Place in the reference, place in the caption, stage."""
    weight: float = 0.0
    chunks: int = 0
    distance: int = 0

    def with_pair(self, there: int, here: int, stage: int, weight: float) -> _Path:
        follows = bool(self.pairs) and self.pairs[-1][:2] == (there - 1, here - 1)
        return _Path(
            self.used | {here},
            (*self.pairs, (there, here, stage)),
            self.weight + weight,
            self.chunks + (not follows),
            self.distance + abs(there - here),
        )

    def rank(self) -> tuple[float, int, int]:
        return -self.weight, self.chunks, self.distance


def align(
    caption: Sequence[str], reference: Sequence[str], stages: Sequence[Stage] = (EXACT,)
) -> tuple[tuple[int, int, int], ...]:
    """Pairs (place in the reference, place in the caption, stage): most weight, then fewest chunks, then least far."""
    keys = [([key(word) for word in caption], [key(word) for word in reference]) for _, key in stages]
    paths = [_Path()]
    for there in range(len(reference)):
        grown = list(paths)
        for path in paths:
            for here in range(len(caption)):
                stage = next((s for s, (said, wanted) in enumerate(keys) if said[here] == wanted[there]), None)
                if stage is not None and here not in path.used:
                    grown.append(path.with_pair(there, here, stage, stages[stage][0]))
        paths = sorted(grown, key=_Path.rank)[:BEAM]
    return paths[0].pairs


def meteor(
    caption: Sequence[str],
    reference: Sequence[str],
    stages: Sequence[Stage] = (EXACT,),
    function_words: frozenset[str] = FUNCTION_WORDS,
) -> float:
    """Score in 0..1 of one caption (words) against one reference; of several references the best counts."""
    pairs = align(caption, reference, stages)
    if not pairs:
        return 0.0
    precision = _share(caption, [(here, stages[stage][0]) for _, here, stage in pairs], function_words)
    recall = _share(reference, [(there, stages[stage][0]) for there, _, stage in pairs], function_words)
    if not precision or not recall:
        return 0.0
    mean = precision * recall / (ALPHA * precision + (1 - ALPHA) * recall)
    if len(pairs) == len(caption) == len(reference) and _chunks(pairs) == 1:
        return mean  # nothing is out of place: no penalty
    return float(mean * (1 - GAMMA * (_chunks(pairs) / len(pairs)) ** BETA))


def _share(words: Sequence[str], matched: Sequence[tuple[int, float]], function_words: frozenset[str]) -> float:
    worth = [1 - DELTA if word in function_words else DELTA for word in words]
    return sum(worth[place] * weight for place, weight in matched) / sum(worth)


def _chunks(pairs: Sequence[tuple[int, int, int]]) -> int:
    joined = sum(
        (there + 1, here + 1) == (next_there, next_here)
        for (there, here, _), (next_there, next_here, _) in pairwise(pairs)
    )
    return len(pairs) - joined
