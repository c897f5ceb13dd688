"""A model to talk to: turns and pictures in, text and boxes out. Opening one is open_chat.py's.

Prompts are data/encode.py's, tokens engine.py's, text text.py's.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from internvl.config import ChatConfig
from internvl.data.encode import Encoder
from internvl.data.images import Source
from internvl.data.templates import find_template
from internvl.generate.answers import picture_size, regions
from internvl.generate.conversation import conversation
from internvl.generate.engine import Engine, Request
from internvl.generate.features import FeatureCache
from internvl.generate.reply import Message, Reply, Usage
from internvl.generate.sampling import Sampling
from internvl.generate.text import Writer, control_ids
from internvl.load import save_checkpoint
from internvl.models.chat import ChatModel

MAX_NEW_TOKENS = 512


@dataclass(frozen=True)
class Job:
    """A request with what makes a reply of it."""

    request: Request
    writer: Writer
    messages: list[Message]
    images: list[Source]


class Stream(Iterator[str]):
    """Pieces of an answer; `reply` reads what is left and is whole."""

    def __init__(self, chat: Chat, job: Job) -> None:
        self._chat, self._job = chat, job
        self._tokens = chat.engine.stream(job.request)
        self._done = False

    def __next__(self) -> str:
        writer = self._job.writer
        while not self._done:
            token = None if writer.stopped else next(self._tokens, None)
            if token is None:
                self.close()
                piece = writer.finish()
            else:
                piece = writer.add(token)
            if piece:
                return piece
        raise StopIteration

    def close(self) -> None:
        """Stop here: the rest is neither computed nor given."""
        self._done = True
        self._tokens.close()

    @property
    def reply(self) -> Reply:
        for _ in self:
            pass
        return self._chat.reply_of(self._job)


class Chat:
    """One model with its tokenizer. Not for several threads at once; batch() is the way to answer many."""

    def __init__(
        self,
        model: ChatModel,
        tokenizer: Any = None,
        *,
        int4: bool = False,
        exact: bool = True,
        max_tiles: int | None = None,
        max_rows: int = 16,
        stop_ids: Sequence[int] = (),
    ) -> None:
        """`stop_ids` end an answer besides those of the template and the tokenizer."""
        if max_tiles is not None and max_tiles < 1:
            raise ValueError(f"max_tiles {max_tiles}: a picture needs at least one tile")
        self.model = model
        self.given_tokenizer = tokenizer
        self.int4, self.exact, self.max_tiles, self.max_rows = int4, exact, max_tiles, max_rows
        self.more_stop_ids = frozenset(stop_ids)
        self.features = FeatureCache()

    # talking

    def chat(self, question: str | Sequence[Message], images: Sequence[Source] | None = None, **options: Any) -> Reply:
        """Answer a question about pictures, or go on with messages; options are those of `stream`."""
        return self.stream(question, images, **options).reply

    def stream(
        self,
        question: str | Sequence[Message],
        images: Sequence[Source] | None = None,
        *,
        system: str | None = None,
        history: Sequence[Message] = (),
        stop: Sequence[str] = (),
        max_tiles: int | None = None,
        **sampling: Any,
    ) -> Stream:
        """The answer piece by piece. `stop`: texts that end it; further options are those of Sampling."""
        return Stream(self, self._job(question, images, system, history, stop, max_tiles, sampling))

    def batch(self, chats: Sequence[str | Sequence[Message] | Mapping[str, Any]], **options: Any) -> list[Reply]:
        """Many chats together, each with the answer that it has alone, in order.

        A chat is a question, messages, or a mapping with the arguments of `chat`; `options` hold for all.
        """
        jobs: list[Job] = []

        def requests() -> Iterator[Request]:
            for chat in chats:
                arguments = {**options, **(chat if isinstance(chat, Mapping) else {"question": chat})}
                named = {name: arguments.pop(name, default) for name, default in _ARGUMENTS.items()}
                jobs.append(self._job(**named, sampling=arguments))
                jobs[-1].request.on_token = partial(_write, jobs[-1])
                yield jobs[-1].request

        self.engine.run(requests())
        for job in jobs:
            job.writer.finish()
        return [self.reply_of(job) for job in jobs]

    # numbers

    @torch.inference_mode()
    def logits(
        self,
        input_ids: Int[Tensor, "rows length"],
        pixel_values: Float[Tensor, "tiles 3 height width"] | None = None,
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "rows length vocab"]:
        """Teacher-forced: the scores of every next token, from normalised tiles."""
        weight = self.model.connector.fc1.weight
        pixels = None if pixel_values is None else pixel_values.to(weight.device, weight.dtype)
        mask = None if attention_mask is None else attention_mask.to(weight.device)
        out: Tensor = self.model(input_ids.to(weight.device), pixels, attention_mask=mask)
        return out

    @torch.inference_mode()
    def encode_tiles(
        self, pixel_values: Float[Tensor, "tiles 3 height width"]
    ) -> Float[Tensor, "tiles tokens llm_width"]:
        """Normalised tiles to tokens of the language model's width, after the connector."""
        weight = self.model.connector.fc1.weight
        return self.model.encode_tiles(pixel_values.to(weight.device, weight.dtype))

    def save(self, out: str | Path, layout: Literal["official", "native"] = "official") -> None:
        """Weights, config and tokenizer as a folder that other tools load."""
        save_checkpoint(self.model, self.given_tokenizer, out, layout)

    # parts, made when first needed

    @property
    def config(self) -> ChatConfig:
        return self.model.config

    @property
    def tokenizer(self) -> Any:
        if self.given_tokenizer is None:
            raise ValueError("this checkpoint has no tokenizer, so it cannot chat; add tokenizer.json to its folder")
        return self.given_tokenizer

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.config)

    @cached_property
    def engine(self) -> Engine:
        return Engine(self.model, int4=self.int4, exact=self.exact, max_rows=self.max_rows)

    @cached_property
    def hidden_ids(self) -> frozenset[int]:
        return control_ids(self.tokenizer)

    @cached_property
    def stop_ids(self) -> frozenset[int]:
        """The template's end of a turn, and what the tokenizer and the checkpoint call end of text."""
        vocabulary = self.tokenizer.get_vocab()
        ends = {vocabulary[text] for text in find_template(self.config.template).stops if text in vocabulary}
        ends |= {self.tokenizer.eos_token_id} - {None}
        return frozenset(ends | self.more_stop_ids)

    # one request

    def _job(
        self,
        question: str | Sequence[Message],
        images: Sequence[Source] | None,
        system: str | None,
        history: Sequence[Message],
        stop: Sequence[str],
        max_tiles: int | None,
        sampling: Mapping[str, Any],
    ) -> Job:
        settings = Sampling(**{"max_new_tokens": MAX_NEW_TOKENS, **sampling})
        messages, sources = conversation(question, images or (), history)
        prompt = self.encoder.prompt(messages, sources, system_message=system, max_tiles=max_tiles or self.max_tiles)
        self.engine.check_length(len(prompt.input_ids))
        started = time.perf_counter()
        visual = self.features.lookup(prompt.tiles, self.engine.encode) if len(prompt.tiles) else None
        request = Request(
            prompt.input_ids, sampling=settings, stop_ids=self.stop_ids, visual=visual, started_at=started
        )
        return Job(request, Writer(self.tokenizer, self.hidden_ids, stop), messages, sources)

    def reply_of(self, job: Job) -> Reply:
        """The finished job as a reply."""
        request, text = job.request, job.writer.text
        num_tiles = 0 if request.visual is None else len(request.visual)
        usage = Usage(
            len(request.input_ids),
            num_tiles * self.config.tokens_per_tile,
            num_tiles,
            len(request.tokens),
            request.first_token_at - request.started_at,
            request.finished_at - request.started_at,
        )
        return Reply(
            text,
            regions(text, picture_size(job.images[-1])) if job.images else (),
            usage,
            "stop" if job.writer.stopped else str(request.finish_reason),
            (*job.messages, {"role": "assistant", "content": text}),
            logprobs=tuple(request.logprobs),
        )


_ARGUMENTS: dict[str, Any] = {
    "question": "",
    "images": None,
    "system": None,
    "history": (),
    "stop": (),
    "max_tiles": None,
}
"""Of `chat`; whatever else it is given belongs to Sampling."""


def _write(job: Job, token: int) -> None:
    job.writer.add(token)
    if job.writer.stopped:
        job.request.cancel()
