"""Record or messages -> token ids, labels, tiles: one path for training, evaluation and chat.

Strings come from templates.py, ids from tokenise.py, pixels from images.py, tiling.py and media.py; stacking samples is
collate.py's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from PIL import Image
from torch import Tensor

from internvl.config import ChatConfig
from internvl.data.crop import middle
from internvl.data.images import Limits, Source, compress, header_size, jpeg_augment, open_image, pad_to_square
from internvl.data.media import FrameSettings, expand_video, probe, read_frames
from internvl.data.records import Record, RecordError
from internvl.data.sample import Counts, Outline, Prompt, Sample
from internvl.data.splitting import Layout, Span
from internvl.data.templates import Piece, Template, Turn, find_template, layout, media_of, turns_of
from internvl.data.tiling import count_tiles, cut, single
from internvl.data.tokenise import Tokeniser, Tokens, expand, tokeniser_of
from internvl.tokens import IGNORE_INDEX, IMAGE_MARK, VIDEO_MARK

_MARKS = re.compile(f"{re.escape(IMAGE_MARK)}|{re.escape(VIDEO_MARK)}")


@dataclass(frozen=True)
class Encoder:
    """Turns records and conversations into tensors for one model; keeps no state, so it pickles and forks."""

    tokenizer: Any
    """A fast tokenizer of transformers that knows the special tokens."""
    config: ChatConfig
    max_length: int | None = None
    overlong: Literal["error", "cut"] = "error"
    """A training sample of more than `max_length` tokens: refuse it, or cut its end (the official way)."""
    augment: bool = False
    """Compress the tiles of pictures as JPEG at random qualities (official `data_augment`)."""
    frames: FrameSettings = field(default_factory=FrameSettings)
    limits: Limits = field(default_factory=Limits)

    @property
    def tokeniser(self) -> Tokeniser:
        return tokeniser_of(self.tokenizer, len(self.tokenizer), self.config.image_marks)

    @property
    def template(self) -> Template:
        return find_template(self.config.template)

    def encode(self, record: Record, rng: np.random.Generator | None = None) -> Sample:
        """The record as a training sample; `rng` draws frames and JPEG qualities."""
        turns: Sequence[Turn] = record.turns
        if record.video is not None:
            chosen = self.frames.choose(probe(record.video), rng, record.clip)
            turns = expand_video(turns, len(chosen), self.frames.label)
            tiles = self._frame_tiles(record.video, chosen)
        else:
            budget = self._budget(len(record.images))
            tiles = [self._tiles(open_image(source, self.limits), budget, rng) for source in record.images]
        ids, labels = self.tokenise(turns, [len(part) for part in tiles], record.source)
        kept = self._fit(ids, labels, record.source)
        return Sample(
            torch.from_numpy(ids[:kept]),
            torch.from_numpy(labels[:kept]),
            self._stack(tiles),
            record.source,
            len(ids) - kept,
        )

    def counts(self, record: Record, rng: np.random.Generator | None = None) -> Counts:
        """Tokens and tiles that `encode` makes, from the headers of the media alone."""
        turns, tiles = self._measured(record, rng)
        num_tokens = len(self._tokens(turns).ids) + sum(tiles) * self.config.tokens_per_tile - len(tiles)
        return Counts(num_tokens if self.max_length is None else min(num_tokens, self.max_length), sum(tiles))

    def layout(self, record: Record, rng: np.random.Generator | None = None) -> Layout:
        """Where pictures and learned tokens stand in what `encode` makes, from headers alone."""
        turns, tiles = self._measured(record, rng)
        tokens = self._tokens(turns)
        lengths = self._lengths(tiles)
        labels = expand(tokens, lengths)[1][: self.max_length]
        spans, longer, mark = [], 0, self.config.picture_marks // 2
        for at, length, count in zip(tokens.image_at.tolist(), lengths, tiles, strict=True):
            start = at + longer
            spans.append(Span(start - mark, start + length + mark, count))  # with the tokens around a picture
            longer += length - 1
        return Layout(tuple(spans), labels != IGNORE_INDEX)

    def outline(self, record: Record, rng: np.random.Generator | None = None) -> Outline:
        """As `encode`, with the same refusals, but no pixel is read."""
        turns, tiles = self._measured(record, rng)
        ids, labels = self.tokenise(turns, tiles, record.source)
        kept = self._fit(ids, labels, record.source)
        learned = int((labels[:kept] != IGNORE_INDEX).sum())
        return Outline(len(ids), sum(tiles), learned, len(ids) - kept)

    def prompt(
        self,
        messages: Sequence[Mapping[str, Any] | Turn],
        images: Sequence[Source] = (),
        *,
        system_message: str | None = None,
        max_tiles: int | None = None,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """A conversation, open for the answer. Images without a mark belong to the last question."""
        turns, tiles = self._open(messages, images, max_tiles)
        system = self.config.system_message if system_message is None else system_message
        pieces = layout(turns, self.template, system, add_generation_prompt)
        ids, _ = expand(self.tokeniser(pieces), self._lengths([len(part) for part in tiles]))
        if self.max_length is not None and len(ids) > self.max_length:
            raise ValueError(
                f"a prompt of {len(ids)} tokens; the limit is {self.max_length}; shorten it or lower max_tiles"
            )
        return Prompt(torch.from_numpy(ids), self._stack(tiles))

    def tokenise(
        self, turns: Sequence[Turn], tile_counts: Sequence[int], source: str = "record"
    ) -> tuple[Int[np.ndarray, " length"], Int[np.ndarray, " length"]]:
        """Ids and labels of training turns whose images have these numbers of tiles; nothing is cut."""
        try:
            return expand(self._tokens(turns), self._lengths(tile_counts))
        except ValueError as error:
            raise RecordError("marks", f"{source}: {error}") from error

    # text

    def _tokens(self, turns: Sequence[Turn]) -> Tokens:
        return self.tokeniser(self._training_pieces(turns))

    def _training_pieces(self, turns: Sequence[Turn]) -> list[Piece]:
        template = self.template
        if template.drops_questions:
            shown = (IMAGE_MARK * turn.text.count(IMAGE_MARK) for turn in turns)
            turns = [t if t.role == "assistant" else Turn(t.role, mark) for t, mark in zip(turns, shown, strict=True)]
        if template.strips:
            turns = [turn._replace(text=turn.text.strip()) for turn in turns]
        if template.drops_leading_answer and turns[0].role == "assistant":
            turns = turns[1:]
        return layout(turns, template, self.config.system_message)

    def _lengths(self, tile_counts: Sequence[int]) -> list[int]:
        return [count * self.config.tokens_per_tile for count in tile_counts]

    def _fit(self, ids: np.ndarray, labels: np.ndarray, source: str) -> int:
        """How many tokens to keep; never a part of an image, never a sample from which nothing is learned."""
        limit = len(ids) if self.max_length is None else self.max_length
        if len(ids) > limit:
            if self.overlong == "error":
                raise RecordError(
                    "too_long",
                    f"{source}: {len(ids)} tokens; the limit is {limit}; shorten it, raise max_length, "
                    "lower max_tiles, or set overlong='cut'",
                )
            last_image = np.flatnonzero(ids == self.tokeniser.image_token_id)[-1:]
            # the token that ends an image must fit too
            end = last_image[0] + 1 + self.config.picture_marks // 2 if len(last_image) else 0
            if end > limit:
                raise RecordError(
                    "too_long",
                    f"{source}: its images end at token {end}; the limit is {limit}; "
                    "raise max_length or lower max_tiles",
                )
        if not (labels[:limit] != IGNORE_INDEX).any():
            said = f"no answer among its first {limit} tokens; raise max_length or remove it"
            raise RecordError("no_answer", f"{source}: {said}")
        return min(limit, len(ids))

    # pixels

    def _budget(self, num_images: int, max_tiles: int | None = None) -> int:
        """Tiles that each of several images may have, before thumbnails."""
        return max(1, (self.config.max_tiles if max_tiles is None else max_tiles) // max(1, num_images))

    def _measured(self, record: Record, rng: np.random.Generator | None) -> tuple[Sequence[Turn], list[int]]:
        """Turns, and tiles of each picture or frame, from headers."""
        if record.video is not None:
            tiles = [1] * len(self.frames.choose(probe(record.video), rng, record.clip))
            return expand_video(record.turns, len(tiles), self.frames.label), tiles
        budget = self._budget(len(record.images))
        return record.turns, [self._count(source, budget) for source in record.images]

    def _count(self, source: Source, budget: int) -> int:
        width, height = header_size(source, self.limits)
        if not self.config.dynamic_tiles:
            return 1
        if self.config.pad_to_square:
            width = height = max(width, height)
        low = min(self.config.min_tiles, budget)
        return count_tiles(width, height, low, budget, self.config.tile_size, self.config.thumbnail)

    def _tiles(
        self, image: Image.Image, budget: int, rng: np.random.Generator | None = None
    ) -> UInt8[Tensor, "tiles 3 side side"]:
        config = self.config
        if config.pad_to_square:
            image = pad_to_square(image, config.normalize)
        augment = rng if self.augment else None
        if not config.dynamic_tiles:
            return single(self._middle(image if augment is None else compress(image, augment)), config.tile_size)
        tiles = cut(image, min(config.min_tiles, budget), budget, config.thumbnail, config.tile_size)
        return tiles if augment is None else jpeg_augment(tiles, augment)

    def _frame_tiles(self, video: Any, indices: Sequence[int]) -> list[UInt8[Tensor, "1 3 side side"]]:
        frames = read_frames(video, indices, self.limits)
        if self.config.pad_to_square:
            frames = [pad_to_square(frame, self.config.normalize) for frame in frames]
        return [single(self._middle(frame), self.config.tile_size) for frame in frames]

    def _middle(self, image: Image.Image) -> Image.Image:
        """The part of a picture that becomes its one tile."""
        return middle(image, self.config.tile_size) if self.config.crop else image

    def _stack(self, tiles: Sequence[Tensor]) -> UInt8[Tensor, "tiles 3 side side"]:
        if not tiles:
            return torch.empty((0, 3, self.config.tile_size, self.config.tile_size), dtype=torch.uint8)
        return tiles[0] if len(tiles) == 1 else torch.cat(list(tiles))

    # conversations

    def _open(
        self, messages: Sequence[Mapping[str, Any] | Turn], images: Sequence[Source], max_tiles: int | None
    ) -> tuple[list[Turn], list[UInt8[Tensor, "tiles 3 side side"]]]:
        """Turns in which every mark is an image, and the tiles of each."""
        inside = media_of(messages)
        pictures = [*(source for kind, source in inside if kind == "image" and source is not None), *images]
        videos = [source for kind, source in inside if kind == "video"]
        turns = _mark_last_question(turns_of(messages), len(pictures))
        marks = _MARKS.findall("\n".join(turn.text for turn in turns if turn.role == "user"))
        for mark, given in ((IMAGE_MARK, pictures), (VIDEO_MARK, videos)):
            if marks.count(mark) != len(given):
                noun = "images" if mark == IMAGE_MARK else "videos"
                raise ValueError(
                    f"{marks.count(mark)} {mark} marks in the questions but {len(given)} {noun}; make them equal"
                )
        budget = self._budget(len(pictures), max_tiles)
        tiles: list[Tensor] = []
        for mark in marks:
            if mark == IMAGE_MARK:
                tiles.append(self._tiles(open_image(pictures.pop(0), self.limits), budget))
            else:
                source = videos.pop(0)
                frames = self._frame_tiles(source, self.frames.choose(probe(source), None))
                turns = _expand_first_video(turns, len(frames), self.frames.label)
                tiles += frames
        return turns, tiles


def _mark_last_question(turns: list[Turn], num_images: int) -> list[Turn]:
    """Turns with marks for the images that have none, in front of the last question if it has none itself."""
    marks = sum(turn.text.count(IMAGE_MARK) for turn in turns if turn.role == "user")
    at = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=-1)
    missing = num_images - marks
    if at < 0 or missing < 1 or IMAGE_MARK in turns[at].text:
        return turns
    numbers = range(marks + 1, num_images + 1)
    words = f"{IMAGE_MARK}\n" if missing == 1 else "".join(f"Image-{number}: {IMAGE_MARK}\n" for number in numbers)
    return [*turns[:at], Turn("user", words + turns[at].text), *turns[at + 1 :]]


def _expand_first_video(turns: Sequence[Turn], num_frames: int, label: str) -> list[Turn]:
    at = next(i for i, turn in enumerate(turns) if turn.role == "user" and VIDEO_MARK in turn.text)
    return [*turns[:at], *expand_video(turns[at : at + 1], num_frames, label, limit=1), *turns[at + 1 :]]
