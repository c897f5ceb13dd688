"""What a task of a dual model leaves: scores, the settings that change them, counts, and the paper's number beside.

A published number stands beside a score only where data and protocol are the same; else the reasons stand there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from internvl.data.records import Problem
from internvl.evaluate.catalog import PUBLISHED, Published

if TYPE_CHECKING:
    from rich.table import Table

ENCODER = "InternViT-6B-224px"
HEADS = {"c": "InternVL-C", "g": "InternVL-G", "encoder": ENCODER}
"""Head -> the name that the paper's numbers of this kind stand under."""

_SEGMENTATION = {
    "crop_px": 504,
    "stride_px": 322,
    "train_batch": 16,
    "learning_rate": 4e-5,
    "upernet_width": 1536,
    "auxiliary_weight": 0.4,
    "classes": 150,
    "reduce_zero": True,
}
PROTOCOLS: dict[str, dict[str, Any]] = {
    "zero-shot classification": {"fit": "crop", "side": 224, "prompts": "clip-benchmark 1.6.2"},
    "zero-shot video classification": {"fit": "crop", "side": 224, "prompts": "unknown: the paper does not say them"},
    "zero-shot retrieval": {"fit": "squash", "side": 224, "clean": True, "rerank": 0, "dual_softmax": None},
    "zero-shot video retrieval": {
        "fit": "crop",
        "side": 224,
        "clean": False,
        "rerank": 0,
        "dual_softmax": "unknown: on in the official script, not in the paper",
    },
    "zero-shot captioning": {
        "side": 224,
        "beams": 5,
        "min_new_tokens": 8,
        "max_new_tokens": 30,
        "length_penalty": 1.0,
    },
    "linear probe": {"fit": "crop", "side": 224, "augmentation": "crop, flip", "learning_rates": [0.1], "epochs": 10},
    "segmentation": {**_SEGMENTATION, "share": 1, "iterations": 80_000, "warmup": 1500},
    **{
        f"few-shot segmentation, {'all' if share == 1 else f'1/{share}'} of the pictures": {
            **_SEGMENTATION,
            "share": share,
            "iterations": 80_000 // share,
            "warmup": warmup,
        }
        for share, warmup in ((16, 100), (8, 200), (4, 400), (2, 800), (1, 1500))
    },
}
"""What the paper's numbers were measured with (sections 5.1 to 5.8 of its supplement; official repository)."""


@dataclass(frozen=True)
class Result:
    """One task on one data set."""

    task: str
    data: str
    model: str
    fingerprint: str
    head: str
    scores: Mapping[str, float]
    """Shares from 0 to 1; CIDEr-D from 0 to 10."""
    protocol: Mapping[str, Any]
    """Every setting that changes a score."""
    counts: Mapping[str, int]
    left_out: tuple[Problem, ...] = ()
    """Pictures and entries that could not be used."""
    complete: bool = True
    """False where --limit took a part of the data."""
    notes: tuple[str, ...] = field(default=())


def differences(result: Result) -> list[str]:
    """Why the published number is not beside this one; empty where data and protocol are the same."""
    family = next((name for name in PROTOCOLS if result.task.startswith(name)), None)
    if family is None:
        return [f"the paper has no task {result.task!r}"]
    found = [] if result.complete else ["only a part of the data was used"]
    if result.left_out:
        found.append(f"{len(result.left_out)} items were left out")
    for key, value in {**PROTOCOLS[family], **({"clean": False} if raw_captions(result.data) else {})}.items():
        if result.protocol.get(key) != value:
            found.append(f"{key}: {result.protocol.get(key)!r} here, {value!r} in the paper")
    return found


def raw_captions(data: str) -> bool:
    """Whether the official script leaves captions of this data as they are: of XTD (multilingual_mscoco.py)."""
    return data.startswith("XTD")


def beside(result: Result) -> dict[str, Any]:
    """Published numbers of the same data, with our distance in points; or why there are none."""
    name = HEADS.get(result.head, result.head)
    known = [p for p in PUBLISHED if (p.model, p.task, p.data) == (name, result.task, result.data)]
    if not known:
        return {"numbers": [], "why_not": [f"the paper has no {result.task} of {name} on {result.data!r}"]}
    reasons = differences(result)
    if reasons:
        return {"numbers": [], "why_not": reasons}
    numbers = [_number(one, result.scores[one.metric]) for one in known if one.metric in result.scores]
    return {"numbers": numbers, "why_not": []}


def _number(one: Published, share: float) -> dict[str, Any]:
    ours = 100 * share
    return {
        "metric": one.metric,
        "published": one.value,
        "ours": round(ours, 2),
        "points": round(ours - one.value, 2),
        "source": one.source,
    }


def as_json(result: Result, manifest: Mapping[str, Any]) -> dict[str, Any]:
    return {**asdict(result), "published": beside(result), "manifest": dict(manifest)}


def table(results: Sequence[Result]) -> Table:
    """Scores in percent, the paper's number where it may stand beside."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, padding=(0, 1))
    for name in ("task", "data", "head", "metric", "here", "paper"):
        shown.add_column(name, justify="right" if name in ("here", "paper") else "left", no_wrap=True)
    for result in results:
        paper = {one["metric"]: one["published"] for one in beside(result)["numbers"]}
        first = [result.task, result.data, result.head]
        for metric, value in result.scores.items():
            there = f"{paper[metric]:.1f}" if metric in paper else "–"
            shown.add_row(*first, metric, f"{100 * value:.2f}", there)
            first = ["", "", ""]
    return shown


def read_result(path: Path) -> dict[str, Any]:
    """A file that a task wrote."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); give a result of internvl evaluate") from error
    results = found.get("results") if isinstance(found, dict) else None
    fields = ("task", "data", "model", "head", "scores", "protocol", "counts")
    if not isinstance(results, list) or not all(isinstance(r, dict) and all(f in r for f in fields) for r in results):
        raise ValueError(f"{path}: no result of a task of a dual model; give a result.json of internvl evaluate")
    return found


def compare(files: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Scores of several files side by side: rows of (task, data, metric), one value a file; and what was not equal.

    A row says in `differs` which settings and counts are not the same in all files that have it: such scores are not
    to be held against each other without looking.
    """
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    settings: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    columns = []
    for name, content in files.items():
        for result in content["results"]:
            column = f"{name} {result['head']}"
            columns += [] if column in columns else [column]
            settings.setdefault((result["task"], result["data"]), {})[column] = {
                **result["protocol"],
                **result["counts"],
            }
            for metric, value in result["scores"].items():
                rows.setdefault((result["task"], result["data"], metric), {})[column] = value
    made = []
    for (task, data, metric), values in rows.items():
        differs = _unlike(settings[task, data])
        made.append({"task": task, "data": data, "metric": metric, "values": values, "differs": differs})
    return {"columns": columns, "rows": made}


def _unlike(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    keys = dict.fromkeys(key for values in settings.values() for key in values)
    found = {key: {column: values.get(key) for column, values in settings.items()} for key in keys}
    return {key: values for key, values in found.items() if len({json.dumps(v) for v in values.values()}) > 1}
