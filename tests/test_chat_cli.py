"""`internvl chat` as a user meets it, and what starting costs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from internvl.cli import main
from internvl.load import save_checkpoint
from tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    tokenizer = tiny_tokenizer()
    tiny = tiny_model(
        vocab_size=len(tokenizer), image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"), max_tiles=2
    )
    out = tmp_path_factory.mktemp("cli")
    save_checkpoint(tiny, tokenizer, out)
    return str(out)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("pictures") / "a cat.png"
    Image.effect_noise((120, 60), 80).convert("RGB").save(path)
    return str(path)


def test_one_question(model: str, picture: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["chat", picture, "What is this?", "--model", model, "--dtype", "float32", "--max-new-tokens", "12"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert main([*words, "--json", "--draw", str(tmp_path / "boxes.png")]) == 0
    reply = json.loads(capsys.readouterr().out)
    assert reply["text"] == text.rstrip("\n")
    assert reply["images"] == [picture]
    assert (reply["finish_reason"], reply["usage"]["new_tokens"], reply["usage"]["tiles"]) == ("length", 12, 3)
    assert Image.open(tmp_path / "boxes.png").size == (120, 60)


def test_question_from_a_pipe(
    model: str, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", _Typed("What is this?\n"))
    assert main(["chat", picture, "--model", model, "--max-new-tokens", "3"]) == 0
    piped = capsys.readouterr().out
    assert main(["chat", picture, "What is this?", "--model", model, "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out == piped


class _Typed:
    def __init__(self, text: str, terminal: bool = False) -> None:
        self.text, self.terminal = text, terminal

    def read(self) -> str:
        return self.text

    def isatty(self) -> bool:
        return self.terminal


def test_conversation(
    model: str, picture: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = iter(
        [
            *("What?", "/image nowhere.png", f"/image {picture}", "And this?", f"/save {tmp_path / 'talk.json'}"),
            *("/help", "/reset", f"/save {tmp_path / 'empty.json'}", "/quit"),
        ]
    )
    monkeypatch.setattr("sys.stdin", _Typed("", terminal=True))
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert main(["chat", picture, "--model", model, "--max-new-tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "nowhere.png: no such picture" in out
    assert "/reset" in out
    talk = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [message["role"] for message in talk] == ["user", "assistant"] * 2
    assert talk[2]["content"] == "<image>\nAnd this?"
    assert [message["images"] for message in talk] == [[picture], [], [picture], []]
    assert json.loads((tmp_path / "empty.json").read_text()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.png", "What?"], "nowhere.png: no such picture"),
        (["nowhere.png"], "nowhere.png: no such picture"),
        (["What?", "--model", "nobody"], "nobody: no such folder, and no model of that name"),
        (["What?", "--model", "tiny-llama"], "no tokenizer"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chat", *words]) == 1
    error = capsys.readouterr().err
    assert error.startswith("internvl chat: ")
    assert error.count("\n") == 1
    assert said in error


def test_drawing_needs_a_picture(model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = str(tmp_path / "b.png")
    assert main(["chat", "What?", "--model", model, "--max-new-tokens", "2", "--draw", out]) == 1
    assert "needs a picture" in capsys.readouterr().err


def test_load_is_the_function_whatever_was_imported_before() -> None:
    for first in ("import internvl.load", "from internvl.load import load_checkpoint", "import internvl"):
        code = f"{first}; import internvl; internvl.load; from internvl import load; print(load.__qualname__, "
        code += "internvl.load is load, internvl.load.__module__)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["load", "True", "internvl.generate.opening"]


@pytest.mark.parametrize(
    "code",
    [
        "import internvl; dir(internvl); internvl.__version__",
        "from internvl.cli import main; assert main(['--help']) == 0",
        "from internvl.cli import main; assert main(['--version']) == 0",
    ],
)
def test_starting_loads_no_heavy_module(code: str) -> None:
    heavy = ("torch", "transformers", "numpy", "PIL", "tyro", "rich", "peft")
    check = f"import sys; {code}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_has_enough_is_no_error() -> None:
    """`internvl train --list | head -1` says nothing on its own."""
    command = [sys.executable, "-m", "internvl.cli", "train", "--list"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 141
