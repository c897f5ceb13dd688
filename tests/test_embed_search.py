"""Embedding folders and texts, searching them: resumed = uninterrupted, search = brute force, bad input named."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

import internvl
from dual_folder import make_dual, make_pictures, open_once, picture
from internvl import cli
from internvl.generate import embed as embedding
from internvl.generate.dual import Dual
from internvl.generate.embedded import Embedded, check_same, evenly, fingerprint, read_embedded, write_embedded
from internvl.generate.search import nearest, search

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
NAMES = ["b.png", "a.jpg", "sub/c.png", "sub/deep/d.webp", "e.png"]
ANY_SCRIPT = ["a cat", "一只猫在桌上", "قطة على الطاولة", "ネコ", "un gatto à côté", "x" * 300, "🐈"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual(tmp_path_factory.mktemp("model") / "dual")


@pytest.fixture(scope="module")
def dual(model: Path) -> Dual:
    return internvl.load(model, dtype="float32")


@pytest.fixture(autouse=True)
def _open_once(monkeypatch: pytest.MonkeyPatch) -> None:
    open_once(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures", NAMES)


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_a_folder_becomes_names_and_unit_vectors(
    model: Path, dual: Dual, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for head in ("c", "g"):
        out = tmp_path / f"{head}.safetensors"
        assert run("embed", model, folder, "--out", out, "--head", head, "--dtype", "float32", "--json") == 0
        said = json.loads(capsys.readouterr().out)
        assert (said["embedded"], said["head"], said["broken"]) == (5, head, [])
        found = read_embedded(out)
        assert found.names == tuple(sorted(NAMES))
        assert (found.facts.head, found.facts.fingerprint) == (head, fingerprint(dual))
        one_by_one = torch.cat([dual.encode_image(folder / name, head) for name in found.names])
        assert_close(found.vectors, one_by_one, **CLOSE)
    assert not list(tmp_path.glob("*.parts"))


@settings(max_examples=6)
@given(order=st.permutations(ANY_SCRIPT), batch=st.integers(1, 7))
def test_texts_do_not_depend_on_batch_padding_and_company(dual: Dual, order: list[str], batch: int) -> None:
    wanted = {text: dual.encode_text(text) for text in order[:3]}
    found = dual.encode_text(order, batch=batch)
    for place, text in enumerate(order[:3]):
        assert_close(found[place : place + 1], wanted[text], **CLOSE)


def test_a_file_of_texts_of_any_script(
    model: Path, dual: Dual, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "texts.txt", tmp_path / "texts.safetensors"
    file.write_text("\n".join(["", *ANY_SCRIPT, "   "]) + "\n", encoding="utf-8")
    assert run("embed", model, file, "--out", out, "--dtype", "float32", "--batch", 3) == 3
    said = capsys.readouterr().out
    assert "7 texts, 24 wide" in said
    assert "1 texts have more than 80 tokens" in said
    assert "left out: 2\n  line 1: no text in it" in said
    found = read_embedded(out)
    assert found.names == tuple(ANY_SCRIPT)
    assert_close(found.vectors, dual.encode_text(ANY_SCRIPT), **CLOSE)


def test_broken_pictures_are_named_and_the_rest_is_whole(
    model: Path, dual: Dual, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "b.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.png").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"")
    assert run("embed", model, folder, "--out", tmp_path / "o.safetensors", "--dtype", "float32") == 3
    said = capsys.readouterr().out
    assert "left out: 3" in said
    assert "cut.png: " in said
    assert "0 bytes" in said
    found = read_embedded(tmp_path / "o.safetensors")
    assert found.names == tuple(sorted(NAMES))
    assert sorted(problem.source for problem in found.facts.broken) == ["cut.png", "empty.jpg", "text.png"]
    assert_close(found.vectors, torch.cat([dual.encode_image(folder / name) for name in found.names]), **CLOSE)


class Killed(BaseException):
    pass


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    dual: Dual, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "a0.png").write_bytes(b"broken")
    source, seen = embedding.read_source(folder), []

    def run_once(out: Path) -> embedding.Made:
        return embedding.embed(dual, "m", source, out, batch=1, part=2)

    whole = run_once(tmp_path / "whole.safetensors")

    def encode(self: Dual, *arguments: object, **more: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 4:
            raise Killed
        return original(self, *arguments, **more)

    original = Dual.encode_image
    monkeypatch.setattr(Dual, "encode_image", encode)
    with pytest.raises(Killed):
        run_once(tmp_path / "cut.safetensors")
    assert not (tmp_path / "cut.safetensors").exists()
    seen += [1]
    again = run_once(tmp_path / "cut.safetensors")
    assert again.resumed == 2
    assert len(seen) == 5 + 2  # the two pictures of the parts that were missing, none twice
    assert again.embedded.names == whole.embedded.names
    assert again.embedded.facts == whole.embedded.facts
    assert torch.equal(again.embedded.vectors, whole.embedded.vectors)
    assert (tmp_path / "cut.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_an_output_is_neither_mixed_nor_overwritten(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("embed", model, folder, "--out", tmp_path / "o.safetensors", "--dtype", "float32")
    assert run(*words) == run(*words) == 0
    assert run(*words, "--head", "g") == 1
    assert "there already, with another head" in capsys.readouterr().err
    picture(77).save(folder / "new.png")
    assert run(*words) == 1
    assert "there already, with other names" in capsys.readouterr().err


def test_pictures_and_texts_that_changed_are_not_taken_for_the_old_ones(
    model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names are the same: the vectors would be those of what is no longer there."""
    words = ("embed", model, folder, "--out", tmp_path / "o.safetensors", "--dtype", "float32")
    assert run(*words) == 0
    first = next(path for path in sorted(folder.rglob("*.png")))
    picture(78).save(first)
    assert run(*words) == 1
    assert "there already, but the pictures have changed since; remove it" in capsys.readouterr().err
    lines = tmp_path / "t.txt"
    lines.write_text("a\nb\nb\n")
    words = ("embed", model, lines, "--out", tmp_path / "t.safetensors", "--dtype", "float32")
    assert run(*words) == 0
    lines.write_text("a\na\nb\n")
    assert run(*words) == 1
    assert "the texts have changed since" in capsys.readouterr().err


