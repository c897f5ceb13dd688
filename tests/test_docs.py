"""What the pages promise: links resolve, commands parse, the READMEs agree, nothing of a machine."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import pytest

import internvl
from internvl.cli import VERBS

ROOT = Path(__file__).parents[1]
ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
PAGES = sorted(
    [
        *(
            ROOT / name
            for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", "demo/README.md")
        ),
        *(ROOT / "docs").glob("*.md"),
    ]
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
MAKE_WORDS = {"PICTURE", "QUESTION"}


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, *languages: str) -> list[str]:
    return [body for language, body in FENCE.findall(read(page)) if language in languages]


def prose(page: Path) -> str:
    return FENCE.sub("", read(page))


def commands(page: Path) -> list[list[str]]:
    """Words of every command line, comments taken off."""
    lines = [line for block in blocks(page, "", "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(("internvl ", "make "))]


def parametrized(pages: list[Path]) -> Any:
    return pytest.mark.parametrize("page", pages, ids=lambda page: page.relative_to(ROOT).as_posix())


@parametrized(PAGES)
def test_links_resolve(page: Path) -> None:
    targets = [target.split("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", prose(page))]
    missing = [t for t in targets if t and "://" not in t and not (page.parent / t).exists()]
    assert not missing


@parametrized(PAGES)
def test_no_page_knows_a_machine(page: Path) -> None:
    assert not re.findall(r"(?<![\w.~])/(?:work|tmp|root|home|mnt|Users)\b\S*", read(page))
    assert not re.findall(r"127\.0\.0\.1|localhost", read(page))


def test_index_lists_every_page_once() -> None:
    listed = re.findall(r"^- \[([\w.-]+\.md)\]\(\1\): \S", read(ROOT / "docs" / "README.md"), re.MULTILINE)
    assert sorted(listed) == sorted(page.name for page in (ROOT / "docs").glob("*.md") if page.name != "README.md")


@parametrized([page for page in PAGES if commands(page)])
def test_commands_exist(page: Path) -> None:
    for program, *words in commands(page):
        if program == "make":
            check_make(words)
        else:
            assert words[0] in VERBS, words
            if "--help" not in words:
                PARSERS[words[0]](words[1:])


def check_make(words: list[str]) -> None:
    targets = {
        target for line in re.findall(r"^\.PHONY: (.*)$", read(ROOT / "Makefile"), re.M) for target in line.split()
    }
    names = {word.split("=")[0] for word in words if "=" in word}
    assert [word for word in words if "=" not in word and word not in targets] == []
    assert names <= MAKE_WORDS
    assert all(f"$({name})" in read(ROOT / "Makefile") for name in names)


def parse_with(module: str, kind: str) -> Any:
    def parse(words: list[str]) -> None:
        import tyro

        tyro.cli(getattr(import_module(f"internvl.commands.{module}"), kind), args=words)

    return parse


def parse_data(words: list[str]) -> None:
    kinds = {"collect": "Collect", "build": "Build", "dual": "Dual", "texts": "Texts", "show": "Show", "check": "Check"}
    parse_with("data", kinds[words[0]])(words[1:])


def parse_train(words: list[str]) -> None:
    from internvl.commands.train import configure, parse

    if words != ["--list"]:
        asked = parse(words)
        assert (asked.recipe is None) != (asked.run_json is None)
        if asked.recipe is not None:
            configure(asked)


def parse_curate(words: list[str]) -> None:
    from internvl.commands.curate import VERBS as CURATE_VERBS

    module, _ = CURATE_VERBS[words[0]]
    parse_with(module, words[0].capitalize())(words[1:])


def parse_evaluate(words: list[str]) -> None:
    from internvl.commands.evaluate_options import TASKS

    if words[0] in TASKS:
        parse_with("evaluate_options", TASKS[words[0]].__name__)(words[1:])
    else:
        parse_with("evaluate", "Evaluate")(words)


PARSERS = {
    "embed": parse_with("embed", "Embed"),
    "search": parse_with("search", "Search"),
    "chat": parse_with("chat", "Options"),
    "evaluate": parse_evaluate,
    "fetch": parse_with("fetch", "Fetch"),
    "convert": parse_with("convert", "Convert"),
    "compose": parse_with("compose", "Compose"),
    "plan": parse_with("plan", "Options"),
    "doctor": parse_with("doctor", "Options"),
    "data": parse_data,
    "curate": parse_curate,
    "train": parse_train,
}


def test_every_verb_has_an_example_in_the_readme() -> None:
    shown = {words[1] for words in commands(ENGLISH) if words[0] == "internvl"}
    assert shown == set(VERBS)


def test_files_of_the_readme_are_there() -> None:
    for page in (ENGLISH, CHINESE):
        pictures = re.findall(r"demo/\w+\.jpg", read(page))
        assert pictures
        assert [name for name in pictures if not (ROOT / name).is_file()] == []


def test_map_of_the_readme_names_what_is_there() -> None:
    tree = next(block for block in blocks(ENGLISH, "") if block.startswith("src/internvl/"))
    source = ROOT / "src" / "internvl"
    for line in tree.splitlines()[1:]:
        names = re.findall(r"[\w/]+\.py\b|\b\w+(?:/\w+)?/(?=[\s,;]|$)", line)
        folder = names[0] if line.startswith("  ") and names[0].endswith("/") else ""
        places = (source, source / folder, ROOT)
        assert [name for name in names if not any((place / name).exists() for place in places)] == [], line


def test_both_readmes_have_the_same_shape() -> None:
    def levels(page: Path) -> list[int]:
        return [len(marks) for marks in re.findall(r"^(#+) ", prose(page), re.MULTILINE)]

    assert levels(ENGLISH) == levels(CHINESE)
    assert re.findall(r"<!-- [\w:]+ -->", read(ENGLISH)) == re.findall(r"<!-- [\w:]+ -->", read(CHINESE))


def test_both_readmes_show_the_same_commands_and_code() -> None:
    assert commands(ENGLISH) == commands(CHINESE)
    assert blocks(ENGLISH, "json") == blocks(CHINESE, "json")
    codes = [[re.sub(r"\s+# .*", "", body) for body in blocks(page, "python")] for page in (ENGLISH, CHINESE)]
    assert codes[0] == codes[1]


def test_both_readmes_say_the_same_numbers() -> None:
    english, chinese = (Counter(re.findall(r"\d+(?:[.,]\d+)*", read(page))) for page in (ENGLISH, CHINESE))
    assert english == chinese


def test_python_of_the_readme_fits_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from internvl.generate.reply import Reply, Usage
    from internvl.generate.session import Chat

    reply = Reply("A cat.", (), Usage(1, 1, 1, 1, 0.1, 0.2), "stop", ({"role": "user", "content": "What is this?"},))
    model = create_autospec(Chat, instance=True)  # refuses names and arguments that Chat does not have
    model.chat.return_value, model.stream.return_value, model.batch.return_value = reply, ["A ", "cup."], [reply, reply]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(internvl, "load", lambda name: model, raising=False)
    for body in blocks(ENGLISH, "python"):
        exec(compile(body, str(ENGLISH), "exec"), {})
    said = capsys.readouterr().out
    assert "A cat. ()" in said
    assert "(3, 2) 7" in said
    assert "<|im_start|>user\n<image>\nWhat is this?<|im_end|>" in said


def test_python_of_the_tasks_page_runs(capsys: pytest.CaptureFixture) -> None:
    bodies = blocks(ROOT / "docs" / "tasks.md", "python")
    assert len(bodies) >= 5
    for body in bodies:
        exec(compile(body, "tasks.md", "exec"), {})
    assert "value=58.6" in capsys.readouterr().out


def test_parity_names_files_that_exist() -> None:
    top = "compose|hub|load_dual|load|locate|opened|plan|pocket|tower"
    named = re.findall(rf"`((?:\w+/)+\w+\.py|(?:{top})\.py)`", read(ROOT / "docs" / "parity.md"))
    assert len(named) > 40
    assert [name for name in named if not (ROOT / "src" / "internvl" / name).is_file()] == []


def test_parity_tables_are_whole() -> None:
    rows = [line for line in read(ROOT / "docs" / "parity.md").splitlines() if line.startswith("|")]
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {5}


def test_sources_of_the_data_page_are_the_pinned_ones() -> None:
    from internvl.packages import DATA, DRAWINGS, KINDS, PACKAGES

    page = read(ROOT / "docs" / "pocket-data.md")
    for name in (*DATA, *DRAWINGS, *KINDS):
        assert f"`{name}`" in page
        assert PACKAGES[name].version in page
    assert f"{sum(PACKAGES[name].size for name in DATA) / 1e6:.0f} MB" in page
