"""Where a process stands, and starting ranks on this machine."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from internvl.commands.train import main, parse, without_value
from internvl.parallel.launch import Place, place, start

PAGE = Path(__file__).parents[2] / "docs" / "ranks.md"


def test_the_place_is_what_torchrun_says() -> None:
    assert place({}) == Place(0, 1, 0)
    assert place({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    with pytest.raises(ValueError, match=r"RANK is 'x' and WORLD_SIZE is '2'"):
        place({"RANK": "x", "WORLD_SIZE": "2"})
    with pytest.raises(ValueError, match="RANK is '1' and WORLD_SIZE is None"):
        place({"RANK": "1"})
    with pytest.raises(ValueError, match="RANK is 2 but WORLD_SIZE is 2; ranks count from 0"):
        place({"RANK": "2", "WORLD_SIZE": "2"})


def test_started_processes_give_their_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    assert start(["--version"], 2) == 0
    assert capfd.readouterr().out.count("internvl ") == 2
    assert start(["no-such-verb"], 2) == 2


def test_words_of_the_command() -> None:
    asked = parse(["tiny_sft", "--nproc", "4", "--export", "best", "--average", "3", "--json", "--seed", "1"])
    assert (asked.nproc, asked.average, asked.export, asked.json) == (4, 3, False, True)
    assert asked.rest == ["--export", "best", "--seed", "1"]
    assert parse(["tiny_sft", "--export", "--json"]).export
    assert without_value(["a", "--nproc", "2", "b"], "--nproc") == ["a", "b"]
    with pytest.raises(ValueError, match="--nproc is 'two'; it takes a number of at least 1"):
        parse(["tiny_sft", "--nproc", "two"])


def test_nproc_inside_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="torchrun has started the processes; leave --nproc out"):
        main(["tiny_sft", "--nproc", "2"])


def commands() -> list[str]:
    fenced = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    return [line for block in fenced for line in block.splitlines() if line.startswith("internvl train tiny")]


def internvl(command: str, folder: Path) -> str:
    words = [sys.executable, "-m", "internvl.cli", *shlex.split(command)[1:]]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr}"
    return done.stdout


@pytest.mark.slow
def test_commands_of_the_page_and_two_processes_equal_one(tmp_path: Path) -> None:
    assert len(commands()) >= 3
    for command in commands():
        internvl(f"{command} --device cpu", tmp_path)
    settings = "--schedule.steps 6 --save-every 3 --device cpu --json --optimiser.eps 0.01"
    two = "--accumulate 2 --data.batch-samples 4 --nproc 2"
    results: list[Any] = [
        json.loads(internvl(f"internvl train tiny_sft --out {name} {how} {settings}", tmp_path))
        for name, how in (("one", two.replace("--nproc 2", "")), ("two", two))
    ]
    assert results[0]["metrics"]["loss"] == pytest.approx(results[1]["metrics"]["loss"], rel=1e-5)
    one, both = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == both.keys()
    for name, value in one.items():
        assert (both[name] - value).abs().max() < 1e-6, name
