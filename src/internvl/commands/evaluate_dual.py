"""`internvl evaluate TASK MODEL DATA`: the paper's tasks on a dual model; scores, settings and the paper's number."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from internvl.commands.compare_results import compare_results
from internvl.commands.embed import LEFT_OUT, SHOWN, bar
from internvl.commands.evaluate_options import (
    RUNS,
    TASKS,
    Captions,
    Common,
    Probe,
    Retrieval,
    Segment,
    ZeroShot,
)

if TYPE_CHECKING:
    from internvl.data.records import Problem
    from internvl.evaluate.dual_data import Where
    from internvl.evaluate.dual_features import Features
    from internvl.evaluate.dual_result import Result
    from internvl.evaluate.dual_tasks import Outcome


COUNTED = {
    "empty_captions": "captions without a letter or sign, left out",
    "bare_pictures": "pictures without a caption, left out",
    "long_captions": "captions of more than 80 tokens, of which the model saw the beginning",
    "long_prompts": "prompts of more than 80 tokens, of which the model saw the beginning",
    "names_twice": "class names that stand twice or more, whose pictures count by chance",
    "left_out_by_reader": "files or lines that are no picture with a class, left out",
    "without_a_word": "written captions without a word",
    "tied": "queries with a wrong answer of exactly the right one's score, which count by chance",
}
"""Counts that are told where they are not 0."""


def main(task: str, arguments: Sequence[str]) -> int:
    asked: Any = tyro.cli(TASKS[task], args=arguments, prog=f"internvl evaluate {task}")
    if task == "compare":
        return compare_results(asked)
    from internvl.evaluate.dual_features import Features
    from internvl.generate.dual import Dual

    tasks: dict[str, Callable[[Any, Features, Path, list[Problem]], list[tuple[str, str, Outcome]]]] = {
        "zero-shot": _zero_shot,
        "retrieval": _retrieval,
        "captions": _captions,
        "probe": _probe,
        "segment": _segment,
    }
    if not asked.data.exists():
        raise FileNotFoundError(f"{asked.data}: no such file or folder")
    dual = Dual.open(asked.model, device=asked.device, dtype=asked.dtype)
    features = Features(dual, asked.features, asked.batch, bar)
    out = asked.out or _default_out(task, asked, features.fingerprint)
    problems: list[Problem] = []
    found = tasks[task](asked, features, out, problems)
    results = [_result(asked, features, *one, problems) for one in found]
    return _leave(asked, out, results, [outcome for _, _, outcome in found])


def _default_out(task: str, asked: Any, fingerprint: str) -> Path:
    plain = {k: str(v) for k, v in asdict(asked).items() if k not in ("out", "json", "sheet", "features")}
    digest = hashlib.sha256(json.dumps([plain, fingerprint], sort_keys=True).encode()).hexdigest()[:8]
    return RUNS / f"{Path(asked.model).name}-{task}-{digest}"


def _where(asked: Any, out: Path) -> Where:
    from internvl.evaluate.dual_data import Where

    columns = asked.columns
    if isinstance(asked, ZeroShot) and columns == ("image", "caption"):
        columns = ("image", "label")
    return Where(asked.data, asked.root, asked.split, columns, out / "pictures")


def _zero_shot(
    asked: ZeroShot, features: Features, out: Path, problems: list[Problem]
) -> list[tuple[str, str, Outcome]]:
    from internvl.evaluate.dual_data import has_class_folders, read_classes, read_prompts
    from internvl.evaluate.dual_tasks import limited, zero_shot

    if len(asked.languages) > 1 and (asked.names is None or Path(asked.names).is_file()):
        raise ValueError("names of one language only; several --languages go with names of the package (imagenet1k)")
    classes = None
    if asked.order is not None and asked.names is None:
        raise ValueError(f"--order {asked.order} says which of --names a folder has; give --names")
    if asked.names is not None and not has_class_folders(asked.data):
        classes = read_prompts(asked.names, asked.templates, asked.languages[0]).names
    data, video = read_classes(_where(asked, out), problems, classes)
    data = limited(data, asked.limit)
    found: list[tuple[str, str, Outcome]] = []
    for language in asked.languages:
        prompts = read_prompts(asked.names, asked.templates, language, data.classes, asked.order)
        outcome = zero_shot(
            features, data, prompts, asked.head, fit=asked.fit, video=video, frames=asked.frames, language=language
        )
        found.append((_data_name(asked, language), asked.head, outcome))
    return found


def _data_name(asked: Common, language: str | None = None) -> str:
    """As the catalog spells it: of languages other than English with the language behind."""
    name = asked.name or asked.data.stem
    return f"{name}, {language}" if language not in (None, "en") else name


def _retrieval(
    asked: Retrieval, features: Features, out: Path, problems: list[Problem]
) -> list[tuple[str, str, Outcome]]:
    from internvl.evaluate.dual_data import read_pairs
    from internvl.evaluate.dual_result import raw_captions
    from internvl.evaluate.dual_tasks import limited, retrieval

    data, video = read_pairs(_where(asked, out), problems)
    published = not (video or raw_captions(_data_name(asked)))
    outcome = retrieval(
        features,
        limited(data, asked.limit),
        asked.head,
        fit=asked.fit or ("crop" if video else "squash"),
        video=video,
        frames=asked.frames,
        clean=published if asked.captions == "auto" else asked.captions == "clean",
        rerank=asked.rerank,
        dual_softmax=asked.dual_softmax,
    )
    return [(_data_name(asked), asked.head, outcome)]


def _captions(
    asked: Captions, features: Features, out: Path, problems: list[Problem]
) -> list[tuple[str, str, Outcome]]:
    from internvl.evaluate.dual_data import read_pairs
    from internvl.evaluate.dual_tasks import captioning, limited
    from internvl.generate.captions import CaptionSearch

    data, video = read_pairs(_where(asked, out), problems)
    if video:
        raise ValueError(f"{asked.data}: videos; captions are written of pictures")
    search = CaptionSearch(asked.beams, asked.min_tokens, asked.max_tokens)
    return [(_data_name(asked), "g", captioning(features, limited(data, asked.limit), search))]


def _probe(asked: Probe, features: Features, out: Path, problems: list[Problem]) -> list[tuple[str, str, Outcome]]:
    from internvl.data.labelled import read_image_folder
    from internvl.evaluate.dual_tasks import limited, probing
    from internvl.evaluate.probe import ProbeSettings

    tests = [asked.data / name for name in ("val", "validation", "test", "heldout") if (asked.data / name).is_dir()]
    if not (asked.data / "train").is_dir() or not tests:
        raise ValueError(f"{asked.data}: needs the folders train and val (or test), each with a folder a class")
    settings = ProbeSettings(asked.rates, asked.epochs, batch=asked.probe_batch, seed=asked.seed)
    train, test = (limited(read_image_folder(part), asked.limit) for part in (asked.data / "train", tests[0]))
    return [(_data_name(asked), "encoder", probing(features, train, test, asked.kind, settings))]


def _segment(asked: Segment, features: Features, out: Path, problems: list[Problem]) -> list[tuple[str, str, Outcome]]:
    from internvl.data.labelled import read_ade20k
    from internvl.evaluate.dual_tasks import Outcome, limited_places
    from internvl.evaluate.segment_train import examples, fit, protocol, score
    from internvl.evaluate.segmenter import Segmenter, task_of

    if asked.classes < 1:
        raise ValueError(f"--classes {asked.classes}; at least 1 class is segmented")
    settings = asked.settings()
    train, test = read_ade20k(asked.data, "training"), read_ade20k(asked.data, "validation")
    test = tuple(test[place] for place in limited_places(len(test), asked.limit))
    model = Segmenter(features.dual.model.vision, asked.classes, settings).to(features.dual.model.logit_scale.device)
    dtype = str(features.dual.model.text_projection.dtype).removeprefix("torch.")
    said = {
        **protocol(settings, model.taps),
        "classes": asked.classes,
        "reduce_zero": asked.reduce_zero,
        "dtype": dtype,
    }
    names = hashlib.sha256(json.dumps([str(item.picture) for item in train]).encode()).hexdigest()
    identity = json.dumps([features.fingerprint, {k: v for k, v in said.items() if k != "stride_px"}, names])
    with bar("training", settings.iterations) as advance:
        fit(model, train, asked.classes, settings, out, identity, reduce_zero=asked.reduce_zero, advance=advance)
    tested = json.dumps([identity, said["stride_px"], [str(item.picture) for item in test]])
    with bar("scoring", len(test)) as advance:
        confusion, broken = score(
            model, test, asked.classes, settings, out, tested, reduce_zero=asked.reduce_zero, advance=advance
        )
    found = confusion.score()
    shown = (examples(model, test, asked.classes, settings, reduce_zero=asked.reduce_zero),) if asked.sheet else ()
    scores = {"mean IoU": found.mean_iou, "mean accuracy": found.mean_accuracy, "pixel accuracy": found.pixel_accuracy}
    counts = {"training_pictures": len(train), "pictures": len(test) - len(broken), "pixels": found.num_pixels}
    return [(_data_name(asked), "encoder", Outcome(task_of(settings), scores, said, counts, tuple(broken), shown))]


def _result(
    asked: Common, features: Features, data: str, head: str, outcome: Outcome, problems: Sequence[Problem]
) -> Result:
    from internvl.evaluate.dual_result import Result

    return Result(
        outcome.task,
        data,
        asked.model,
        features.fingerprint,
        head,
        outcome.scores,
        outcome.protocol,
        outcome.counts,
        (*problems, *outcome.left_out),
        asked.limit is None,
        outcome.notes,
    )


def _leave(asked: Common, out: Path, results: Sequence[Result], outcomes: Sequence[Outcome]) -> int:
    """result.json, the sheet, the table; exit code 3 where something was left out."""
    from internvl.evaluate import report
    from internvl.evaluate.dual_result import as_json, table

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(asked).items()}
    facts = report.manifest(settings, {results[0].data: str(asked.data)}, {})
    content = {"results": [as_json(one, facts) for one in results]}
    report.write_json(out / "result.json", content)
    if asked.sheet:
        _draw(asked, out, results, outcomes)
    broken = list(dict.fromkeys(problem for one in results for problem in one.left_out))
    if asked.json:
        sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")
        return LEFT_OUT if broken else 0
    from rich.console import Console

    console = Console(highlight=False, markup=False)
    console.print(table(results))
    for one in content["results"]:
        reasons = one["published"]["why_not"]
        if reasons:
            console.print(f"no published number beside {one['data']}: {'; '.join(reasons)}", style="dim")
    for result in results:
        for key, count in result.counts.items():
            if key in COUNTED and count:
                console.print(f"{result.data}: {count} {COUNTED[key]}")
    if broken:
        console.print(f"left out: {len(broken)}")
    for problem in broken[:SHOWN]:
        console.print(f"  {problem.source}: {problem.message}")
    console.print(f"written to {out}")
    return LEFT_OUT if broken else 0


def _draw(asked: Common, out: Path, results: Sequence[Result], outcomes: Sequence[Outcome]) -> None:
    """sheet.html; masks, which need no letters, as sheet.png too."""
    from internvl.data.sheet import write_sheet

    sections = [
        replace(section, title=f"{result.task}, {result.data}, {result.head}: {section.title}")
        for result, outcome in zip(results, outcomes, strict=True)
        for section in outcome.sections
    ]
    for suffix in ("html", "png") if isinstance(asked, Segment) else ("html",):
        if sections:
            write_sheet(out / f"sheet.{suffix}", f"{asked.model}: {results[0].task}", sections)
