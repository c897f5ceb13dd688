"""The held-out tasks of `pocket` (what is measured, how long an answer may be, the target), and published numbers.

The published ones are InternVL-C's and -G's, each with its table, so that a result can stand beside them. Their
protocols are in docs/tasks.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from internvl.evaluate.ground import IOU_HIT, answer_iou
from internvl.evaluate.heldout import Row
from internvl.evaluate.vqa import contains, exact_match, verbatim_match

Measures = dict[str, float]


def measure_exact(answer: str, row: Row) -> Measures:
    return {"exact match": float(exact_match(answer, row.accept))}


def measure_verbatim(answer: str, row: Row) -> Measures:
    return {
        "exact as written": float(verbatim_match(answer, row.accept)),
        "ignoring case": float(verbatim_match(answer, row.accept, ignore_case=True)),
    }


def measure_box(answer: str, row: Row) -> Measures:
    if row.box is None:
        raise ValueError(f"row {row.id!r} of {row.task} has no box; build the set again")
    overlap = answer_iou(answer, row.box)
    return {f"IoU >= {IOU_HIT}": float(overlap >= IOU_HIT), "mean IoU": overlap}


def measure_name(answer: str, row: Row) -> Measures:
    named = float(contains(answer, row.accept))
    if row.name_seen is None:
        return {"named": named}
    return {"named": named, "name seen" if row.name_seen else "name not seen": named}


@dataclass(frozen=True)
class Task:
    """A held-out set and its score."""

    name: str
    measure: Callable[[str, Row], Measures] | Literal["loss"]
    """Numbers of one answer, the score first; "loss": the reference answer's loss, nothing is generated."""
    metric: str
    target: float
    """Least score wanted (project goals); for losses, least gain in nats a token over another picture."""
    max_new_tokens: int = 0
    times_blind: float = 1.0
    """The score must also be this many times the one with another picture."""


CATALOG = {
    task.name: task
    for task in (
        Task("easy_vqa", measure_exact, "exact match", 0.95, 16),
        Task("scenes_yesno", measure_exact, "exact match", 0.90, 16),
        Task("scenes_colour", measure_exact, "exact match", 0.90, 16),
        Task("scenes_count", measure_exact, "exact match", 0.70, 16),
        Task("scenes_position", measure_exact, "exact match", 0.85, 16),
        Task("scenes_box", measure_box, f"IoU >= {IOU_HIT}", 0.60, 64),
        Task("words", measure_verbatim, "exact as written", 0.60, 48),
        Task("naming", measure_name, "named", 0.45, 24, times_blind=3.0),
        Task("captions", "loss", "loss, nats a token", 0.80),
    )
}


def find_task(name: str) -> Task:
    if name not in CATALOG:
        raise ValueError(f"no task {name!r}; it is one of {', '.join(CATALOG)}")
    return CATALOG[name]


@dataclass(frozen=True)
class Published:
    """A number that the InternVL paper (arXiv 2312.14238) or its repository states; shares in percent as printed."""

    model: str
    task: str
    data: str
    metric: str
    value: float
    source: str


_TABLE = "InternVL paper, table "
_C, _G, _VIT = "InternVL-C", "InternVL-G", "InternViT-6B-224px"
_BOTH_WAYS = tuple(f"{way} R@{k}" for way in ("image to text", "text to image") for k in (1, 5, 10))
_VIDEO_WAYS = tuple(f"{way} R@{k}" for way in ("video to text", "text to video") for k in (1, 5, 10))


def _row(model: str, task: str, data: str, source: str, **values: float) -> Iterator[Published]:
    for metric, value in values.items():
        yield Published(model, task, data, metric.replace("_", " "), value, source)


def _list(
    model: str, task: str, names: tuple[str, ...], values: str, source: str, metric: str = "top-1"
) -> Iterator[Published]:
    """The same metric on several data sets."""
    for name, value in zip(names, values.split(), strict=True):
        yield Published(model, task, name, metric, float(value), source)


def _ways(model: str, task: str, data: str, values: str, source: str, ways: tuple[str, ...]) -> Iterator[Published]:
    """Several metrics on one data set."""
    for metric, value in zip(ways, values.split(), strict=True):
        yield Published(model, task, data, metric, float(value), source)


def _published_classification() -> Iterator[Published]:
    sets = ("ImageNet-1K", "ImageNet-ReaL", "ImageNet-V2", "ImageNet-A", "ImageNet-R", "ImageNet-Sketch", "mean of six")
    yield from _list(
        _VIT, "linear probe", sets, "88.2 90.4 79.9 77.5 89.8 69.1 82.5", "InternVL paper, tables 4 and 22"
    )
    names = ("ImageNet-1K", "ImageNet-A", "ImageNet-R", "ImageNet-V2", "ImageNet-Sketch", "ObjectNet", "mean of six")
    yield from _list(_C, "zero-shot classification", names, "83.2 83.8 95.5 77.3 73.9 80.6 82.4", f"{_TABLE}6a")
    tongues = tuple(f"ImageNet-1K, {language}" for language in ("en", "zh", "ja", "ar", "it", "mean of five"))
    yield from _list(_C, "zero-shot classification", tongues, "83.2 64.5 61.5 44.9 65.7 64.0", f"{_TABLE}6b")
    others = (
        "CIFAR-10 CIFAR-100 MNIST Caltech-101 SUN397 Aircraft Country-211 Cars Birdsnap DTD EuroSAT FER2013 Flowers "
        "Food-101 GTSRB Pets SST2 RESISC45 STL-10 VOC2007 mean-of-20"
    )
    scores = "99.4 93.2 80.6 89.5 76.0 52.7 34.1 94.2 72.0 70.7 79.4 56.2 86.1 95.3 65.5 96.0 67.9 74.2 99.5 80.0 78.1"
    yield from _list(_C, "zero-shot classification", tuple(others.split()), scores, f"{_TABLE}16")
    for frames, lines in ((1, "65.9 76.1 65.5 75.5 56.8 67.5"), (8, "69.1 79.4 68.9 78.8 60.6 71.5")):
        numbers = lines.split()
        for place, name in enumerate(("Kinetics-400", "Kinetics-600", "Kinetics-700")):
            yield from _ways(
                _C, f"zero-shot video classification, {frames} frames", name,
                " ".join(numbers[2 * place : 2 * place + 2]), f"{_TABLE}8", ("top-1", "mean of top-1 and top-5"),
            )  # fmt: skip


