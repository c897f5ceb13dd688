"""What users may hand to a dual model by mistake: each error says what was given, and what to give."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from internvl.generate.dual import Dual
from internvl.generate.dual_inputs import check_ids, check_pixels, listed_pictures, listed_texts
from internvl.generate.open_chat import device_of
from internvl.load_dual import LoadedDual
from internvl.zoo import DUAL
from tiny import tiny_dual, tiny_pictures, tiny_tokenizer, unchecked


@pytest.fixture(scope="module")
def dual() -> Dual:
    language = DUAL["tiny-dual"].language
    model = tiny_dual(language=replace(language, settings={**language.settings, "vocab_size": 280}))
    return Dual(LoadedDual(model, tiny_tokenizer(), model.config))


@pytest.mark.parametrize("head", ["c", "g"])
def test_vectors_of_a_bfloat16_model_are_unit_vectors(dual: Dual, head: Any) -> None:
    """Divided by their length in bfloat16 they are up to half a percent off, and cosines pass 1."""
    config = dual.config
    low = Dual(LoadedDual(tiny_dual(language=config.language).to(torch.bfloat16), dual.tokenizer, config))
    images = low.encode_image(tiny_pictures(3), head)
    texts = low.encode_text(["a cat", "ein Hund", "犬"])
    for vectors in (images, texts, low.encode_text(torch.tensor([[1, 20, 2]]))):
        assert vectors.dtype == torch.float32
        assert_close(vectors.norm(dim=1), torch.ones(len(vectors)), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("check", "given", "said"),
    [
        (listed_texts, [], "no text was given; give at least one"),
        (listed_texts, ["a", 5], "text 1 is int '5'; give strings"),
        (listed_texts, [None], "text 0 is NoneType 'None'; give strings"),
        (listed_pictures, [], "no picture was given; give at least one"),
        (listed_pictures, 5, "pictures are int '5'; give a path"),
        (listed_pictures, ["a.jpg", None], "picture 1 is NoneType 'None'; give a path"),
        (check_pixels, torch.zeros(3, 56, 56), r"pixels of shape \(3, 56, 56\); give \(pictures, 3"),
        (check_pixels, torch.zeros(0, 3, 56, 56), "at least one picture"),
        (check_pixels, torch.zeros(1, 3, 56, 56, dtype=torch.uint8), "pixels of torch.uint8; they are normalised"),
    ],
)
def test_what_is_no_text_and_no_picture_is_named(check: Any, given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unchecked(check)(given)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([1, 5, 2]), r"ids of shape \(3,\) and torch.int64; give whole numbers \(texts, length\)"),
        (torch.tensor([[1.0, 2.0]]), "torch.float32; give whole numbers"),
        (torch.tensor([[1, 280]]), "ids run from 1 to 280, but the model knows 0 to 279"),
        (torch.tensor([[1, -3]]), "ids run from -3 to 1"),
    ],
)
def test_ids_that_the_model_does_not_know_are_refused(ids: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unchecked(check_ids)(ids, 280)


def test_the_model_asks_these_questions(dual: Dual) -> None:
    picture = np.zeros((9, 9, 3), np.uint8)
    with pytest.raises(ValueError, match="no text was given"):
        dual.encode_text([])
    with pytest.raises(ValueError, match="is no Unicode at character 10, half a surrogate pair; repair or remove it"):
        dual.encode_text(["\ud83d"])
    with pytest.raises(ValueError, match="ids run from 1 to 900"):
        dual.encode_text(torch.tensor([[1, 900, 2]]))
    with pytest.raises(ValueError, match="ids run from 1 to 900"):
        dual.match([picture], torch.tensor([[1, 900, 2]]))
    with pytest.raises(ValueError, match="batch 0; at least 1"):
        dual.encode_image(picture, batch=0)
    with pytest.raises(ValueError, match="batch 0; at least 1"):
        dual.encode_text("a", batch=0)
    with pytest.raises(ValueError, match="dtype 'int8' is for chat models"):
        Dual.open("tiny-dual", dtype="int8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_said() -> None:
    assert device_of("auto") == "cpu"
    with pytest.raises(ValueError, match="device 'cuda', but torch sees no GPU here; give cpu or auto"):
        device_of("cuda")
