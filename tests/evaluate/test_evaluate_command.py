"""The verb end to end with a fake model: folder, table, JSON, growing limits, errors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from test_evaluate_run import Seer, build

from internvl import cli
from internvl.commands import evaluate


class Subject(Seer):
    def prompt(self, question: str) -> str:
        return f"<s>{question}"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    build(tmp_path / "d")
    build(tmp_path / "e", "captions")
    (tmp_path / "e" / "heldout" / "captions.jsonl").rename(tmp_path / "d" / "heldout" / "captions.jsonl")
    monkeypatch.setattr(evaluate, "_subject", lambda asked: Subject(asked.dtype))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "d"


def run(data: Path, *more: str) -> int:
    return cli.main(["evaluate", "some/pocket", "--data", str(data), *more])


def test_a_run_leaves_predictions_scores_manifest_and_chart(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert run(data, "--out", "o") == 0
    said = capsys.readouterr().out
    assert "scenes_colour" in said
    assert "majority answer 'red'" in said
    out = Path("o")
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*.*")) == [
        "manifest.json",
        "predictions/captions.blind.jsonl",
        "predictions/captions.jsonl",
        "predictions/scenes_colour.blind.jsonl",
        "predictions/scenes_colour.jsonl",
        "scores.json",
        "scores.png",
    ]
    facts = json.loads((out / "manifest.json").read_text())
    assert facts["prompts"]["scenes_colour"] == "<s>Which colour?"
    assert facts["model"] == "some/pocket"


def test_json_is_the_scores_file(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--out", "o", "--json", "--no-chart", "--tasks", "captions") == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads(Path("o/scores.json").read_text())
    assert list(said["scores"]) == ["captions"]


def test_resumed_scores_equal_uninterrupted_ones(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def scores(out: str, *more: str) -> object:
        assert run(data, "--out", out, "--json", "--no-chart", *more) == 0
        return json.loads(capsys.readouterr().out)["scores"]

    scores("parts", "--limit", "5", "--batch", "2")
    assert scores("parts", "--batch", "3") == scores("whole")


def test_settings_choose_the_folder_and_never_mix(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(data, "--no-chart") == run(data, "--no-chart", "--dtype", "bfloat16") == 0
    assert len(list(Path("runs/evaluate").iterdir())) == 2
    assert run(data, "--no-chart", "--out", "o") == 0
    capsys.readouterr()
    assert run(data, "--no-chart", "--out", "o", "--dtype", "bfloat16") == 1
    assert "another run" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "said"),
    [(["--tasks", "vqa"], "no task 'vqa'"), (["--tasks", "words"], "holds: captions, scenes_colour")],
)
def test_wrong_tasks_say_what_there_is(
    data: Path, capsys: pytest.CaptureFixture[str], more: Sequence[str], said: str
) -> None:
    assert run(data, *more) == 1
    assert said in capsys.readouterr().err
