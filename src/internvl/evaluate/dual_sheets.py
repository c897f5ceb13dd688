"""What a sheet of a task shows: pictures with the answers that were best, hits with the right ones in green."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from internvl.data.captions import CaptionSet
from internvl.data.labelled import Labelled
from internvl.data.sheet import Line, Panel, Section
from internvl.evaluate.dual_features import poster
from internvl.evaluate.probe import Probe
from internvl.evaluate.ranking import top_k

SHOWN, BEST = 24, 5
"""Examples on a sheet, and how many answers of each."""


def spaced(count: int, shown: int = SHOWN) -> list[int]:
    return sorted({int(place) for place in torch.linspace(0, count - 1, min(shown, count)).round()})


def answers(
    items: Sequence[Labelled], labels: Tensor, rows: Tensor, vectors: Tensor, names: Sequence[str], video: bool
) -> Section:
    """Evenly spaced examples with their best answers, the right one in green."""
    chosen = spaced(len(items))
    scores, places = top_k(rows[chosen], vectors, BEST)
    panels = []
    for example, row_scores, row in zip(chosen, scores.tolist(), places.tolist(), strict=True):
        right = int(labels[example])
        lines: list[Line] = [(f"is: {names[right]}", "black")]
        lines += [
            (f"{s:.3f} {names[n]}", "green" if n == right else "firebrick")
            for s, n in zip(row_scores, row, strict=True)
        ]
        panels.append(Panel(poster(items[example].path, video), tuple(lines)))
    return Section(f"{len(chosen)} of {len(items)}, the {BEST} best answers", tuple(panels))


def text_hits(data: CaptionSet, rows: Tensor, texts: Tensor, video: bool) -> Section:
    """Texts with the pictures found for them."""
    chosen = spaced(len(texts), SHOWN // BEST)
    owners, captions = data.image_of_text, data.captions
    scores, places = top_k(texts[chosen], rows, BEST)
    panels = []
    for query, row_scores, row in zip(chosen, scores.tolist(), places.tolist(), strict=True):
        panels.append(Panel(None, ((captions[query], "black"),)))
        for score, place in zip(row_scores, row, strict=True):
            line = (f"{score:.3f}", "green" if place == owners[query] else "firebrick")
            panels.append(Panel(poster(data.items[place].path, video), (line,)))
    return Section("text to picture, by cosine; its own in green", tuple(panels))


def picture_hits(data: CaptionSet, rows: Tensor, texts: Tensor, video: bool) -> Section:
    chosen = spaced(len(rows), SHOWN // 2)
    owners, captions = data.image_of_text, data.captions
    scores, places = top_k(rows[chosen], texts, BEST)
    panels = []
    for query, row_scores, row in zip(chosen, scores.tolist(), places.tolist(), strict=True):
        lines = tuple(
            (f"{s:.3f} {captions[n]}", "green" if owners[n] == query else "firebrick")
            for s, n in zip(row_scores, row, strict=True)
        )
        panels.append(Panel(poster(data.items[query].path, video), lines))
    return Section("picture to text, by cosine; its own in green", tuple(panels))


@torch.inference_mode()
def probed(probe: Probe, items: Sequence[Labelled], labels: Tensor, rows: Tensor, names: Sequence[str]) -> Section:
    chosen = spaced(len(items))
    probe.head.eval()
    shares = probe.head(rows[chosen].to(next(probe.head.parameters()))).float().softmax(1)
    best = shares.topk(min(BEST, len(names)))
    panels = []
    for example, values, row in zip(chosen, best.values.tolist(), best.indices.tolist(), strict=True):
        right = int(labels[example])
        lines: list[Line] = [(f"is: {names[right]}", "black")]
        lines += [
            (f"{s:.2f} {names[n]}", "green" if n == right else "firebrick") for s, n in zip(values, row, strict=True)
        ]
        panels.append(Panel(poster(items[example].path, False), tuple(lines)))
    return Section(f"{len(chosen)} of {len(items)}, the best answers", tuple(panels))
