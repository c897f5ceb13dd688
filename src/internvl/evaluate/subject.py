"""A chat model as evaluation sees it: what identifies it, its greedy answers, its losses on given answers.

Pictures are read on threads and encoded together; tokens come from the one engine, samples from the one encoder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from internvl.data.collate import collate
from internvl.data.encode import Encoder
from internvl.data.images import normalise
from internvl.data.records import Record
from internvl.data.sample import Prompt, Sample
from internvl.data.templates import Turn, render
from internvl.evaluate.caption_loss import answer_losses
from internvl.evaluate.run import Question
from internvl.generate.engine import Request
from internvl.generate.open_chat import Dtype, Quantiser, load_chat
from internvl.generate.sampling import Sampling
from internvl.generate.session import Chat
from internvl.generate.text import Writer
from internvl.models.int8 import stored
from internvl.tokens import IMAGE_MARK

TILES_AT_ONCE = 256
"""Tiles in one pass of the vision encoder: 1 GB of activations for `pocket`."""
POSITIONS_AT_ONCE = {"cpu": 4096, "cuda": 65536}
"""Tokens, padding included, in one pass of the language model for losses."""
THREADS = min(16, os.cpu_count() or 1)


class ChatSubject:
    """`batch` answers are decoded together."""

    def __init__(self, chat: Chat, batch: int = 64, max_tiles: int | None = None) -> None:
        self.chat = chat
        self.batch = batch
        config = chat.config if max_tiles is None else replace(chat.config, max_tiles=max_tiles)
        self.encoder = Encoder(chat.tokenizer, config)

    @cached_property
    def settings(self) -> Mapping[str, Any]:
        config = self.encoder.config
        return {
            "weights": weights_sha256(self.chat.model),
            "vocabulary": _vocabulary_sha256(self.chat.tokenizer),
            "template": config.template,
            "system_message": config.system_message,
            "tiles": [config.min_tiles, config.max_tiles, config.tile_size, config.thumbnail, config.dynamic_tiles],
            "dtype": str(self._weight.dtype).removeprefix("torch.") + (" and int4 steps" if self.chat.int4 else ""),
            "device": self._weight.device.type,
            "decoding": {key: value for key, value in asdict(Sampling()).items() if key != "max_new_tokens"},
        }

    def prompt(self, question: str) -> str:
        """The exact text for one question, the picture a mark."""
        config = self.encoder.config
        messages = [{"role": "user", "content": _marked(question)}]
        return render(messages, config.template, system_message=config.system_message)

    def answers(self, questions: Sequence[Question], max_new_tokens: int) -> list[str]:
        """Greedy answers, in order."""
        sampling = Sampling(max_new_tokens=max_new_tokens)
        with ThreadPoolExecutor(THREADS) as threads:
            prompts = list(threads.map(self._prompt, questions))
        requests = []
        for part in _groups(prompts, [prompt.tiles.shape[0] for prompt in prompts], TILES_AT_ONCE):
            counts = [prompt.tiles.shape[0] for prompt in part]
            visual = self.chat.engine.encode(torch.cat([prompt.tiles for prompt in part])).split(counts)
            requests += [
                Request(prompt.input_ids, sampling=sampling, stop_ids=self.chat.stop_ids, visual=features)
                for prompt, features in zip(part, visual, strict=True)
            ]
        return [self._text(request) for request in self.chat.engine.run(requests)]

    def losses(self, questions: Sequence[Question]) -> list[tuple[float, int]]:
        """Summed loss in nats and number of tokens of each reference answer, in order."""
        with ThreadPoolExecutor(THREADS) as threads:
            samples = list(threads.map(self._sample, questions))
        order = sorted(
            range(len(samples)), key=lambda index: len(samples[index].input_ids)
        )  # unlike lengths are padding
        most = POSITIONS_AT_ONCE[self._weight.device.type]
        lengths = [len(samples[index].input_ids) for index in order]
        found: dict[int, tuple[float, int]] = {}
        for indices in _groups(order, lengths, most):
            found.update(zip(indices, self._losses([samples[index] for index in indices]), strict=True))
        return [found[index] for index in range(len(samples))]

    def _losses(self, samples: Sequence[Sample]) -> list[tuple[float, int]]:
        weight = self._weight
        batch = collate(samples, pad_id=self.chat.tokenizer.pad_token_id or 0).to(weight.device)
        pixels = normalise(batch.tiles, self.chat.config.normalize, weight.dtype) if batch.num_tiles else None
        losses, tokens = answer_losses(self.chat.model, batch, pixels)
        return list(zip(losses.tolist(), tokens.tolist(), strict=True))

    def _prompt(self, question: Question) -> Prompt:
        return self.encoder.prompt([Turn("user", _marked(question.text))], [question.picture])

    def _sample(self, question: Question) -> Sample:
        turns = (Turn("user", _marked(question.text)), Turn("assistant", question.reference))
        return self.encoder.encode(Record(turns, (question.picture,), source=str(question.picture)))

    def _text(self, request: Request) -> str:
        writer = Writer(self.chat.tokenizer, self.chat.hidden_ids)
        for token in request.tokens:
            writer.add(token)
        writer.finish()
        return writer.text

    @property
    def _weight(self) -> torch.Tensor:
        return self.chat.model.connector.fc1.weight


def open_subject(
    model: str,
    *,
    device: str | None = None,
    dtype: Dtype = "auto",
    max_tiles: int | None = None,
    batch: int = 64,
    quantiser: Quantiser = "auto",
) -> ChatSubject:
    """The model as `internvl.load` opens it, with as many rows as a batch has questions."""
    if max_tiles is not None and max_tiles < 1:
        raise ValueError(f"max_tiles {max_tiles}: a picture needs at least one tile")
    chat = load_chat(model, device=device or "auto", dtype=dtype, max_rows=batch, quantiser=quantiser)
    return ChatSubject(chat, batch, max_tiles)


def weights_sha256(model: nn.Module) -> str:
    """One hash of every weight with its name, shape and type; where the files lie does not matter."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        for part in stored(tensor):
            digest.update(part.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _vocabulary_sha256(tokenizer: Any) -> str:
    words = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256("\n".join(f"{index} {word}" for word, index in words).encode()).hexdigest()


def _marked(question: str) -> str:
    """With the mark where training puts it."""
    return question if IMAGE_MARK in question else f"{IMAGE_MARK}\n{question}"


def _groups(items: Sequence[Any], sizes: Sequence[int], most: int) -> Iterator[list[Any]]:
    """Neighbours, as many as keep number x largest size within `most`; at least one."""
    group: list[Any] = []
    largest = 0
    for item, size in zip(items, sizes, strict=True):
        largest = max(largest, size)
        if group and (len(group) + 1) * largest > most:
            yield group
            group, largest = [], size
        group.append(item)
    if group:
        yield group
