"""Short answers: exact match, containment of a name, VQA accuracy, ANLS, relaxed accuracy. Text alone.

The first half is this project's held-out sets; the second half is the protocol of the public benchmarks, whose folding
of answers is their own.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_UNSPACED = re.compile(r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]")  # kana, Han, Hangul: no spaces between words


def same_case(text: str) -> str:
    """NFKC and single spaces; case and punctuation stay."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def normalise(text: str) -> str:
    """What exact match compares: case folded, one final period and the articles a, an, the removed.

    An answer that is nothing but an article ("A") keeps it.
    """
    folded = same_case(text).casefold().removesuffix(".").strip()
    return " ".join(_ARTICLES.sub(" ", folded).split()) or folded


def exact_match(answer: str, accepted: Sequence[str]) -> bool:
    return normalise(answer) in {normalise(one) for one in accepted}


def verbatim_match(answer: str, accepted: Sequence[str], ignore_case: bool = False) -> bool:
    """As written: case and punctuation count; only outer and repeated spaces do not."""
    fold = str.casefold if ignore_case else str
    return fold(same_case(answer)) in {fold(same_case(one)) for one in accepted}


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """An accepted name stands in the answer as whole words; case, hyphens and underscores do not matter.

    Names in scripts without spaces are looked for as they are.
    """
    spoken = _spoken(answer)
    return any(_stands_in(_spoken(name), spoken) for name in accepted)


def _spoken(text: str) -> str:
    return " ".join(re.sub(r"[-_]", " ", same_case(text).casefold()).split())


def _stands_in(name: str, text: str) -> bool:
    if not name:
        return False
    if _UNSPACED.search(name):
        return name in text
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


# The public benchmarks. Official internvl_chat/eval/vqa: textvqa_eval.py, infographicsvqa_eval.py, evaluate_vqa.py.

ANLS_LEAST = 0.5
"""Answers that share less count as wrong (ST-VQA, section 3; DocVQA)."""
RELAXED_SHARE = 0.05
"""A number may be off by this share of the right one (ChartQA, section 5.1)."""
_FEW_VOTES = 3  # VQA (Antol et al. 2015), section 3: as many people make an answer fully right
_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(number) for number, word in enumerate(_COUNTED.split())} | {"none": "0"}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_SEPARATED = re.compile(r"\d,\d")
_CONTRACTIONS = (
    "ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd "
    "he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've "
    "needn't not've o'clock oughtn't shan't should've shouldn't shouldn't've somebody'll somebody's someone'd "
    "someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're "
    "there's they'd they'd've they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's "
    "where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't "
    "wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've"
)


def _spellings() -> dict[str, str]:
    """Contractions with apostrophes missing -> as they are written: all of one, or one of several."""
    found: dict[str, str] = {}
    for whole in _CONTRACTIONS.split():
        places = [place for place, letter in enumerate(whole) if letter == "'"]
        dropped = [whole[:place] + whole[place + 1 :] for place in places]
        found |= dict.fromkeys(dropped, whole)
    # The official table knows these only so, "somebody'd" the wrong way round.
    odd = {"shed've": "she'd've", "she'dve": "she'd've", "wed've": "we'd've", "we'dve": "we'd've"}
    odd |= {"somebodyd've": "somebody'd've", "somebody'dve": "somebody'd've", "somebody'd": "somebodyd"}
    odd |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    return found | odd


_SPELLINGS = _spellings()


def fold_vqa(answer: str) -> str:
    """An answer as the VQA protocol compares it: punctuation, articles, number words, missing apostrophes."""
    text = answer.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    text = text.replace("\n", " ").replace("\t", " ").strip()
    spaced = _SEPARATED.search(text) is not None
    folded = text
    for mark in _MARKS:
        alone = f"{mark} " in text or f" {mark}" in text
        folded = folded.replace(mark, "" if alone or spaced else " ")
    folded = _PERIOD.sub("", folded)
    words = (_NUMBERS.get(word, word) for word in folded.split())
    return " ".join(_SPELLINGS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(answer: str, people: Sequence[str]) -> float:
    """VQA, VQAv2, TextVQA, OKVQA, VizWiz: the mean over leaving one person out of min(1, agreeing / 3).

    `people`: one answer a person, ten of them in those sets; at least two are needed.
    """
    if len(people) < 2:
        raise ValueError(f"{len(people)} answers of people; leaving one out needs at least 2")
    said = fold_vqa(answer)
    agree = [fold_vqa(one) == said for one in people]
    votes = sum(agree)
    return sum(min(1.0, (votes - own) / _FEW_VOTES) for own in agree) / len(agree)


def edit_distance(one: str, other: str) -> int:
    """Fewest letters put in, taken out or exchanged (Levenshtein)."""
    row = list(range(len(other) + 1))
    for number, letter in enumerate(one, 1):
        before, row[0] = row[0], number
        for place, candidate in enumerate(other, 1):
            here = row[place]
            row[place] = min(here + 1, row[place - 1] + 1, before + (letter != candidate))
            before = here
    return row[-1]


def anls(answer: str, accepted: Sequence[str], *, join_spaces: bool = True) -> float:
    """1 - edit distance / longer length against the nearest accepted answer, 0 below one half; case is ignored.

    DocVQA and InfographicVQA make runs of spaces one (`join_spaces`), ST-VQA does not.
    """
    if not accepted:
        raise ValueError("no accepted answer to compare with; give at least one")
    fold: Callable[[str], str] = (lambda text: " ".join(text.lower().split())) if join_spaces else _lower
    said = fold(answer)
    wanted = [fold(one) for one in accepted]
    nearest = max(1 - edit_distance(said, one) / max(1, len(said), len(one)) for one in wanted)
    return nearest if nearest >= ANLS_LEAST else 0.0


def _lower(text: str) -> str:
    return text.lower().strip()


def relaxed_match(answer: str, target: str) -> bool:
    """ChartQA: a number within 5 % of the target, any other text equal but for case. "50%" is 0.5."""
    number, wanted = _number(answer), _number(target)
    if number is not None and wanted:
        return abs(number - wanted) / abs(wanted) <= RELAXED_SHARE
    return answer.lower() == target.lower()


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def plain_match(answer: str, accepted: Sequence[str]) -> bool:
    """GQA, OCR-VQA, AI2D: equal but for case and outer spaces."""
    return _lower(answer) in {_lower(one) for one in accepted}