def _published_retrieval() -> Iterator[Published]:
    task, source = "zero-shot retrieval", "InternVL paper, zero-shot image-text retrieval"
    for model, data, values in (
        (_C, "Flickr30K", "94.7 99.6 99.9 81.7 96.0 98.2"),
        (_G, "Flickr30K", "95.7 99.7 99.9 85.0 97.0 98.6"),
        (_C, "COCO", "70.6 89.0 93.5 54.1 77.3 84.6"),
        (_G, "COCO", "74.9 91.3 95.2 58.6 81.3 88.0"),
        (_C, "Flickr30K-CN", "90.3 98.8 99.7 75.1 92.9 96.4"),
        (_G, "Flickr30K-CN", "92.9 99.4 99.8 77.7 94.8 97.3"),
        (_C, "COCO-CN", "68.8 92.0 96.7 68.9 91.9 96.5"),
        (_G, "COCO-CN", "71.4 93.9 97.7 73.8 94.4 98.1"),
    ):
        yield from _ways(model, task, data, values, source, _BOTH_WAYS)
    pairs = ("Flickr30K and COCO", "Flickr30K-CN and COCO-CN")
    for model, values in ((_C, "86.6 89.0"), (_G, "88.8 90.9")):
        yield from _list(model, task, pairs, values, source, "mean of twelve")
    xtd = tuple(f"XTD, {language}" for language in ("en", "es", "fr", "zh", "it", "ko", "ru", "ja", "mean of eight"))
    for model, values in (
        (_C, "97.3 95.7 95.1 95.6 96.0 92.2 93.3 95.5 95.1"),
        (_G, "98.6 97.7 96.5 96.7 96.9 95.1 94.8 96.1 96.6"),
    ):
        yield from _list(model, task, xtd, values, source, "image to text R@10")
    firsts = ("image to text R@1", "text to image R@1", "mean of six")
    for model, data, values in (
        (_C, "Flickr30K", "97.2 88.5 97.2"),
        (_G, "Flickr30K", "97.9 89.6 97.6"),
        (_C, "Flickr30K-CN", "96.5 85.2 96.2"),
        (_G, "Flickr30K-CN", "96.9 85.9 96.4"),
    ):
        yield from _ways(model, "fine-tuned retrieval", data, values, f"{_TABLE}15", firsts)
    for model, frames, values in (
        (_C, 1, "35.3 56.6 66.6 37.5 60.9 70.9"),
        (_C, 8, "40.2 63.1 74.1 44.7 68.2 78.4"),
        (_G, 1, "36.6 58.3 67.7 39.1 61.7 70.7"),
        (_G, 8, "42.4 65.9 75.4 46.3 70.5 79.6"),
    ):
        yield from _ways(
            model, f"zero-shot video retrieval, {frames} frames", "MSR-VTT 1K", values, f"{_TABLE}14", _VIDEO_WAYS
        )


def _published_captions_and_masks() -> Iterator[Published]:
    ways = ("CIDEr", "BLEU-4", "METEOR")
    for data, values in (
        ("COCO", "128.2 37.1 30.1"),
        ("Flickr30K", "79.2 27.0 25.3"),
        ("NoCaps val", "113.7 44.3 30.1"),
    ):
        yield from _ways(
            _G,
            "zero-shot captioning",
            data,
            values,
            "InternVL paper, zero-shot captioning; internvl_g/eval/evaluate_caption.py",
            ways,
        )
    segmentation = ("linear probe", "head tuning", "full tuning")
    for task, value in zip(segmentation, (47.2, 54.9, 58.9), strict=True):
        yield from _row(_VIT, f"segmentation, {task}", "ADE20K", "InternVL paper, tables 5 and 23", mean_IoU=value)
    for part, value in zip((16, 8, 4, 2, 1), (46.5, 50.0, 53.3, 55.8, 57.2), strict=True):
        share = "all" if part == 1 else f"1/{part}"
        yield from _row(
            _VIT,
            f"few-shot segmentation, {share} of the pictures",
            "ADE20K",
            "InternVL paper, tables 5 and 23",
            mean_IoU=value,
        )


PUBLISHED = (*_published_classification(), *_published_retrieval(), *_published_captions_and_masks())
"""Every number once: (model, task, data, metric) is unique."""


def published(model: str, task: str, data: str, metric: str) -> Published:
    """One published number; ValueError that lists what there is for the model where it was never published."""
    known = {(one.model, one.task, one.data, one.metric): one for one in PUBLISHED}
    if (model, task, data, metric) not in known:
        near = sorted({f"{t} / {d} / {m}" for (who, t, d, m) in known if who == model and (t == task or d == data)})
        raise ValueError(
            f"no published {metric} of {model} for {task} on {data}; there are {'; '.join(near[:8]) or 'none like it'}"
        )
    return known[model, task, data, metric]


def beside_published(model: str, task: str, data: str, metric: str, share: float) -> float:
    """Percentage points of a share (0..1) above the published number; CIDEr is likewise given as 1.282 for 128.2."""
    return 100 * share - published(model, task, data, metric).value
