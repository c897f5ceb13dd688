"""Names, folders and hub ids to the folder of a checkpoint. No network: the hub's one function is replaced."""

from __future__ import annotations

import builtins
import json
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from internvl.cli import main
from internvl.generate.open_chat import load_chat as load
from internvl.hub import FILES, NOT_FILES, is_hub_id
from internvl.load import load_checkpoint, save_checkpoint
from internvl.locate import locate
from internvl.zoo import CHAT, RELEASED
from tiny import tiny_model, tiny_tokenizer

HUB_ID = "OpenGVLab/InternVL2_5-1B"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A whole repository, as the hub has it: with code, pickle and pictures."""
    folder = tmp_path / "repository"
    save_checkpoint(tiny_model(), tiny_tokenizer(), folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 151]}')
    (folder / "modeling_internvl_chat.py").write_text("raise SystemExit('code of a checkpoint ran')")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    return folder


@pytest.fixture
def hub(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """snapshot_download as its documentation has it: allowed files that are not ignored; the calls are kept."""
    calls: list[str] = []

    def snapshot_download(repo_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        calls.append(repo_id)
        target = tmp_path / "cache" / repo_id.replace("/", "--")
        for path in (path for path in repository.rglob("*") if path.is_file()):
            name = path.relative_to(repository).as_posix()
            allowed = any(fnmatch(name, pattern) for pattern in allow_patterns)
            if allowed and not any(fnmatch(name, pattern) for pattern in ignore_patterns):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                (target / name).write_bytes(path.read_bytes())
        return str(target)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_hub_id_opens_as_its_folder_does(hub: list[str], repository: Path) -> None:
    ours, theirs = load_checkpoint(HUB_ID), load_checkpoint(repository)
    assert hub == [HUB_ID]
    assert ours.layout == "official"
    state = theirs.model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in ours.model.state_dict().items())
    assert ours.model.image_token_id == theirs.model.image_token_id
    assert load(HUB_ID, dtype="float32").more_stop_ids == {2, 151}  # of its generation_config.json


def test_code_pickle_and_subfolders_stay_away(hub: list[str]) -> None:
    names = {path.name for path in locate(HUB_ID).rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= names
    assert not {name for name in names if name.endswith((".py", ".bin"))}
    assert not (locate(HUB_ID) / "onnx").exists()
    for name in ("a.py", "a.bin", "a.pth", "a.pt", "a.ckpt", "a.pkl", "a.so", "a.sh", "sub/model.safetensors"):
        fetched = any(fnmatch(name, pattern) for pattern in FILES)
        assert not fetched or any(fnmatch(name, pattern) for pattern in NOT_FILES), name


def test_converting_a_hub_id_keeps_its_generation_settings(hub: list[str], tmp_path: Path) -> None:
    assert main(["convert", HUB_ID, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [2, 151]}


def test_repository_without_safetensors(hub: list[str], repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"InternVL2_5-1B: the repository has no \*\.safetensors; pickled"):
        load_checkpoint(HUB_ID)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Name or service not known\nmore lines"),
        ValueError("Name or service not known"),
        huggingface_hub.errors.LocalEntryNotFoundError("Name or service not known"),
        huggingface_hub.errors.HfHubHTTPError.__bases__[0]("Name or service not known"),
    ],
)
def test_unreachable_hub_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fails(*_: Any, **__: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    assert main(["convert", HUB_ID, str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "(Name or service not known)" in said
    assert f"hf download {HUB_ID}" in said
    assert "give its path" in said


def test_offline_mode_of_the_hub_is_respected(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="the hub did not give it"):
        load_checkpoint(HUB_ID)


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def imports(name: str, *rest: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", imports)
    with pytest.raises(FileNotFoundError, match="needs: pip install huggingface_hub; where there is a connection"):
        locate(HUB_ID)


@pytest.mark.parametrize("name", RELEASED)
def test_release_by_name_is_never_random(name: str, hub: list[str]) -> None:
    said = (
        rf"its weights .* are not here\. .* or OpenGVLab/{name} to" if RELEASED[name].on_hub else "was never released"
    )
    with pytest.raises(FileNotFoundError, match=f"^{name}: {said}"):
        load_checkpoint(name)
    assert hub == []  # a name alone fetches nothing


def test_folder_named_like_a_release(hub: list[str], repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository.parent)
    repository.rename("InternVL2_5-8B")
    assert load_checkpoint("InternVL2_5-8B").layout == "official"
    (repository.parent / "OpenGVLab").mkdir()
    with pytest.raises(FileNotFoundError, match="no such folder"):  # the folder is there, the model is not: mistyped
        load_checkpoint(HUB_ID)
    assert hub == []


def test_what_is_a_hub_id() -> None:
    assert is_hub_id(HUB_ID)
    assert [name for name in ("model", "/a/b", "./a", "../a", "a/b/c", "~/a", "a/", "a//b") if is_hub_id(name)] == []


def test_random_models_have_no_folder() -> None:
    for name in CHAT:
        if name != "pocket":
            with pytest.raises(FileNotFoundError, match="random weights"):
                locate(name)
