"""internvl convert."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl import rewrite
from internvl.cli import main
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from internvl.models.chat import ChatModel
from tiny import FAMILIES, tiny_chat_config, tiny_model, tiny_tokenizer
from wrapped import wrap


@pytest.fixture
def official(tmp_path: Path) -> Path:
    save_checkpoint(tiny_model("internlm2", dtype=torch.bfloat16), tiny_tokenizer(), tmp_path / "official")
    (tmp_path / "official" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tmp_path / "official"


def test_there_and_back(official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native, back = tmp_path / "native", tmp_path / "back"
    assert main(["convert", str(official), str(native), "--layout", "native", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["from"], said["to"], said["max_logit_difference"]) == ("official", "native", 0.0)
    assert load_checkpoint(native).layout == "native"
    assert (native / "generation_config.json").read_text() == '{"eos_token_id": 2}'
    assert main(["convert", str(native), str(back)]) == 0
    assert "max_logit_difference  0.0" in capsys.readouterr().out
    first, second = load_file(official / "model.safetensors"), load_file(back / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) and first[key].dtype == torch.bfloat16 for key in first)
    assert (official / "config.json").read_text() == (back / "config.json").read_text()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_family_goes_there_and_back_byte_by_byte(
    tmp_path: Path, family: str, vision: str, dtype: torch.dtype
) -> None:
    source, native, back = (tmp_path / name for name in ("source", "native", "back"))
    save_checkpoint(tiny_model(family, vision=vision, dtype=dtype, max_tiles=7), tiny_tokenizer(), source)
    assert rewrite.convert(source, native, rewrite.Wanted("native")).logit_difference == 0.0
    assert rewrite.convert(native, back, rewrite.Wanted("official"), check=False).logit_difference is None
    names = sorted(path.name for path in source.iterdir())
    assert sorted(path.name for path in back.iterdir()) == names
    assert [name for name in names if (source / name).read_bytes() != (back / name).read_bytes()] == []


def test_pixel_shuffle_v1_has_no_native_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tiny_model(pixel_shuffle="v1"), tiny_tokenizer(), tmp_path / "source")
    assert main(["convert", str(tmp_path / "source"), str(tmp_path / "out"), "--layout", "native"]) == 1
    assert "pixel shuffle v1 has no native form: transformers emits tokens row by row" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


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


@pytest.mark.parametrize("there", [False, True])
def test_a_wrong_copy_leaves_nothing(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    right = rewrite.write_checkpoint

    def damaged(folder, config, layout, image_token_id, kinds, read, limit):  # type: ignore[no-untyped-def]
        def wrong(key: str) -> torch.Tensor:
            return read(key) * 1.01 if key == "connector.fc1.weight" else read(key)

        right(folder, config, layout, image_token_id, kinds, wrong, limit)

    monkeypatch.setattr(rewrite, "write_checkpoint", damaged)
    target = tmp_path / "out"
    if there:
        target.mkdir()
    assert main(["convert", str(official), str(target)]) == 1
    assert re.search(r"logits differ by up to \d\S* from .*, tolerance 0; nothing was written", capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == (["official", "out"] if there else ["official"])
    assert not there or not any(target.iterdir())
    assert main(["convert", str(official), str(target), "--tolerance", "10"]) == 0


def test_a_write_that_fails_leaves_nothing(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("internvl.convert.files.save_file", full)
    assert main(["convert", str(official), str(tmp_path / "out")]) == 1
    assert "No space left" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


def test_a_dry_run_lists_keys_and_writes_nothing(
    official: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "native"
    assert main(["convert", str(official), str(target), "--layout", "native", "--dry-run", "--json"]) == 0
    rows = {row["key"]: row for row in json.loads(capsys.readouterr().out)}
    assert not target.exists()
    assert main(["convert", str(official), str(target), "--layout", "native", "--no-check"]) == 0
    capsys.readouterr()
    written = load_file(target / "model.safetensors")
    assert written.keys() == rows.keys()
    assert all(list(written[key].shape) == row["shape"] and row["dtype"] == "bfloat16" for key, row in rows.items())
    wqkv = "language_model.model.layers.1.attention.wqkv.weight"
    assert rows["model.language_model.layers.1.self_attn.k_proj.weight"]["from"] == [wqkv]
    assert {key for row in rows.values() for key in row["from"]} == load_file(official / "model.safetensors").keys()
    assert main(["convert", str(official), str(target), "--dry-run"]) == 0
    assert f"{wqkv}  128x64  bfloat16\n" in capsys.readouterr().out


def test_every_tensor_keeps_its_stored_type(official: Path, tmp_path: Path) -> None:
    path = official / "model.safetensors"
    mixed = {key: value.float() if "norm" in key else value for key, value in load_file(path).items()}
    save_file(mixed, path)
    assert main(["convert", str(official), str(tmp_path / "native"), "--layout", "native"]) == 0
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(back[key].dtype == value.dtype and torch.equal(back[key], value) for key, value in mixed.items())


@pytest.mark.parametrize("layout", ["official", "native"])
def test_wrapped_checkpoints_are_merged_or_taken_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    source = tmp_path / "wrapped"
    save_checkpoint(tiny_model("internlm2"), tiny_tokenizer(), source)
    wrap(source, "internlm2")
    whole, base = tmp_path / "whole", tmp_path / "base"
    assert main(["convert", str(source), str(whole), "--layout", layout, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["max_logit_difference"] == 0.0
    assert 0.0 < said["merging_moved_logits"] < 1e-4
    assert main(["convert", str(source), str(base), "--layout", layout, "--apart", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["max_logit_difference"] == 0.0
    folders = [base / "adapters" / part for part in ("language", "vision")]
    merged = [rewrite.probe(load_checkpoint(path, adapters=a).model) for path, a in ((whole, ()), (base, folders))]
    assert torch.equal(*merged)
    assert (rewrite.probe(load_checkpoint(base).model) - merged[0]).abs().max() > 0.1
    assert main(["convert", str(base), str(tmp_path / "again"), "--adapters", *map(str, folders)]) == 0
    assert torch.equal(rewrite.probe(load_checkpoint(tmp_path / "again").model), merged[0])


def test_progress_counts_every_byte_once(official: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    rewrite.convert(
        official, tmp_path / "out", rewrite.Wanted("native"), check=False, progress=lambda *pair: seen.append(pair)
    )
    size = sum(value.nbytes for value in load_file(official / "model.safetensors").values())
    assert {total for _, total in seen} == {size}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == size


def test_without_peft_both_sides_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "wrapped"
    save_checkpoint(tiny_model(), None, source)
    wrap(source, "llama")
    for module in (rewrite, sys.modules["internvl.load"]):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
    whole = rewrite.convert(source, tmp_path / "whole", rewrite.Wanted())
    assert (whole.logit_difference, whole.merge_change) == (0.0, None)
    assert rewrite.convert(source, tmp_path / "apart", rewrite.Wanted(apart=True)).logit_difference == 0.0
    with pytest.raises(ValueError, match=r"adapters beside the weights need: pip install 'internvl\[train\]'"):
        load_checkpoint(source, merge=False)


def test_an_adapter_folder_converts_with_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "wrapped"
    save_checkpoint(tiny_model(), tiny_tokenizer(), source)
    wrap(source, "llama", vision_rank=0)
    rewrite.convert(source, tmp_path / "base", rewrite.Wanted(apart=True))
    rewrite.convert(source, tmp_path / "whole", rewrite.Wanted())
    folder = tmp_path / "base" / "adapters" / "language"
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(tmp_path / "base")}))
    assert main(["convert", str(folder), str(tmp_path / "out")]) == 0
    assert "merging_moved_logits" in capsys.readouterr().out
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_tied_head_that_is_stored_once(tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_checkpoint(tied_model(), None, source)
    weights = load_file(source / "model.safetensors")
    del weights["language_model.lm_head.weight"]
    save_file(weights, source / "model.safetensors")
    arguments = ["convert", str(source), str(tmp_path / "native"), "--layout", "native", "--image-token-id", "9"]
    assert main(arguments) == 0
    assert main(["convert", str(tmp_path / "native"), str(tmp_path / "back")]) == 0
    back = load_file(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[key], value) for key, value in weights.items())
    assert torch.equal(back["language_model.lm_head.weight"], back["language_model.model.embed_tokens.weight"])


def tied_model() -> ChatModel:
    config = tiny_chat_config("qwen2")
    settings = {**config.language.settings, "tie_word_embeddings": True}
    return build(replace(config, language=replace(config.language, settings=settings)))
