"""The snippets of docs/models.md and docs/convert.md, run in order, each page in a folder of its own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internvl.cli import main
from internvl.load import load_checkpoint

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["models.md", "convert.md"])
def test_snippets_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    snippets = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert snippets
    names: dict[str, object] = {}
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), names)
    said = capsys.readouterr().out
    if page == "models.md":
        assert "3 <IMG_CONTEXT> tokens but 4 visual tokens from 1 tiles; each real tile needs 4" in said
    else:
        assert "official internvl2_5 None" in said
        assert main(["convert", "native", "back"]) == 0
        assert load_checkpoint("back").layout == "official"


def test_tables_name_files_that_exist() -> None:
    for name in re.findall(r"`(\w+\.py)`", (DOCS / "models.md").read_text(encoding="utf-8")):
        assert list((DOCS.parent / "src" / "internvl" / "models").glob(name)), name
