"""Encoding laws: header counts are real counts, answers alone are learned, what a user types is only text."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tokenizers import decoders

from internvl.data.encode import Encoder
from internvl.data.media import FrameSettings
from internvl.data.records import Record, parse_record
from internvl.data.templates import TEMPLATES, Turn
from internvl.data.tiling import cut
from internvl.tokens import IGNORE_INDEX, IMAGE_TOKEN, token_id
from tiny import tiny_chat_config, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
CONTEXT = token_id(TOKENIZER, IMAGE_TOKEN)
END = token_id(TOKENIZER, "<|im_end|>")
text = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).map(lambda s: s.replace("<", "("))
words = text.filter(str.strip)


def encoder(tokenizer: Any = TOKENIZER, config: dict[str, Any] | None = None, **settings: Any) -> Encoder:
    return Encoder(tokenizer, tiny_chat_config(**(config or {})), **settings)


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


def record(images: Sequence[Image.Image] = (), question: str = "What?", answer: str = "A cat.") -> Record:
    marks = "<image>\n" * len(images)
    return Record((Turn("user", marks + question), Turn("assistant", answer)), tuple(images), source="set.jsonl:4")


def learned_text(ids: torch.Tensor, labels: torch.Tensor) -> str:
    assert torch.equal(labels[labels != IGNORE_INDEX], ids[labels != IGNORE_INDEX])
    return str(TOKENIZER.decode(labels[labels != IGNORE_INDEX].tolist()))


@given(
    st.lists(st.tuples(st.integers(1, 260), st.integers(1, 260)), max_size=3),
    st.fixed_dictionaries(
        {
            "min_tiles": st.integers(1, 3),
            "max_tiles": st.integers(3, 9),
            "thumbnail": st.booleans(),
            "dynamic_tiles": st.booleans(),
            "pad_to_square": st.booleans(),
            "crop": st.booleans(),
            "image_marks": st.booleans(),
            "downsample": st.sampled_from([0.5, 1.0]),
            "template": st.sampled_from(sorted(TEMPLATES)),
        }
    ),
    words,
)
def test_header_counts_are_real_counts(sizes: list[tuple[int, int]], config: dict[str, Any], answer: str) -> None:
    made = encoder(config=config)
    given_record = record([noise(*size) for size in sizes], answer=answer)
    sample = made.encode(given_record)
    assert made.counts(given_record) == (len(sample.input_ids), sample.num_tiles)
    assert int((sample.input_ids == CONTEXT).sum()) == sample.num_tiles * made.config.tokens_per_tile
    assert sample.labels.shape == sample.input_ids.shape
    assert sample.source == "set.jsonl:4"


@given(st.lists(st.tuples(words, words), min_size=1, max_size=3), st.sampled_from(sorted(TEMPLATES)))
def test_learned_is_each_answer_and_its_end(pairs: list[tuple[str, str]], name: str) -> None:
    turns = [Turn(role, said) for pair in pairs for role, said in zip(("user", "assistant"), pair, strict=True)]
    sample = encoder(config={"template": name}).encode(Record(tuple(turns)))
    template = TEMPLATES[name]
    answers = [answer.strip() if template.strips else answer for _, answer in pairs]
    expected = "".join(f"{template.gap}{answer}{template.assistant_end}" for answer in answers)
    assert learned_text(sample.input_ids, sample.labels) == expected


@given(words, words, st.sampled_from(["internvl2_5", "Hermes-2", "phi3-chat", "internvl_zh"]))
def test_a_prompt_is_the_beginning_of_its_training_sample(question: str, answer: str, name: str) -> None:
    made = encoder(config={"template": name})
    given_record = record([noise(120, 60)], question, answer)
    prompt = made.prompt(given_record.turns[:1], given_record.images)
    sample = made.encode(given_record)
    assert torch.equal(sample.input_ids[: len(prompt.input_ids)], prompt.input_ids)
    assert (sample.labels[: len(prompt.input_ids)] == IGNORE_INDEX).all()
    assert torch.equal(prompt.tiles, sample.tiles)


def test_tiles_are_those_of_each_image_in_order() -> None:
    made = encoder(config={"max_tiles": 9})
    images = [noise(150, 50, 1), noise(50, 150, 2)]
    sample = made.encode(record(images))
    expected = torch.cat([cut(image, 1, 4, True, made.config.tile_size) for image in images])
    assert torch.equal(sample.tiles, expected)
    assert made.encode(record()).tiles.shape == (0, 3, made.config.tile_size, made.config.tile_size)


def test_several_images_share_the_tiles() -> None:
    made = encoder(config={"max_tiles": 12, "thumbnail": False})
    for count, most in ((1, 12), (2, 6), (5, 2), (13, 1)):
        sample = made.encode(record([noise(560, 560)] * count))
        assert sample.num_tiles <= count * most
    assert made.encode(record([noise(560, 560)] * 13)).num_tiles == 13


# one path, no state


def test_an_encoder_pickles_and_gives_the_same() -> None:
    made = encoder(max_length=900, augment=True)
    copied = pickle.loads(pickle.dumps(made))
    first, second = (one.encode(record([noise(99, 60)]), np.random.default_rng(3)) for one in (made, copied))
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.tiles, second.tiles)


def test_truncation_left_in_the_tokenizer_changes_nothing() -> None:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer.from_str(TOKENIZER.backend_tokenizer.to_str())
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>")
    before = encoder(tokenizer).encode(record()).input_ids
    tokenizer("a long text", truncation=True, max_length=2, padding="max_length")
    assert torch.equal(encoder(tokenizer).encode(record()).input_ids, before)


def test_augmentation_follows_the_generator() -> None:
    made = encoder(augment=True)
    plain, first, second, third = (
        one.encode(record([noise(80, 80)]), rng).tiles
        for one, rng in (
            (encoder(), None),
            (made, np.random.default_rng(1)),
            (made, np.random.default_rng(1)),
            (made, np.random.default_rng(2)),
        )
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert not torch.equal(first, plain)
    assert torch.equal(made.encode(record([noise(80, 80)])).tiles, plain)


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

        def __len__(self) -> int:
            return 1

    with pytest.raises(ValueError, match="Slow gives no character offsets; load the fast tokenizer"):
        encoder(Slow()).encode(record())


def test_a_tokenizer_without_image_tokens_is_refused() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0}, [])))
    with pytest.raises(ValueError, match="no token '<IMG_CONTEXT>'; add the special tokens"):
        encoder(bare).encode(record())


# what people type


MERGING = tiny_tokenizer((("a", "b"), ("ab", "c"), ("Ġ", "a")))


@given(st.text("abc é<", min_size=1, max_size=12).filter(str.strip))
def test_a_spelled_answer_is_learned_letter_by_letter_and_reads_as_written(answer: str) -> None:
    plain = Record((Turn("user", "ab c"), Turn("assistant", answer)))
    spelled = replace(plain, turns=(plain.turns[0], Turn("assistant", answer, spelled=True)))
    whole, apart = (encoder(MERGING).encode(one) for one in (plain, spelled))
    learned = apart.labels[apart.labels != IGNORE_INDEX].tolist()
    said = answer.strip() if encoder(MERGING).template.strips else answer
    assert MERGING.decode(learned) == MERGING.decode(whole.labels[whole.labels != IGNORE_INDEX].tolist())
    letters = [MERGING.encode(letter, add_special_tokens=False) for letter in said]
    assert learned[: sum(map(len, letters))] == [number for ids in letters for number in ids]
    assert torch.equal(apart.input_ids[apart.labels == IGNORE_INDEX], whole.input_ids[whole.labels == IGNORE_INDEX])
    assert encoder(MERGING).counts(spelled).tokens == len(apart.input_ids)


def test_spelling_makes_more_tokens_and_comes_from_the_record() -> None:
    turns = [{"from": "human", "value": "Read."}, {"from": "gpt", "value": "abc"}]
    lengths = [encoder(MERGING).encode(parse_record({"conversations": turns, **more})).num_learned
               for more in ({}, {"spelled": False}, {"spelled": True})]  # fmt: skip
    assert lengths[0] == lengths[1] == lengths[2] - 2
    with pytest.raises(ValueError, match="`spelled` is 'yes'; give true or false"):
        parse_record({"conversations": turns, "spelled": "yes"})


def test_a_tokenizer_that_cannot_spell_is_refused() -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer())
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()  # a space between pieces
    spelled = Record((Turn("user", "Read."), Turn("assistant", "ab", spelled=True)), source="set.jsonl:4")
    with pytest.raises(ValueError, match=r"set.jsonl:4.*puts spaces between letters.*remove `spelled`"):
        encoder(tokenizer).encode(spelled)


@pytest.mark.parametrize("typed", ["<IMG_CONTEXT>", "<img>", "</img>", "<|im_end|>", "<|im_start|>", "</s>", "<s>"])
@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_control_tokens_in_a_text_are_only_text(typed: str, role: str) -> None:
    texts = {"user": "Q", "assistant": "A", "system": "S"}
    plain, typed_record = (
        Record((Turn("system", t["system"]), Turn("user", t["user"]), Turn("assistant", t["assistant"])))
        for t in (texts, {**texts, role: f"one {typed} two"})
    )
    one, other = encoder().encode(plain), encoder().encode(typed_record)
    number = token_id(TOKENIZER, typed)
    assert int((one.input_ids == number).sum()) == int((other.input_ids == number).sum())
    assert typed in TOKENIZER.decode(other.input_ids.tolist())
    expected = "A<|im_end|>" if role != "assistant" else f"one {typed} two<|im_end|>"
    assert learned_text(other.input_ids, other.labels) == expected


def test_a_typed_image_token_does_not_shift_the_images() -> None:
    made = encoder()
    prompt = made.prompt([{"role": "user", "content": "<image>\nWhat is <IMG_CONTEXT>?"}], [noise(60, 60)])
    assert int((prompt.input_ids == CONTEXT).sum()) == len(prompt.tiles) * made.config.tokens_per_tile


def test_region_tokens_may_be_typed() -> None:
    sample = encoder().encode(record(answer="<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"))
    for token in ("<ref>", "</ref>", "<box>", "</box>"):
        assert int((sample.labels == token_id(TOKENIZER, token)).sum()) == 1


# marks and images


@pytest.mark.parametrize(("marks", "images"), [(0, 1), (2, 1), (1, 0), (1, 2)])
def test_marks_and_images_must_agree(marks: int, images: int) -> None:
    turns = (Turn("user", "<image>" * marks + "Q"), Turn("assistant", "A"))
    said = f"set.jsonl:8: {marks} <image> marks but {images} images; make them equal"
    with pytest.raises(ValueError, match=said):
        encoder().encode(Record(turns, tuple([noise(9, 9)] * images), source="set.jsonl:8"))


def test_a_prompt_says_how_many_marks_and_images() -> None:
    with pytest.raises(ValueError, match="2 <image> marks in the questions but 1 images; make them equal"):
        encoder().prompt([{"role": "user", "content": "<image><image>"}], [noise(9, 9)])
    with pytest.raises(ValueError, match="1 <image> marks in the questions but 2 images; make them equal"):
        encoder().prompt([{"role": "user", "content": "<image>"}], [noise(9, 9)] * 2)


def test_images_without_marks_belong_to_the_last_question() -> None:
    made = encoder()
    one = made.prompt([{"role": "user", "content": "Q"}], [noise(9, 9)])
    assert torch.equal(one.input_ids, made.prompt([{"role": "user", "content": "<image>\nQ"}], [noise(9, 9)]).input_ids)
    two = made.prompt([{"role": "user", "content": "Q"}], [noise(9, 9)] * 2)
    marked = [{"role": "user", "content": "Image-1: <image>\nImage-2: <image>\nQ"}]
    assert torch.equal(two.input_ids, made.prompt(marked, [noise(9, 9)] * 2).input_ids)
    history = [{"role": "user", "content": "<image>\nQ"}, {"role": "assistant", "content": "A"}]
    later = made.prompt([*history, {"role": "user", "content": "R"}], [noise(9, 9)] * 2)
    assert "<image>" not in TOKENIZER.decode(later.input_ids.tolist())
    assert len(later.tiles) == 2


def test_content_lists_carry_their_images() -> None:
    made = encoder()
    picture = noise(120, 60)
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "Q"}]
    inside = made.prompt([{"role": "user", "content": parts}])
    beside = made.prompt([{"role": "user", "content": "<image>\nQ"}], [picture])
    assert torch.equal(inside.input_ids, beside.input_ids)
    assert torch.equal(inside.tiles, beside.tiles)


def test_max_tiles_of_a_prompt() -> None:
    made = encoder(config={"max_tiles": 12})
    message = [{"role": "user", "content": "Q"}]
    assert len(made.prompt(message, [noise(560, 560)], max_tiles=1).tiles) == 1
    assert len(made.prompt(message, [noise(560, 560)]).tiles) == 10


# too long


def test_overlong_samples_are_refused_by_default() -> None:
    with pytest.raises(ValueError, match=r"set\.jsonl:4: \d+ tokens; the limit is 60; shorten it, raise max_length"):
        encoder(max_length=60).encode(record(answer="word " * 40))


def test_cutting_keeps_the_beginning_and_says_how_much_is_gone() -> None:
    whole = encoder().encode(record([noise(56, 56)], answer="word " * 40))
    limit = len(whole.input_ids) - 30
    sample = encoder(max_length=limit, overlong="cut").encode(record([noise(56, 56)], answer="word " * 40))
    assert sample.num_cut == 30
    assert torch.equal(sample.input_ids, whole.input_ids[:limit])
    assert torch.equal(sample.labels, whole.labels[:limit])
    assert (
        encoder(max_length=limit, overlong="cut").counts(record([noise(56, 56)], answer="word " * 40)).tokens == limit
    )


def test_cutting_never_cuts_an_image() -> None:
    given_record = record([noise(56, 56)], answer="word " * 40)
    whole = encoder().encode(given_record).input_ids
    end = int((whole == token_id(TOKENIZER, "</img>")).nonzero()) + 1
    for limit in range(end - 4, end):
        with pytest.raises(ValueError, match=f"its images end at token {end}; the limit is {limit}; raise max_length"):
            encoder(max_length=limit, overlong="cut").encode(given_record)


def test_a_sample_without_anything_to_learn_is_an_error() -> None:
    whole = encoder().encode(record())
    first = int((whole.labels != IGNORE_INDEX).nonzero()[0])
    with pytest.raises(ValueError, match=rf"set\.jsonl:4: no answer among its first {first} tokens"):
        encoder(max_length=first, overlong="cut").encode(record())
    assert encoder(max_length=first + 1, overlong="cut").encode(record()).num_learned == 1


def test_overlong_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a prompt of \d+ tokens; the limit is 30; shorten it or lower max_tiles"):
        encoder(max_length=30).prompt([{"role": "user", "content": "word " * 40}])


# video


def frames_folder(tmp_path: Path, count: int = 6) -> Path:
    for number in range(count):
        Image.new("RGB", (20, 10), (number * 20, 0, 0)).save(tmp_path / f"frame_{number}.png")
    return tmp_path


def test_video_frames_are_tiles_and_lines(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path)
    settings = FrameSettings("rand", 2, 4)
    made = encoder(frames=settings)
    data = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}], "video": str(folder)}
    given_record = parse_record(data)
    seen = set()
    for seed in range(12):
        sample = made.encode(given_record, np.random.default_rng(seed))
        assert made.counts(given_record, np.random.default_rng(seed)) == (len(sample.input_ids), sample.num_tiles)
        seen.add(sample.num_tiles)
    assert seen == {2, 3, 4}
    sample = encoder(frames=replace(settings, sampling="centres", max_frames=3)).encode(given_record)
    spoken = TOKENIZER.decode([i for i in sample.input_ids.tolist() if i != CONTEXT])
    assert "Frame-1: <img></img>\nFrame-2: <img></img>\nFrame-3: <img></img>\nQ" in spoken
    assert [int(tile[0, 0, 0]) for tile in sample.tiles] == [0, 40, 60]


def test_video_frames_are_padded_like_pictures(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path)
    made = encoder(config={"pad_to_square": True, "dynamic_tiles": False}, frames=FrameSettings("centres", 2, 2))
    parts = [{"type": "video", "video": str(folder)}, {"type": "text", "text": "Q"}]
    frames = made.prompt([{"role": "user", "content": parts}]).tiles
    picture = made.prompt([{"role": "user", "content": "Q"}], [folder / "frame_1.png"]).tiles
    assert torch.equal(frames[0], picture[0])
    assert int(frames[0, 1, 0, 0]) > 0  # the mean colour above, where the frame itself has no green


def test_videos_and_images_mix_in_a_prompt(tmp_path: Path) -> None:
    folder = frames_folder(tmp_path)
    made = encoder(frames=FrameSettings("centres", 2, 2, label="Frame{}: "))
    parts = [
        {"type": "video", "video": str(folder)},
        {"type": "image", "image": Image.new("RGB", (56, 56), (0, 255, 0))},
        {"type": "text", "text": "Q"},
    ]
    prompt = made.prompt([{"role": "user", "content": parts}])
    spoken = TOKENIZER.decode([i for i in prompt.input_ids.tolist() if i != CONTEXT])
    assert "Frame1: <img></img>\nFrame2: <img></img>\n<img></img>\nQ" in spoken
    assert [int(tile[1, 0, 0]) for tile in prompt.tiles] == [0, 0, 255]
