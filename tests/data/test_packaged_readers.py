"""Readers of packaged sets against small packages made here in the same formats."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from wordnet_files import animals

from internvl.data.packaged import clipart, emojione, gcompris, iconify, openmoji, qt, stamps
from internvl.data.sheet import sheet


def png(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGBA", (8, 8), colour).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_stamps_carry_captions_names_and_a_series(tmp_path: Path) -> None:
    base = tmp_path / "usr/share/tuxpaint/stamps"
    words = "# a comment\nA zebra.\nfr.utf8=Un zèbre.\nzh_CN.utf8=斑马。\n"
    for name in ("animals/mammals/zebra_1.png", "animals/cartoon/zebra_2.png"):
        put((base / name).with_suffix(".txt"), words)
        put(base / name, png())
    put(base / "animals/nothing.png", png())  # no text: no words to learn
    put(base / "animals/zebra_1_mirror.png", png())
    put(base / "symbols/coin.txt", "A coin.\n")
    put(base / "symbols/coin.png", png())
    found = list(stamps.read(tmp_path))
    assert [(one.path, one.kind) for one in found] == [
        ("animals/cartoon/zebra_2.png", "drawing"),
        ("animals/mammals/zebra_1.png", "photo"),
    ]
    assert found[1].title == "A zebra."
    assert found[1].names == {"fr": "Un zèbre", "zh": "斑马"}
    assert found[1].keywords == ("animals", "mammals")
    assert found[1].series == "stamps/animals/mammals/zebra"


def emoji_names(folder: Path) -> Path:
    put(folder / "emoji.json", json.dumps({
        "🦊": {"en": ":fox:"}, "☀️": {"en": ":sun:"}, "➡": {"en": ":right_arrow:"}, "👩‍🚒": {"en": ":firefighter:"},
        "🐻‍❄️": {"en": ":polar_bear:"},
    }))  # fmt: skip
    put(folder / "emoji_fr.json", json.dumps({"🦊": ":renard:"}))
    put(folder / "emoji_zh.json", json.dumps({"🦊": ":狐狸:"}))
    return folder


def test_emoji_that_are_things_have_names(tmp_path: Path) -> None:
    named = dict(openmoji.named(emoji_names(tmp_path)))
    assert sorted(entry["en"] for entry in named.values()) == ["fox", "polar bear", "sun"]
    assert named["🦊"]["fr"] == "renard"
    assert named["🦊"]["zh"] == "狐狸"


def test_emojione_is_found_by_code(tmp_path: Path) -> None:
    put(tmp_path / "gem/assets/png/1F98A.png", png())
    (fox,) = emojione.read(tmp_path / "gem", emoji_names(tmp_path / "names"))
    assert (fox.title, fox.series, fox.names["fr"]) == ("fox", "emoji/🦊", "renard")


SQUARE = '<path fill="{}" d="M0 0h8v8H0z"/>'


def icons(folder: Path, drawings: dict[str, object], symbols: dict[str, str] | None = None) -> Path:
    put(folder / "icons.json", json.dumps({"prefix": "toy", "width": 8, "height": 8, "icons": drawings}))
    if symbols is not None:
        put(folder / "chars.json", json.dumps(symbols))
    return folder


def test_drawings_are_called_by_what_they_are_once(tmp_path: Path) -> None:
    names = ("hot-dog", "hot-dog-flat", "hot-dog-2", "hot-dog-bold-3", "waving-hand", "waving-hand-medium-dark", "gone")
    body = SQUARE.format("#ff0000")
    drawings = {name: {"body": body, "hidden": name == "gone"} for name in names}
    found = list(iconify.read(icons(tmp_path, drawings, {"1f44b": "waving-hand", "1f32d-fe0f": "hot-dog"}), "toy"))
    assert [(one.title, one.series, one.source) for one in found] == [
        ("hot dog", "emoji/🌭", "toy"),
        ("waving hand", "emoji/👋", "toy"),
    ]


def test_drawings_of_one_colour_get_one_each_and_always_the_same(tmp_path: Path) -> None:
    drawings = {f"thing{letter}": {"body": SQUARE.format("currentColor")} for letter in "abcdefghijklmnop"}
    drawings |= {"red": {"body": SQUARE.format("#ff0000"), "left": 2, "width": 4}}
    folder = icons(tmp_path, drawings)
    found = {one.title: one.data.decode() for one in iconify.read(folder, "toy")}
    inks = {text.split('fill="')[1][:7] for title, text in found.items() if title != "red"}
    assert len(inks) > 8
    assert all(ink.startswith("#") for ink in inks)
    assert 'viewBox="2 0 4 8"' in found["red"]
    assert 'fill="#ff0000"' in found["red"]
    assert {one.title: one.data.decode() for one in iconify.read(folder, "toy")} == found


def test_emoji_have_names_in_every_language_that_is_there(tmp_path: Path) -> None:
    folder = emoji_names(tmp_path)
    assert openmoji.languages(folder) == ("fr", "zh")
    assert dict(openmoji.named(folder, ("fr",)))["🦊"] == {"symbol": "🦊", "en": "fox", "fr": "renard"}
    assert openmoji.plain_symbol("1F98A.svg") == "🦊"
    assert openmoji.plain_symbol("1F43B-200D-2744-FE0F.svg") == "🐻‍❄"


def message(source: str, *forms: str) -> bytes:
    """One message of a .qm file: source text, translations, its end."""
    parts = [struct.pack(">BI", 6, len(source.encode())) + source.encode(), struct.pack(">BI", 5, 7)]
    parts += [struct.pack(">BI", 3, len(x.encode("utf-16-be"))) + x.encode("utf-16-be") for x in forms]
    return b"".join(parts) + struct.pack(">BIB", 3, 0xFFFFFFFF, 1)


def qm(texts: dict[str, tuple[str, ...]]) -> bytes:
    content, hashes = b"", b""
    for source, forms in texts.items():
        hashes += struct.pack(">II", qt.elf_hash(source.encode()), len(content))
        content += message(source, *forms)
    blocks = b"".join(struct.pack(">BI", tag, len(x)) + x for tag, x in ((0x42, hashes), (0x69, content)))
    return qt.MAGIC + bytes(12) + blocks


@given(st.dictionaries(st.text(min_size=1), st.text(min_size=1), max_size=6))
def test_qt_messages_are_found_by_their_source(texts: dict[str, str]) -> None:
    plain = {a: b for a, b in texts.items() if not any(0xD800 <= ord(x) < 0xE000 for x in a + b)}
    found = qt.Messages(qm({source: (said, "another form") for source, said in plain.items()}))
    if len({qt.elf_hash(source.encode()) for source in plain}) == len(plain):
        assert {source: found(source) for source in plain} == plain
    assert qt.Messages(qm({"a": ("b",)}))("c") is None


def test_qt_hash_is_that_of_elf_symbol_tables() -> None:
    known = {b"exit": 0x0006CF04, b"printf": 0x077905A6, b"syscall": 0x0B09985C, b"flapenguin.me": 0x03987915}
    assert {name: qt.elf_hash(name) for name in known} == known  # published values; the last two fold the top bits
    assert qt.elf_hash(b"") == 1
    with pytest.raises(ValueError, match="begins with"):
        qt.Messages(b"GIF89a")


def svg(title: str, *keywords: str) -> str:
    items = "".join(f"<rdf:li>{word}</rdf:li>" for word in keywords)
    return f"<svg><dc:title>{title}</dc:title><dc:description>d</dc:description>{items}</svg>"


def test_clip_art_has_title_keywords_and_variants_in_one_series(tmp_path: Path) -> None:
    for name, title in (("animals/fox_01", "Red &amp; white fox"), ("animals/fox_02", "Clipart by somebody")):
        put(tmp_path / f"p/usr/share/openclipart/png/{name}.png", png())
        put(tmp_path / f"s/usr/share/openclipart/svg/{name}.svg", svg(title, "Fox", "hash", "animal"))
    put(tmp_path / "p/usr/share/openclipart/png/recreation/games/cards/ace.png", png())
    first, second = clipart.read(tmp_path / "p", tmp_path / "s")
    assert (first.title, first.keywords) == ("Red & white fox", ("fox", "animal"))
    assert second.title == "fox_02"  # a title that says nothing gives way to the name of the file
    assert first.series == second.series


def rcc(files: dict[str, bytes], version: int = 1, packed: bool = False) -> bytes:
    """A Qt resource file with these files in one folder each level, as Qt's rcc lays them out."""
    tree: dict[str, object] = {}
    for path, content in files.items():
        at = tree
        *folders, leaf = path.split("/")
        for folder in folders:
            at = at.setdefault(folder, {})  # type: ignore[assignment]
        at[leaf] = content
    names, data, nodes, queue = b"", b"", [], [("", tree)]
    order: list[tuple[str, object]] = [("", tree)]
    while queue:
        _, node = queue.pop(0)
        for child in sorted(node.items()):  # type: ignore[attr-defined]
            order.append(child)
            if isinstance(child[1], dict):
                queue.append(child)
    place = 1
    for name, node in order:
        at = len(names)
        names += struct.pack(">HI", len(name), 0) + name.encode("utf-16-be")
        extra = b"" if version < 2 else bytes(8)
        if isinstance(node, dict):
            nodes.append(struct.pack(">IHII", at, 2, len(node), place) + extra)
            place += len(node)
        else:
            raw = struct.pack(">I", len(node)) + zlib.compress(node) if packed else node
            nodes.append(struct.pack(">IHHHI", at, int(packed), 0, 0, len(data)) + extra)
            data += struct.pack(">I", len(raw)) + raw
    table = b"".join(nodes)
    head = 20
    return (
        b"qres"
        + struct.pack(">IIII", version, head, head + len(table), head + len(table) + len(data))
        + table
        + data
        + names
    )