def test_names_that_are_no_utf8_are_embedded_and_told(model: Path, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    try:
        picture(1).save(tmp_path / "odd" / "caf\udce9.png")
    except OSError:
        pytest.skip("this file system has UTF-8 names only")
    (tmp_path / "odd" / "br\udce9.png").write_bytes(b"x")
    words = ["embed", str(model), str(tmp_path / "odd"), "--out", str(tmp_path / "o.safetensors")]
    code = f"import sys; from internvl.cli import main; sys.exit(main({words!r}))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert found.returncode == 3, found.stderr
    assert b"br\\udce9.png" in found.stdout
    assert read_embedded(tmp_path / "o.safetensors").names == ("caf\udce9.png",)


def test_parts_of_other_pictures_are_refused(dual: Dual, folder: Path, tmp_path: Path) -> None:
    source = embedding.read_source(folder)
    changed = replace(source, stamps=("other", *source.stamps[1:]))
    out = tmp_path / "o.safetensors"
    embedding.kept_pictures(dual, tmp_path / "o.safetensors.parts", [], [], {"head": "c"}, "c", "squash")
    with pytest.raises(ValueError, match="holds rows of another run"):
        embedding.embed(dual, "m", changed, out)


@given(
    rows=st.integers(1, 60),
    top=st.integers(1, 70),
    block=st.integers(1, 70),
    seed=st.integers(0, 9),
    levels=st.sampled_from([2, 1000]),
)
def test_search_equals_brute_force(rows: int, top: int, block: int, seed: int, levels: int) -> None:
    """Whole numbers: products are exact, and with two levels many scores are equal."""
    draw = torch.Generator().manual_seed(seed)
    vectors = torch.randint(-levels, levels, (rows, 6), generator=draw).float()
    queries = torch.randint(-levels, levels, (3, 6), generator=draw).float()
    scores, places = nearest(queries, vectors, top, index="exact", block=block)
    products = queries.double() @ vectors.double().T
    for query in range(3):
        wanted = sorted(range(rows), key=lambda n: (-float(products[query, n]), n))[:top]
        assert places[query].tolist() == wanted
        assert scores[query].tolist() == [float(products[query, n]) for n in wanted]


@pytest.mark.parametrize("package", ["faiss", "hnswlib"])
def test_an_installed_index_finds_the_same(package: str) -> None:
    pytest.importorskip(package)
    draw = torch.Generator().manual_seed(0)
    vectors = torch.nn.functional.normalize(torch.randn(500, 24, generator=draw), dim=1)
    queries = torch.nn.functional.normalize(torch.randn(4, 24, generator=draw), dim=1)
    exact, found = (nearest(queries, vectors, 10, index=name) for name in ("exact", package))
    assert torch.equal(exact[1], found[1])
    assert_close(exact[0], found[0], **CLOSE)


@given(rows=st.integers(1, 60), top=st.integers(1, 70), seed=st.integers(0, 9), levels=st.sampled_from([2, 1000]))
def test_faiss_equals_exact_where_scores_are_equal(rows: int, top: int, seed: int, levels: int) -> None:
    pytest.importorskip("faiss")
    draw = torch.Generator().manual_seed(seed)
    vectors, queries = (torch.randint(-levels, levels, (n, 6), generator=draw).float() for n in (rows, 3))
    exact, found = (nearest(queries, vectors, top, index=name) for name in ("exact", "faiss"))
    assert torch.equal(exact[0], found[0])
    assert torch.equal(exact[1], found[1])


def test_of_copies_faiss_gives_the_earlier() -> None:
    pytest.importorskip("faiss")
    draw = torch.Generator().manual_seed(1)
    vectors = torch.nn.functional.normalize(torch.randn(40, 64, generator=draw), dim=1).repeat(50, 1)
    scores, places = nearest(vectors[:5], vectors, 12, index="faiss")
    assert places.tolist() == [[40 * copy + query for copy in range(12)] for query in range(5)]
    assert_close(scores, torch.ones(5, 12), **CLOSE)


def test_a_graph_that_does_not_reach_all_says_so() -> None:
    pytest.importorskip("hnswlib")
    vectors = torch.nn.functional.normalize(torch.ones(300, 8), dim=1)
    with pytest.raises(ValueError, match=r"fewer than 300 of 300 vectors.*--index exact"):
        nearest(vectors[:1], vectors, 300, index="hnswlib")


@pytest.mark.parametrize("package", ["faiss", "hnswlib"])
def test_an_index_that_is_not_installed_names_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"pip install 'internvl\[{package}\]'"):
        nearest(torch.ones(1, 2), torch.ones(3, 2), 1, index=package)


