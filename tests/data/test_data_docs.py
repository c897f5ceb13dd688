"""The snippets of docs/data.md, run in order in one folder."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import internvl
from internvl.zoo import CHAT
from tiny import tiny_tokenizer

PAGE = Path(__file__).parents[2] / "docs" / "data.md"


def test_snippets_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("INTERNVL_CACHE", str(tmp_path / "cache"))
    pocket = SimpleNamespace(tokenizer=tiny_tokenizer(), config=CHAT["pocket"])
    monkeypatch.setattr(internvl, "load", lambda name: pocket, raising=False)
    page = PAGE.read_text(encoding="utf-8")
    blocks = re.findall(r"```(python|json)\n(.*?)```", page, re.DOTALL)
    line, meta = (json.loads(body) for language, body in blocks if language == "json")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 600, 3), np.uint8))
    picture.save("photo.jpg")
    Path("pictures").mkdir()
    picture.save(f"pictures/{line['image']}")
    broken = {**line, "conversations": [{"from": "human", "value": "<image><image>"}, line["conversations"][1]]}
    Path("train.jsonl").write_text("\n".join(json.dumps(record) for record in (line, line, broken)))
    Path("meta.json").write_text(json.dumps(meta))
    names: dict[str, Any] = {}
    for language, body in blocks:
        if language == "python":
            exec(compile(body, str(PAGE), "exec"), names)
    assert names["tiling"].grid == (3, 2)
    assert len(names["problems"]) == 1
    assert "train.jsonl:3: 2 <image> marks in the questions but 1 images" in names["problems"][0].message
    names["batches"].close()


def test_snippets_of_packing_run() -> None:
    page = (PAGE.parent / "packing.md").read_text(encoding="utf-8")
    for body in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(body, "packing.md", "exec"), {})