@given(
    st.dictionaries(
        st.sampled_from(["a/b.txt", "a/c/d.webp", "e.json", "f/g", "a/h"]), st.binary(max_size=40), min_size=1
    ),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_qt_resources_come_back(
    tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes], version: int, packed: bool
) -> None:
    root = tmp_path_factory.mktemp("rcc")
    put(root / "usr/share/gcompris-qt/rcc/board.rcc", rcc(files, version, packed))
    assert gcompris.resources(root, "board") == files


def test_a_file_that_is_no_resource_file_is_named(tmp_path: Path) -> None:
    put(tmp_path / "usr/share/gcompris-qt/rcc/board.rcc", b"PK\x03\x04" + bytes(40))
    with pytest.raises(ValueError, match=r"board\.rcc: not a Qt resource file"):
        gcompris.resources(tmp_path, "board")


def test_boards_give_photos_with_title_and_text(tmp_path: Path) -> None:
    board = (
        'tab: [\n  {\n "image2": "qrc:/pics/tower.webp",\n "title": qsTr("Eiffel Tower"),\n'
        ' "text": qsTr("It is \\"tall\\"" + " and of iron.")\n }\n ]'
    )
    empty = {"x/y.txt": b""}
    for name in ("explore_world_animals", "explore_farm_animals"):
        put(tmp_path / f"usr/share/gcompris-qt/rcc/{name}.rcc", rcc(empty))
    pictures = {
        "categorization/resource/images/tools/pliers2.webp": b"P",
        "categorization/resource/images/numbers/1.webp": b"1",
    }
    put(tmp_path / "usr/share/gcompris-qt/rcc/categorization.rcc", rcc(pictures))
    content = {
        "words_sample.json": [{"content": [{"name": "Animals", "content": [
            {"image": "cat.webp", "description": "cat", "voice": "voices/cat.$CA"},
            {"image": "son.webp", "description": "son", "voice": "voices/son.$CA"},
        ]}]}],
        "content-fr.json": {"cat.ogg": "chat"},
        "content-zh_CN.json": {"cat.ogg": "猫"},
    }  # fmt: skip
    lang = {f"{gcompris._LANG}{name}": json.dumps(value).encode() for name, value in content.items()}
    lang |= {f"{gcompris._LANG}words_sample/{name}.webp": name.encode() for name in ("cat", "son")}
    put(tmp_path / "usr/share/gcompris-qt/rcc/lang.rcc", rcc(lang))
    boards = {"monuments/board1.qml": board.encode(), "pics/tower.webp": b"T"}
    put(tmp_path / "usr/share/gcompris-qt/rcc/explore_monuments.rcc", rcc(boards))
    found = {one.title: one for one in gcompris.read(tmp_path)}
    assert sorted(found) == ["Eiffel Tower", "cat", "pliers"]
    assert found["Eiffel Tower"].captions == ('It is "tall" and of iron.',)
    assert found["Eiffel Tower"].data == b"T"
    assert found["cat"].names == {"fr": "chat", "zh": "猫"}


