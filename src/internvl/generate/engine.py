"""The one batched decoder: requests wait, take a row of the cache, are read, stepped together, and leave.

Laws: cached equals uncached, alone equals in a batch, and a seed's answer does not depend on its neighbours.
Text, pictures and turns are session.py's; how a token is chosen is sampling.py's.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from internvl.data.images import normalise
from internvl.generate.sampling import Sampling, choose
from internvl.models.chat import ChatModel
from internvl.models.choose import choose_decoder, choose_vision

FinishReason = Literal["stop", "length", "cancelled"]


@dataclass(eq=False)
class Request:
    """One answer to be: what goes in, and below it what has come out so far."""

    input_ids: Int[Tensor, " length"]
    tiles: UInt8[Tensor, "tiles 3 side side"] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: frozenset[int] = frozenset()
    on_token: Callable[[int], None] | None = None
    visual: Float[Tensor, "tiles tokens llm_width"] | None = None
    """Tiles encoded before; `tiles` is then not read."""

    tokens: list[int] = field(default_factory=list)
    """Without the stop token."""
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    started_at: float = 0.0
    """When its pictures began to be encoded; set at submission where they are encoded here."""
    first_token_at: float = 0.0
    finished_at: float = 0.0
    cancelled: bool = False

    def cancel(self) -> None:
        """Leave at the next step, with what there is."""
        self.cancelled = True


class Engine:
    """Weights are read when the engine is made: make a new one after training."""

    def __init__(
        self,
        model: ChatModel,
        *,
        max_rows: int = 16,
        int4: bool = False,
        exact: bool = True,
        max_length: int | None = None,
    ) -> None:
        """`exact`: bfloat16 rows have the same bits in every company; without it wide batches are faster."""
        self.model = model
        self.max_rows = max_rows
        self.max_length = max_length or int(model.language.model.config.max_position_embeddings)
        self.decoder = choose_decoder(model.language, int4=int4, exact=exact)
        self.vision = choose_vision(model.vision)
        self.waiting: deque[Request] = deque()
        self.rows: list[Request | None] = []
        self.lengths: list[int] = []
        self.generators: list[torch.Generator] = []

    @property
    def idle(self) -> bool:
        return not self.waiting and not self.rows

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.connector.fc1.weight.device
        return device

    def submit(self, request: Request) -> Request:
        """Queue a request; ValueError where it can never be answered."""
        self.check_length(len(request.input_ids))
        self._check_pictures(request)
        request.started_at = request.started_at or time.perf_counter()
        self.waiting.append(request)
        return request

    def check_length(self, length: int) -> None:
        """ValueError for a prompt that leaves no room for an answer."""
        if not 0 < length < self.max_length:
            raise ValueError(
                f"a prompt of {length} tokens; the model takes 1 to {self.max_length - 1}; "
                "shorten the text, give fewer pictures or lower max_tiles"
            )

    def run(self, requests: Iterable[Request]) -> list[Request]:
        """Answer them all; returned in their order. An iterator is read as rows become free."""
        source, taken = iter(requests), []
        try:
            while True:
                while len(self.waiting) < self.max_rows - len(self.rows) and (request := next(source, None)):
                    taken.append(self.submit(request))
                if self.idle:
                    return taken
                self.step()
        finally:
            for request in taken:
                request.cancel()  # of what is unfinished after an error

    def stream(self, request: Request) -> Generator[int]:
        """Tokens as they come; closing the iterator cancels the request."""
        self.submit(request)
        given = 0
        try:
            while request.finish_reason is None or given < len(request.tokens):
                if given == len(request.tokens):
                    self.step()
                for token in request.tokens[given:]:
                    given += 1
                    yield token
        finally:
            request.cancel()

    @torch.inference_mode()
    def step(self) -> None:
        """Let finished rows go and waiting requests in, then give every live row one more token."""
        for row, request in enumerate(self.rows):
            if request is not None and request.cancelled:
                self._leave(row, "cancelled")
        self._admit()
        self._close_gaps()
        live = [request for request in self.rows if request is not None]
        if live:
            last = torch.tensor([request.tokens[-1] for request in live], device=self.device)
            self._take(range(len(live)), self._reread(self.decoder.step(last, self.lengths)))
            self.lengths = [length + 1 for length in self.lengths]
            self._close_gaps()

    def encode(self, tiles: UInt8[Tensor, "tiles 3 side side"]) -> Float[Tensor, "tiles tokens llm_width"]:
        """Visual tokens of uint8 tiles; on a CPU tile by tile, so that the bits do not depend on the company."""
        weight = self.model.connector.fc1.weight
        pixels = normalise(tiles.to(weight.device), self.model.config.normalize, weight.dtype)
        with torch.inference_mode():
            if weight.device.type != "cpu":
                return self.model.encode_tiles(pixels)
            return torch.cat([self.model.encode_tiles(tile[None], self.vision) for tile in pixels])

    # rows

    def _admit(self) -> None:
        free = [row for row, request in enumerate(self.rows) if request is None]
        free += range(len(self.rows), self.max_rows)
        entering: list[Request] = []
        while self.waiting and len(entering) < len(free):
            request = self.waiting.popleft()
            if request.cancelled:
                self._finish(request, "cancelled")
            else:
                entering.append(request)
        if not entering:
            return
        rows = free[: len(entering)]
        longest = max(len(request.input_ids) + request.sampling.max_new_tokens for request in entering)
        self.decoder.reserve(max(rows) + 1, min(longest, self.max_length))
        for row, request in zip(rows, entering, strict=True):
            self._place(row, request)
        prompts = [self._embed(request) for request in entering]
        self._take(rows, self.decoder.read(prompts, rows))

    def _place(self, row: int, request: Request) -> None:
        generator = torch.Generator(self.device).manual_seed(request.sampling.seed)
        if row == len(self.rows):
            self.rows.append(request)
            self.lengths.append(0)
            self.generators.append(generator)
        self.rows[row], self.generators[row] = request, generator
        self.lengths[row] = len(request.input_ids)

    def _close_gaps(self) -> None:
        """Rows 0..n-1 are live again: the last one takes the place of one that left."""
        row = 0
        while row < len(self.rows):
            last = self.rows[-1]
            if last is None or self.rows[row] is None:
                length, generator = self.lengths.pop(), self.generators.pop()
                self.rows.pop()
                if last is not None:
                    self.decoder.move(len(self.rows), row, length)
                    self.rows[row], self.lengths[row], self.generators[row] = last, length, generator
            else:
                row += 1

    def _take(self, rows: Sequence[int], logits: Float[Tensor, "rows vocab"]) -> None:
        """Choose a token for every row and hand it out."""
        best = logits.argmax(-1).tolist()
        for row, scores, token in zip(rows, logits, best, strict=True):
            request = self.rows[row]
            assert request is not None
            logprob = None
            if not request.sampling.plain:
                token, logprob = choose(scores, request.sampling, request.tokens, self.generators[row])
            self._give(row, request, token, logprob)

    def _give(self, row: int, request: Request, token: int, logprob: float | None) -> None:
        if not request.first_token_at:
            request.first_token_at = time.perf_counter()
        if token in request.stop_ids:
            self._leave(row, "stop")
            return
        request.tokens.append(token)
        if logprob is not None:
            request.logprobs.append(logprob)
        if request.on_token is not None:
            request.on_token(token)
        room = self.max_length - len(request.input_ids)
        if len(request.tokens) >= min(request.sampling.max_new_tokens, room):
            self._leave(row, "length")

    def _leave(self, row: int, reason: FinishReason) -> None:
        request = self.rows[row]
        assert request is not None
        self._finish(request, reason)
        self.rows[row] = None

    @staticmethod
    def _finish(request: Request, reason: FinishReason) -> None:
        request.finish_reason = reason
        request.finished_at = time.perf_counter()

    # prompts

    def _embed(self, request: Request) -> Float[Tensor, "length llm_width"]:
        """What a request holds so far: its prompt, and its answer where there is one."""
        visual = request.visual
        if visual is None and request.tiles is not None and len(request.tiles):
            visual = self.encode(request.tiles)
        prompt = self.model.embed(request.input_ids[None].to(self.device), visual=visual)[0]
        if not request.tokens:
            return prompt
        answer = self.model.language.embed(torch.tensor([request.tokens], device=self.device))[0]
        return torch.cat([prompt, answer])

    def _reread(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """A row whose angles have just changed is read anew, its cache with it, so that cached stays uncached."""
        rows = [row for row, length in enumerate(self.lengths) if length == self.model.language.switches_at]
        if rows:
            held = [request for row in rows if (request := self.rows[row]) is not None]
            logits = logits.clone()
            logits[rows] = self.decoder.read([self._embed(request) for request in held], rows)
        return logits

    def _check_pictures(self, request: Request) -> None:
        given = request.visual if request.visual is not None else request.tiles
        num_tiles = 0 if given is None else len(given)
        per_tile = self.model.config.tokens_per_tile
        image_token = self.model.image_token_id
        places = 0 if image_token is None else int((request.input_ids == image_token).sum())
        if places != num_tiles * per_tile:
            raise ValueError(
                f"a prompt with {places} image tokens but {num_tiles} tiles of {per_tile}, which need "
                f"{num_tiles * per_tile}; make them with one Encoder.prompt call"
            )
