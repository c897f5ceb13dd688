"""scripts/mean_parts.py: the mean of shipped parts, number by number, and refusals of parts that differ."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "mean_parts.py"


def parts(folder: Path, value: float, kind: torch.dtype = torch.bfloat16) -> Path:
    (folder / "vision").mkdir(parents=True)
    save_file({"a": torch.full((2, 3), value, dtype=kind)}, folder / "connector.safetensors")
    save_file({"b": torch.full((4,), -value)}, folder / "vision" / "adapter_model.safetensors")
    (folder / "vision" / "adapter_config.json").write_text('{"r": 4}')
    return folder


def mean_of(*arguments: Any) -> int:
    code: int = runpy.run_path(str(SCRIPT))["main"]([str(one) for one in arguments])
    return code


def test_every_part_is_the_mean_in_the_kind_of_the_first(tmp_path: Path) -> None:
    folders = [parts(tmp_path / str(value), value) for value in (1.0, 2.0, 6.0)]
    assert mean_of(*folders, "--out", tmp_path / "out") == 0
    connector = load_file(tmp_path / "out" / "connector.safetensors")
    assert connector["a"].dtype == torch.bfloat16
    assert torch.equal(connector["a"].float(), torch.full((2, 3), 3.0))
    assert torch.equal(load_file(tmp_path / "out/vision/adapter_model.safetensors")["b"], torch.full((4,), -3.0))
    assert (tmp_path / "out/vision/adapter_config.json").read_text() == '{"r": 4}'


def test_parts_that_differ_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, other = parts(tmp_path / "one", 1.0), parts(tmp_path / "other", 2.0)
    save_file({"c": torch.zeros(1)}, other / "embeddings.safetensors")
    with pytest.raises(SystemExit):
        mean_of(one, other, "--out", tmp_path / "out")
    assert "different parts: embeddings.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_without_parts_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mean_of(tmp_path, "--out", tmp_path / "out")
    assert "none at all" in capsys.readouterr().err
