"""Zero-shot classification: class vectors from ensembles of prompts, top-1, top-5 and mean per class.

Takes embeddings and a function that embeds texts; no model, no files. Names and prompts of the public benchmarks are
read by data/packaged/class_names.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.evaluate.ranking import BLOCK, Ranks, Side, rank, unit


@runtime_checkable
class TextEmbedder(Protocol):
    """Texts to embeddings, prefix and end of text included as the model was trained (`summarize:` in InternVL-C)."""

    def __call__(self, texts: Sequence[str]) -> Float[Tensor, "texts dim"]: ...


@dataclass(frozen=True)
class Accuracy:
    top1: float
    top5: float
    mean_per_class: float
    """Mean over the classes that occur of their top-1: every class weighs the same."""
    per_class: tuple[float | None, ...]
    """Top-1 of each class; None where it does not occur."""
    num_pictures: int
    num_tied: int
    """Pictures with another class at exactly the score of the right one; they count by chance."""

    @property
    def mean_top1_top5(self) -> float:
        """What the Kinetics columns call the average (InternVL paper, table 8)."""
        return (self.top1 + self.top5) / 2


def fill(template: str, name: str) -> str:
    """The prompt of a class: `{}` or `{c}` becomes its name."""
    if "{}" not in template and "{c}" not in template:
        raise ValueError(f"template {template!r} has no place for the name; write {{}} where it stands")
    return template.replace("{c}", name).replace("{}", name)


def class_vectors(
    embed: TextEmbedder, names: Sequence[str], templates: Sequence[str | Callable[[str], str]], *, texts: int = 256
) -> Float[Tensor, "classes dim"]:
    """Unit vector of each class: the mean over the templates of unit text embeddings, made unit again.

    About `texts` prompts are embedded in one call, whole classes together. Templates may repeat, and then count twice,
    as in the published lists. Source: official zeroshot_classification.py; CLIP, section 3.1.4.
    """
    if not names or not templates:
        raise ValueError(f"{len(names)} class names and {len(templates)} templates; at least one of each is needed")
    at_once = max(1, texts // len(templates))
    found = []
    for start in range(0, len(names), at_once):
        part = names[start : start + at_once]
        prompts = [one(name) if callable(one) else fill(one, name) for name in part for one in templates]
        embedded = embed(prompts)
        if len(embedded) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts gave {len(embedded)} embeddings; one a prompt is needed")
        found.append(unit(unit(embedded).view(len(part), len(templates), -1).mean(1)))
    return torch.cat(found)


def classify(
    images: Float[Tensor, "images dim"],
    classes: Float[Tensor, "classes dim"],
    labels: Int[Tensor, " images"],
    *,
    among: Iterable[int] | None = None,
    block: int = BLOCK,
) -> Accuracy:
    """Accuracy of the class with the highest cosine. `among`: classes that may be answered (ImageNet-A and -R: 200).

    Classes of equal vectors (two classes of one name) share their pictures by chance. ValueError for a label outside.
    """
    allowed = torch.arange(len(classes)) if among is None else torch.tensor(sorted(set(among)), dtype=torch.long)
    outside = ~torch.isin(labels.cpu(), allowed) if len(allowed) else torch.ones(len(labels), dtype=torch.bool)
    if bool(outside.any()) or (len(allowed) and int(allowed[-1]) >= len(classes)):
        raise ValueError(
            f"{int(outside.sum())} of {len(labels)} labels are none of the {len(allowed)} classes that may be answered "
            f"of {len(classes)}; check that labels count from 0 in the order of the class list"
        )
    allowed = allowed.to(classes.device)
    ranks = rank(Side(images, labels), Side(classes[allowed], allowed), block=block)
    return accuracy(ranks, labels, len(classes))


def accuracy(ranks: Ranks, labels: Int[Tensor, " images"], num_classes: int) -> Accuracy:
    """Shares from ranks of the right classes."""
    first, labels = ranks.hits(1).cpu(), labels.cpu()
    counts = torch.bincount(labels, minlength=num_classes)
    sums = torch.zeros(num_classes, dtype=torch.float64).index_add_(0, labels, first)
    per_class = [float(s / n) if n else None for s, n in zip(sums, counts, strict=True)]
    seen = [one for one in per_class if one is not None]
    return Accuracy(
        top1=float(first.mean()),
        top5=float(ranks.hits(5).mean()),
        mean_per_class=sum(seen) / len(seen),
        per_class=tuple(per_class),
        num_pictures=len(labels),
        num_tied=int((ranks.equal > 0).sum()),
    )


def any_label_top1(predictions: Sequence[int], accepted: Sequence[Iterable[int]]) -> tuple[float, int]:
    """ImageNet-ReaL: share of pictures whose prediction is one of their labels, and how many had none and were skipped.

    Source: Beyer et al. 2020, section 3.
    """
    judged = [
        prediction in wanted for prediction, wanted in zip(predictions, map(frozenset, accepted), strict=True) if wanted
    ]
    if not judged:
        raise ValueError(f"none of {len(predictions)} pictures has a label; check the file of labels")
    return sum(judged) / len(judged), len(predictions) - len(judged)
