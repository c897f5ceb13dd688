"""Video files, animations and folders of frames: which frames, and their pixels (spec 3.4).

One picture is images.py's; the prompt's words for frames are here, since they number the frames.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageSequence

from internvl.data.images import DEFAULT_LIMITS, Limits, open_image
from internvl.data.templates import Turn
from internvl.tokens import IMAGE_MARK, VIDEO_MARK

_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_VIDEO = re.compile(re.escape(VIDEO_MARK) + r"\n?")


class Clip(NamedTuple):
    """What a video's header says."""

    num_frames: int
    fps: float


@dataclass(frozen=True)
class FrameSettings:
    """Which frames of a video are shown, and what the prompt calls them."""

    sampling: Literal["rand", "middle", "fps", "centres"] = "rand"
    """`rand`: one random frame of each equal part, as `centres` where there is no generator; `middle`: its middle;
    `fps`: every 1/fps seconds; `centres`: the fixed centres of the official inference."""
    min_frames: int = 8
    max_frames: int = 32
    """Training draws a number between the two; `centres` and a missing generator take the larger."""
    fps: float = 1.0
    label: str = "Frame-{}: "
    """Official training and VLMEvalKit; the quick start and MVBench write `Frame{}: `."""

    def __post_init__(self) -> None:
        if not 1 <= self.min_frames <= self.max_frames:
            raise ValueError(f"{self.min_frames} to {self.max_frames} frames; it must be 1 <= min_frames <= max_frames")

    def choose(
        self, clip: Clip, rng: np.random.Generator | None, seconds: tuple[float, float] | None = None
    ) -> list[int]:
        """Indices of the frames to show, inside `seconds` when given."""
        first, last = _bounds(clip, seconds)
        length = last - first + 1
        if self.sampling == "centres" or (self.sampling == "rand" and rng is None):
            return segment_centres(first, last, self.max_frames)
        if self.sampling == "fps":
            chosen = every(length, clip.fps, self.fps)[: self.max_frames]
        else:
            count = self.max_frames if rng is None else int(rng.integers(self.min_frames, self.max_frames + 1))
            chosen = parts(length, count, rng if self.sampling == "rand" else None)
        return [first + index for index in chosen]


def _bounds(clip: Clip, seconds: tuple[float, float] | None) -> tuple[int, int]:
    if seconds is None:
        return 0, clip.num_frames - 1
    first = min(round(seconds[0] * clip.fps), clip.num_frames - 1)
    return first, max(first, min(round(seconds[1] * clip.fps), clip.num_frames - 1))


def segment_centres(first: int, last: int, count: int) -> list[int]:
    """The official inference: centres of `count` equal parts of [first, last]."""
    width = (last - first) / count
    return [int(first + width / 2 + np.round(width * part)) for part in range(count)]


def parts(length: int, count: int, rng: np.random.Generator | None) -> list[int]:
    """One frame of each of `count` equal parts, random or the middle; a short video repeats its last frame."""
    taken = min(count, length)
    edges = np.linspace(0, length, taken + 1).astype(int)
    ranges = list(zip(edges[:-1], edges[1:] - 1, strict=True))
    if rng is None:
        chosen = [int(low + high) // 2 for low, high in ranges]
    elif all(low < high for low, high in ranges):
        chosen = [int(rng.integers(low, high)) for low, high in ranges]  # official: never the part's last frame
    else:
        chosen = sorted(int(index) for index in rng.permutation(length)[:taken])
    return chosen + chosen[-1:] * (count - taken)


def every(length: int, fps: float, wanted_fps: float) -> list[int]:
    """Centres of parts of 1/wanted_fps seconds; at least one frame."""
    step = 1 / wanted_fps
    seconds = np.arange(step / 2, length / fps + step / 2, step)
    return [index for index in np.around(seconds * fps).astype(int).tolist() if index < length] or [length // 2]


def expand_video(turns: Sequence[Turn], num_frames: int, label: str, limit: int = 0) -> tuple[Turn, ...]:
    """Turns whose `<video>` marks (the first `limit` of a turn, 0: all) are a line for each frame."""
    lines = "".join(f"{label.format(number)}{IMAGE_MARK}\n" for number in range(1, num_frames + 1))
    return tuple(
        Turn(turn.role, _VIDEO.sub(lambda _: lines, turn.text, limit)) if turn.role == "user" else turn
        for turn in turns
    )


def probe(path: str | Path) -> Clip:
    """Frames and frames a second, without decoding."""
    file = Path(path)
    if file.is_dir():
        return Clip(len(_frame_files(file)), 1.0)
    if not file.is_file():
        raise FileNotFoundError(f"{path}: no such video; check the path and the root of its data set")
    if file.suffix.lower() in (".gif", ".webp"):
        with Image.open(file, formats=("GIF", "WEBP")) as image:
            return Clip(int(getattr(image, "n_frames", 1)), 1.0)
    with _container(file) as container:
        stream = _stream(container, file)
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        if not count:
            raise ValueError(f"{path}: a video of 0 frames; fetch it again or remove its record")
        return Clip(count, float(stream.average_rate or 1))


def read_frames(path: str | Path, indices: Sequence[int], limits: Limits = DEFAULT_LIMITS) -> list[Image.Image]:
    """These frames as RGB; where the file ends early, its last frame."""
    file = Path(path)
    if file.is_dir():
        files = _frame_files(file)
        return [open_image(files[min(index, len(files) - 1)], limits) for index in indices]
    wanted = set(indices)
    found: dict[int, Image.Image] = {}
    if file.suffix.lower() in (".gif", ".webp"):
        with Image.open(file, formats=("GIF", "WEBP")) as image:
            for number, frame in enumerate(ImageSequence.Iterator(image)):
                if number in wanted:
                    found[number] = open_image(frame, limits).copy()
    else:
        found = _decode(file, wanted, limits)
    if not found:
        raise ValueError(f"{path}: none of the frames {sorted(wanted)[:4]} could be read; fetch the video again")
    last = max(found)
    return [found.get(index, found[last]) for index in indices]


def _decode(file: Path, wanted: set[int], limits: Limits) -> dict[int, Image.Image]:
    import av

    found: dict[int, Image.Image] = {}
    with _container(file) as container:
        stream = _stream(container, file)
        if stream.width * stream.height > limits.pixels:
            size = f"{stream.width} x {stream.height}"
            raise ValueError(f"{file}: frames of {size} px; the limit is {limits.pixels}; scale the video down")
        stream.thread_type = "AUTO"
        try:
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    found[number] = frame.to_image()
                if number >= max(wanted):
                    break
        except av.error.FFmpegError as error:
            raise ValueError(f"{file}: the video is damaged: {error}; fetch it again") from error
    return found


def _container(file: Path) -> Any:
    try:
        import av
    except ImportError as error:
        raise ValueError("video files need: pip install 'internvl[video]'") from error
    try:
        return av.open(str(file))
    except av.error.FFmpegError as error:
        raise ValueError(f"{file}: not a video that PyAV can read: {error}") from error


def _stream(container: Any, file: Path) -> Any:
    if not container.streams.video:
        raise ValueError(f"{file}: no video stream; give a file with pictures")
    return container.streams.video[0]


def _frame_files(folder: Path) -> list[Path]:
    """Pictures of a folder in the order of the number that ends their name."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in _PICTURES]
    if not files:
        raise ValueError(f"{folder}: no frames; a folder of frames holds files such as frame_0.jpg")

    def number(file: Path) -> tuple[int, str]:
        digits = re.findall(r"\d+", file.stem)
        return (int(digits[-1]) if digits else 0), file.name

    return sorted(files, key=number)
