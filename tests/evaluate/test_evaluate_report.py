"""Table, chart and JSON of scores; the chart alone needs matplotlib."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from internvl.evaluate import report
from internvl.evaluate.intervals import Estimate
from internvl.evaluate.run import Score


def shares(task: str = "words", **fields: object) -> Score:
    known = {
        "task": task,
        "metric": "exact as written",
        "n": 40,
        "num_pictures": 40,
        "model": Estimate(0.5, 0.4, 0.6, 40),
        "blind": Estimate(0.1, 0.05, 0.2, 40),
        "majority": Estimate(0.0, 0.0, 0.1, 40),
        "majority_answer": "salt",
        "majority_source": "held-out answers",
        "target": 0.6,
        "times_blind": 1.0,
        "gain": None,
        "met": False,
        "parts": {"ignoring case": Estimate(0.7, 0.6, 0.8, 40)},
    }
    return Score(**{**known, **fields})  # type: ignore[arg-type]


def losses() -> Score:
    gain = Estimate(0.9, 0.8, 1.0, 40)
    return shares("captions", majority=None, majority_answer=None, majority_source=None, gain=gain, met=True, parts={})


def shown(scores: list[Score]) -> str:
    console = Console(width=80)
    with console.capture() as captured:
        console.print(report.table(scores))
    return captured.get()


def test_table_says_model_baselines_and_target() -> None:
    text = shown([shares(), shares("naming", times_blind=3.0, met=None), losses()])
    for part in ("0.500 (0.40–0.60)", "0.100", "ignoring case", "0.60 missed", "3x blind", "gain 0.60 met"):
        assert part in text
    assert "0.900 (0.80–1.00)" in text
    assert max(map(len, text.splitlines())) <= 80


def test_scores_survive_json(tmp_path: Path) -> None:
    facts = report.manifest({"dtype": "float32"}, {"words": "ab"}, {"words": "prompt"})
    report.write_json(tmp_path / "s.json", report.scores_json([shares(), losses()], facts))
    read = json.loads((tmp_path / "s.json").read_text())
    assert read["scores"]["words"]["model"] == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 40}
    assert read["scores"]["captions"]["gain"]["value"] == 0.9
    assert read["manifest"]["versions"]["torch"]
    assert read["manifest"]["hardware"]["cores"]
    assert list(tmp_path.iterdir()) == [tmp_path / "s.json"]


@pytest.mark.parametrize("scores", [[shares()], [losses()], [shares(), shares("naming", blind=None), losses()]])
def test_chart_is_a_picture(tmp_path: Path, scores: list[Score]) -> None:
    pytest.importorskip("matplotlib")
    report.chart(scores, tmp_path / "c" / "scores.png")
    assert (tmp_path / "c" / "scores.png").read_bytes().startswith(b"\x89PNG")


def test_matplotlib_is_imported_for_the_chart_only() -> None:
    code = "import sys, internvl.evaluate.report, internvl.commands.evaluate; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_chart_without_matplotlib_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install"):
        report.chart([shares()], tmp_path / "c.png")
