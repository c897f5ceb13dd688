"""Data as people have it, given to the tasks of dual models: nothing is lost in silence, errors name what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import internvl
from dual_folder import make_dual, make_pictures
from internvl import cli
from internvl.data.clips import read_kinetics
from internvl.data.labelled import read_image_folder
from internvl.data.records import Problem
from internvl.data.shards import write_tar
from internvl.evaluate import report
from internvl.evaluate.catalog import PUBLISHED
from internvl.evaluate.dual_data import Where, archives, read_pairs, read_prompts
from internvl.evaluate.dual_result import PROTOCOLS, Result, beside
from internvl.evaluate.ranking import Side, together
from internvl.evaluate.retrieve import retrieve
from internvl.generate.dual import Dual
from tiny import unchecked


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual(tmp_path_factory.mktemp("model") / "dual")


@pytest.fixture(scope="module")
def dual(model: Path) -> Dual:
    return internvl.load(model, dtype="float32")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, dual: Dual, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dual, "open", lambda name, **settings: dual)
    monkeypatch.setattr(report, "commit", lambda: "none")


def run(task: str, *words: object, code: int = 0) -> Any:
    assert cli.main(["evaluate", task, "model", *map(str, words), "--dtype", "float32", "--out", "o"]) == code
    return json.loads(Path("o/result.json").read_text(encoding="utf-8"))["results"][0]


def refused(capsys: pytest.CaptureFixture[str], task: str, *words: object) -> str:
    assert cli.main(["evaluate", task, "model", *map(str, words), "--out", "o"]) == 1
    return capsys.readouterr().err


def png(seed: int) -> bytes:
    make_pictures(Path("made"), [f"{n}.png" for n in range(seed + 1)])
    return Path(f"made/{seed}.png").read_bytes()


def pairs(where: Path) -> tuple[list[tuple[str, tuple[str, ...]]], list[Problem]]:
    problems: list[Problem] = []
    found, _ = read_pairs(Where(where, scratch=Path("scratch")), problems)
    return [(item.path.name, item.captions) for item in found.items], problems


def test_half_a_surrogate_pair_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("d"), ["0.png", "1.png", "2.png"])
    texts = ["a cat", "half \ud83d pair", "two dogs"]
    entries = [{"split": "test", "filename": f"{n}.png", "sentences": [{"raw": t}]} for n, t in enumerate(texts)]
    Path("d/k.json").write_text(json.dumps({"images": entries}))
    found = run("retrieval", "d/k.json", code=3)
    assert found["counts"]["pictures"] == 2
    assert found["left_out"][0]["source"] == "d/k.json: images[1]"
    assert "is no Unicode at character 5" in found["left_out"][0]["message"]
    Path("d/p.jsonl").write_text(
        "\n".join(json.dumps({"image": f"{n}.png", "caption": t}) for n, t in enumerate(texts))
    )
    lines, problems = pairs(Path("d/p.jsonl"))
    assert [name for name, _ in lines] == ["0.png", "2.png"]
    assert problems[0].source == "d/p.jsonl:2"


def test_lines_of_one_picture_are_its_captions() -> None:
    """Twice among the pictures, it would be a wrong answer that scores as the right one."""
    make_pictures(Path("d"), ["0.png", "1.png"])
    lines = [("0.png", "a cat"), ("1.png", "a dog"), ("0.png", ["the cat", "cats"])]
    Path("d/p.jsonl").write_text("\n".join(json.dumps({"image": name, "caption": text}) for name, text in lines))
    found = run("retrieval", "d/p.jsonl")
    assert (found["counts"]["pictures"], found["counts"]["texts"], found["counts"]["tied"]) == (2, 4, 0)
    assert pairs(Path("d/p.jsonl"))[0] == [("0.png", ("a cat", "the cat", "cats")), ("1.png", ("a dog",))]


def test_lines_of_a_text_in_a_shard_are_captions_and_a_folder_of_shards_is_one_set() -> None:
    samples = [(f"{n}", {"png": png(n), "txt": f"first {n}\nsecond {n}\n".encode()}) for n in range(3)]
    write_tar("whole.tar", samples)
    Path("shards").mkdir()
    for place, number in ((0, 2), (1, 10), (2, 11)):
        write_tar(f"shards/{number}.tar", samples[place : place + 1])
    assert [path.name for path in archives(Path("shards"))] == ["2.tar", "10.tar", "11.tar"]
    whole, parts = pairs(Path("whole.tar"))[0], pairs(Path("shards"))[0]
    assert [captions for _, captions in whole] == [captions for _, captions in parts]
    assert whole[2][1] == ("first 2", "second 2")
    assert run("retrieval", "shards")["counts"]["texts"] == 6
    write_tar("shards/2.tar", [("0", {"png": png(0), "cls": b"1"})])
    write_tar("shards/10.tar", [("1", {"png": png(1), "cls": b"0"})])
    Path("shards/11.tar").unlink()
    Path("names.txt").write_text("cat\ndog\n")
    assert run("zero-shot", "shards", "--names", "names.txt")["counts"]["pictures"] == 2
    make_pictures(Path("shards"), ["cat/0.png", "dog/0.png", "dog/1.png"])  # shards that class folders came from
    assert run("zero-shot", "shards", "--names", "names.txt")["counts"]["pictures"] == 3


def test_a_shard_that_changed_is_read_anew() -> None:
    first, second = bytes(png(0)), bytearray(png(0))
    second[-1] ^= 1  # of the same size
    for content in (first, bytes(second)):
        write_tar("s.tar", [("0", {"png": content, "txt": b"a cat"})])
        pairs(Path("s.tar"))
        assert Path("scratch/s.tar/00000000.jpg").read_bytes() == content


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"junk" * 300, "the first problem: s.tar: at or after start of the shard: truncated or damaged"),
        (None, "the first problem: s.tar:0.png: fields png; a pair has one of jpg, jpeg, png, webp and txt"),
    ],
)
def test_where_nothing_is_left_the_first_problem_is_said(
    content: bytes | None, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tar("s.tar", [("0", {"png": png(0)})])
    if content is not None:
        Path("s.tar").write_bytes(content)
    assert said in refused(capsys, "retrieval", "s.tar")


def test_videos_that_are_gone_are_named(tmp_path: Path) -> None:
    rows = ["label,youtube_id,time_start,time_end,split", "run,a,1,2,validate", "jump,b,1,2,validate"]
    Path("k.csv").write_text("\n".join(rows))
    Path("a_000001_000002.mp4").write_bytes(b"")
    problems: list[Problem] = []
    found = read_kinetics("k.csv", tmp_path, split="validate", problems=problems)
    assert (len(found.items), found.left_out) == (1, 1)
    assert problems[0].source == "k.csv:3"
    assert "b_000001_000002.mp4: no such video" in problems[0].message
    with pytest.raises(ValueError, match=r"no video of split 'test'; there are 'validate' \(2\): choose one"):
        read_kinetics("k.csv", tmp_path, split="test")


def test_the_splits_of_a_file_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    entries = [{"split": "val", "filename": "0.png", "sentences": [{"raw": "a"}]}]
    Path("k.json").write_text(json.dumps({"images": entries}))
    assert "no picture of split 'test'; there are 'val' (1): choose one" in refused(capsys, "retrieval", "k.json")


def test_folders_that_are_numbers_are_labels() -> None:
    """ImageNet-V2: in alphabetical order, 10 would stand before 2 and take its name."""
    make_pictures(Path("v2"), [f"{n}/0.png" for n in range(12)])
    assert read_image_folder("v2").classes == tuple(str(n) for n in range(12))


def test_folders_take_the_names_of_their_lines(capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("a"), ["n03/0.png", "n01/0.png"])
    Path("names.txt").write_text("tench\nshark\nray\n")
    Path("order.txt").write_text("n01 tench, Tinca tinca\nn02 shark\nn03 ray\n")
    assert read_prompts("names.txt", None, "en", ("n01", "n03"), Path("order.txt")).names == ("tench", "ray")
    assert run("zero-shot", "a", "--names", "names.txt", "--order", "order.txt")["counts"]["classes"] == 2
    Path("order.txt").write_text("n01\nn02\nn04\n")
    said = refused(capsys, "zero-shot", "a", "--names", "names.txt", "--order", "order.txt")
    assert "1 of 2 class folders are not listed, such as ['n03']" in said
    Path("order.txt").write_text("n01\n")
    said = refused(capsys, "zero-shot", "a", "--names", "names.txt", "--order", "order.txt")
    assert "1 lines for 3 names" in said
    assert "give --names" in refused(capsys, "zero-shot", "a", "--order", "order.txt")


def test_what_was_left_out_is_told_on_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    make_pictures(Path("d"), ["0.png", "1.png", "2.png"])
    groups = [["a cat", ""], ["x" * 300], ["!!!"]]  # of the last the clean-up leaves nothing
    entries = [
        {"split": "test", "filename": f"{n}.png", "sentences": [{"raw": t} for t in group]}
        for n, group in enumerate(groups)
    ]
    Path("d/k.json").write_text(json.dumps({"images": entries}))
    run("retrieval", "d/k.json")
    said = capsys.readouterr().out
    assert "k: 2 captions without a letter or sign, left out" in said
    assert "k: 1 pictures without a caption, left out" in said
    assert "k: 1 captions of more than 80 tokens" in said
    Path("d/p.jsonl").write_text(json.dumps({"image": "0.png", "caption": "..."}))
    assert "the clean-up leaves no caption of 1 pictures" in refused(capsys, "retrieval", "d/p.jsonl")


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("retrieval", ("--dual-softmax", "0"), "dual softmax at a scale of 0.0; it must be above 0"),
        ("retrieval", ("--rerank", "-1"), "--rerank -1; give how many"),
        ("retrieval", ("--frames", "0"), "--frames 0; at least 1"),
        ("retrieval", ("--limit", "0"), "--limit 0; at least one"),
    ],
)
def test_settings_without_a_meaning_are_refused(
    task: str, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    make_pictures(Path("d"), ["0.png", "1.png"])
    Path("d/p.jsonl").write_text("\n".join(json.dumps({"image": f"{n}.png", "caption": f"text {n}"}) for n in range(2)))
    assert said in refused(capsys, task, "d/p.jsonl", *words)


def test_vectors_of_two_models_and_no_k_are_refused() -> None:
    with pytest.raises(ValueError, match="vectors of 3 and of 4 numbers; both sides must come from the same model"):
        unchecked(together)(Side(torch.eye(3), torch.arange(3)), Side(torch.eye(3, 4), torch.arange(3)))
    with pytest.raises(ValueError, match="no K to take the recall at"):
        retrieve(torch.eye(3), torch.eye(3), torch.arange(3), at=())


def test_published_numbers_of_xtd_stand_beside_captions_as_they_are() -> None:
    protocol = {**PROTOCOLS["zero-shot retrieval"], "clean": False}
    values = {"model": "m", "fingerprint": "f", "head": "c", "scores": {"image to text R@10": 0.97}, "counts": {}}
    found = beside(Result(task="zero-shot retrieval", data="XTD, en", protocol=protocol, **values))  # type: ignore[arg-type]
    assert found["numbers"][0]["published"] == 97.3
    cleaned = {**protocol, "clean": True}
    found = beside(Result(task="zero-shot retrieval", data="XTD, en", protocol=cleaned, **values))  # type: ignore[arg-type]
    assert found["why_not"] == ["clean: True here, False in the paper"]
    make_pictures(Path("d"), ["0.png"])
    Path("d/p.jsonl").write_text(json.dumps({"image": "0.png", "caption": "A Cat."}))
    assert run("retrieval", "d/p.jsonl", "--name", "XTD, en")["protocol"]["clean"] is False
    assert run("retrieval", "d/p.jsonl", "--name", "COCO")["protocol"]["clean"] is True


def test_every_published_task_that_a_command_runs_has_its_protocol() -> None:
    """What was measured after fine-tuning is another model's; all else can stand beside a result."""
    tasks = {one.task for one in PUBLISHED} - {"fine-tuned retrieval"}
    assert all(any(task.startswith(name) for name in PROTOCOLS) for task in tasks)
