"""Chats with a tiny model: the same answers streamed, in a batch, in every form; history; clear errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import internvl
from internvl.generate.answers import Region
from internvl.generate.features import FeatureCache
from internvl.generate.session import Chat
from internvl.load import save_checkpoint
from tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 120, 3), dtype=np.uint8))
OTHER = PICTURE.rotate(90, expand=True)


@pytest.fixture(scope="module")
def chat() -> Chat:
    image_token_id = TOKENIZER.convert_tokens_to_ids("<IMG_CONTEXT>")
    return Chat(tiny_model(vocab_size=len(TOKENIZER), image_token_id=image_token_id), TOKENIZER, max_tiles=2)


@pytest.fixture(scope="module")
def folder(chat: Chat, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    chat.save(out)
    return out


def test_streamed_batched_and_plain_answers_are_equal(chat: Chat) -> None:
    plain = chat.chat("What?", [PICTURE], max_new_tokens=20)
    assert plain.text
    assert "".join(chat.stream("What?", [PICTURE], max_new_tokens=20)) == plain.text
    others = ["Hello", {"question": "Which one?", "images": [PICTURE, OTHER], "temperature": 1.0, "seed": 4}]
    replies = chat.batch([*others, {"question": "What?", "images": [PICTURE]}], max_new_tokens=20)
    assert replies[2].text == plain.text
    assert replies[1].text == chat.chat("Which one?", [PICTURE, OTHER], max_new_tokens=20, temperature=1.0, seed=4).text
    assert str(replies[0]) == chat.chat("Hello", max_new_tokens=20).text


def test_every_source_of_a_picture_gives_the_same_answer(chat: Chat, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    PICTURE.save(path)
    sources = [PICTURE, path, str(path), path.read_bytes(), np.asarray(PICTURE)]
    assert len({chat.chat("What?", [source], max_new_tokens=8).text for source in sources}) == 1


def test_usage_counts(chat: Chat) -> None:
    reply = chat.chat("What?", [PICTURE], max_new_tokens=5)
    usage = reply.usage
    assert (usage.tiles, usage.image_tokens, usage.new_tokens, reply.finish_reason) == (3, 12, 5, "length")
    assert usage.prompt_tokens == len(
        chat.encoder.prompt([{"role": "user", "content": "What?"}], [PICTURE], max_tiles=2)[0]
    )
    assert 0 < usage.seconds_to_first_token <= usage.seconds
    assert chat.chat("What?", [PICTURE], max_new_tokens=5, max_tiles=1).usage.tiles == 1


def test_a_follow_up_question_encodes_no_tile_again(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = Chat(chat.model, TOKENIZER, max_tiles=2)
    first = fresh.chat("What?", [PICTURE], max_new_tokens=5)
    seen: list[int] = []
    encode = fresh.engine.encode
    monkeypatch.setattr(fresh.engine, "encode", lambda tiles: seen.append(len(tiles)) or encode(tiles))
    second = fresh.chat("And?", history=first.messages, max_new_tokens=5)
    assert (seen, second.usage.tiles) == ([], 3)
    assert second.text == chat.chat("And?", history=first.messages, max_new_tokens=5).text
    assert [message["role"] for message in second.messages] == ["user", "assistant", "user", "assistant"]
    fresh.chat("New?", [OTHER], history=second.messages, max_new_tokens=5)
    assert sum(seen) < 6


def test_feature_cache_is_bounded_and_exact() -> None:
    cache = FeatureCache(max_bytes=3 * 16)
    tiles = torch.arange(5, dtype=torch.uint8)[:, None, None, None].expand(5, 3, 2, 2)
    calls: list[int] = []

    def encode(some: torch.Tensor) -> torch.Tensor:
        calls.append(len(some))
        return some[:, 0, :1].float().repeat(1, 2, 1)

    assert torch.equal(cache.lookup(tiles, encode)[:, 0, 0], torch.arange(5.0))
    assert cache.num_bytes <= 48
    again = cache.lookup(tiles[[4, 4, 3, 0]], encode)
    assert torch.equal(again[:, 0, 0], torch.tensor([4.0, 4.0, 3.0, 0.0]))
    assert calls == [5, 1]


def test_stop_strings_and_stop_ids(chat: Chat) -> None:
    free = chat.chat("What?", [PICTURE], max_new_tokens=60)
    stop = next(letter for letter in free.text[2:] if letter.isascii() and letter.isprintable() and letter != " ")
    cut = chat.chat("What?", [PICTURE], max_new_tokens=60, stop=[stop])
    assert cut.text == free.text[: free.text.index(stop)].strip()
    assert cut.finish_reason == "stop"
    assert chat.batch(["What?"], images=[PICTURE], max_new_tokens=60, stop=[stop])[0].text == cut.text
    assert chat.engine.idle or chat.engine.step() is None
    assert set(TOKENIZER.convert_tokens_to_ids(["<|im_end|>", "</s>"])) <= chat.stop_ids


def test_boxes_are_in_pixels_of_the_last_picture(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = chat.stream("Where?", [OTHER, PICTURE], max_new_tokens=1)
    words = TOKENIZER.encode("<ref>cat</ref><box>[[250, 500, 500, 1000]]</box>", add_special_tokens=False)
    monkeypatch.setattr(stream, "_tokens", (token for token in words))
    assert stream.reply.boxes == (Region("cat", (30, 30, 60, 60), (250, 500, 500, 1000)),)


def test_a_closed_stream_has_what_was_said_so_far(chat: Chat) -> None:
    stream = chat.stream("What?", [PICTURE], max_new_tokens=50)
    first = next(stream)
    stream.close()
    assert list(stream) == []
    assert stream.reply.text == first.strip()


def test_system_message_is_replaced(chat: Chat) -> None:
    usages = [chat.chat("Hi", system=text, max_new_tokens=1).usage.prompt_tokens for text in ("", "Be brief.")]
    assert usages[1] - usages[0] == len("Be brief.")


def test_loaded_folder_answers_alike_and_gives_numbers(chat: Chat, folder: Path) -> None:
    loaded = internvl.load(folder, dtype="float32", max_tiles=2)
    assert (
        loaded.chat("What?", [PICTURE], max_new_tokens=8).text == chat.chat("What?", [PICTURE], max_new_tokens=8).text
    )
    tiles = torch.randn(2, 3, 56, 56)
    assert loaded.encode_tiles(tiles).shape == (2, 4, 64)
    ids = torch.tensor([[5, *[chat.model.image_token_id] * 8, 7]])
    torch.testing.assert_close(loaded.logits(ids, tiles), chat.model(ids, tiles).detach())


@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4", "auto", torch.float32])
def test_every_dtype_answers(folder: Path, dtype: str | torch.dtype) -> None:
    assert internvl.load(folder, dtype=dtype).chat("What?", [PICTURE], max_new_tokens=4).usage.new_tokens == 4


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_rounded_weights_that_change_answers_are_refused(folder: Path, dtype: str) -> None:
    with pytest.raises(ValueError, match=r"limit 1e-12.*bfloat16"):
        internvl.load(folder, dtype=dtype, max_kl=1e-12)
    internvl.load(folder, dtype=dtype, max_kl=10.0)


def test_saving_a_four_bit_model_saves_its_weights(folder: Path, tmp_path: Path) -> None:
    loaded = internvl.load(folder, dtype="int4")
    loaded.chat("What?", max_new_tokens=2)
    loaded.save(tmp_path / "out")
    again = internvl.load(tmp_path / "out", dtype="bfloat16")
    for (name, ours), theirs in zip(loaded.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(ours, theirs), name


def test_end_of_text_of_the_generation_config_is_read(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert {7, 8} <= internvl.load(folder).stop_ids
    (folder / "generation_config.json").unlink()


def test_a_folder_without_tokenizer_gives_numbers_and_a_clear_error(chat: Chat, tmp_path: Path) -> None:
    save_checkpoint(chat.model, None, tmp_path / "bare")
    bare = internvl.load(tmp_path / "bare", dtype="float32")
    assert bare.logits(torch.tensor([[5, 6]])).shape == (1, 2, len(TOKENIZER))
    with pytest.raises(ValueError, match="no tokenizer"):
        bare.chat("What?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"question": "<image><image>", "images": [PICTURE]}, "2 <image> marks but 1 images"),
        ({"question": "What?", "images": ["missing.png"]}, "missing.png: no such picture"),
        ({"question": "word " * 600}, r"tokens; the model takes 1 to 511.*max_tiles"),
        ({"question": "What?", "temperature": -1}, "temperature -1"),
    ],
)
def test_what_cannot_be_answered_is_named(chat: Chat, arguments: dict, said: str) -> None:
    with pytest.raises((ValueError, OSError), match=said):
        chat.chat(**arguments)
    with pytest.raises((ValueError, OSError), match=said):
        chat.batch(["Hi", arguments])


def test_wrong_names_are_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype 'int3'; it is one of"):
        internvl.load(folder, dtype="int3")
    with pytest.raises(FileNotFoundError, match="pocket"):
        internvl.load("nothing")
    with pytest.raises(FileNotFoundError, match="the hub did not give it"):  # tests are offline
        internvl.load("OpenGVLab/none")
    with pytest.raises(ValueError, match="max_tiles 0"):
        internvl.load(folder, max_tiles=0)


def test_a_native_folder_opens_as_a_chat(chat: Chat, tmp_path: Path) -> None:
    """Its model_type is that of InternVL-C and -G."""
    chat.save(tmp_path, layout="native")
    loaded = internvl.load(tmp_path, dtype="float32", max_tiles=2)
    assert isinstance(loaded, Chat)
    assert (
        loaded.chat("What?", [PICTURE], max_new_tokens=9).text == chat.chat("What?", [PICTURE], max_new_tokens=9).text
    )
