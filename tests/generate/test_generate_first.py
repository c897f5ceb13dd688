"""Chats with models of 1.0: counts, prompts, and the same answers streamed, in a batch, step by step and uncached."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from internvl.data.encode import Encoder
from internvl.data.images import normalise, pad_to_square
from internvl.data.records import Record, RecordError
from internvl.data.templates import Turn
from internvl.generate.engine import Request
from internvl.generate.session import Chat
from internvl.tokens import IGNORE_INDEX, IMAGE_TOKEN
from internvl.train.chat_records import prompted
from internvl.train.settings import Data
from tiny import tiny_first, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = TOKENIZER.convert_tokens_to_ids(IMAGE_TOKEN)
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 100, 3), dtype=np.uint8))
OTHER = PICTURE.rotate(90, expand=True)
SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)


@pytest.fixture(scope="module", params=[True, False], ids=["qllama", "plain"])
def chat(request: pytest.FixtureRequest) -> Chat:
    model = tiny_first(request.param, vocab_size=len(TOKENIZER)).eval()
    model.image_token_id = CONTEXT
    return Chat(model, TOKENIZER)


def test_streamed_batched_and_plain_answers_are_equal(chat: Chat) -> None:
    plain = chat.chat("What?", [PICTURE], max_new_tokens=12)
    assert "".join(chat.stream("What?", [PICTURE], max_new_tokens=12)) == plain.text
    replies = chat.batch(
        ["Hello", {"question": "Which?", "images": [PICTURE, OTHER]}, {"question": "What?", "images": [PICTURE]}],
        max_new_tokens=12,
    )
    assert replies[2].text == plain.text
    assert replies[1].text == chat.chat("Which?", [PICTURE, OTHER], max_new_tokens=12).text
    assert replies[0].text == chat.chat("Hello", max_new_tokens=12).text
    assert replies[1].usage.image_tokens == 2 * chat.config.tokens_per_tile == 2 * (chat.config.num_queries + 16)


@torch.no_grad()
def test_the_cached_answer_is_the_uncached_one(chat: Chat) -> None:
    prompt = chat.encoder.prompt([{"role": "user", "content": "What?"}], [PICTURE])
    request = chat.engine.run([Request(prompt.input_ids, prompt.tiles)])[0]
    ids, pixels = prompt.input_ids[None], normalise(prompt.tiles)
    for token in request.tokens[:8]:
        assert int(chat.model(ids, pixels)[0, -1].argmax()) == token
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)


def test_the_prompt_is_that_of_vicuna_and_nothing_stands_around_a_picture(chat: Chat) -> None:
    prompt = chat.encoder.prompt([{"role": "user", "content": "<image>\nWhat?"}], [PICTURE])
    count = chat.config.tokens_per_tile
    said = TOKENIZER.decode(prompt.input_ids.tolist(), skip_special_tokens=False)
    assert said == f"{SYSTEM} USER: {IMAGE_TOKEN * count}\nWhat? ASSISTANT:"


def test_padded_squares_and_middle_squares(chat: Chat) -> None:
    """Stage A cuts the middle (60 x 100 px: 56 x 93, 18 px away on the left), stage B pads with the mean colour."""
    config = chat.config
    question = [{"role": "user", "content": "What?"}]
    padded = Encoder(TOKENIZER, config).prompt(question, [PICTURE]).tiles[0].permute(1, 2, 0).numpy()
    square = pad_to_square(PICTURE)
    assert square.size == (100, 100)
    assert square.getpixel((0, 0)) == (123, 116, 103)
    assert np.array_equal(padded, np.asarray(square.resize((56, 56), Image.Resampling.BICUBIC)))
    stage_a = prompted(config, Data(pad_to_square=False))
    middle = Encoder(TOKENIZER, stage_a).prompt(question, [PICTURE]).tiles[0].permute(1, 2, 0).numpy()
    resized = np.asarray(PICTURE.resize((93, 56), Image.Resampling.BICUBIC))
    assert np.array_equal(middle, resized[:, 18:74])
    tall = Encoder(TOKENIZER, stage_a).prompt(question, [OTHER]).tiles[0].permute(1, 2, 0).numpy()
    assert np.array_equal(tall, np.asarray(OTHER.resize((56, 93), Image.Resampling.BICUBIC))[18:74])


def test_plain_learns_the_caption_behind_the_picture_alone(chat: Chat) -> None:
    """Official preprocess_plain: of the question only the picture stays; the caption and its line break are learned."""
    config = prompted(chat.config, Data(template="plain"))
    turns = (Turn("user", "<image>\nDescribe it."), Turn("assistant", "a red square"))
    made = Encoder(TOKENIZER, config)
    record = Record(turns, (PICTURE,), source="a:1")
    sample = made.encode(record)
    said = TOKENIZER.decode(sample.input_ids.tolist(), skip_special_tokens=False)
    assert said == f"{IMAGE_TOKEN * config.tokens_per_tile}a red square\n"
    learned = sample.labels[sample.labels != IGNORE_INDEX]
    assert TOKENIZER.decode(learned.tolist()) == "a red square\n"
    assert made.counts(record) == (len(sample.input_ids), 1)
    assert made.outline(record).learned == len(learned)
    layout = made.layout(record)
    assert layout.pictures == ((0, config.tokens_per_tile, 1),)  # nothing around it
    text = made.encode(Record((Turn("user", "Say it."), Turn("assistant", "it")), source="a:2"))
    assert TOKENIZER.decode(text.input_ids.tolist()) == "it\n"


def test_a_cut_never_takes_a_part_of_a_picture(chat: Chat) -> None:
    count = chat.config.tokens_per_tile
    turns = (Turn("user", "<image>"), Turn("assistant", "yes"))
    config = prompted(chat.config, Data(template="plain"))
    for room, fits in ((count - 1, False), (count + 1, True)):
        made = Encoder(TOKENIZER, config, max_length=room, overlong="cut")
        if fits:
            assert len(made.encode(Record(turns, (PICTURE,), source="a:1")).input_ids) == room
            continue
        with pytest.raises(RecordError, match=f"its images end at token {count}; the limit is {room}"):
            made.encode(Record(turns, (PICTURE,), source="a:1"))


def test_another_template_brings_its_own_system_text(chat: Chat) -> None:
    assert prompted(chat.config, Data()) == chat.config
    assert prompted(chat.config, Data(template="plain")).system_message is None
    assert prompted(chat.config, Data(max_tiles=3)).max_tiles == 3


def test_a_prompt_with_other_counts_is_refused(chat: Chat) -> None:
    prompt = chat.encoder.prompt([{"role": "user", "content": "What?"}], [PICTURE])
    count = chat.config.tokens_per_tile
    at = int((prompt.input_ids == CONTEXT).nonzero()[0])
    short = torch.cat([prompt.input_ids[:at], prompt.input_ids[at + 1 :]])
    with pytest.raises(ValueError, match=f"{count - 1} image tokens but 1 tiles of {count}"):
        chat.engine.submit(Request(short, prompt.tiles))
