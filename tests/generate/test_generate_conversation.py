"""Every form of a question ends as the same messages and pictures."""

from __future__ import annotations

import pytest

from internvl.generate.conversation import conversation


def _image(name: str) -> dict[str, str]:
    return {"type": "image", "image": name}


def _text(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def test_forms_of_one_question() -> None:
    wanted = ([{"role": "user", "content": "<image>\nWhat?", "images": ["a.png"]}], ["a.png"])
    assert conversation("What?", ["a.png"]) == wanted
    assert conversation("<image>\nWhat?", ["a.png"]) == wanted
    assert conversation([{"role": "user", "content": [_image("a.png"), _text("What?")]}], []) == wanted
    assert conversation([{"role": "user", "content": "What?"}], ["a.png"]) == wanted
    assert conversation([{"from": "human", "value": "<image>\nWhat?"}], ["a.png"]) == wanted
    url = {"type": "image_url", "image_url": {"url": "a.png"}}
    assert conversation([{"role": "user", "content": [url, _text("What?")]}], []) == wanted
    assert conversation(*wanted[:1], []) == wanted  # what Reply.messages holds


def test_several_pictures_are_numbered_and_marks_are_kept_where_they_stand() -> None:
    assert conversation("Same?", ["a", "b"])[0][0]["content"] == "Image-1: <image>\nImage-2: <image>\nSame?"
    messages, images = conversation("Is <image> like <image>?", ["a", "b"])
    assert messages[0]["content"] == "Is <image> like <image>?"
    assert images == ["a", "b"]


def test_history_keeps_its_pictures_and_new_ones_are_numbered_after_them() -> None:
    first, _ = conversation("What?", ["a"])
    history = [*first, {"role": "assistant", "content": "A cat."}]
    messages, images = conversation("And these?", ["b", "c"], history)
    assert images == ["a", "b", "c"]
    assert messages[2]["content"] == "Image-2: <image>\nImage-3: <image>\nAnd these?"
    assert conversation("And now?", [], history)[1] == ["a"]


def test_a_mark_in_an_answer_is_text() -> None:
    history = [{"role": "user", "content": "Write a tag."}, {"role": "assistant", "content": "<image>"}]
    assert conversation("Now?", ["a"], history)[0][2]["content"] == "<image>\nNow?"


@pytest.mark.parametrize(
    ("question", "images", "said"),
    [
        ("<image> <image> same?", ["a"], "2 <image> marks but 1 images"),
        ("<image> what?", ["a", "b", "c"], "1 <image> marks but 3 images"),
        ("<image> what?", [], "1 <image> marks but 0 images"),
    ],
)
def test_unequal_marks_and_images_name_both_numbers(question: str, images: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        conversation(question, images)


def test_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="give a list"):
        conversation("What?", "a.png")
    with pytest.raises(ValueError, match="no question among them"):
        conversation([{"role": "system", "content": "Be brief."}], [])
    with pytest.raises(ValueError, match="role 'robot'"):
        conversation([{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}], [])
    video = {"role": "user", "content": [{"type": "video", "video": "v.mp4"}, _text("What?")]}
    assert conversation([video], []) == ([video], [])
    with pytest.raises(ValueError, match="content lists"):
        conversation([video], ["a.png"])
