"""Captions against several references each: BLEU-1..4, ROUGE-L, CIDEr-D, METEOR (COCO caption toolkit).

Numbers are as the toolkit computes them, its small constants included (parity.md). Words are ptb.py's, METEOR's
alignment is meteor.py's; what writes the captions is the caller's.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from internvl.evaluate.meteor import meteor
from internvl.evaluate.ptb import tokenise

NUM_GRAMS = 4
ROUGE_BETA = 1.2  # coco-caption, rouge.py: recall counts more
CIDER_SIGMA = 6.0  # coco-caption, cider.py; CIDEr paper, section 6
CIDER_SCALE = 10.0
# coco-caption, bleu_scorer.py: they keep quotients and powers defined, and show in scores of single pictures.
BLEU_SMALL, BLEU_TINY = 1e-9, 1e-15

Words = Sequence[str]
Grams = Counter[tuple[str, ...]]


@dataclass(frozen=True)
class Score:
    """Of all pictures, and of each in the order given."""

    corpus: float
    per_picture: tuple[float, ...]


@dataclass(frozen=True)
class CaptionScores:
    bleu: tuple[Score, Score, Score, Score]
    """BLEU-1 to BLEU-4. Of all pictures: from summed counts, not the mean of pictures."""
    rouge_l: Score
    cider_d: Score
    """0 to 10; papers print a hundred times it: 1.282 is written 128.2."""
    meteor: Score
    """With exact matches alone it is below the Java program's, which also knows stems, synonyms and paraphrases."""
    num_words: float
    """Mean words of a caption."""
    empty: int
    """Captions without a word: they score 0 and are counted, not left out."""


def caption_scores(captions: Sequence[str], references: Sequence[Sequence[str]]) -> CaptionScores:
    """Scores of one caption a picture against its references (raw text; any number, at least one, a picture).

    CIDEr-D weighs n-grams by how many of these pictures' references hold them: it belongs to the set of pictures, and
    a set of one picture scores 0.
    """
    check_lengths(captions, references)
    single = [place for place, group in enumerate(references) if isinstance(group, str)]
    if single:
        raise ValueError(f"the references of picture {single[0]} are one text; put it into a list, [{references[0]!r}]")
    said = [tokenise(caption) for caption in captions]
    wanted = [[tokenise(reference) for reference in group] for group in references]
    return CaptionScores(
        bleu=bleu(said, wanted),
        rouge_l=_mean([rouge_l(one, group) for one, group in zip(said, wanted, strict=True)]),
        cider_d=cider_d(said, wanted),
        meteor=_mean([max(meteor(one, other) for other in group) for one, group in zip(said, wanted, strict=True)]),
        num_words=sum(map(len, said)) / len(said),
        empty=sum(not one for one in said),
    )


def check_lengths(captions: Sequence[object], references: Sequence[Sequence[object]]) -> None:
    """ValueError unless there is a caption, as many groups of references, and none of them empty."""
    if not captions or len(captions) != len(references):
        raise ValueError(f"{len(captions)} captions for {len(references)} pictures; give one caption a picture")
    bare = [place for place, group in enumerate(references) if not group]
    if bare:
        raise ValueError(f"picture {bare[0]} has no references ({len(bare)} in all); leave such pictures out")


def grams(words: Words, longest: int = NUM_GRAMS) -> Grams:
    """How often each run of 1 to `longest` words occurs."""
    return Counter(tuple(words[i : i + size]) for size in range(1, longest + 1) for i in range(len(words) - size + 1))