def test_wordnet_knows_wider_words_synonyms_and_singulars(tmp_path: Path) -> None:
    nouns = animals(tmp_path)
    eagle = nouns.depicted("eagle")
    assert eagle is not None
    assert nouns.wider(eagle) == ["bird", "animal", "beast"]
    assert nouns.is_a(eagle, "bird")
    animal = nouns.depicted("beast")
    assert animal is not None
    assert nouns.synonyms(animal) == ["animal", "beast"]
    assert (nouns.base("eagles"), nouns.base("geese"), nouns.base("grass")) == ("eagle", "goose", "grass")
    assert nouns.is_english("flying")
    assert not nouns.is_english("xyzzy")


def test_a_contact_sheet_shows_records_and_says_what_is_missing(tmp_path: Path) -> None:
    put(tmp_path / "images/a.png", png())
    turns = [
        {"from": "human", "value": "<image>\nWhere is it?"},
        {"from": "gpt", "value": "<ref>it</ref><box>[[100, 100, 900, 900]]</box>"},
    ]
    path = put(tmp_path / "set.jsonl", json.dumps({"image": "images/a.png", "conversations": turns}) + "\n\n")
    made = np.asarray(sheet(path))
    assert made.shape[1] == 6 * 210
    assert (made[:, :210] != 255).any()
    put(tmp_path / "set.jsonl", json.dumps({"image": "images/b.png", "question": "?", "answer": "!"}) + "\n")
    with pytest.raises(ValueError, match=r"images/b.png is in none of the folders"):
        sheet(path)
    put(tmp_path / "set.jsonl", "\n")
    with pytest.raises(ValueError, match="no lines to show"):
        sheet(path)
