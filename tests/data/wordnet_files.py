"""A small WordNet in its own file format."""

from __future__ import annotations

from pathlib import Path

from internvl.data.packaged.wordnet import Nouns


def animals(folder: Path) -> Nouns:
    """Three animals: entity <- bird <- eagle; a bar of gold is no animal."""
    folder.mkdir(parents=True, exist_ok=True)
    lines, places = b"", {}
    for name, kind, words, parent in (
        ("animal", 5, ["animal", "beast"], None), ("bird", 5, ["bird"], "animal"), ("eagle", 5, ["eagle"], "bird"),
        ("gold", 21, ["eagle"], "animal"),
    ):  # fmt: skip
        places[name] = len(lines)
        listed = " ".join(f"{word} 0" for word in words)
        above = f"001 @ {places[parent]:08d} n 0000" if parent else "000"
        told = 'meaning; "an example of it"'
        lines += f"{places[name]:08d} {kind:02d} n {len(words):02x} {listed} {above} | {told}\n".encode()
    (folder / "data.noun").write_bytes(lines)
    index = {"animal": ["animal"], "beast": ["animal"], "bird": ["bird"], "eagle": ["eagle", "gold"]}
    (folder / "index.noun").write_text("  1 licence\n" + "".join(
        f"{word} n {len(of)} 1 @ {len(of)} 0 {' '.join(f'{places[x]:08d}' for x in of)}\n" for word, of in index.items()
    ))  # fmt: skip
    (folder / "noun.exc").write_text("geese goose\n")
    for part in ("verb", "adj", "adv"):
        (folder / f"index.{part}").write_text("fly v 1\n")
    return Nouns(folder)
