"""Public layouts: what is read, what is refused, and what a damaged file costs."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from internvl.data.captions import clean_caption, read_coco, read_karpathy
from internvl.data.clips import protocol_frames, read_kinetics, read_msrvtt
from internvl.data.labelled import (
    check_classes,
    read_ade20k,
    read_class_list,
    read_image_folder,
    read_mask,
    read_path_list,
)
from internvl.data.packaged import class_names
from internvl.data.records import Problem
from internvl.data.shards import picture_and_text, read_parquet, read_tar, write_tar
from internvl.evaluate.classify import fill
from internvl.fetch import cache_folder
from internvl.packages import PACKAGES


def picture(path: Path, value: int = 0, mode: str = "L") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (3, 2), value if mode in ("L", "P") else (value,) * 3).save(path)
    return path


# class folders and lists


def test_class_folders(tmp_path: Path) -> None:
    for name in ("b/2.png", "b/1.PNG", "a/deep/x.png", ".hidden/x.png"):
        picture(tmp_path / name)
    (tmp_path / "b" / "notes.txt").write_text("x")
    found = read_image_folder(tmp_path)
    assert found.classes == ("a", "b")
    assert [(item.path.name, item.label) for item in found.items] == [("x.png", 0), ("1.PNG", 1), ("2.png", 1)]
    assert found.left_out == 1
    assert [item.label for item in read_image_folder(tmp_path, ["b", "a"]).items] == [0, 0, 1]
    with pytest.raises(ValueError, match=r"1 folders are no class \['b'\], 1 classes have no folder \['c'\]"):
        read_image_folder(tmp_path, ["a", "c"])
    (tmp_path / "d").mkdir()
    with pytest.raises(ValueError, match="none is a picture"):
        read_image_folder(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_image_folder(tmp_path / "absent")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("cat\ndog\ncat \n", r"class 'cat' stands 2 times, at 1, 3"),
        ("cat\n\ndog\n", r"names.txt:2: an empty class name"),
        ("", "an empty class name|no class"),
    ],
)
def test_class_lists_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=said):
        read_class_list(tmp_path / "names.txt")


def test_class_lists_of_any_script(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("\ufeff猫\nقطة\ngatto \n\n", encoding="utf-8")
    assert read_class_list(tmp_path / "names.txt") == ("猫", "قطة", "gatto")
    (tmp_path / "names.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_class_list(tmp_path / "names.txt")
    assert check_classes(["a", "A"], "x") == ("a", "A")


def test_path_lists(tmp_path: Path) -> None:
    (tmp_path / "val.txt").write_text("a b/1.jpg 0\n\n2.mp4,1\n3.jpg 2\nnothing\n")
    with pytest.raises(ValueError, match=r"val.txt:4: class 2, but there are 2"):
        read_path_list(tmp_path / "val.txt", "root", ["x", "y"])
    problems: list[Problem] = []
    found = read_path_list(tmp_path / "val.txt", "root", ["x", "y"], problems)
    assert [(str(item.path), item.label) for item in found.items] == [("root/a b/1.jpg", 0), ("root/2.mp4", 1)]
    assert found.left_out == len(problems) == 2
    assert problems[1].source.endswith("val.txt:5")


# ADE20K


def test_ade20k(tmp_path: Path) -> None:
    for name in ("b", "a"):
        picture(tmp_path / f"images/validation/{name}.jpg", 9, "RGB")
        picture(tmp_path / f"annotations/validation/{name}.png", 150)
    found = read_ade20k(tmp_path)
    assert [item.picture.stem for item in found] == [item.mask.stem for item in found] == ["a", "b"]
    picture(tmp_path / "images/validation/c.jpg")
    with pytest.raises(ValueError, match="'c' has no mask"):
        read_ade20k(tmp_path)
    with pytest.raises(ValueError, match="no such folder"):
        read_ade20k(tmp_path, "training")


def test_masks(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 150], [255, 2, 3]], np.uint8)).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png").tolist() == [[255, 0, 149], [255, 1, 2]]
    with pytest.raises(ValueError, match="class 150 of 150 in 1 pixels"):
        read_mask(tmp_path / "m.png", reduce_zero=False)
    with pytest.raises(ValueError, match="class 149 of 9"):
        read_mask(tmp_path / "m.png", 9)
    picture(tmp_path / "rgb.png", 1, "RGB")
    with pytest.raises(ValueError, match="mode RGB"):
        read_mask(tmp_path / "rgb.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "m.png").read_bytes()[:50])
    with pytest.raises(ValueError, match="not a usable mask"):
        read_mask(tmp_path / "cut.png")


# captions


def entry(name: str, split: str, *captions: str, **more: str) -> dict:
    return {"filename": name, "split": split, "sentences": [{"raw": one} for one in captions], **more}


def test_karpathy(tmp_path: Path) -> None:
    path = tmp_path / "dataset.json"
    entries = [
        entry("1.jpg", "test", "A cat. ", "", "  ", filepath="val2014"),
        entry("2.jpg", "restval", "a dog"),
        entry("3.jpg", "test", " "),
        entry("4.jpg", "test", "猫", "قطة"),
    ]
    path.write_text(json.dumps({"images": entries}))
    found = read_karpathy(path, "root")
    assert [str(item.path) for item in found.items] == ["root/val2014/1.jpg", "root/4.jpg"]
    assert found.captions == ["A cat.", "猫", "قطة"]
    assert found.image_of_text == [0, 1, 1]
    assert (found.empty, found.bare) == (3, 1)
    assert len(read_karpathy(path, "root", "train").items) == 1
    with pytest.raises(
        ValueError, match=r"no picture of split 'val'; there are 'restval' \(1\), 'test' \(3\): choose one"
    ):
        read_karpathy(path, "root", "val")


@pytest.mark.parametrize("bad", [{"split": "test", "sentences": []}, 5, entry("1.jpg", "test") | {"sentences": [{}]}])
def test_karpathy_names_the_entry(tmp_path: Path, bad: object) -> None:
    path = tmp_path / "dataset.json"
    path.write_text(json.dumps({"images": [entry("0.jpg", "test", "a"), bad]}))
    with pytest.raises(ValueError, match=r"dataset.json: images\[1\]"):
        read_karpathy(path, "")
    problems: list[Problem] = []
    assert read_karpathy(path, "", problems=problems).left_out == len(problems) == 1


@pytest.mark.parametrize("text", ["{", '{"images": 3}', "[]", "[" * 100_000])
def test_files_of_another_layout(tmp_path: Path, text: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"x\.json"):
        read_karpathy(tmp_path / "x.json", "")


def test_coco(tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    images = [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    notes = [{"image_id": 3, "caption": "x"}, {"image_id": 7, "caption": "y"}, {"image_id": 3, "caption": "z"}]
    path.write_text(json.dumps({"images": images, "annotations": notes}))
    found = read_coco(path, "r")
    assert [(str(item.path), item.captions) for item in found.items] == [("r/7.jpg", ("y",)), ("r/3.jpg", ("x", "z"))]
    path.write_text(json.dumps({"images": images, "annotations": [*notes, {"image_id": 9, "caption": "w"}]}))
    with pytest.raises(ValueError, match=r"annotations\[3\]: image_id 9 is no picture"):
        read_coco(path, "r")
    path.write_text(json.dumps({"images": [*images, images[0]], "annotations": notes}))
    with pytest.raises(ValueError, match=r"images\[2\]: id 7 stands twice"):
        read_coco(path, "r")


def test_cleaning() -> None:
    assert clean_caption('A "Big"  dog: (brown); wow!') == "a big dog brown wow"
    assert clean_caption("word " * 60) == ("word " * 50).strip()
    assert clean_caption("一只猫。") == "一只猫。"


@given(st.text())
def test_cleaning_twice_changes_nothing(text: str) -> None:
    assert clean_caption(clean_caption(text)) == clean_caption(text)


# videos


def test_kinetics(tmp_path: Path) -> None:
    path = tmp_path / "val.csv"
    rows = [
        ("label", "youtube_id", "time_start", "time_end", "split"),
        ("yoga", "aa", "1", "11", "val"),
        ("abseiling", "bb", "2", "12", "val"),
        ("yoga", "gone", "2", "12", "val"),
        ("yoga", "cc", "2", "12", "train"),
        ("yoga", "dd", "x", "12", "val"),
    ]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    for name in ("aa_000001_000011.mp4", "bb_000002_000012.mp4", "cc_000002_000012.mp4"):
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=r"val.csv:6: time_start"):
        read_kinetics(path, tmp_path, split="val")
    problems: list[Problem] = []
    found = read_kinetics(path, tmp_path, split="val", problems=problems)
    assert found.classes == ("abseiling", "yoga")
    assert [(item.path.name[:2], item.label) for item in found.items] == [("aa", 1), ("bb", 0)]
    assert (found.left_out, len(problems)) == (2, 2)
    with pytest.raises(ValueError, match=r"val.csv:2: label 'yoga' is none"):
        read_kinetics(path, tmp_path, ["abseiling"])
    with pytest.raises(ValueError, match="none of 4 videos"):
        read_kinetics(path, tmp_path / "absent", split="val", problems=[])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"val.csv:1: no column 'label'"):
        read_kinetics(path, tmp_path)


def test_msrvtt(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("key,video_id,sentence\nr0,video7,a man sings\nr1,video3,\nr2,video3,猫\n")
    with pytest.raises(ValueError, match=r"test.csv:3: a field is missing"):
        read_msrvtt(tmp_path / "test.csv", "v")
    found = read_msrvtt(tmp_path / "test.csv", "v", problems=[])
    assert [(str(item.path), item.captions) for item in found.items] == [
        ("v/video7.mp4", ("a man sings",)),
        ("v/video3.mp4", ("猫",)),
    ]
    sentences = [{"video_id": "b", "caption": "x"}, {"video_id": "a", "caption": "y"}, {"video_id": "b", "caption": ""}]
    (tmp_path / "data.json").write_text(json.dumps({"sentences": sentences}))
    kept = read_msrvtt(tmp_path / "data.json", "v", ["a", "b"])
    assert [item.captions for item in kept.items] == [("y",), ("x",)]
    assert kept.empty == 1
    with pytest.raises(ValueError, match="no sentence for 'c'"):
        read_msrvtt(tmp_path / "data.json", "v", ["c"])


@given(st.integers(1, 400), st.integers(1, 12))
def test_every_video_gives_its_frames(length: int, count: int) -> None:
    found = protocol_frames(length, count)
    assert len(found) == count
    assert found == sorted(found)
    assert 0 <= found[0] <= found[-1] < length


def test_frames_of_the_protocol() -> None:
    assert protocol_frames(9, 1) == [4]
    assert protocol_frames(80, 8) == [5, 15, 25, 35, 45, 55, 65, 75]
    # stretches of ceil(9 / 8) = 2 leave four frames: the official script stops here
    assert len(set(protocol_frames(9, 8))) == 8
    with pytest.raises(ValueError, match="8 frames of a video of 0"):
        protocol_frames(0, 8)


# shards

SAMPLES = [(f"d/{i:03d}", {"jpg": bytes([i]) * (100 + 300 * i), "txt": f"caption {i} 猫".encode()}) for i in range(4)]


@pytest.fixture(scope="module")
def shard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("shards") / "a.tar"
    write_tar(path, SAMPLES)
    return path


def test_tars(shard: Path, tmp_path: Path) -> None:
    found = list(read_tar(shard))
    assert [(one.key, dict(one.fields)) for one in found] == SAMPLES
    assert found[1].source.endswith("a.tar:d/001.jpg")
    assert picture_and_text(found[2]) == (SAMPLES[2][1]["jpg"], "caption 2 猫")
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(shard.read_bytes()))
    assert [dict(one.fields) for one in read_tar(packed)] == [fields for _, fields in SAMPLES]
    with pytest.raises(FileNotFoundError):
        list(read_tar(tmp_path / "absent.tar"))


@settings(max_examples=60)
@given(data=st.data(), zipped=st.booleans())
def test_truncated_tars_lose_only_what_was_cut(shard: Path, data: st.DataObject, zipped: bool) -> None:
    """What is given is whole and from the front; what is missing was reported."""
    whole = shard.read_bytes()
    content = gzip.compress(whole) if zipped else whole
    cut = shard.parent / ("cut.tar.gz" if zipped else "cut.tar")
    cut.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    problems: list[Problem] = []
    found = [(one.key, dict(one.fields)) for one in read_tar(cut, problems)]
    assert found == SAMPLES[: len(found)]
    assert len(problems) <= 1
    if len(found) < len(SAMPLES):
        assert len(problems) == 1
        with pytest.raises(ValueError, match=r"cut\.tar.*: at or after .*truncated or damaged"):
            list(read_tar(cut))


@settings(max_examples=60)
@given(data=st.data())
def test_damaged_tars_end_in_a_typed_error_at_most(shard: Path, data: st.DataObject) -> None:
    content = bytearray(shard.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    bad = shard.parent / "bad.tar"
    bad.write_bytes(bytes(content))
    problems: list[Problem] = []
    for sample in read_tar(bad, problems):
        assert all(isinstance(value, bytes) for value in sample.fields.values())


def test_members_twice_and_pairs_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "twice.tar"
    write_tar(
        path, [("a", {"jpg": b"1", "txt": b"x"}), ("b", {"txt": b"x"}), ("b", {"txt": b"y"}), ("c", {"txt": b""})]
    )
    with pytest.raises(ValueError, match=r"twice.tar:b.txt: the member stands twice"):
        list(read_tar(path))
    found = list(read_tar(path, []))
    assert [one.key for one in found] == ["a", "c"]
    with pytest.raises(ValueError, match=r"twice.tar:c.txt: fields txt; a pair has one of"):
        picture_and_text(found[1])


def test_parquet_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"pip install 'internvl\[parquet\]'"):
        next(read_parquet(tmp_path / "x.parquet", ["image"]))


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    path = tmp_path / "x.parquet"
    rows = [{"image": {"bytes": b"1", "path": "a"}, "text": "猫"}, {"image": None, "text": "x"}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ValueError, match="row 2: 'image' is empty"):
        list(read_parquet(path, ["image", "text"]))
    assert list(read_parquet(path, ["image", "text"], problems=[])) == [{"image": b"1", "text": "猫"}]
    with pytest.raises(ValueError, match=r"x\.parquet: no column 'caption'"):
        next(read_parquet(path, ["caption"]))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ValueError, match="damaged"):
        list(read_parquet(path, ["text"]))


# class names of the public benchmarks


def lists(folder: Path, names: object, templates: object, code: str = "cn") -> Path:
    (folder / "datasets").mkdir(parents=True, exist_ok=True)
    (folder / "datasets" / f"{code}_classnames.json").write_text(json.dumps(names))
    (folder / "datasets" / f"{code}_zeroshot_classification_templates.json").write_text(json.dumps(templates))
    return folder


def test_class_names_and_prompts(tmp_path: Path) -> None:
    folder = lists(tmp_path, {"imagenet1k": ["猫", "狗", "猫"], "own": ["x"]}, {"imagenet1k": ["{c}的照片", "{}"]})
    found = class_names.read(folder, language="zh")
    assert found.names == ("猫", "狗", "猫")
    assert found.repeated == ("猫",)
    assert [fill(one, "猫") for one in found.templates] == ["猫的照片", "猫"]
    assert class_names.read(folder, "own", "zh").templates == found.templates
    with pytest.raises(ValueError, match="no language 'xx'; there are en, zh, ja, ar, it"):
        class_names.read(folder, language="xx")
    with pytest.raises(ValueError, match="there are imagenet1k, own"):
        class_names.read(folder, "other", "zh")
    with pytest.raises(ValueError, match=r"0 files en_classnames.json"):
        class_names.read(folder)
    with pytest.raises(ValueError, match="no list of texts"):
        class_names.read(lists(tmp_path, {"imagenet1k": [1]}, {}), language="zh")


@pytest.mark.parametrize(
    ("language", "templates", "distinct"),
    [("en", 80, 80), ("zh", 80, 78), ("ja", 37, 37), ("ar", 55, 55), ("it", 49, 46)],
)
def test_the_packaged_lists(language: str, templates: int, distinct: int) -> None:
    folder = cache_folder() / "packages" / PACKAGES[class_names.PACKAGE].folder
    if not folder.is_dir():
        pytest.skip("the class lists are not in the cache; bring them with: internvl fetch lists")
    found = class_names.read(folder, language=language)
    assert len(found.names) == 1000
    assert len(found.templates) == templates
    assert len(set(found.templates)) == distinct
