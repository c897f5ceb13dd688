"""Frames of videos, animations and folders: the official indices, and errors for what cannot be read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from internvl.data.images import Limits
from internvl.data.media import (
    Clip,
    FrameSettings,
    every,
    expand_video,
    parts,
    probe,
    read_frames,
    segment_centres,
)
from internvl.data.templates import Turn

lengths = st.integers(1, 400)
counts = st.integers(1, 40)


@given(lengths, counts, st.integers(0, 99))
def test_training_takes_one_frame_of_each_part(length: int, count: int, seed: int) -> None:
    chosen = parts(length, count, np.random.default_rng(seed))
    middle = parts(length, count, None)
    edges = np.linspace(0, length, min(count, length) + 1).astype(int)
    for found in (chosen, middle):
        assert len(found) == count
        assert found == sorted(found)
        assert 0 <= found[0] <= found[-1] < length
        assert found[min(count, length) :] == found[min(count, length) - 1 :][:1] * max(0, count - length)
    ranges = list(zip(edges[:-1], edges[1:] - 1, strict=True))
    assert middle[: len(ranges)] == [(low + high) // 2 for low, high in ranges]
    if all(low < high for low, high in ranges):
        assert all(low <= index < high for index, (low, high) in zip(chosen, ranges, strict=False))


@given(st.integers(0, 50), lengths, counts)
def test_inference_takes_the_official_centres(first: int, length: int, count: int) -> None:
    last = first + length - 1
    width = float(last - first) / count
    official = [int(first + (width / 2) + np.round(width * index)) for index in range(count)]
    assert segment_centres(first, last, count) == official
    assert all(first <= index <= last for index in official)


def test_short_videos_repeat_their_last_frame() -> None:
    assert parts(3, 5, None) == [0, 1, 2, 2, 2]
    assert parts(1, 3, np.random.default_rng(0)) == [0, 0, 0]
    assert segment_centres(0, 0, 4) == [0, 0, 0, 0]


def test_frames_by_the_second() -> None:
    assert every(100, 10.0, 0.5) == [10, 30, 50, 70, 90]
    assert every(5, 25.0, 1.0) == [2]
    settings = FrameSettings("fps", 1, 3, fps=0.5)
    assert settings.choose(Clip(100, 10.0), None) == [10, 30, 50]


def test_a_clip_bounds_the_frames() -> None:
    video = Clip(100, 10.0)
    assert FrameSettings("centres", 2, 2).choose(video, None, (2.0, 4.0)) == segment_centres(20, 40, 2)
    assert all(20 <= i <= 40 for i in FrameSettings("rand").choose(video, np.random.default_rng(1), (2.0, 4.0)))
    assert set(FrameSettings("middle", 2, 2).choose(video, None, (50.0, 60.0))) == {99}


def test_numbers_of_frames_are_drawn_between_the_two() -> None:
    settings = FrameSettings("rand", 8, 12)
    drawn = {len(settings.choose(Clip(200, 25.0), np.random.default_rng(seed))) for seed in range(60)}
    assert drawn == set(range(8, 13))
    assert settings.choose(Clip(200, 25.0), None) == segment_centres(0, 199, 12)
    with pytest.raises(ValueError, match="5 to 4 frames"):
        FrameSettings(min_frames=5, max_frames=4)


def test_marks_become_lines_with_or_without_a_newline() -> None:
    lines = "Frame-1: <image>\nFrame-2: <image>\n"
    for text in ("<video>\nQ", "<video>Q"):
        assert expand_video([Turn("user", text)], 2, "Frame-{}: ") == (Turn("user", f"{lines}Q"),)
    answer = Turn("assistant", "<video>")
    assert expand_video([answer], 2, "Frame-{}: ") == (answer,)


def frames(count: int) -> list[Image.Image]:
    return [Image.new("RGB", (32, 16), (0, 0, number * 20)) for number in range(count)]


def test_folders_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number, frame in enumerate(frames(11)):
        frame.save(tmp_path / f"clip_{number}.png")
    (tmp_path / "notes.txt").write_text("no frame")
    assert probe(tmp_path).num_frames == 11
    assert [frame.getpixel((0, 0))[2] for frame in read_frames(tmp_path, [2, 10, 99])] == [40, 200, 200]


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    first, *rest = frames(5)
    options = {"lossless": True} if kind == "webp" else {}
    first.save(path, save_all=True, append_images=rest, **options)
    assert probe(path).num_frames == 5
    assert [frame.getpixel((0, 0))[2] for frame in read_frames(path, [0, 3, 3, 4])] == [0, 60, 60, 80]


def write_video(path: Path, count: int = 12) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for frame in frames(count):
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode(None))


def test_video_files(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    write_video(path)
    assert probe(path) == Clip(12, 5.0)
    blues = [frame.getpixel((3, 3))[2] for frame in read_frames(path, [1, 6, 11, 20])]
    assert [abs(found - expected) < 12 for found, expected in zip(blues, [20, 120, 220, 220], strict=True)] == [
        True
    ] * 4
    with pytest.raises(ValueError, match=r"v\.mp4: frames of 32 x 16 px; the limit is 100"):
        read_frames(path, [0], Limits(pixels=100))


def test_videos_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    pytest.importorskip("av")
    broken, gone, empty = tmp_path / "broken.mp4", tmp_path / "gone.mp4", tmp_path / "empty"
    broken.write_bytes(b"not a video")
    empty.mkdir()
    with pytest.raises(ValueError, match=r"broken\.mp4: not a video that PyAV can read"):
        probe(broken)
    with pytest.raises(FileNotFoundError, match=r"gone\.mp4: no such video"):
        probe(gone)
    with pytest.raises(ValueError, match="empty: no frames"):
        probe(empty)
    whole = tmp_path / "whole.mp4"
    write_video(whole)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"cut\.mp4"):
        read_frames(cut, [5])


def test_without_pyav_the_error_says_what_to_install(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"x")
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from internvl.data.media import probe\n"
        f"try: probe({str(path)!r})\n"
        "except ValueError as error: print(error)"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pip install 'internvl[video]'" in said