def bleu(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> tuple[Score, Score, Score, Score]:
    """BLEU-1..4 with the reference length nearest to the caption's (the shorter of two equally near)."""
    check_lengths(captions, references)
    rows = [_bleu_counts(caption, group) for caption, group in zip(captions, references, strict=True)]
    summed = [sum(column) for column in zip(*rows, strict=True)]
    whole, single = _bleu_of(summed), [_bleu_of(row) for row in rows]
    found = [Score(whole[n], tuple(one[n] for one in single)) for n in range(NUM_GRAMS)]
    return found[0], found[1], found[2], found[3]


def _bleu_counts(caption: Words, group: Sequence[Words]) -> list[int]:
    """Length, reference length, then matched and possible n-grams of each size."""
    most: Grams = Counter()
    for reference in group:
        most |= grams(reference)
    matched = [0] * NUM_GRAMS
    for gram, count in (grams(caption) & most).items():
        matched[len(gram) - 1] += count
    possible = [max(0, len(caption) - size) for size in range(NUM_GRAMS)]
    nearest = min((abs(len(reference) - len(caption)), len(reference)) for reference in group)[1]
    return [len(caption), nearest, *matched, *possible]


def _bleu_of(counts: Sequence[int]) -> list[float]:
    length, nearest, *rest = counts
    ratio = (length + BLEU_TINY) / (nearest + BLEU_SMALL)
    brevity = math.exp(1 - 1 / ratio) if 1e-3 < ratio < 1 else float(ratio >= 1)
    product, found = 1.0, []
    for size in range(NUM_GRAMS):
        product *= (rest[size] + BLEU_TINY) / (rest[NUM_GRAMS + size] + BLEU_SMALL)
        found.append(product ** (1 / (size + 1)) * brevity)
    return found


def rouge_l(caption: Words, group: Sequence[Words]) -> float:
    """F-measure of the longest common subsequence; precision and recall are each the best over the references."""
    common = [_longest_common(caption, reference) for reference in group]
    precision = max(shared / max(1, len(caption)) for shared in common)
    recall = max(shared / max(1, len(reference)) for shared, reference in zip(common, group, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _longest_common(one: Words, other: Words) -> int:
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, candidate in enumerate(other, 1):
            here = row[place]
            row[place] = before + 1 if word == candidate else max(here, row[place - 1])
            before = here
    return row[-1]


@dataclass(frozen=True)
class _Vector:
    """tf-idf weights of a caption by size of n-gram, their norms, and its length in pairs of words."""

    weights: tuple[dict[tuple[str, ...], float], ...]
    norms: tuple[float, ...]
    length: int


def cider_d(captions: Sequence[Words], references: Sequence[Sequence[Words]]) -> Score:
    """CIDEr-D, 0 to 10: document frequencies from the references, clipped counts, Gaussian length penalty."""
    check_lengths(captions, references)
    wanted = [[grams(reference) for reference in group] for group in references]
    documents: Counter[tuple[str, ...]] = Counter()
    for group in wanted:
        documents.update({gram for reference in group for gram in reference})
    num_pictures = math.log(len(captions))
    scores = []
    for caption, group in zip(captions, wanted, strict=True):
        said = _vector(grams(caption), documents, num_pictures)
        each = [_alike(said, _vector(reference, documents, num_pictures)) for reference in group]
        scores.append(CIDER_SCALE * math.fsum(each) / len(each))
    return _mean(scores)


def _vector(counts: Grams, documents: Counter[tuple[str, ...]], num_pictures: float) -> _Vector:
    weights: tuple[dict[tuple[str, ...], float], ...] = tuple({} for _ in range(NUM_GRAMS))
    length = 0
    for gram, count in counts.items():
        weights[len(gram) - 1][gram] = count * (num_pictures - math.log(max(1, documents[gram])))
        length += count if len(gram) == 2 else 0  # the toolkit measures length by pairs of words
    return _Vector(weights, tuple(math.sqrt(math.fsum(w * w for w in part.values())) for part in weights), length)


def _alike(said: _Vector, reference: _Vector) -> float:
    total = 0.0
    for size in range(NUM_GRAMS):
        wanted = reference.weights[size]
        shared = math.fsum(
            min(weight, wanted[gram]) * wanted[gram] for gram, weight in said.weights[size].items() if gram in wanted
        )
        norms = said.norms[size] * reference.norms[size]
        total += shared / norms if norms else shared
    apart = said.length - reference.length
    return total / NUM_GRAMS * math.exp(-(apart**2) / (2 * CIDER_SIGMA**2))


def _mean(scores: Sequence[float]) -> Score:
    return Score(math.fsum(scores) / len(scores), tuple(scores))
