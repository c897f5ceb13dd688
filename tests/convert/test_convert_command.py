"""internvl convert."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from internvl.cli import main
from internvl.load import load_checkpoint, save_checkpoint
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture
def official(tmp_path: Path) -> Path:
    save_checkpoint(tiny_model("internlm2", dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "official")
    (tmp_path / "official" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tmp_path / "official"


def test_there_and_back(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(official), str(native), "--layout", "native", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["from"], said["to"], said["logits"]) == ("official", "native", "equal")
    assert load_checkpoint(native).layout == "native"
    assert (native / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert main(["convert", str(native), str(back)]) == 0
    assert "logits      equal" in capsys.readouterr().out
    first, second = load_file(official / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == torch.bfloat16 for key in first)
    assert (official / "config.json").read_text() == (back / "config.json").read_text()


def test_another_number_type(official: Path, tmp_path: Path) -> None:
    assert main(["convert", str(official), str(tmp_path / "wide"), "--dtype", "float32", "--no-check"]) == 0
    assert json.loads((tmp_path / "wide" / "config.json").read_text())["torch_dtype"] == "float32"
    assert {value.dtype for value in load_file(tmp_path / "wide" / "model.safetensors").values()} == {torch.float32}


def test_mistakes_are_one_line(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", str(official), str(official)]) == 1
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), str(tmp_path / "out")]) == 1
    assert "no such folder" in capsys.readouterr().err
    save_checkpoint(tiny_model(), None, tmp_path / "wordless")
    assert main(["convert", str(tmp_path / "wordless"), str(tmp_path / "out"), "--layout", "native"]) == 1
    assert "<IMG_CONTEXT>" in capsys.readouterr().err
    arguments = ["convert", str(tmp_path / "wordless"), str(tmp_path / "out"), "--layout", "native"]
    assert main([*arguments, "--image-token-id", "9"]) == 0


def test_a_wrong_copy_is_refused(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loading = sys.modules["internvl.load"]  # the name internvl.load is the public function

    def damaged(model, tokenizer, out, layout):  # type: ignore[no-untyped-def]
        with torch.no_grad():
            model.connector.fc1.weight.mul_(1.01)
        save_checkpoint(model, tokenizer, out, layout)

    monkeypatch.setattr(loading, "save_checkpoint", damaged)
    assert main(["convert", str(official), str(tmp_path / "out")]) == 1
    assert "logits differ by" in capsys.readouterr().err
