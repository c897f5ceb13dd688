"""Laws of streamed text: pieces join to the text, characters stay whole, stop strings never show."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from internvl.generate.text import Writer, control_ids
from tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
HIDDEN = control_ids(TOKENIZER)


def _write(text: str, stops: tuple[str, ...] = ()) -> tuple[Writer, list[str]]:
    writer = Writer(TOKENIZER, HIDDEN, stops)
    pieces = [writer.add(token) for token in TOKENIZER.encode(text, add_special_tokens=False)]
    return writer, [*pieces, writer.finish()]


@given(st.text(max_size=40))
def test_pieces_join_to_the_stripped_text(text: str) -> None:
    writer, pieces = _write(text)
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    shown = TOKENIZER.decode([token for token in ids if token not in HIDDEN], skip_special_tokens=False)
    assert "".join(pieces) == writer.text == shown.strip()


@given(st.text(alphabet="é你👍🏽ab", min_size=1, max_size=12))
def test_no_piece_holds_half_a_character(text: str) -> None:
    _, pieces = _write(text)  # one token a byte
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == text


@given(before=st.text(alphabet="ab\n ", max_size=12), after=st.text(alphabet="ab\n ", max_size=6))
def test_nothing_of_a_stop_string_or_behind_it_shows(before: str, after: str) -> None:
    stop = "a\nb"
    text = before + stop + after
    writer, pieces = _write(text, (stop, "never"))
    assert writer.stopped
    assert "".join(pieces) == writer.text == text[: text.index(stop)].strip()


def test_a_held_back_beginning_of_a_stop_string_comes_at_the_end() -> None:
    writer, pieces = _write("yes EN", ("END",))
    assert pieces[-1] == " EN"
    assert writer.text == "yes EN"


def test_region_tokens_show_and_control_tokens_do_not() -> None:
    text = "<ref>cat</ref><box>[[1, 2, 3, 4]]</box>"
    assert _write(f"<|im_start|>{text}<img><IMG_CONTEXT></img><|im_end|>")[0].text == text


def test_unfinished_bytes_at_the_end_are_shown_as_such() -> None:
    writer = Writer(TOKENIZER, HIDDEN)
    tokens = TOKENIZER.encode("a你", add_special_tokens=False)
    pieces = [writer.add(token) for token in tokens[:-1]]
    assert pieces == ["a", "", ""]
    assert writer.finish() == "\ufffd"
