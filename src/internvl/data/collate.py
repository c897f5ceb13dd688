"""Samples -> batch: padded rows, or one packed row with the bounds of its samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from internvl.batch import ChatBatch
from internvl.data.sample import Sample
from internvl.data.weighting import Weighting, weigh
from internvl.tokens import IGNORE_INDEX


def collate(
    samples: Sequence[Sample], pad_id: int, weighting: Weighting = "token", length: int | None = None
) -> ChatBatch:
    """Rows padded on the right to the longest sample, or to `length`."""
    longest = max(len(sample.input_ids) for sample in samples)
    if length is not None and longest > length:
        raise ValueError(f"{_longest(samples)}: {longest} tokens; rows are padded to {length}; raise it or cut samples")
    shape = (len(samples), longest if length is None else length)
    input_ids = torch.full(shape, pad_id, dtype=torch.int64)
    labels = torch.full(shape, IGNORE_INDEX, dtype=torch.int64)
    weights = torch.zeros(shape)
    position_ids = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    for row, sample in enumerate(samples):
        end = len(sample.input_ids)
        input_ids[row, :end] = sample.input_ids
        labels[row, :end] = sample.labels
        weights[row, :end] = weigh(sample.labels, weighting)
        position_ids[row, :end] = torch.arange(end)
        mask[row, :end] = True
    return ChatBatch(
        input_ids=input_ids,
        labels=labels,
        loss_weights=weights,
        position_ids=position_ids,
        tiles=_tiles(samples),
        attention_mask=mask,
        num_samples=len(samples),
        sources=tuple(sample.source for sample in samples),
    )


def collate_packed(
    samples: Sequence[Sample], pad_id: int, weighting: Weighting = "token", length: int | None = None
) -> ChatBatch:
    """One row of all samples, one after the other; padding up to `length` is a segment of its own."""
    lengths = [len(sample.input_ids) for sample in samples]
    total = sum(lengths)
    if length is not None and total > length:
        raise ValueError(f"{len(samples)} samples of {total} tokens; the row holds {length}; pack fewer or raise it")
    rest = 0 if length is None else length - total
    bounds = torch.tensor([0, *lengths, *([rest] if rest else [])]).cumsum(0).to(torch.int32)
    ids = [*(sample.input_ids for sample in samples), torch.full((rest,), pad_id)]
    labels = [*(sample.labels for sample in samples), torch.full((rest,), IGNORE_INDEX)]
    weights = [*(weigh(sample.labels, weighting) for sample in samples), torch.zeros(rest)]
    # Official: the padding segment stays at position 0.
    positions = [*(torch.arange(count) for count in lengths), torch.zeros(rest, dtype=torch.int64)]
    return ChatBatch(
        input_ids=torch.cat(ids)[None],
        labels=torch.cat(labels)[None],
        loss_weights=torch.cat(weights)[None],
        position_ids=torch.cat(positions)[None],
        tiles=_tiles(samples),
        segments=bounds,
        num_samples=len(samples),
        sources=tuple(sample.source for sample in samples),
    )


def collate_nothing(pad_id: int, side: int, packed: bool) -> ChatBatch:
    """A batch of one pad token from which nothing is learned: what a rank runs where all its samples were skipped."""
    return ChatBatch(
        input_ids=torch.full((1, 1), pad_id, dtype=torch.int64),
        labels=torch.full((1, 1), IGNORE_INDEX, dtype=torch.int64),
        loss_weights=torch.zeros(1, 1),
        position_ids=torch.zeros(1, 1, dtype=torch.int64),
        tiles=torch.zeros(0, 3, side, side, dtype=torch.uint8),
        attention_mask=None if packed else torch.ones(1, 1, dtype=torch.bool),
        segments=torch.tensor([0, 1], dtype=torch.int32) if packed else None,
    )


def _tiles(samples: Sequence[Sample]) -> Tensor:
    """One after the other; in a worker of a loader at once in the memory that it shares.

    From a worker's own memory they would be copied there, and what such a large block leaves behind stays: a heap grows
    by the largest batch and is not given back.
    """
    tiles = [sample.tiles for sample in samples if sample.num_tiles]
    if not tiles:
        return samples[0].tiles
    if len(tiles) == 1:
        return tiles[0]
    if get_worker_info() is None:
        return torch.cat(tiles)
    shape = (sum(map(len, tiles)), *tiles[0].shape[1:])
    storage = torch.UntypedStorage._new_shared(math.prod(shape))  # as torch's own default_collate does
    return torch.cat(tiles, out=tiles[0].new_empty(0).set_(storage).view(shape))


def _longest(samples: Sequence[Sample]) -> str:
    return max(samples, key=lambda sample: len(sample.input_ids)).source or "sample"