@pytest.mark.parametrize("index", ["auto", "faiss", "hnswlib"])
def test_the_command_finds_the_same_by_every_index(
    index: str, model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if index != "auto":
        pytest.importorskip(index)
    out = tmp_path / "o.safetensors"
    assert run("embed", model, folder, "--out", out, "--dtype", "float32") == 0
    words = ("search", out, "a cat", folder / "b.png", "--top", 3, "--dtype", "float32", "--json", "--index")
    capsys.readouterr()
    hits = []
    for name in ("exact", index):
        assert run(*words, name) == 0
        hits.append([one["hits"] for one in json.loads(capsys.readouterr().out)["found"]])
    for exact, found in zip(*hits, strict=True):
        assert [hit["name"] for hit in exact] == [hit["name"] for hit in found]
        assert [hit["score"] for hit in exact] == pytest.approx([hit["score"] for hit in found], abs=1e-5)


def test_search_by_text_and_by_picture_with_a_sheet(
    model: Path, dual: Dual, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.safetensors"
    assert run("embed", model, folder, "--out", out, "--dtype", "float32", "--head", "g") == 0
    capsys.readouterr()
    words = ("search", out, "<b>a cat</b>", folder / "e.png", "--top", 3, "--dtype", "float32")
    assert run(*words, "--json", "--sheet", tmp_path / "s.html") == 0
    text, image = json.loads(capsys.readouterr().out)["found"]
    assert (text["kind"], image["kind"]) == ("text", "picture")
    assert image["hits"][0]["name"] == "e.png"
    assert image["hits"][0]["score"] == pytest.approx(1, abs=1e-4)
    stored = read_embedded(out)
    scores = stored.vectors @ dual.encode_text("<b>a cat</b>")[0]
    best = scores.argsort(descending=True)[:3].tolist()
    assert [hit["place"] for hit in text["hits"]] == best
    page = (tmp_path / "s.html").read_text(encoding="utf-8")
    assert page.count("data:image/jpeg;base64,") == 3 + 1 + 3
    assert "<b>" not in page
    assert run(*words, "--sheet", tmp_path / "s.png") == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert "e.png" in capsys.readouterr().out


def test_a_picture_finds_texts(model: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.txt").write_text("\n".join(ANY_SCRIPT), encoding="utf-8")
    assert run("embed", model, tmp_path / "t.txt", "--out", tmp_path / "t.safetensors") == 0
    assert run("search", tmp_path / "t.safetensors", folder / "b.png", "--sheet", tmp_path / "s.html") == 0
    assert "قطة" in capsys.readouterr().out
    assert "قطة" in (tmp_path / "s.html").read_text(encoding="utf-8")


def test_another_model_or_head_is_refused(
    model: Path, dual: Dual, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "o.safetensors"
    assert run("embed", model, folder, "--out", out) == 0
    other = make_dual(tmp_path / "other", seed=3)
    assert run("search", out, "a cat", "--model", other) == 1
    assert "give the model that made them" in capsys.readouterr().err
    assert run("search", out, "a cat", "--head", "g") == 1
    assert "of head 'c', asked is 'g'" in capsys.readouterr().err
    in_bfloat16 = internvl.load(model, dtype="bfloat16")
    check_same(read_embedded(out), in_bfloat16, None)
    with torch.no_grad():
        in_bfloat16.model.vision.layers[0].norm1.weight.mul_(1.1)
    assert fingerprint(in_bfloat16) != fingerprint(dual)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("embed", "{model}", "{tmp}/none", "--out", "o.safetensors"), "no such folder or file"),
        (("embed", "{model}", "{tmp}/empty", "--out", "o.safetensors"), "no picture in it or its subfolders"),
        (("embed", "{model}", "{tmp}/blank.txt", "--out", "o.safetensors"), "no text in it"),
        (("embed", "{model}", "{tmp}/latin.txt", "--out", "o.safetensors"), "not UTF-8"),
        (("embed", "{model}", "{tmp}/p.png", "--out", "o.safetensors"), "give the folder that holds it"),
        (("embed", "{model}", "{tmp}/empty", "--out", "o.npy"), "ends in .safetensors or .parquet"),
        (("search", "{tmp}/none.safetensors", "a"), "make it with internvl embed"),
        (("search", "{tmp}/p.safetensors", "a"), "damaged, or not made by internvl embed"),
        (("search", "{tmp}/p.safetensors", "none.png"), "no such picture; check the path, or say --text"),
        (("search", "{tmp}/p.safetensors", "a", "--sheet", "s.pdf"), "a sheet ends in .html or .png"),
    ],
)
def test_bad_input_says_what_to_do(
    model: Path, tmp_path: Path, words: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    picture(0).save(tmp_path / "p.png")
    (tmp_path / "p.safetensors").write_bytes((tmp_path / "p.png").read_bytes())
    assert run(*(word.format(model=model, tmp=tmp_path) for word in words)) == 1
    assert said in capsys.readouterr().err


def test_queries_must_fit(dual: Dual, tmp_path: Path, model: Path, folder: Path) -> None:
    with pytest.raises(ValueError, match="the best 0 in blocks"):
        nearest(torch.ones(1, 3), torch.ones(2, 3), 0)
    with pytest.raises(ValueError, match="queries of 4 numbers, vectors of 3"):
        nearest(torch.ones(1, 4), torch.ones(2, 3), 1)
    made = embedding.embed(dual, "m", embedding.read_source(folder), tmp_path / "o.safetensors").embedded
    with pytest.raises(ValueError, match="no query"):
        search(dual, made, [], 3)
    with pytest.raises(ValueError, match="an empty query"):
        search(dual, made, [" "], 3)
    with pytest.raises(ValueError, match="1 names for 2 vectors"):
        write_embedded(tmp_path / "x.safetensors", Embedded(("a",), torch.ones(2, 3), made.facts))


def test_parquet_holds_the_same(dual: Dual, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    source = embedding.read_source(folder)
    one, two = (
        embedding.embed(dual, "m", source, tmp_path / f"o.{suffix}").embedded for suffix in ("safetensors", "parquet")
    )
    again = read_embedded(tmp_path / "o.parquet")
    assert again.names == one.names == two.names
    assert again.facts == one.facts
    assert torch.equal(again.vectors, one.vectors)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match="damaged, or not made by internvl embed"):
        read_embedded(tmp_path / "bad.parquet")


@given(length=st.integers(1, 10**11), count=st.integers(1, 64))
def test_places_looked_at_are_inside_and_reach_both_ends(length: int, count: int) -> None:
    places = evenly(length, count).tolist()
    assert len(places) == len(set(places)) == min(length, count)
    assert places == sorted(places)
    assert places[0] == 0
    assert places[-1] == (length - 1 if len(places) > 1 else 0)
