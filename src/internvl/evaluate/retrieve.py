"""Retrieval both ways by the Karpathy protocol, with re-ranking by a pair scorer; videos as means of frames.

Takes embeddings and, for re-ranking, a function that scores pairs; no model, no files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.evaluate.ranking import BLOCK, Ranks, Side, rank, together, top_k, unit

RECALL_AT = (1, 5, 10)


@runtime_checkable
class PairScorer(Protocol):
    """Scores pairs more closely than embeddings do, such as image-text matching. Indices are rows of the two sides."""

    def __call__(self, images: Int[Tensor, " pairs"], texts: Int[Tensor, " pairs"]) -> Float[Tensor, " pairs"]: ...


@dataclass(frozen=True)
class Recall:
    """Of one direction."""

    at: Mapping[int, float]
    """K -> share of queries with a right item among the first K."""
    median_rank: float
    """Expected place of the first right item, from 1; the lower middle one of an even number."""
    num_queries: int
    num_items: int
    num_tied: int
    """Queries with wrong items that score exactly as the right one; they count by chance (`Ranks.hits`)."""


@dataclass(frozen=True)
class Retrieval:
    image_to_text: Recall
    text_to_image: Recall
    settings: Mapping[str, float | int | str | None] = field(default_factory=dict)
    """What of the protocol changes the score."""

    @property
    def mean(self) -> float:
        """Mean of all recalls of both directions, as tables of papers average."""
        every = (*self.image_to_text.at.values(), *self.text_to_image.at.values())
        return sum(every) / len(every)


def retrieve(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
    *,
    at: Sequence[int] = RECALL_AT,
    dual_softmax: float | None = None,
    block: int = BLOCK,
) -> Retrieval:
    """R@K both ways by cosine. `image_of_text`: row of the picture each text describes; any number of texts a picture.

    Image to text: share of pictures with at least one of their texts among the first K of all texts. Text to image:
    share of texts whose picture is among the first K. ValueError where a picture has no text.
    """
    pictures, captions = sides(images, texts, image_of_text)
    forth = rank(pictures, captions, block=block, dual_softmax=dual_softmax)
    back = rank(captions, pictures, block=block, dual_softmax=dual_softmax)
    return Retrieval(
        recall(forth, len(texts), at), recall(back, len(images), at), {"score": "cosine", "dual_softmax": dual_softmax}
    )


def retrieve_reranked(
    images: Float[Tensor, "images dim"],
    texts: Float[Tensor, "texts dim"],
    image_of_text: Int[Tensor, " texts"],
    scorer: PairScorer,
    *,
    best: int = 128,
    pairs: int = 64,
    add_cosine: bool = False,
    at: Sequence[int] = RECALL_AT,
    block: int = BLOCK,
) -> Retrieval:
    """As `retrieve`, but the `best` items of each query are put in the order of `scorer`; the others stay behind them.

    `pairs` are scored in one call. `add_cosine` adds the cosine to the score (BLIP-2). Both directions together score
    (images + texts) x best pairs.
    """
    pictures, captions = sides(images, texts, image_of_text)
    forth = rerank(pictures, captions, scorer, best=best, pairs=pairs, add_cosine=add_cosine, block=block)
    turned: PairScorer = lambda images, texts: scorer(texts, images)  # noqa: E731
    back = rerank(captions, pictures, turned, best=best, pairs=pairs, add_cosine=add_cosine, block=block)
    settings = {"score": "cosine, then pairs" if not add_cosine else "cosine, then pairs + cosine", "best": best}
    return Retrieval(recall(forth, len(texts), at), recall(back, len(images), at), settings)


def sides(
    images: Float[Tensor, "images dim"], texts: Float[Tensor, "texts dim"], image_of_text: Int[Tensor, " texts"]
) -> tuple[Side, Side]:
    """The two sides, pictures as groups."""
    if len(image_of_text) and not 0 <= int(image_of_text.min()) <= int(image_of_text.max()) < len(images):
        raise ValueError(
            f"image_of_text runs from {int(image_of_text.min())} to {int(image_of_text.max())} but there are "
            f"{len(images)} pictures; give rows from 0"
        )
    groups = torch.arange(len(images), device=images.device)
    return Side(images, groups), Side(texts, image_of_text.to(texts.device))


def rerank(
    queries: Side, items: Side, scorer: PairScorer, *, best: int, pairs: int, add_cosine: bool, block: int = BLOCK
) -> Ranks:
    """Ranks after the first `best` items of each query are ordered by `scorer(query rows, item rows)`.

    A query whose right items are all behind the first `best` keeps its rank by cosine.
    """
    if pairs < 1:
        raise ValueError(f"{pairs} pairs a call; at least 1 is needed")
    queries, items = together(queries, items)
    first = rank(queries, items, block=block)
    cosines, places = top_k(queries.vectors, items.vectors, best, block=block)
    rows = torch.arange(len(places), device=places.device)[:, None].expand_as(places)
    asked, shown = rows.flatten(), places.flatten()
    parts = [
        scorer(asked[i : i + pairs], shown[i : i + pairs]).detach().double().to(places.device)
        for i in range(0, len(asked), pairs)
    ]
    scores = torch.cat(parts).view(places.shape)
    if not bool(torch.isfinite(scores).all()):
        raise ValueError(f"{int((~torch.isfinite(scores)).sum())} pair scores are not finite; score in float32")
    scores = scores + cosines if add_cosine else scores
    own = queries.group[:, None] == items.group[places]
    found = own.any(1)
    top = scores.masked_fill(~own, -torch.inf).amax(1, keepdim=True)
    greater, equal = ((scores > top) & ~own).sum(1), ((scores == top) & ~own).sum(1)
    # not found: at least `best` wrong items stand before, also where the cosine was the same as of the last of them
    behind = first.greater.clamp(min=places.shape[1])
    beside = first.equal - (behind - first.greater)
    return Ranks(
        torch.where(found, greater, behind),
        torch.where(found, equal, beside.clamp(min=0)),
        torch.where(found, ((scores == top) & own).sum(1), first.right),
    )


def recall(ranks: Ranks, num_items: int, at: Sequence[int] = RECALL_AT) -> Recall:
    """Shares from ranks."""
    if not at:
        raise ValueError("no K to take the recall at; give at least one, such as 1, 5, 10")
    return Recall(
        at={k: float(ranks.hits(k).mean()) for k in at},
        median_rank=float(ranks.expected.median()),
        num_queries=len(ranks.greater),
        num_items=num_items,
        num_tied=int((ranks.equal > 0).sum()),
    )


def frame_means(frames: Float[Tensor, "frames dim"], num_frames: Sequence[int]) -> Float[Tensor, "videos dim"]:
    """The mean of each video's frames, those of all videos one after another; ValueError where the numbers disagree."""
    if sum(num_frames) != len(frames) or min(num_frames, default=0) < 1:
        raise ValueError(
            f"{len(frames)} frames for videos of {sum(num_frames)} frames in all, the shortest of "
            f"{min(num_frames, default=0)}; every video needs at least one and the numbers must agree"
        )
    return torch.stack([part.mean(0) for part in frames.split(list(num_frames))])


def mean_of_frames(
    frames: Float[Tensor, "frames dim"], num_frames: Sequence[int], *, unit_frames: bool = False
) -> Float[Tensor, "videos dim"]:
    """One unit vector a video: the mean of its frames' embeddings, frames of all videos one after another.

    The official MSR-VTT script averages embeddings as the model gives them; `unit_frames` makes each of length 1 first,
    so that every frame has the same say.
    """
    each = unit(frames) if unit_frames else frames.detach().double()
    return unit(frame_means(each, num_frames))
