"""The paper's tasks on a dual model: features in, scores out, and what a sheet of examples shows.

Protocols are retrieve.py's, classify.py's, caption.py's and probe.py's; what is computed once is dual_features.py's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internvl.data.captions import Captioned, CaptionSet, clean_caption
from internvl.data.labelled import LabelledSet
from internvl.data.records import Problem
from internvl.data.sheet import Panel, Section
from internvl.evaluate.caption import caption_scores
from internvl.evaluate.classify import Accuracy, TextEmbedder, class_vectors, classify, fill
from internvl.evaluate.dual_data import Prompts
from internvl.evaluate.dual_features import Features, PairMatcher, poster
from internvl.evaluate.dual_sheets import answers, picture_hits, probed, spaced, text_hits
from internvl.evaluate.probe import Probe, ProbeSettings, attention_probe, linear_probe, logistic_probe
from internvl.evaluate.retrieve import Recall, retrieve, retrieve_reranked
from internvl.generate.captions import CaptionSearch
from internvl.generate.dual import Fit
from internvl.models.contrastive import Head

ProbeKind = Literal["linear", "attention", "logistic"]


@dataclass(frozen=True)
class Outcome:
    """Of one task; the command puts names of model and data to it."""

    task: str
    scores: Mapping[str, float]
    protocol: Mapping[str, Any]
    counts: Mapping[str, int]
    left_out: tuple[Problem, ...] = ()
    sections: tuple[Section, ...] = ()
    notes: tuple[str, ...] = field(default=())


def zero_shot(
    features: Features,
    data: LabelledSet,
    prompts: Prompts,
    head: Head,
    *,
    fit: Fit = "crop",
    video: bool = False,
    frames: int = 8,
    language: str = "en",
) -> Outcome:
    """Top-1, top-5 and mean per class by the cosine with class vectors."""
    if len(prompts.names) != len(data.classes):
        raise ValueError(
            f"{len(prompts.names)} class names ({prompts.source}) for {len(data.classes)} classes of the data; give "
            "one name a class, in the order of the folders"
        )
    check_frames(frames)
    paths = [item.path for item in data.items]
    kept = features.videos(paths, frames, head, fit) if video else features.pictures(paths, head, fit)
    items = _some(kept.at(data.items), paths, kept.broken)
    labels = torch.tensor([item.label for item in items])
    every = [fill(template, name) for name in prompts.names for template in prompts.templates]
    vectors = class_vectors(_in_order(features.texts(every, "prompts")), prompts.names, prompts.templates)
    result = classify(kept.rows, vectors, labels)
    task = f"zero-shot video classification, {frames} frames" if video else "zero-shot classification"
    return Outcome(
        task,
        _accuracy(result, video),
        {
            "fit": fit,
            "side": features.dual.config.side,
            "prompts": prompts.source,
            "language": language,
            "templates": len(prompts.templates),
            **({"frames": frames} if video else {}),
        },
        {
            "pictures": len(items),
            "classes": len(prompts.names),
            "tied": result.num_tied,
            "names_twice": len(prompts.names) - len(set(prompts.names)),
            "left_out_by_reader": data.left_out,
            "long_prompts": features.dual.num_cut(every),
        },
        kept.broken,
        (answers(items, labels, kept.rows, vectors, prompts.names, video),),
    )


def _in_order(vectors: Tensor) -> TextEmbedder:
    """Hands out embeddings that were made before, in the order in which they are asked for."""
    start = 0

    def embed(texts: Sequence[str]) -> Tensor:
        nonlocal start
        start += len(texts)
        return vectors[start - len(texts) : start]

    return embed


def _some(items: list[Any], paths: Sequence[Path], broken: Sequence[Problem]) -> list[Any]:
    if not items:
        first = f"; the first: {broken[0].message}" if broken else ""
        raise ValueError(f"none of {len(paths)} pictures or videos could be used{first}")
    return items


def check_frames(frames: int) -> None:
    if frames < 1:
        raise ValueError(f"--frames {frames}; at least 1 of each video is looked at")


def _accuracy(result: Accuracy, video: bool = False) -> dict[str, float]:
    found = {"top-1": result.top1, "top-5": result.top5, "mean per class": result.mean_per_class}
    return {**found, "mean of top-1 and top-5": result.mean_top1_top5} if video else found


def retrieval(
    features: Features,
    data: CaptionSet,
    head: Head,
    *,
    fit: Fit = "squash",
    video: bool = False,
    frames: int = 8,
    clean: bool = True,
    rerank: int = 0,
    dual_softmax: float | None = None,
) -> Outcome:
    """Recall both ways; `rerank` puts that many of the best in the order of image-text matching."""
    check_frames(frames)
    if rerank < 0:
        raise ValueError(f"--rerank {rerank}; give how many of the best are put in order, 0 for none")
    if rerank and (dual_softmax is not None or video):
        raise ValueError("re-ranking goes with pictures and plain cosines; leave out --dual-softmax and videos")
    matcher = PairMatcher(features.dual, [], []) if rerank else None  # says early what cannot be
    paths = [item.path for item in data.items]
    kept = features.videos(paths, frames, head, fit) if video else features.pictures(paths, head, fit)
    used = CaptionSet(tuple(_some(kept.at(data.items), paths, kept.broken)))
    rows, emptied, seen = kept.rows, 0, len(used.items)
    if clean:
        rows = rows[[place for place, item in enumerate(used.items) if any(map(clean_caption, item.captions))]]
        used, emptied = _cleaned(used)
        if not used.items:
            raise ValueError(f"the clean-up leaves no caption of {seen} pictures; check them, or give --captions raw")
    texts = features.texts(used.captions)
    owners = torch.tensor(used.image_of_text)
    if matcher is not None:
        matcher = PairMatcher(features.dual, [item.path for item in used.items], used.captions)
        found = retrieve_reranked(rows, texts, owners, matcher, best=rerank)
    else:
        found = retrieve(rows, texts, owners, dual_softmax=dual_softmax)
    what = "video" if video else "image"
    task = f"zero-shot video retrieval, {frames} frames" if video else "zero-shot retrieval"
    return Outcome(
        task,
        {
            **_recalls(f"{what} to text", found.image_to_text),
            **_recalls(f"text to {what}", found.text_to_image),
            "mean of six": found.mean,
        },
        {
            "fit": fit,
            "side": features.dual.config.side,
            "clean": clean,
            "rerank": rerank,
            "dual_softmax": dual_softmax,
            **({"frames": frames} if video else {}),
        },
        {
            "pictures": len(used.items),
            "texts": len(used.captions),
            "empty_captions": data.empty + emptied,
            "bare_pictures": data.bare + seen - len(used.items),
            "long_captions": features.dual.num_cut(used.captions),
            "tied": found.image_to_text.num_tied + found.text_to_image.num_tied,
        },
        kept.broken,
        (text_hits(used, rows, texts, video), picture_hits(used, rows, texts, video)),
    )


def _cleaned(data: CaptionSet) -> tuple[CaptionSet, int]:
    """Captions after the official clean-up; those that it leaves nothing of are counted and dropped."""
    groups = [[clean_caption(one) for one in item.captions] for item in data.items]
    empty = sum(not one for group in groups for one in group)
    pairs = [
        Captioned(item.path, tuple(one for one in group if one)) for item, group in zip(data.items, groups, strict=True)
    ]
    return CaptionSet(tuple(item for item in pairs if item.captions)), empty


def _recalls(way: str, recall: Recall) -> dict[str, float]:
    return {f"{way} R@{k}": share for k, share in recall.at.items()}


def captioning(features: Features, data: CaptionSet, search: CaptionSearch) -> Outcome:
    """A caption a picture, against all that people wrote about it (COCO toolkit)."""
    if not features.dual.config.generative:
        raise ValueError("this model is InternVL-C alone and writes no captions; give InternVL-G")
    paths = [item.path for item in data.items]
    kept = features.captions(paths, search)
    items = _some(kept.at(data.items), paths, kept.broken)
    found = caption_scores(kept.texts, [item.captions for item in items])
    chosen = spaced(len(items))
    panels = tuple(
        Panel(
            poster(items[n].path, False),
            ((kept.texts[n], "blue"), *((one, "black") for one in items[n].captions[:2])),
        )
        for n in chosen
    )
    return Outcome(
        "zero-shot captioning",
        {
            "CIDEr": found.cider_d.corpus,
            **{f"BLEU-{n}": score.corpus for n, score in enumerate(found.bleu, 1)},
            "ROUGE-L": found.rouge_l.corpus,
            "METEOR, exact matches only": found.meteor.corpus,
        },
        {"side": features.dual.config.side, **asdict(search)},
        {
            "pictures": len(items),
            "references": sum(len(item.captions) for item in items),
            "without_a_word": found.empty,
            "empty_captions": data.empty,
            "bare_pictures": data.bare,
        },
        kept.broken,
        (Section("captions in blue, two of the references in black", panels),),
        (f"{found.num_words:.2f} words a caption",),
    )


def probing(
    features: Features,
    train: LabelledSet,
    test: LabelledSet,
    kind: ProbeKind,
    settings: ProbeSettings,
    fit: Fit = "crop",
) -> Outcome:
    """A head on frozen features: `linear` (official), `attention` over all tokens, `logistic` to convergence."""
    if train.classes != test.classes:
        unlike = sorted({*train.classes} ^ {*test.classes})
        raise ValueError(f"training and test folders name other classes: {unlike[:5]}; make them agree")
    compute = features.tokens if kind == "attention" else features.pooled
    learn, look = (compute([item.path for item in part.items], fit) for part in (train, test))
    items = _some(look.at(test.items), [i.path for i in test.items], look.broken)
    labels = torch.tensor([item.label for item in learn.at(train.items)])
    wanted = torch.tensor([item.label for item in items])
    head = _learned(kind, learn.rows, labels, len(train.classes), settings)
    result = head.score(look.rows, wanted)
    chosen = {"chosen": head.chosen, "tried": {str(k): v for k, v in head.tried.items()}}
    protocol = {"epochs": settings.epochs, "batch": settings.batch, "learning_rates": list(settings.learning_rates)}
    return Outcome(
        f"{kind} probe",
        _accuracy(result),
        {
            "fit": fit,
            "side": features.dual.config.side,
            "augmentation": "none",
            **({} if kind == "logistic" else protocol),
            "seed": settings.seed,
            **chosen,
        },
        {
            "training_pictures": len(labels),
            "pictures": len(items),
            "classes": len(train.classes),
            "left_out_by_reader": train.left_out + test.left_out,
        },
        (*learn.broken, *look.broken),
        (probed(head, items, wanted, look.rows, train.classes),),
    )


def _learned(kind: ProbeKind, rows: Tensor, labels: Tensor, num_classes: int, settings: ProbeSettings) -> Probe:
    if kind == "linear":
        return linear_probe(rows, labels, num_classes, settings)
    if kind == "logistic":
        return logistic_probe(rows, labels, num_classes, seed=settings.seed)
    heads = next(n for n in (25, 16, 8, 4, 2, 1) if rows.shape[2] % n == 0)  # 25 of 128 in InternViT-6B
    return attention_probe(rows, labels, num_classes, settings, heads)


def limited(data: Any, limit: int | None) -> Any:
    """The first `limit` items of a set, spread over it, so that class folders keep most of their classes."""
    if limit is None or limit >= len(data.items):
        return data
    return replace(data, items=tuple(data.items[place] for place in limited_places(len(data.items), limit)))


def limited_places(count: int, limit: int | None) -> list[int]:
    """Places of `limit` of so many items, spread over them; all without a limit."""
    if limit is not None and limit < 1:
        raise ValueError(f"--limit {limit}; at least one item is needed")
    return list(range(count)) if limit is None else spaced(count, limit)
