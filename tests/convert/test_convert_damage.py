"""Damaged and hostile folders: the error names file and key, nothing half is used, no code of a folder ever runs."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hostile import trap
from internvl.cli import main
from internvl.convert.files import write_weights
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.chat import ChatModel
from internvl.opened import open_checkpoint
from reference import golden
from tiny import FAMILIES, tiny_model, tiny_tokenizer

INDEX = "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint of several shards, to break."""
    path = tmp_path / "model"
    save_checkpoint(tiny_model("qwen2"), tiny_tokenizer(), path)
    weights = load_file(path / "model.safetensors")
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in weights.items()}
    write_weights(path, shapes, weights.__getitem__, max_shard_bytes=300_000)
    return path


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def change_shard(folder: Path, number: int, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = shards(folder)[number]
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    content = json.loads((folder / INDEX).read_text())
    change(content["weight_map"])
    (folder / INDEX).write_text(json.dumps(content))


def first(folder: Path, number: int) -> str:
    return sorted(load_file(shards(folder)[number]))[0]


def missing_shard(folder: Path) -> str:
    shards(folder)[1].unlink()
    return r"model-00002-of-\S+: shard not found"


def truncated_data(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-1])
    return r"model-00002-of-\S+: not a whole safetensors file"


def truncated_header(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:30])
    return r"model-00002-of-\S+: not a whole safetensors file"


def endless_header(folder: Path) -> str:
    path = shards(folder)[1]
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])
    return r"model-00002-of-\S+: not a whole safetensors file"


def wrong_shape(folder: Path) -> str:
    key = first(folder, 1)
    change_shard(folder, 1, lambda w: w.update({key: torch.zeros(3, 5)}))
    return rf"{key} is 3x5, must be"


def scalar(folder: Path) -> str:
    key = first(folder, 1)
    change_shard(folder, 1, lambda w: w.update({key: torch.zeros(())}))
    return rf"{key} is a number, must be"


def extra_key(folder: Path) -> str:
    change_shard(folder, 1, lambda w: w.update({"vision_model.surprise": torch.zeros(2)}))
    change_index(folder, lambda m: m.update({"vision_model.surprise": shards(folder)[1].name}))
    return r"1 keys that the model does not use: vision_model\.surprise"


def missing_key(folder: Path) -> str:
    key = first(folder, 1)
    change_shard(folder, 1, lambda w: w.pop(key))
    change_index(folder, lambda m: m.pop(key))
    return rf"1 keys missing: {key}"


def key_in_another_shard(folder: Path) -> str:
    key = first(folder, 1)
    change_index(folder, lambda m: m.update({key: shards(folder)[0].name}))
    return rf"index\.json: {key} not in the shard that it names"


def key_in_two_shards(folder: Path) -> str:
    key = first(folder, 1)
    value = load_file(shards(folder)[1])[key]
    change_shard(folder, 0, lambda w: w.update({key: value}))
    return rf"index\.json: {key} in both model-00001-\S+ and model-00002-"


def key_without_a_name(folder: Path) -> str:
    key = first(folder, 1)
    change_index(folder, lambda m: m.pop(key))
    return rf"index\.json: does not name {key}, which model-00002-"


def path_outside(folder: Path) -> str:
    shutil.copy(shards(folder)[1], folder.parent / "outside.safetensors")
    change_index(folder, lambda m: m.update({first(folder, 1): "../outside.safetensors"}))
    return r"index\.json: shard '\.\./outside\.safetensors' must be .* in the same folder"


def absolute_path(folder: Path) -> str:
    shutil.copy(shards(folder)[1], folder.parent / "outside.safetensors")
    outside = str(folder.parent / "outside.safetensors")
    change_index(folder, lambda m: m.update({first(folder, 1): outside}))
    return r"index\.json: shard .* must be .* in the same folder"


def integers(folder: Path) -> str:
    key = first(folder, 1)
    change_shard(folder, 1, lambda w: w.update({key: w[key].to(torch.int8)}))
    return rf"model-00002-\S+: {key} stored as I8; readable are F32, BF16, F16"


def eight_bit_floats(folder: Path) -> str:
    key = first(folder, 1)
    change_shard(folder, 1, lambda w: w.update({key: w[key].to(torch.float8_e4m3fn)}))
    return rf"model-00002-\S+: {key} stored as F8_E4M3"


