"""The snippets of the pages on 1.0, and the sizes of docs/internvl-1.0.md."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from internvl.models.build import build_dual
from internvl.zoo import DUAL

DOCS = Path(__file__).parents[1] / "docs"
PAGE = (DOCS / "internvl-1.0.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", ["internvl-1.0.md", "internvl-chat-1.0.md"])
def test_snippets_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    said = []
    for snippet in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL):
        exec(compile(snippet, page, "exec"), names)
        said += re.findall(r"print\(.*\)\s+# (.*)", snippet)
    assert said == capsys.readouterr().out.splitlines()


def test_sizes_are_those_of_the_table() -> None:
    rows = re.findall(r"^\| (`[^|]*`) \| ([\d,]+) \| ([\d,]+) \|", PAGE, flags=re.MULTILINE)
    shown = {name: (tensors, numbers) for names, tensors, numbers in rows for name in re.findall(r"`([\w.-]+)`", names)}
    assert shown == {
        name: (f"{len(build_dual(config, device='meta').state_dict()):,}", f"{config.num_parameters:,}")
        for name, config in DUAL.items()
    }
