"""InternVL-C and -G from strings and pictures: prompts, sizes, batches, and opening by `internvl.load`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import internvl
from internvl.generate.captions import CaptionSearch
from internvl.generate.dual import MAX_TEXT_TOKENS, Dual, square
from internvl.generate.open_chat import load_chat
from internvl.load_dual import LoadedDual
from internvl.zoo import DUAL
from tiny import tiny_dual, tiny_pictures, tiny_tokenizer

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TEXTS = ["a cat", "", "ein Hund, 犬", "x" * 200, "two words"]


@pytest.fixture(scope="module")
def dual() -> Dual:
    language = DUAL["tiny-dual"].language
    model = tiny_dual(language=replace(language, settings={**language.settings, "vocab_size": 280}))
    return Dual(LoadedDual(model, tiny_tokenizer(), model.config))


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def test_texts_carry_the_prompt_and_any_batch_gives_the_same(dual: Dual) -> None:
    found = dual.encode_text(TEXTS)
    assert found.shape == (5, 24)
    assert_close(found.norm(dim=1), torch.ones(5))
    assert_close(torch.cat([dual.encode_text(text) for text in TEXTS]), found, **CLOSE)
    assert_close(dual.encode_text(TEXTS, batch=2), found, **CLOSE)
    ids, mask = dual.ids(["summarize:" + text for text in TEXTS])
    assert_close(dual.encode_text(ids, mask), found, **CLOSE)
    assert ids.shape[1] == MAX_TEXT_TOKENS
    assert ids[3, 0] == 1
    assert ids[3, -1] == 2
    assert (ids[1] > 0).sum() == len("summarize:") + 2


def test_pictures_come_in_any_form(dual: Dual, tmp_path: Path) -> None:
    images = [picture(90, 60), picture(56, 56, 1), picture(30, 200, 2)]
    images[0].save(tmp_path / "a.png")
    for head in ("c", "g"):
        found = dual.encode_image(images, head)
        assert_close(found.norm(dim=1), torch.ones(3))
        forms = [tmp_path / "a.png", np.asarray(images[1]), images[2]]
        assert_close(dual.encode_image(forms, head, batch=2), found, **CLOSE)
        assert_close(dual.encode_image(str(tmp_path / "a.png"), head), found[:1], **CLOSE)
    assert (dual.encode_image(images[0], fit="crop") - dual.encode_image(images[0])).abs().max() > 1e-3
    pixels = tiny_pictures(2)
    with torch.no_grad():
        assert_close(dual.encode_image(pixels), dual.model.encode_image(pixels), **CLOSE)


@pytest.mark.parametrize(("width", "height"), [(90, 60), (60, 91), (56, 56), (10, 33)])
def test_the_crop_is_the_middle_of_the_shorter_side(width: int, height: int) -> None:
    image = picture(width, height)
    assert square(image, 56, "squash").size == square(image, 56, "crop").size == (56, 56)
    if width == height:
        assert square(image, 56, "crop").tobytes() == image.tobytes()


def test_match_and_captions(dual: Dual) -> None:
    images = [picture(90, 60), picture(56, 56, 1)]
    chances = dual.match(images, ["a cat", "a dog"])
    assert chances.shape == (2,)
    assert ((chances > 0) & (chances < 1)).all()
    assert_close(dual.match(images[1], "a dog"), chances[1:], **CLOSE)
    search = CaptionSearch(beams=2, min_new_tokens=2, max_new_tokens=4)
    captions = dual.caption(images, search)
    assert captions == [dual.caption(image, search)[0] for image in images]
    assert all(isinstance(text, str) for text in captions)


def test_load_opens_names_and_folders(dual: Dual, tmp_path: Path) -> None:
    assert isinstance(internvl.load("tiny-dual"), Dual)
    dual.save(tmp_path)
    again = internvl.load(tmp_path, dtype="float32")
    assert isinstance(again, internvl.Dual)
    assert_close(again.encode_text(TEXTS), dual.encode_text(TEXTS), **CLOSE)
    assert isinstance(internvl.load("tiny-llama"), internvl.Chat)


def test_bad_input_says_what_to_do(dual: Dual, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text was given"):
        dual.ids([])
    with pytest.raises(ValueError, match="no picture was given"):
        dual.encode_image([])
    with pytest.raises(ValueError, match="2 pictures and 1 texts; give one text for each picture"):
        dual.match([picture(9, 9)] * 2, ["a"])
    with pytest.raises(ValueError, match=r"fit 'pad'; it is 'squash'"):
        dual.encode_image(picture(9, 9), fit="pad")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="this model has no tokenizer; give ids"):
        internvl.load("tiny-dual").encode_text("a")
    with pytest.raises(ValueError, match="dtype 'int4' is for chat models"):
        Dual.open("tiny-dual", dtype="int4")
    with pytest.raises(FileNotFoundError, match=r"about 27\.7 GB in bfloat16\) are not here"):
        internvl.load("InternVL-14B-224px")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match="not a picture that Pillow can read"):
        dual.encode_image(tmp_path / "broken.png")


def test_a_dual_model_that_is_asked_to_chat_says_what_it_can_do(tmp_path: Path) -> None:
    internvl.load("tiny-dual").save(tmp_path)
    with pytest.raises(ValueError, match=r"does not chat; open it by internvl\.load, or use internvl embed"):
        load_chat(tmp_path)
