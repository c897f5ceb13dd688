"""Captions of the collected pictures in every language that their packages know: one file in the collected folder.

Packages are read here and nowhere later, as `collect.py` does for pixels. Records of it are `build_dual.py`'s.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from internvl.data.library import Entry, Library
from internvl.data.packaged import gcompris, openmoji, stamps
from internvl.data.pictures import caption_of
from internvl.fetch import fetch, locked

Captions = dict[str, list[str]]
"""Language (BCP 47: fr, pt-BR, zh-CN, sr-Latn) -> captions, the plainest first."""

FILE = "captions.jsonl"
ENGLISH = "en"
_CODES = {"zh": "zh-CN", "sr@latin": "sr-Latn", "ca@valencia": "ca-valencia"}
_SAME = ("en-GB", "en-AU")
"""English again: only where the words differ."""
MOST_BYTES = 120
"""Of a sentence about a photo: in most scripts a byte or two are a token, and 80 tokens are read."""
_SENTENCE = re.compile(r".{20,}?(?:(?<!\bSt)[.!?](?=\s)|[。।])", re.DOTALL)
"""Twenty letters at least: early stops are those of abbreviations. Saints are met in names of places."""
MOST_KEYWORDS, LONGEST_KEYWORD = 6, 14
EMOJI = ("openmoji", "noto", "emojione")


def language_code(code: str) -> str:
    """One spelling for the codes of all packages: zh_CN and zh are zh-CN."""
    return _CODES.get(code, code.replace("_", "-"))


def read_captions(folder: Path) -> dict[str, Captions]:
    """Picture id -> its captions; the file is made from the packages where it is missing."""
    path = folder / FILE
    with locked(path):
        if not path.is_file():
            lines = [json.dumps({"id": id, "captions": texts}, ensure_ascii=False) for id, texts in _gather(folder)]
            scratch = path.with_name(f".{FILE}.part")
            scratch.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
            os.replace(scratch, path)
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {row["id"]: row["captions"] for row in rows}


def _gather(folder: Path) -> list[tuple[str, Captions]]:
    told = _sources()
    found = []
    for entry in Library(folder, "train").all:
        texts: Captions = {ENGLISH: english(entry)} if english(entry) else {}
        foreign = told[entry.source](entry) if entry.source in told else {}
        found.append((entry.id, texts | _clean(foreign, texts.get(ENGLISH, []))))
    return [(id, texts) for id, texts in found if texts]


def _clean(foreign: Mapping[str, list[str]], english: list[str]) -> Captions:
    """Untranslated texts say nothing about their language; empty ones nothing at all."""
    found: Captions = {}
    for code, texts in sorted(foreign.items()):
        kept = [text.strip() for text in texts if text and text.strip() and text.strip() not in english]
        language = language_code(code)
        if kept and language not in (ENGLISH, *_SAME):
            found[language] = list(dict.fromkeys(kept))
    return found


def english(entry: Entry) -> list[str]:
    """A sentence, then what else the package says: title, description, keywords."""
    texts = [caption_of(entry)]
    if entry.source in EMOJI:
        texts.append(entry.title)
    elif entry.source == "gcompris":
        texts = brief([*texts, entry.title])
    elif entry.source == "openclipart":
        keywords = [word for word in entry.keywords if len(word) <= LONGEST_KEYWORD]
        texts += [*entry.captions, ", ".join(keywords[:MOST_KEYWORDS]) if len(keywords) > 2 else ""]
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def brief(texts: list[str]) -> list[str]:
    """The first sentence of each text, without those that are still too long unless nothing else is left."""
    found = [_SENTENCE.match(text) for text in texts]
    sentences = [match[0] if match else text for match, text in zip(found, texts, strict=True)]
    return [text for text in sentences if len(text.encode()) <= MOST_BYTES] or sentences[-1:]


def _sources() -> dict[str, Callable[[Entry], dict[str, list[str]]]]:
    """By source: an entry to its captions by the language codes of the package."""
    folder = stamps.folder(fetch("tuxpaint-stamps-default"))
    names = fetch("emoji")
    emoji = dict(openmoji.named(names, openmoji.languages(names)))
    quiz = fetch("gcompris-qt-data")
    words, messages = gcompris.words_by_language(quiz), gcompris.translations(quiz)

    def of_stamp(entry: Entry) -> dict[str, list[str]]:
        captions = stamps.captions_of((folder / entry.path).with_suffix(".txt"))
        return {code: [text] for code, text in captions.items()}

    def of_emoji(entry: Entry) -> dict[str, list[str]]:
        row = emoji.get(openmoji.plain_symbol(entry.path), {})
        return {code: [text] for code, text in row.items() if code != "symbol"}

    def of_quiz(entry: Entry) -> dict[str, list[str]]:
        if entry.path in words:
            return {code: [word] for code, word in words[entry.path].items()}
        texts = [*entry.captions, entry.title]
        return {code: brief([said for text in texts if (said := say(text))]) for code, say in messages.items()}

    return {"stamps": of_stamp, "gcompris": of_quiz, **dict.fromkeys(EMOJI, of_emoji)}