def config_that_is_not_json(folder: Path) -> str:
    (folder / "config.json").write_text("{'model_type': 'internvl_chat'}")
    return r"config\.json: not readable as JSON"


def config_that_is_not_text(folder: Path) -> str:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    return r"config\.json: not readable as JSON"


def config_that_never_ends(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 200_000)
    return r"config\.json: not readable as JSON"


def unknown_architecture(folder: Path) -> str:
    settings = json.loads((folder / "config.json").read_text())
    settings["llm_config"]["architectures"] = ["MambaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(settings))
    return r"config\.json: language model 'MambaForCausalLM' is not one of"


def pickle(folder: Path) -> str:
    for path in (*shards(folder), folder / INDEX):
        path.unlink()
    torch.save({"a": torch.zeros(1)}, folder / "pytorch_model.bin")
    return r"pytorch_model\.bin but no safetensors\. .* can run code"


DAMAGES = (
    *(missing_shard, truncated_data, truncated_header, endless_header, wrong_shape, scalar, extra_key, missing_key),
    *(key_in_another_shard, key_in_two_shards, key_without_a_name, path_outside, absolute_path, integers),
    *(eight_bit_floats, config_that_is_not_json, config_that_is_not_text, config_that_never_ends),
    *(unknown_architecture, pickle),
)


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damage_is_named_and_nothing_is_used(
    folder: Path,
    damage: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    message = damage(folder)
    assigned: list[object] = []
    monkeypatch.setattr(ChatModel, "load_state_dict", lambda *a, **k: assigned.append(a))
    with pytest.raises((ValueError, OSError), match=message):
        load_checkpoint(folder)
    assert not assigned
    with pytest.raises((ValueError, OSError), match=message):
        open_checkpoint(folder)
    assert main(["convert", str(folder), str(folder.parent / "out"), "--image-token-id", "9"]) == 1
    assert str(folder) in capsys.readouterr().err
    assert not (folder.parent / "out").exists()
    assert not list(folder.parent.glob(".*"))


def test_the_whole_folder_opens(folder: Path) -> None:
    """The damages above are what breaks it."""
    assert len(shards(folder)) >= 3
    assert load_checkpoint(folder).layout == "official"


@pytest.mark.parametrize("layout", ["official", "native"])
@pytest.mark.parametrize("family", FAMILIES)
def test_no_code_of_a_folder_runs(tmp_path: Path, family: str, layout: str) -> None:
    folder = tmp_path / "model"
    save_checkpoint(tiny_model(family), tiny_tokenizer(), folder, layout)
    mark = trap(folder)
    loaded = load_checkpoint(folder)
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    assert main(["convert", str(folder), str(tmp_path / "out"), "--image-token-id", "9"]) == 0
    assert not mark.exists()
    assert not [name for name in sys.modules if name.endswith("_trap")]
    assert not list((tmp_path / "out").glob("**/*.py"))
    settings = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert "auto_map" not in settings
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert load_checkpoint(tmp_path / "out").tokenizer.get_vocab() == tiny_tokenizer().get_vocab()


@pytest.mark.parametrize(("name", "family"), [("qwen", "qwen2"), ("internlm2", "internlm2")])
def test_no_code_of_a_folder_runs_for_slow_tokenizers(tmp_path: Path, name: str, family: str) -> None:
    if name == "internlm2" and not find_spec("sentencepiece"):
        pytest.skip("needs sentencepiece")
    folder = tmp_path / "model"
    save_checkpoint(tiny_model(family), None, folder)
    for path in golden(f"tokenizers/{name}").iterdir():
        shutil.copy(path, folder)
    (folder / "tokenizer.json").unlink()
    mark = trap(folder)
    assert load_checkpoint(folder).tokenizer.get_vocab()["<IMG_CONTEXT>"] > 0
    assert not mark.exists()
    assert not [name for name in sys.modules if name.endswith("_trap")]


def test_the_trap_works(tmp_path: Path) -> None:
    """What would run is what writes the mark."""
    folder = tmp_path / "model"
    save_checkpoint(tiny_model(), None, folder)
    mark = trap(folder)
    with pytest.raises(SystemExit):
        exec(compile((folder / "modeling_trap.py").read_text(), "trap", "exec"), {})
    assert mark.exists()
