"""The commands of docs/train.md that train the tiny model run as they stand."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from internvl.commands.train import main

PAGE = Path(__file__).parents[2] / "docs" / "train.md"


def commands() -> list[list[str]]:
    fenced = PAGE.read_text(encoding="utf-8").split("```")[1::2]
    lines = [line for block in fenced for line in block.splitlines() if line.startswith("internvl train ")]
    return [shlex.split(line)[2:] for line in lines]


def test_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    tiny = [words for words in commands() if not any("pocket" in word for word in words)]
    assert len(tiny) >= 6
    for words in tiny:
        assert main(words) == 0, words
    for name in ("tiny_sft", "connector", "lora", "short"):
        assert (tmp_path / "runs" / name / "model" / "model.safetensors").is_file()
    assert (tmp_path / "runs" / "lora" / "parts" / "language" / "adapter_model.safetensors").is_file()
    assert main(["--run", "runs/tiny_sft"]) == 0


def test_recipes_of_the_page_exist() -> None:
    from internvl.train.recipes import RECIPES

    named = {words[0] for words in commands() if not words[0].startswith("-")}
    assert named <= set(RECIPES)
