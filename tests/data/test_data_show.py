"""What `internvl data show` shows is the sample that training makes: its tokens, its weights, its tiles."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from internvl.data.encode import Encoder
from internvl.data.records import parse_record
from internvl.data.show import LEARNED, arrange, tell, to_html, to_picture, view
from internvl.data.weighting import weigh
from tiny import tiny_chat_config, tiny_tokenizer

ENCODER = Encoder(tiny_tokenizer(), tiny_chat_config(max_tiles=6, thumbnail=True))


@pytest.fixture
def record(tmp_path: Path) -> Any:
    """Two pictures of other shapes, two answers; every tile of the first has a colour of its own."""
    colours = np.arange(18, dtype=np.uint8).reshape(2, 3, 3) * 14
    Image.fromarray(colours.repeat(56, 0).repeat(56, 1)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 90), "blue").save(tmp_path / "tall.png")
    turns = [("human", "<image> <image> <b>What?</b>"), ("gpt", "A cat & 猫."), ("human", "Why?"), ("gpt", "Because.")]
    data = {
        "image": ["wide.png", "tall.png"],
        "conversations": [{"from": who, "value": text} for who, text in turns],
    }
    return parse_record(data, str(tmp_path), "set.jsonl:3")


@pytest.mark.parametrize("weighting", ["token", "sample", "square"])
def test_spans_are_the_tokens_of_the_sample(record: Any, weighting: Any) -> None:
    sample = ENCODER.encode(record)
    seen = view(record, ENCODER, weighting)
    weights = [span.weight for span in seen.spans for _ in range(span.num_tokens)]
    assert weights == weigh(sample.labels, weighting).tolist()
    learned = [span.text for span in seen.spans if span.weight]
    assert learned == ["A cat & 猫.<|im_end|>", "Because.<|im_end|>"]
    whole = "".join(span.text * (span.num_tokens if span.is_image else 1) for span in seen.spans)
    assert whole == ENCODER.tokenizer.decode(sample.input_ids.tolist())


def test_pictures_have_their_own_tiles_in_their_grid(record: Any) -> None:
    sample = ENCODER.encode(record)
    seen = view(record, ENCODER)
    assert [shown.grid for shown in seen.pictures] == [(2, 1), (1, 3)]  # three tiles each
    assert all(shown.has_thumbnail for shown in seen.pictures)
    assert sum(len(shown.tiles) for shown in seen.pictures) == sample.num_tiles
    single = Encoder(ENCODER.tokenizer, tiny_chat_config(max_tiles=6)).encode
    first = parse_record(
        {"image": [record.images[0]], "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    )
    (shown,) = view(first, ENCODER).pictures
    assert shown.grid == (3, 2)
    assert shown.tiles.equal(single(first).tiles)
    sheet = np.asarray(arrange(shown, 56, 4))
    original = np.asarray(Image.open(record.images[0]))
    for row in range(2):
        for column in range(3):
            middle = original[row * 56 + 28, column * 56 + 28].astype(int)
            assert np.abs(sheet[row * 60 + 28, column * 60 + 28] - middle).max() <= 2


def test_pages_escape_what_data_says(record: Any) -> None:
    page = to_html(view(record, ENCODER))
    assert "<b>What?</b>" not in page
    assert "&lt;b&gt;What?&lt;/b&gt;" in page
    assert page.count('class="learned" title') == 2
    assert page.count("data:image/png;base64,") == 2


def test_the_picture_marks_what_is_learned(record: Any) -> None:
    pixels = np.asarray(to_picture(view(record, ENCODER)))
    ground = [int(LEARNED[at : at + 2], 16) for at in (1, 3, 5)]
    assert (pixels == ground).all(2).sum() > 2000


def told(record: Any, **options: Any) -> str:
    console = Console(file=io.StringIO(), width=100, **options)
    tell(view(record, ENCODER), console)
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_a_terminal_shows_tiles_and_colours(record: Any) -> None:
    text = told(record, force_terminal=True, color_system="truecolor")
    assert "▀" in text
    assert "[[" not in text
    plain = told(record)
    assert "▀" not in plain
    assert "[[A cat & 猫.<|im_end|>]]" in plain
    assert "2 x 1 tiles of 56 px and a thumbnail" in plain


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "a\x1b[31mb[red]"}, {"from": "gpt", "value": "c\x07"}]
    text = told(parse_record(json.loads(json.dumps({"conversations": turns}))))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "[red]" in text


def test_a_cut_sample_says_so(record: Any) -> None:
    limit = len(ENCODER.encode(record).input_ids) - 3
    cutting = Encoder(ENCODER.tokenizer, ENCODER.config, max_length=limit, overlong="cut")
    assert "; 3 more were cut" in view(record, cutting).says()
