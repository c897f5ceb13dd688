"""A stage on a tiny model and records of random ids, without files: what the laws of the loop are tested on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from internvl.batch import ChatBatch
from internvl.tokens import IGNORE_INDEX, SPECIAL_TOKENS, token_id
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule
from internvl.train.stages.sft import Sft
from tiny import IMAGE_TOKEN_ID, tiny_model, tiny_tokenizer

IMAGE_ID = token_id(tiny_tokenizer(), SPECIAL_TOKENS[2])
VOCAB = len(tiny_tokenizer())
assert IMAGE_TOKEN_ID != IMAGE_ID


def sample(index: int) -> tuple[list[int], list[int], torch.Tensor]:
    """Ids, labels and tiles of one record; every fourth is text alone."""
    generator = torch.Generator().manual_seed(index)
    num_tiles = index % 4 and 1 + index % 2
    text = torch.randint(10, 100, (4 + index % 5,), generator=generator).tolist()
    ids = [3, *[IMAGE_ID] * (4 * num_tiles), *text]
    labels = [IGNORE_INDEX] * (len(ids) - 3) + ids[-3:]
    tiles = torch.randint(0, 256, (num_tiles, 3, 56, 56), generator=generator, dtype=torch.uint8)
    return ids, labels, tiles


def collate(indices: list[int]) -> ChatBatch:
    samples = [sample(index) for index in indices]
    length = max(len(ids) for ids, _, _ in samples)

    def padded(rows: list[list[int]], fill: int) -> torch.Tensor:
        return torch.tensor([row + [fill] * (length - len(row)) for row in rows])

    labels = padded([labels for _, labels, _ in samples], IGNORE_INDEX)
    mask = padded([[1] * len(ids) for ids, _, _ in samples], 0).bool()
    return ChatBatch(
        input_ids=padded([ids for ids, _, _ in samples], 0),
        labels=labels,
        loss_weights=(labels != IGNORE_INDEX).float() * torch.tensor(indices).add(1).sqrt()[:, None],
        position_ids=torch.arange(length).expand(len(samples), -1).contiguous(),
        tiles=torch.cat([tiles for _, _, tiles in samples]),
        attention_mask=mask,
        num_samples=len(samples),
    )


class Records:
    """An endless, seekable stream of batches in the manner of the loader."""

    def __init__(self, num_records: int, batch: int) -> None:
        self.num_records, self.batch, self.position = num_records, batch, 0
        self.num_cut, self.skipped = 0, dict[str, str]()

    def __iter__(self) -> Iterator[ChatBatch]:
        while True:
            indices = [(self.position + i) % self.num_records for i in range(self.batch)]
            self.position += self.batch
            yield collate(indices)

    def dealt(self, rank: int, num_ranks: int) -> Iterator[ChatBatch | None]:
        for place, batch in enumerate(self):
            yield batch if place % num_ranks == rank else None

    def __len__(self) -> int:
        return -(-self.num_records // self.batch)

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def once(self) -> Iterator[ChatBatch]:
        for start in range(0, self.num_records, self.batch):
            yield collate(list(range(start, min(self.num_records, start + self.batch))))

    def describe(self, batch: ChatBatch) -> str:
        return f"{batch.num_samples} samples before {self.position}"


def tiny_run(out: Any, **changes: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "out": str(out),
        "model": "tiny-llama",
        "vision": Part("full"),
        "connector": Part("full"),
        "language": Part("full"),
        "data": Data(batch_samples=4),
        "optimiser": Optimiser(peak_lr=1e-3),
        "schedule": Schedule(steps=6, warmup_steps=2),
        "log_every": 1,
        "save_every": 2,
        "export": "none",
        "device": "cpu",
    }
    return RunConfig(**{**settings, **changes})


def tiny_stage(run: RunConfig, *, family: str = "llama", tied: bool = False, num_records: int = 10) -> Sft:
    model = tiny_model(family, vocab_size=VOCAB, image_token_id=IMAGE_ID)
    if tied:
        model = tie(model)
    loader = Records(num_records, run.data.batch_samples)
    return Sft(run, model, tiny_tokenizer(), loader, Records(5, 2))  # type: ignore[arg-type]


def tie(model: Any) -> Any:
    """The same model with its output head sharing the token table."""
    language = model.language.model
    language.config.tie_word_embeddings = True
    language.tie_weights()
    assert language.lm_head.weight is language.model.embed_tokens.weight
    return model
