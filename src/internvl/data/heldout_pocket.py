"""Held-out questions of `pocket`: pictures, cut-outs, backgrounds and words that no training record shows.

Scenes are made of held-out cut-outs on held-out grounds, but of names that training knows, so that counting measures
counting and not naming. Scoring is `evaluate/`.
"""

from __future__ import annotations

import json
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from internvl.data import pictures, questions, scenes, words
from internvl.data.asked import Asked
from internvl.data.library import Entry, Library

QUALITY = 90
STREAM, KNOWN_STREAM = 100, 200
"""First numbers of the seeds of held-out rows, of unknown and of known pictures; training uses smaller ones."""
TRAIN_ANSWERS = 3000
"""Training answers kept beside the held-out rows, from which the majority baseline is counted."""
SCENE_ROWS, WORD_ROWS, NAMING_ROWS, CAPTION_ROWS, EASY_VQA_ROWS, FOREIGN_ROWS = 400, 400, 600, 300, 2000, 100
MOST_PER_HEAD = 8
"""Rows of one name in the naming task: no score should hang on emoji faces."""
_KINDS: dict[str, tuple[scenes.Kind, ...]] = {
    "yesno": ("mixed", "count", "shapes", "colour"),
    "colour": ("colour", "shapes"),
    "count": ("count", "count", "shapes"),
    "position": ("mixed", "mixed", "shapes"),
    "box": ("mixed", "mixed", "colour", "shapes"),
}
_SHARE_OF_ANSWER = {"yesno": 2, "position": 4, "count": 5}
"""Answers that must be equally frequent: a constant answer then scores 1/n."""


def write(collected: Path, out: Path, seed: int, answers: dict[str, list[dict[str, Any]]]) -> None:
    """`out/heldout/<task>.jsonl`, the same as training records for the held-out loss, and training answers."""
    library = Library(collected, "heldout")
    tasks: dict[str, list[dict[str, Any]]] = {"easy_vqa": _easy_vqa(collected, out)}
    for place, task in enumerate(_KINDS):
        tasks[f"scenes_{task}"] = _scenes(library, out, task, (seed, STREAM + place))
    tasks["words"] = _words(library, out, (seed, STREAM + 10))
    tasks["naming"] = _naming(library, out)
    tasks["captions"] = _captions(library, out, (seed, STREAM + 11))
    for task, rows in tasks.items():
        _lines(out / "heldout" / "records" / f"{task}.jsonl", [_record(row) for row in rows])
        _write_rows(out, task, rows)
        if answers.get(task):
            _lines(out / "train" / f"{task}.jsonl", answers[task])
    for language in ("fr", "zh"):
        _lines(out / "heldout" / "more" / f"naming_{language}.jsonl", _foreign(library, language))
    meta = {
        task: {"root": "", "annotation": f"records/{task}.jsonl", "repeat_time": 1, "length": len(rows)}
        for task, rows in tasks.items()
    }  # fmt: skip
    (out / "heldout" / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def write_known(collected: Path, out: Path, seed: int) -> None:
    """`out/heldout/scenes_<task>.jsonl`: new scenes of pictures that training shows.

    Beside the scores of unknown pictures they tell what a model cannot see from what it cannot say.
    """
    library = Library(collected, "train")
    for place, task in enumerate(_KINDS):
        rows = _scenes(library, out, task, (seed, KNOWN_STREAM + place))
        _write_rows(out, f"scenes_{task}", rows)


def _write_rows(out: Path, task: str, rows: list[dict[str, Any]]) -> None:
    """Without what tells the answer: where things are is for records alone."""
    _lines(out / "heldout" / f"{task}.jsonl", [{k: v for k, v in row.items() if k != "regions"} for row in rows])


def row(name: str, image: str, asked: Asked, **more: Any) -> dict[str, Any]:
    """One held-out line."""
    box = {"box": list(asked.box)} if asked.box else {}
    accept = list(asked.accept) or [asked.answer]
    return {"id": name, "image": image, "question": asked.question, "answer": asked.answer, "accept": accept,
            "task": asked.task, **box, **more}  # fmt: skip


def _record(line: dict[str, Any]) -> dict[str, Any]:
    turns = [{"from": "human", "value": "<image>\n" + line["question"]}, {"from": "gpt", "value": line["answer"]}]
    more: dict[str, Any] = {"spelled": True} if line["task"] == "words" else {}
    if line.get("regions"):
        more["regions"] = [{"text": text, "box": box} for text, box in line["regions"]]
    return {"id": line["id"], "image": "../" + line["image"], "conversations": turns, **more}


def _lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in rows), encoding="utf-8")


def _save(out: Path, image: Image.Image, task: str, number: int) -> str:
    path = f"images/heldout/{task}/{number:04d}.jpg"
    (out / path).parent.mkdir(parents=True, exist_ok=True)
    image.convert("RGB").save(out / path, "JPEG", quality=QUALITY)
    return path


