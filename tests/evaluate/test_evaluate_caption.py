"""Caption scores: recorded outputs of the COCO toolkit, numbers by hand, laws."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.evaluate.caption import bleu, caption_scores, cider_d, rouge_l
from internvl.evaluate.meteor import EXACT, WEIGHT_STEM, meteor
from internvl.evaluate.ptb import tokenise
from reference import golden

words = st.lists(st.sampled_from(["a", "cat", "dog", "sits", "on", "the", "red", "mat", "two"]), min_size=1, max_size=8)
sets = st.lists(st.tuples(words, st.lists(words, min_size=1, max_size=3)), min_size=2, max_size=5)


def test_scores_equal_the_toolkit() -> None:
    kept = json.loads(golden("metrics.json").read_text())["captions"]
    names = sorted(kept["references"])
    found = caption_scores([kept["candidates"][name][0] for name in names], [kept["references"][n] for n in names])
    scores = kept["scores"]
    assert [one.corpus for one in found.bleu] == pytest.approx(scores["bleu"]["corpus"], rel=1e-9)
    for one, expected in zip(found.bleu, zip(*scores["bleu"]["per_image"], strict=True), strict=True):
        assert one.per_picture == pytest.approx(expected, rel=1e-9, abs=1e-18)
    for one, name in ((found.rouge_l, "rouge_l"), (found.cider_d, "cider")):
        assert one.corpus == pytest.approx(scores[name]["corpus"], rel=1e-9)
        assert one.per_picture == pytest.approx(scores[name]["per_image"], rel=1e-9)


def test_meteor_equals_the_java_program_where_words_match_exactly() -> None:
    """Pictures 1 and 3 need stems, synonyms or paraphrases: there ours may only be lower."""
    kept = json.loads(golden("metrics.json").read_text())["captions"]
    names = sorted(kept["references"])
    found = caption_scores([kept["candidates"][n][0] for n in names], [kept["references"][n] for n in names]).meteor
    theirs = kept["scores"]["meteor"]["per_image"]
    for place in (0, 2, 4, 5):
        assert found.per_picture[place] == pytest.approx(theirs[place], rel=1e-6)
    assert all(ours <= other + 1e-6 for ours, other in zip(found.per_picture, theirs, strict=True))


def test_words_equal_the_toolkit() -> None:
    kept = json.loads(golden("metrics.json").read_text())["captions"]
    for case in kept["ptb"]:
        assert " ".join(tokenise(case["in"])) == case["out"]
    for group, tokens in (("references", "tokenized_references"), ("candidates", "tokenized_candidates")):
        for name, texts in kept[group].items():
            assert [" ".join(tokenise(text)) for text in texts] == kept[tokens][name]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("They can't go at 5 o'clock.", "they ca n't go at 5 o'clock"),
        ("I cannot, you’re gonna", "i can not you 're gon na"),
        ("Dr. Who (1963)", "dr. who -lrb- 1963 -rrb-"),
        ("一只猫。", "一只猫 。"),
        ("¡Qué niño!", "¡ qué niño"),
        ("...", ""),
        ("AT&T bus No. 5, rock&roll of the '90s", "at&t bus no. 5 rock & roll of the '90s"),
        ("बिल्ली मेज़ पर है।", "बिल्ली मेज़ पर है ।"),
        ("แมวนั่ง บนโต๊ะ", "แมวนั่ง บนโต๊ะ"),
        ("قِطَّةٌ جَمِيلَة", "قِطَّةٌ جَمِيلَة"),
        ("او می\u200cخواهد", "او می\u200cخواهد"),
        ("cafe\u0301 a\u2764\ufe0f", "cafe\u0301 a \u2764\ufe0f"),
        ("IT'S an O'CLOCK &amp; so DON'T", "it 's an o'clock & so do n't"),
    ],
)
def test_words_by_hand(text: str, expected: str) -> None:
    assert " ".join(tokenise(text)) == expected


def test_bleu_and_rouge_by_hand() -> None:
    one, two, *_ = bleu([["a", "cat"]], [[["a", "dog"], ["a", "cat", "sits"]]])
    # length 2; references of 2 and 3 words: 2 is nearest, so no penalty
    assert one.corpus == pytest.approx(1.0)
    assert two.corpus == pytest.approx(1.0)
    short = bleu([["a"]], [[["a", "cat"]]])[0].corpus
    assert short == pytest.approx(math.exp(1 - 2), rel=1e-6)
    # longest common "a sits": precision 2/3, recall 2/2
    precision, recall = 2 / 3, 1.0
    assert rouge_l(["a", "cat", "sits"], [["a", "sits"]]) == pytest.approx(
        2.44 * precision * recall / (recall + 1.44 * precision)
    )


def test_cider_by_hand() -> None:
    # idf of every word is log 2. "cat" twice for once: clipped min(2, 1) x 1 / (2 x 1) of single words, nothing longer;
    # one pair of words more than the reference
    found = cider_d([["cat", "cat"], ["dog"]], [[["cat"]], [["dog"]]])
    assert found.per_picture[0] == pytest.approx(10 * 0.5 / 4 * math.exp(-1 / 72))
    assert found.per_picture[1] == pytest.approx(10 / 4)  # a sentence of one word has no longer runs to share
    assert cider_d([["cat"]], [[["cat"]]]).corpus == 0.0  # log 1: a single picture tells nothing about rarity


def test_meteor_by_hand() -> None:
    # "a" alone is shared: P = .25/1, R = .25/.25; one chunk of one match
    mean = 0.25 / (0.85 * 0.25 + 0.15)
    assert meteor(["a", "cat"], ["a"]) == pytest.approx(mean * 0.4)
    assert meteor(["red", "cat"], ["red", "cat"]) == 1.0
    assert meteor(["cat", "red"], ["red", "cat"]) == pytest.approx(0.4)
    stems = (EXACT, (WEIGHT_STEM, lambda word: word.rstrip("s")))
    assert meteor(["cats"], ["cat"]) == 0.0
    assert meteor(["cats"], ["cat"], stems) == pytest.approx(0.6)


@given(sets, st.randoms(use_true_random=False))
def test_cider_does_not_know_the_order_of_pictures(pictures: list, random: object) -> None:
    shuffled = list(enumerate(pictures))
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    straight = cider_d([said for said, _ in pictures], [wanted for _, wanted in pictures])
    other = cider_d([said for _, (said, _) in shuffled], [wanted for _, (_, wanted) in shuffled])
    assert other.corpus == pytest.approx(straight.corpus, abs=1e-12)
    assert [other.per_picture[[p for p, _ in shuffled].index(i)] for i in range(len(pictures))] == pytest.approx(
        list(straight.per_picture), abs=1e-12
    )


@given(sets)
def test_a_reference_as_caption_is_best(pictures: list) -> None:
    wanted = [group[:1] for _, group in pictures]
    said = [group[0] for group in wanted]
    assert all(rouge_l(one, group) == pytest.approx(1.0) for one, group in zip(said, wanted, strict=True))
    assert all(meteor(one, group[0]) == pytest.approx(1.0) for one, group in zip(said, wanted, strict=True))
    mine, theirs = cider_d(said, wanted), cider_d([other for other, _ in pictures], wanted)
    assert all(a >= b - 1e-9 for a, b in zip(mine.per_picture, theirs.per_picture, strict=True))
    assert all(score <= 10 + 1e-9 for score in mine.per_picture)


def test_empty_captions_score_nothing_and_are_counted() -> None:
    found = caption_scores(["", "a red bus"], [["a dog"], ["a red bus"]])
    assert found.empty == 1
    assert found.num_words == 1.5
    assert found.rouge_l.per_picture[0] == found.cider_d.per_picture[0] == found.meteor.per_picture[0] == 0.0
    assert found.bleu[0].per_picture[0] < 1e-3


@pytest.mark.parametrize(
    ("captions", "references", "said"),
    [
        ([], [], "0 captions"),
        (["a"], [["a"], ["b"]], "1 captions for 2"),
        (["a"], [[]], "picture 0 has no references"),
        (["a"], ["a dog"], r"the references of picture 0 are one text; put it into a list, \['a dog'\]"),
    ],
)
def test_wrong_lengths_are_refused(captions: list[str], references: list[list[str]], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        caption_scores(captions, references)
