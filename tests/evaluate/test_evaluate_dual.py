"""Tasks of dual models end to end on a tiny model: scores equal the functions, features are kept, problems named."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import internvl
from dual_folder import make_dual, make_pictures, make_video, picture
from internvl import cli
from internvl.data.shards import write_tar
from internvl.evaluate import dual_features, report
from internvl.evaluate.caption import caption_scores
from internvl.evaluate.classify import class_vectors, classify
from internvl.evaluate.dual_result import PROTOCOLS, Result, beside, compare
from internvl.evaluate.retrieve import mean_of_frames, retrieve
from internvl.generate.captions import CaptionSearch
from internvl.generate.dual import Dual

CAPTIONS = [
    ["A cat sits on a table.", "Two cats"],
    ["一只狗在跑", "un chien (rouge)"],
    ["قطة", ""],
    ["x" * 300],
    ["a red bus"],
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual(tmp_path_factory.mktemp("model") / "dual")


@pytest.fixture(scope="module")
def dual(model: Path) -> Dual:
    return internvl.load(model, dtype="float32")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, dual: Dual, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands work in an empty folder, on the one model that is open already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Dual, "open", lambda name, **settings: dual)
    monkeypatch.setattr(report, "commit", lambda: "none")


def run(task: str, model: Path, *words: object, code: int = 0) -> Any:
    plain = ["--dtype", "float32", "--out", "o"]
    assert cli.main(["evaluate", task, str(model), *map(str, words), *plain]) == code
    return json.loads(Path("o/result.json").read_text(encoding="utf-8"))["results"]


def karpathy(folder: Path, captions: list[list[str]] = CAPTIONS) -> Path:
    make_pictures(folder, [f"{n}.png" for n in range(len(captions))])
    entries = [
        {"split": "test", "filename": f"{n}.png", "sentences": [{"raw": text} for text in group]}
        for n, group in enumerate(captions)
    ]
    (folder / "dataset.json").write_text(json.dumps({"images": entries}), encoding="utf-8")
    return folder / "dataset.json"


def class_folders(folder: Path, per_class: int = 3) -> Path:
    make_pictures(folder, [f"{name}/{n}.png" for name in ("cat", "red_bus", "tree") for n in range(per_class)])
    return folder


def test_retrieval_is_the_function_on_embeddings(model: Path, dual: Dual, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d")
    for head in ("c", "g"):
        (result,) = run("retrieval", model, data, "--head", head, "--name", "COCO", "--features", "f")
        texts = ["a cat sits on a table", "two cats", "一只狗在跑", "un chien rouge", "قطة", "x" * 300, "a red bus"]
        images = dual.encode_image([data.parent / f"{n}.png" for n in range(5)], head)
        found = retrieve(images, dual.encode_text(texts), torch.tensor([0, 0, 1, 1, 2, 3, 4]))
        for k in (1, 5, 10):
            assert result["scores"][f"image to text R@{k}"] == pytest.approx(found.image_to_text.at[k])
            assert result["scores"][f"text to image R@{k}"] == pytest.approx(found.text_to_image.at[k])
        assert result["counts"]["empty_captions"] == 1
        assert result["counts"]["long_captions"] == 1
        assert result["head"] == head
        assert "side: 56 here, 224 in the paper" in result["published"]["why_not"]
    page = Path("o/sheet.html").read_text(encoding="utf-8")
    assert "قطة" in page
    assert "data:image/jpeg" in page


def test_features_are_computed_once(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = karpathy(tmp_path / "d")
    seen = []
    original = Dual.encode_image

    def counted(self: Dual, images: Any, *more: Any, **settings: Any) -> torch.Tensor:
        seen.append(len(images))
        return original(self, images, *more, **settings)

    monkeypatch.setattr(Dual, "encode_image", counted)
    (first,) = run("retrieval", model, data, "--no-sheet")
    assert sum(seen) == 5
    (softer,) = run("retrieval", model, data, "--no-sheet", "--dual-softmax", "1")
    (again,) = run("retrieval", model, data, "--no-sheet", "--batch", "2")
    assert sum(seen) == 5
    assert again["scores"] == first["scores"]
    assert softer["protocol"]["dual_softmax"] == 1.0
    picture(50).save(data.parent / "0.png")
    run("retrieval", model, data, "--no-sheet")
    assert sum(seen) == 10


def test_reranking_orders_by_matching(model: Path, dual: Dual, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d", [["a cat"], ["two dogs in a park"], ["bus"], ["tree"], ["red"]])
    (result,) = run("retrieval", model, data, "--rerank", 5, "--head", "g")
    texts = ["a cat", "two dogs in a park", "bus", "tree", "red"]
    paths = [data.parent / f"{n}.png" for n in range(5)]
    scores = torch.stack([dual.match([path] * 5, texts) for path in paths])
    first = float((scores.argmax(1) == torch.arange(5)).float().mean())
    back = float((scores.argmax(0) == torch.arange(5)).float().mean())
    assert result["scores"]["image to text R@1"] == pytest.approx(first)
    assert result["scores"]["text to image R@1"] == pytest.approx(back)
    assert result["protocol"]["rerank"] == 5


def test_patches_of_pictures_seen_lately_are_not_computed_again(dual: Dual, tmp_path: Path) -> None:
    paths = [make_pictures(tmp_path, ["a.png", "b.png", "c.png"]) / f"{name}.png" for name in "abc"]
    wide = dual_features.PairMatcher(dual, paths, ["a cat", "dogs"])
    narrow = dual_features.PairMatcher(dual, paths, ["a cat", "dogs"], max_bytes=1)
    images, texts = torch.tensor([0, 2, 0, 1]), torch.tensor([0, 0, 1, 1])
    found = wide(images, texts)
    torch.testing.assert_close(found, dual.match([paths[n] for n in images], ["a cat", "a cat", "dogs", "dogs"]))
    torch.testing.assert_close(narrow(images, texts), found)
    torch.testing.assert_close(narrow(images[:1], texts[:1]), found[:1])
    assert (len(wide.seen), len(narrow.seen)) == (3, 1)


def test_zero_shot_is_the_function_on_embeddings(model: Path, dual: Dual, tmp_path: Path) -> None:
    data = class_folders(tmp_path / "d")
    (tmp_path / "t.txt").write_text("a photo of a {}.\na drawing of the {c}\n")
    (result,) = run("zero-shot", model, data, "--templates", "t.txt", "--head", "g")
    vectors = class_vectors(dual.encode_text, ["cat", "red bus", "tree"], ["a photo of a {}.", "a drawing of the {}"])
    paths = sorted(data.rglob("*.png"))
    images = dual.encode_image(paths, "g", fit="crop")
    wanted = classify(images, vectors, torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2]))
    assert result["scores"]["top-1"] == pytest.approx(wanted.top1)
    assert result["scores"]["mean per class"] == pytest.approx(wanted.mean_per_class)
    assert result["counts"]["pictures"] == 9
    assert "is: red bus" in Path("o/sheet.html").read_text()


def test_several_languages_look_at_the_pictures_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from internvl.evaluate import dual_data

    package = tmp_path / "lists"
    package.mkdir()
    for code, names in (("en", ["cat", "bus", "bus"]), ("cn", ["猫", "巴士", "树"]), ("ar", ["قط", "حافلة", "شجرة"])):
        (package / f"{code}_classnames.json").write_text(json.dumps({"imagenet1k": names}))
        prompts = {"imagenet1k": ["{c}.", "a {c}"]}
        (package / f"{code}_zeroshot_classification_templates.json").write_text(json.dumps(prompts))
    monkeypatch.setattr(dual_data, "fetch", lambda name: package)
    data = class_folders(tmp_path / "d", 2)
    words = ("--names", "imagenet1k", "--languages", "en", "zh", "ar", "--name", "ImageNet-1K", "--features", "f")
    results = run("zero-shot", model, data, *words)
    assert [result["data"] for result in results] == ["ImageNet-1K", "ImageNet-1K, zh", "ImageNet-1K, ar"]
    assert [result["counts"]["names_twice"] for result in results] == [1, 0, 0]
    assert len(list(Path("f").glob("pictures-*"))) == 1
    assert len(list(Path("f").glob("prompts-*"))) == 3


def test_videos_are_means_of_frames(model: Path, dual: Dual, tmp_path: Path) -> None:
    for n in range(4):
        make_video(tmp_path / "v" / f"video{n}.mp4", n)
    (tmp_path / "v" / "list.csv").write_text(
        "video_id,sentence\n" + "".join(f"video{n},a thing number {n}\n" for n in range(4))
    )
    (result,) = run("retrieval", model, "v/list.csv", "--frames", 2, "--head", "g")
    frames = [tmp_path / "v" / f"video{n}.mp4" / f"frame_{f}.png" for n in range(4) for f in (1, 4)]
    videos = mean_of_frames(dual.encode_image(frames, "g", fit="crop", raw=True), [2] * 4)
    texts = dual.encode_text([f"a thing number {n}" for n in range(4)])
    wanted = retrieve(videos, texts, torch.arange(4))
    paths = [tmp_path / "v" / f"video{n}.mp4" for n in range(4)]
    kept = dual_features.Features(dual, tmp_path / "f").videos(paths, 2, "g", "crop")
    torch.testing.assert_close(torch.nn.functional.normalize(kept.rows, dim=1).double(), videos, atol=2e-5, rtol=1e-4)
    assert result["task"] == "zero-shot video retrieval, 2 frames"
    assert result["scores"]["video to text R@1"] == pytest.approx(wanted.image_to_text.at[1])
    assert result["scores"]["text to video R@1"] == pytest.approx(wanted.text_to_image.at[1])


def test_videos_are_classified(model: Path, tmp_path: Path) -> None:
    rows = ["label,youtube_id,time_start,time_end,split"]
    for n, label in enumerate(("surfing", "knitting", "surfing")):
        rows.append(f"{label},id{n},{n},{n + 10},test")
        first, *rest = (picture(10 * n + f).convert("P") for f in range(3))
        path = tmp_path / f"id{n}_{n:06d}_{n + 10:06d}.mp4"
        first.save(path, format="GIF", save_all=True, append_images=rest)  # FFmpeg goes by the content
    rows.append("knitting,gone,0,10,test")
    Path("k.csv").write_text("\n".join(rows) + "\n")
    pytest.importorskip("av")
    (result,) = run("zero-shot", model, "k.csv", "--frames", 1, code=3)
    assert "gone_000000_000010.mp4: no such video" in result["left_out"][0]["message"]
    assert result["task"] == "zero-shot video classification, 1 frames"
    assert result["counts"]["pictures"] == 3
    assert set(result["scores"]) >= {"top-1", "top-5", "mean of top-1 and top-5"}


def test_captions_are_scored(model: Path, dual: Dual, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d")
    words = ("--beams", 2, "--min-tokens", 1, "--max-tokens", 4, "--features", "f")
    (result,) = run("captions", model, data, *words)
    search = CaptionSearch(2, 1, 4)
    said = [dual.caption(data.parent / f"{n}.png", search)[0] for n in range(5)]
    wanted = caption_scores(said, [[text for text in group if text] for group in CAPTIONS])
    assert result["scores"]["CIDEr"] == pytest.approx(wanted.cider_d.corpus)
    assert result["scores"]["BLEU-4"] == pytest.approx(wanted.bleu[3].corpus)
    assert result["protocol"]["beams"] == 2
    for part in Path("f").glob("captions-*/part-*"):  # kept texts are those that were written
        stamp = part.stat().st_mtime_ns
        (again,) = run("captions", model, data, *words)
        assert again["scores"] == result["scores"]
        assert part.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("kind", ["linear", "attention", "logistic"])
def test_probes(model: Path, tmp_path: Path, kind: str) -> None:
    for name, colour in (("dark", 20), ("light", 230)):
        for split, count in (("train", 6), ("val", 3)):
            (tmp_path / "d" / split / name).mkdir(parents=True)
            for n in range(count):
                noise = np.random.default_rng(n).integers(-15, 15, (40, 40, 3)) + colour
                from PIL import Image

                Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "d" / split / name / f"{n}.png")
    words = ("--kind", kind, "--rates", "0.3", "--probe-batch", 4, "--features", "f")
    (result,) = run("probe", model, "d", *words)
    assert result["scores"]["top-1"] == 1.0
    assert result["counts"] == {"training_pictures": 12, "pictures": 6, "classes": 2, "left_out_by_reader": 0}
    assert result["head"] == "encoder"
    assert "is: dark" in Path("o/sheet.html").read_text()


def test_archives_give_the_same_as_files(model: Path, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d", [["a cat"], ["two dogs"], ["bus"]])
    (wanted,) = run("retrieval", model, data)
    pairs = [(f"{n}", (data.parent / f"{n}.png").read_bytes(), t) for n, t in enumerate(["a cat", "two dogs", "bus"])]
    write_tar("s.tar", [(key, {"png": content, "txt": text.encode()}) for key, content, text in pairs])
    (found,) = run("retrieval", model, "s.tar")
    assert found["scores"] == wanted["scores"]
    lines = [json.dumps({"image": f"{key}.png", "caption": text}) for key, _, text in pairs]
    Path("p.jsonl").write_text("\n".join([lines[0], "{", *lines[1:]]))
    (bad_line,) = run("retrieval", model, "p.jsonl", "--root", data.parent, code=3)
    assert bad_line["scores"] == wanted["scores"]
    assert bad_line["left_out"][0]["source"].endswith("p.jsonl:2")
    write_tar("c.tar", [(key, {"png": content, "cls": key.encode()}) for key, content, _ in pairs])
    Path("names.txt").write_text("cat\ndog\nbus\n")
    (labelled,) = run("zero-shot", model, "c.tar", "--names", "names.txt")
    assert labelled["counts"]["pictures"] == 3
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": content, "path": key} for key, content, _ in pairs]
    rows = {"image": images, "caption": [["a cat"], ["two dogs"], ["bus"]], "label": [0, 1, 2]}
    parquet.write_table(pyarrow.table(rows), "p.parquet")
    assert run("retrieval", model, "p.parquet")[0]["scores"] == wanted["scores"]
    assert run("zero-shot", model, "p.parquet", "--names", "names.txt")[0]["scores"] == labelled["scores"]


def test_a_truncated_tar_gives_its_whole_samples_and_says_so(model: Path, tmp_path: Path) -> None:
    data = karpathy(tmp_path / "d", [["a cat"], ["two dogs"], ["bus"]])
    write_tar("s.tar", [(f"{n}", {"png": (data.parent / f"{n}.png").read_bytes(), "txt": b"cat"}) for n in range(3)])
    with tarfile.open("s.tar") as tar:
        last = tar.getmembers()[-1]
    Path("s.tar").write_bytes(Path("s.tar").read_bytes()[: last.offset + 200])
    (result,) = run("retrieval", model, "s.tar", code=3)
    assert result["counts"]["pictures"] == 2
    assert "truncated or damaged" in result["left_out"][0]["message"]
    assert "1 items were left out" in str(result["published"]) or result["published"]["why_not"]


def test_broken_pictures_are_left_out_and_named(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = karpathy(tmp_path / "d")
    (data.parent / "1.png").write_bytes(b"\x89PNG")
    (data.parent / "4.png").unlink()
    (result,) = run("retrieval", model, data, code=3)
    assert result["counts"]["pictures"] == 3
    assert [Path(one["source"]).name for one in result["left_out"]] == ["1.png", "4.png"]
    assert "left out: 2" in capsys.readouterr().out
    whole = karpathy(tmp_path / "e", [CAPTIONS[0], CAPTIONS[2], CAPTIONS[3]])
    for new, old in enumerate((0, 2, 3)):
        (whole.parent / f"{new}.png").write_bytes((data.parent / f"{old}.png").read_bytes())
    assert run("retrieval", model, whole)[0]["scores"] == result["scores"]


@pytest.mark.parametrize(
    ("task", "words", "said"),
    [
        ("retrieval", ("none.json",), "no such file or folder"),
        ("retrieval", ("twice.txt",), "no data of pairs"),
        ("retrieval", ("bad.json",), "not JSON"),
        ("retrieval", ("empty.json",), "no picture with a caption (1 without"),
        ("retrieval", ("d/dataset.json", "--rerank", "2", "--dual-softmax", "1"), "leave out --dual-softmax"),
        ("zero-shot", ("classes", "--names", "twice.txt"), "class 'cat' stands 2 times"),
        ("zero-shot", ("classes", "--names", "two.txt"), "2 class names (two.txt) for 3 classes"),
        ("zero-shot", ("classes", "--names", "turned.txt"), "class 0 is 'tree', but that folder is 'cat'"),
        ("zero-shot", ("classes", "--names", "blank.txt"), "no class; give at least one name"),
        ("zero-shot", ("classes", "--languages", "en", "zh"), "names of one language only"),
        ("zero-shot", ("classes", "--templates", "two.txt"), "has no place for the name"),
        ("probe", ("classes",), "needs the folders train and val"),
        ("captions", ("d/dataset.json", "--limit", "0"), "at least one item is needed"),
    ],
)
def test_bad_input_says_what_to_do(
    model: Path, tmp_path: Path, task: str, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    karpathy(tmp_path / "d")
    class_folders(tmp_path / "classes", 1)
    karpathy(tmp_path / "x", [["", " "]])
    (tmp_path / "x" / "dataset.json").rename("empty.json")
    Path("twice.txt").write_text("cat\nbus\ncat\n")
    Path("two.txt").write_text("cat\nbus\n")
    Path("turned.txt").write_text("tree\nred bus\ncat\n")
    Path("blank.txt").write_text("\n")
    Path("bad.json").write_text('{"images": [')
    assert cli.main(["evaluate", task, str(model), *words, "--out", "o", "--dtype", "float32"]) == 1
    assert said in capsys.readouterr().err
    assert not Path("o/result.json").exists()


@pytest.mark.pocket_data
@pytest.mark.parametrize(
    ("language", "templates", "distinct"),
    [("en", 80, 80), ("zh", 80, 78), ("ja", 37, 37), ("ar", 55, 55), ("it", 49, 46)],
)
def test_the_pinned_lists_are_the_published_ones(language: str, templates: int, distinct: int) -> None:
    from internvl.data.packaged.class_names import read
    from internvl.fetch import fetch

    found = read(fetch("clip-benchmark"), "imagenet1k", language)
    assert (len(found.names), len(found.templates), len(set(found.templates))) == (1000, templates, distinct)


def result(**changes: Any) -> Result:
    protocol = dict(PROTOCOLS["zero-shot retrieval"])
    values: dict[str, Any] = {
        "task": "zero-shot retrieval",
        "data": "COCO",
        "model": "m",
        "fingerprint": "f",
        "head": "g",
        "scores": {"text to image R@1": 0.59, "mean of six": 0.8},
        "protocol": protocol,
        "counts": {"pictures": 5000},
    }
    return Result(**{**values, **changes})


def test_the_papers_number_stands_only_beside_its_own_protocol() -> None:
    (number,) = beside(result())["numbers"]
    assert (number["published"], number["ours"], number["points"]) == (58.6, 59.0, 0.4)
    assert "54.1" in str(beside(result(head="c")))
    for changes, why in (
        ({"complete": False}, "only a part of the data"),
        ({"data": "my pictures"}, "the paper has no zero-shot retrieval of InternVL-G on 'my pictures'"),
        ({"protocol": {**PROTOCOLS["zero-shot retrieval"], "rerank": 64}}, "rerank: 64 here, 0 in the paper"),
        ({"protocol": {**PROTOCOLS["zero-shot retrieval"], "clean": False}}, "clean: False here, True in the paper"),
    ):
        found = beside(result(**changes))
        assert found["numbers"] == []
        assert why in found["why_not"][0]


def test_results_are_compared_with_what_was_not_equal(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = karpathy(tmp_path / "d")
    for head in ("c", "g"):
        run("retrieval", model, data, "--head", head, *(["--captions", "raw"] if head == "g" else []))
        Path("o").rename(head)
    capsys.readouterr()
    assert cli.main(["evaluate", "compare", "c", "g/result.json", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["columns"] == ["c/result.json c", "g/result.json g"]
    row = next(row for row in found["rows"] if row["metric"] == "mean of six")
    wanted = [json.loads(Path(h, "result.json").read_text())["results"][0]["scores"]["mean of six"] for h in "cg"]
    assert list(row["values"].values()) == wanted
    assert list(row["differs"]) == ["clean"]
    assert cli.main(["evaluate", "compare", "c", "g"]) == 0
    assert "clean differs (1: True, 2: False)" in capsys.readouterr().out
    assert cli.main(["evaluate", "compare", "c"]) == 1
    assert "give two or more" in capsys.readouterr().err
    Path("o.json").write_text("[]")
    assert cli.main(["evaluate", "compare", "c", "o.json"]) == 1
    assert "no result of a task" in capsys.readouterr().err


def test_compare_keeps_a_column_a_head() -> None:
    both = {"results": [{**vars(result(head=head)), "protocol": {}, "counts": {}} for head in "cg"]}
    found = compare({"a": both})
    assert found["columns"] == ["a c", "a g"]
    assert all(len(row["values"]) == 2 for row in found["rows"])