def _scenes(library: Library, out: Path, task: str, seed: tuple[int, ...]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    answered: Counter[str] = Counter()
    make: Callable[..., Asked | None] = questions.MAKERS[task]
    most = SCENE_ROWS // _SHARE_OF_ANSWER[task] if task in _SHARE_OF_ANSWER else SCENE_ROWS
    for index in range(50 * SCENE_ROWS):
        generator = np.random.default_rng((*seed, index))
        kind = _KINDS[task][index % len(_KINDS[task])]
        scene = scenes.compose(library, generator, kind, small=generator.random() < 0.7)
        asked = make(scene, library, generator) if scene.things else None
        if asked is None or asked.task != f"scenes_{task}" or (task == "box" and asked.box is None):
            continue
        if answered[asked.answer] >= most or (task == "count" and not 1 <= int(asked.answer) <= 5):
            continue
        answered[asked.answer] += 1
        image = _save(out, scene.image, f"scenes_{task}", len(rows))
        rows.append(row(f"scenes_{task}-{len(rows)}", image, asked, name_seen=True, kind=kind, regions=scene.regions()))
        if len(rows) == SCENE_ROWS:
            break
    return rows


def _words(library: Library, out: Path, seed: tuple[int, ...]) -> list[dict[str, Any]]:
    """Seventeen words to three numbers; no random letters."""
    rows = []
    for index in range(WORD_ROWS):
        generator = np.random.default_rng((*seed, index))
        text = words.text_for(library.folder, "heldout", generator, "number" if index % 20 >= 17 else "word")
        picture, letters = words.render_placed(library, text, generator)
        image = _save(out, picture, "words", index)
        rows.append(row(f"words-{index}", image, words.ask(text, generator), regions=letters))
    return rows


def _naming(library: Library, out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for entry in _named(library):
        asked = Asked("naming", "What is this?", pictures.named(entry), entry.accept)
        generator = np.random.default_rng(int(entry.id[:8], 16))
        picture, box = pictures.show_placed(library, entry, generator, plain=True)
        image = _save(out, picture, "naming", len(rows))
        more = {"name_seen": entry.name_seen, "source": entry.source, "regions": [pictures.region_of(entry, box)]}
        rows.append(row(f"naming-{entry.id}", image, asked, **more))
    return rows


def _named(library: Library) -> list[Entry]:
    """Held-out pictures with a common name, in the order of their content hash."""
    taken: Counter[str] = Counter()
    chosen = []
    for entry in sorted(library.entries, key=lambda e: e.id):
        if entry.name and not entry.proper and taken[entry.head] < MOST_PER_HEAD:
            taken[entry.head] += 1
            chosen.append(entry)
    return chosen[:NAMING_ROWS]


def _captions(library: Library, out: Path, seed: tuple[int, ...]) -> list[dict[str, Any]]:
    """Half packaged pictures with their own sentence, half composed scenes."""
    rows: list[dict[str, Any]] = []
    own = [e for e in sorted(library.entries, key=lambda e: e.id) if e.captions and e.source in ("stamps", "gcompris")]
    for entry in own[: CAPTION_ROWS // 2]:
        asked = Asked("captions", "Describe the picture.", entry.captions[0])
        generator = np.random.default_rng(int(entry.id[:8], 16))
        image = _save(out, pictures.show(library, entry, generator, plain=True), "captions", len(rows))
        rows.append(row(f"captions-{entry.id}", image, asked, name_seen=entry.name_seen, source=entry.source))
    for index in range(50 * CAPTION_ROWS):
        if len(rows) == CAPTION_ROWS:
            break
        generator = np.random.default_rng((*seed, index))
        scene = scenes.compose(library, generator, small=True)
        if scene.things:
            asked = questions.caption(scene, library, generator)
            image = _save(out, scene.image, "captions", len(rows))
            one = Asked("captions", "Describe the picture.", asked.answer)
            rows.append(row(f"captions-scene-{index}", image, one, name_seen=True, source="scenes"))
    return rows


def _foreign(library: Library, language: str) -> list[dict[str, Any]]:
    """French and Chinese names of pictures of the naming task, for which no threshold is set."""
    question = {"fr": "Qu'est-ce que c'est ?", "zh": "这是什么？"}[language]
    rows = []
    for place, entry in enumerate(_named(library)):
        if language in entry.names:
            asked = Asked(f"naming_{language}", question, entry.names[language])
            rows.append(row(f"naming_{language}-{entry.id}", f"images/heldout/naming/{place:04d}.jpg", asked))
    return rows[:FOREIGN_ROWS]


def _easy_vqa(collected: Path, out: Path) -> list[dict[str, Any]]:
    """2,000 of the 9,673 official test questions, each answer with its share of the whole."""
    asked = json.loads((collected / "easy_vqa" / "test.json").read_text())
    total = Counter(answer for _, answer, _ in asked)
    generator = np.random.default_rng(20)
    wanted = {answer: round(EASY_VQA_ROWS * number / len(asked)) for answer, number in total.items()}
    rows = []
    for place in generator.permutation(len(asked)):
        question, answer, number = asked[int(place)]
        if wanted[answer]:
            wanted[answer] -= 1
            one = Asked("easy_vqa", question, answer)
            rows.append(row(f"easy_vqa-{place}", f"images/easy_vqa/test/{number}.png", one))
    unpack_easy_vqa(collected, out, "test")
    return rows[:EASY_VQA_ROWS]


def unpack_easy_vqa(collected: Path, out: Path, split: str) -> None:
    folder = out / "images" / "easy_vqa" / split
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(collected / "easy_vqa" / f"{split}.zip") as archive:
        archive.extractall(folder)
