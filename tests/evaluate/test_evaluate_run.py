"""Laws of a run with a fake model: resumed = uninterrupted, no dependence on batch size, blindness, fingerprints."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.evaluate.catalog import find_task
from internvl.evaluate.heldout import Row, another_picture, available, majority, read_heldout, read_rows
from internvl.evaluate.run import Question, evaluate, predict, score

COLOURS = ("red", "green", "blue")


class Seer:
    """Reads the answer out of the picture file; its losses are lower where the picture fits the reference."""

    def __init__(self, weights: str = "w1", fail_after: int | None = None) -> None:
        self.settings: Mapping[str, Any] = {"weights": weights, "dtype": "float32"}
        self.asked: list[Question] = []
        self.fail_after = fail_after

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise KeyboardInterrupt
        self.asked += questions
        return [question.picture.read_text().split()[0] + "." for question in questions]

    def losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        self.asked += questions
        return [(1.0 if q.reference in q.picture.read_text() else 3.0, 2) for q in questions]


def build(root: Path, task: str = "scenes_colour", n: int = 12) -> Path:
    (root / "heldout").mkdir(parents=True)
    (root / "pictures").mkdir()
    lines = []
    for i in range(n):
        colour = COLOURS[i % 3]
        (root / "pictures" / f"{i}.txt").write_text(f"{colour} {i}")
        row = {"id": f"r{i}", "image": f"pictures/{i}.txt", "question": "Which colour?", "answer": colour, "task": task}
        lines.append(json.dumps({**row, "accept": [colour]}))
    (root / "heldout" / f"{task}.jsonl").write_text("\n".join(lines) + "\n")
    return root


def test_a_seeing_model_scores_one_and_blindness_costs(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    found = evaluate(Seer(), find_task("scenes_colour"), held, tmp_path / "o")
    assert found.model.value == 1.0
    assert found.met is True
    assert found.blind is not None
    assert found.blind.value < 1.0
    assert (found.majority_answer, found.majority_source) == ("red", "held-out answers")
    assert found.majority is not None
    assert found.majority.value == pytest.approx(1 / 3)
    assert found.num_pictures == found.n == 12


@pytest.mark.parametrize("batch", [1, 3, 5, 100])
def test_predictions_do_not_depend_on_batch_size(tmp_path: Path, batch: int) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task = find_task("scenes_colour")
    whole = predict(Seer(), task, held, held.rows, tmp_path / "whole.jsonl", batch=12)
    assert predict(Seer(), task, held, held.rows, tmp_path / "parts.jsonl", batch=batch) == whole
    assert (tmp_path / "parts.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.parametrize("cut", [0, 1, 7])
def test_resumed_equals_uninterrupted(tmp_path: Path, cut: int) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task, path = find_task("scenes_colour"), tmp_path / "p.jsonl"
    whole = predict(Seer(), task, held, held.rows, tmp_path / "whole.jsonl", batch=2)
    with pytest.raises(KeyboardInterrupt):
        predict(Seer(fail_after=6), task, held, held.rows, path, batch=2)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    again = Seer()
    assert predict(again, task, held, held.rows, path, batch=2) == whole
    assert len(again.asked) == (6 if cut == 0 else 7)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    third = Seer()
    assert predict(third, task, held, held.rows, path, batch=2) == whole
    assert third.asked == []


def test_a_run_that_died_in_its_first_line_starts_over(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    path = tmp_path / "p.jsonl"
    path.write_text('{"settings": {"we')
    assert len(predict(Seer(), find_task("scenes_colour"), held, held.rows, path)) == 12


def test_any_answer_can_be_read_back(tmp_path: Path) -> None:
    class Odd(Seer):
        def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
            return ["a\u2028b\u0085c\x1cd\re\nf \x00 \ufffd"] * len(questions)

    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task, path = find_task("scenes_colour"), tmp_path / "p.jsonl"
    assert predict(Odd(), task, held, held.rows, path) == predict(Odd(), task, held, held.rows, path)


def test_other_settings_are_an_error_that_names_them(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task, path = find_task("scenes_colour"), tmp_path / "p.jsonl"
    predict(Seer(), task, held, held.rows, path)
    with pytest.raises(ValueError, match=r"weights: 'w1' there, 'w2' now.*--out"):
        predict(Seer("w2"), task, held, held.rows, path)
    (held.root / held.rows[0].image).write_text("purple 99")
    changed = read_heldout(held.root, "scenes_colour")
    with pytest.raises(ValueError, match="data: "):
        predict(Seer(), task, changed, changed.rows, path)


def test_a_broken_prediction_line_is_named(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task, path = find_task("scenes_colour"), tmp_path / "p.jsonl"
    predict(Seer(), task, held, held.rows, path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", *lines[2:]]) + "\n")
    with pytest.raises(ValueError, match=r"p\.jsonl:2: not a prediction"):
        predict(Seer(), task, held, held.rows, path)


def test_samples_are_nested_and_grow_without_asking_again(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d"), "scenes_colour")
    task, path = find_task("scenes_colour"), tmp_path / "p.jsonl"
    assert {row.id for row in held.sample(3)} < {row.id for row in held.sample(8)}
    predict(Seer(), task, held, held.sample(3), path)
    more = Seer()
    results = predict(more, task, held, held.sample(8), path)
    assert len(more.asked) == 5
    assert [one["image"] for one in results] == [row.image for row in held.sample(8)]
    with pytest.raises(ValueError, match="limit 0"):
        held.sample(0)


def test_captions_gain_is_the_difference_of_losses(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d", "captions"), "captions")
    found = evaluate(Seer(), find_task("captions"), held, tmp_path / "o", batch=5)
    assert found.model.value == 0.5
    assert found.blind is not None
    assert found.gain is not None
    assert found.gain.value == pytest.approx(found.blind.value - 0.5)
    assert found.met is (found.gain.value >= 0.8)
    assert evaluate(Seer(), find_task("captions"), held, tmp_path / "o", blind=False).met is None


def test_naming_needs_three_times_blind(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d", "naming"), "naming")
    task = find_task("naming")
    assert evaluate(Seer(), task, held, tmp_path / "o", blind=False).met is None
    right = [{"answer": row.answer} for row in held.rows]
    wrong = [{"answer": "purple"} for _ in held.rows]
    assert score(task, held, held.rows, right, wrong[:9] + right[9:]).met is True
    assert score(task, held, held.rows, right, wrong[:6] + right[6:]).met is False
    assert score(task, held, held.rows, wrong, wrong).met is False


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30).filter(lambda shown: len(set(shown)) > 1))
def test_another_picture_is_never_the_same(shown: list[int]) -> None:
    rows = [Row(str(i), f"{i}.png", "?", "x", ("x",), "t") for i in range(len(shown))]
    content = {row.image: f"{hash(number) * 2654435761 % 2**32:08x}" for row, number in zip(rows, shown, strict=True)}
    another = another_picture(rows, content)
    assert all(content[another[row.id]] != content[row.image] for row in rows)
    cycle = {content[row.image]: content[another[row.id]] for row in rows}
    assert sorted(cycle.values()) == sorted(cycle)


def test_one_picture_cannot_be_blind(tmp_path: Path) -> None:
    held = read_heldout(build(tmp_path / "d", n=1), "scenes_colour")
    with pytest.raises(ValueError, match="--no-blind"):
        evaluate(Seer(), find_task("scenes_colour"), held, tmp_path / "o")
    assert evaluate(Seer(), find_task("scenes_colour"), held, tmp_path / "o", blind=False).model.value == 1.0


def test_majority_comes_from_training_answers_where_there_are_any(tmp_path: Path) -> None:
    root = build(tmp_path / "d")
    (root / "train").mkdir()
    row = {"id": "t", "image": "pictures/0.txt", "question": "?", "answer": "blue"}
    (root / "train" / "scenes_colour.jsonl").write_text(json.dumps(row) + "\n")
    held = read_heldout(root, "scenes_colour")
    common = majority(root, "scenes_colour", held.rows)
    assert (common.answer, common.source) == ("blue", "training answers")


def test_majority_box_is_the_median_of_each_side(tmp_path: Path) -> None:
    boxes = [(0, 0, 100, 100), (100, 50, 300, 400), (500, 600, 900, 1000)]
    rows = [Row(str(i), "a.png", "?", "x", ("x",), "scenes_box", box) for i, box in enumerate(boxes)]
    assert majority(tmp_path, "scenes_box", rows).answer == "[[100, 50, 300, 400]]"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "Expecting"),
        ("[]", "JSON object"),
        ('{"id": "a"}', "'image'"),
        ('{"id": "a", "image": "b", "question": "c", "answer": "d", "box": [1, 2, 0, 5]}', "'box'"),
        ('{"id": "a", "image": "b", "question": "c", "answer": "d", "accept": "d"}', "'accept'"),
        ('{"id": "a", "image": "b", "question": "c", "answer": "d", "task": "other"}', "task 'other'"),
    ],
)
def test_bad_rows_say_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"id": "z", "image": "b", "question": "c", "answer": "d"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"t\.jsonl:2: .*{said}"):
        read_rows(path, "t")


def test_missing_sets_and_pictures_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="internvl data"):
        available(tmp_path)
    root = build(tmp_path / "d")
    assert available(root) == ["scenes_colour"]
    with pytest.raises(ValueError, match="holds: scenes_colour"):
        read_heldout(root, "words")
    (root / "pictures" / "3.txt").unlink()
    with pytest.raises(ValueError, match=r"3\.txt, which does not exist"):
        read_heldout(root, "scenes_colour")
