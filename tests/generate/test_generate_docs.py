"""The commands and snippets of docs/chat.md, with a tiny model where they say `pocket`."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import internvl
from internvl.cli import main
from internvl.load import save_checkpoint
from tiny import tiny_model, tiny_tokenizer

PAGE = (Path(__file__).parents[2] / "docs" / "chat.md").read_text(encoding="utf-8")


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A folder with a tiny model; the working directory has the pictures of the page."""
    tokenizer = tiny_tokenizer()
    image_token_id = tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>")
    save_checkpoint(tiny_model(vocab_size=len(tokenizer), image_token_id=image_token_id), tokenizer, tmp_path / "tiny")
    for name in set(re.findall(r"demo/(\w+)\.jpg", PAGE)):
        (tmp_path / "demo").mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 80).convert("RGB").save(tmp_path / "demo" / f"{name}.jpg")
    monkeypatch.chdir(tmp_path)
    return str(tmp_path / "tiny")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, flags=re.DOTALL)


def test_snippets_run(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    load = internvl.load
    monkeypatch.setattr("internvl.generate.opening.load", lambda name, **options: load(model, **options))
    names: dict[str, object] = {}
    for snippet in _blocks("python"):
        exec(compile(snippet, "chat.md", "exec"), names)
    assert len(names["replies"]) == 3  # type: ignore[arg-type]
    assert (Path("out") / "config.json").is_file()


def test_commands_run(model: str) -> None:
    lines = [line for block in _blocks("bash") for line in block.splitlines()]
    assert len(lines) == 6
    for line in lines:
        typed, _, command = line.rpartition("|")
        words = shlex.split(command)
        assert words.pop(0) == "internvl"
        if "--help" not in words:
            words += ["--model", model, *(["--max-new-tokens", "4"] if "--max-new-tokens" not in words else [])]
        if typed or "--help" in words:
            code = "import sys; from internvl.cli import main; sys.exit(main(sys.argv[1:]))"
            subprocess.run([sys.executable, "-c", code, *words], input=b"What is this?\n", check=True)
        else:
            assert main(words) == 0
    assert Path("boxes.png").is_file()
