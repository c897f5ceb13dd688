"""`internvl chat`: one question about pictures, or a conversation on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from internvl.generate.answers import Region
    from internvl.generate.reply import Reply
    from internvl.generate.session import Chat

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
HELP = """/image PATH  show a picture with the next question     /reset  forget the conversation
/save PATH   write the conversation as JSON            /quit   leave (or Ctrl-D); Ctrl-C stops an answer
"""


@dataclass(frozen=True)
class Options:
    """Ask a model about pictures: internvl chat PICTURE... "question". Without a question, talk on the terminal."""

    words: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[PICTURE ...] [QUESTION]")] = ()
    """Picture files, then the question."""
    model: str = "pocket"
    """A name, or the folder of a checkpoint (official or native layout)."""
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = "auto"
    """int4 is the fastest on a CPU; auto is bfloat16 where the hardware computes it."""
    quantiser: Literal["auto", "own", "torchao"] = "auto"
    """What rounds to int8 and int4; torchao is an extra."""
    device: str = "cpu"
    """cpu, cuda, or auto."""
    max_tiles: int | None = None
    """Tiles of all pictures together; fewer are faster and coarser."""
    max_new_tokens: int = 512
    temperature: float = 0.0
    """0 always gives the likeliest answer."""
    top_p: float = 1.0
    seed: int = 0
    system: str | None = None
    """Replaces the model's system message."""
    json: bool = False
    """Print the reply with boxes, counts and times as JSON."""
    draw: Path | None = None
    """Write the last picture with the answer's boxes to this file."""

    @property
    def sampling(self) -> dict[str, Any]:
        return {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "seed": self.seed,
        }


def main(arguments: list[str]) -> int:
    options = tyro.cli(Options, prog="internvl chat", args=arguments)
    pictures, question = split_words(options.words)
    if question is None and not sys.stdin.isatty():
        question = sys.stdin.read().strip()
        if not question:
            raise ValueError('no question; give one after the pictures: internvl chat PICTURE "What is this?"')
    chat = open_model(options)
    if question is None:
        return talk(chat, options, pictures)
    answer(chat, options, question, pictures)
    return 0


def split_words(words: Sequence[str]) -> tuple[list[Path], str | None]:
    """Pictures and question: the last word is the question unless it is a file, or named like one."""
    if not words:
        return [], None
    *front, last = words
    is_picture = _is_file(last) or (" " not in last and last.lower().endswith(PICTURE_SUFFIXES))
    pictures = [Path(word) for word in (words if is_picture else front)]
    for picture in pictures:
        if not picture.is_file():
            raise FileNotFoundError(f"{picture}: no such picture; all words but the last (the question) are files")
    return pictures, None if is_picture else last


def _is_file(word: str) -> bool:
    try:
        return Path(word).is_file()
    except (OSError, ValueError):  # a question longer than any file name
        return False


def open_model(options: Options) -> Chat:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(f"opening {options.model}"):
        from internvl.generate.open_chat import load_chat

        return load_chat(
            options.model,
            device=options.device,
            dtype=options.dtype,
            quantiser=options.quantiser,
            max_tiles=options.max_tiles,
        )


def answer(chat: Chat, options: Options, question: str, pictures: Sequence[Path], history: Sequence[Any] = ()) -> Reply:
    """Print one answer while it comes, or its JSON."""
    stream = chat.stream(question, list(pictures), system=options.system, history=history, **options.sampling)
    if options.json:
        sys.stdout.write(json.dumps(as_json(options.model, stream.reply, pictures), ensure_ascii=False) + "\n")
    else:
        for piece in stream:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")
    if options.draw is not None:
        if not pictures:
            raise ValueError(f"--draw {options.draw} needs a picture to draw on; give one before the question")
        draw(pictures[-1], stream.reply.boxes, options.draw)
    return stream.reply


def as_json(model: str, reply: Reply, pictures: Sequence[Path]) -> dict[str, Any]:
    """The reply without what only Python can hold."""
    return {
        "model": model,
        "images": [str(picture) for picture in pictures],
        "text": reply.text,
        "boxes": [box._asdict() for box in reply.boxes],
        "finish_reason": reply.finish_reason,
        "usage": {**asdict(reply.usage), "tokens_per_second": reply.usage.tokens_per_second},
    }


def draw(picture: Path, boxes: Sequence[Region], out: Path) -> None:
    """The picture with a named frame around every box."""
    from PIL import ImageDraw

    from internvl.data.images import open_image

    image = open_image(picture).copy()
    pen = ImageDraw.Draw(image)
    width = max(2, min(image.size) // 150)
    for number, box in enumerate(boxes):
        colour = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")[number % 6]
        pen.rectangle(box.box_px, outline=colour, width=width)
        if box.name:
            corner = (box.box_px[0] + width + 2, box.box_px[1] + width + 1)
            pen.rectangle(pen.textbbox(corner, box.name), fill="white")
            pen.text(corner, box.name, fill=colour)
    image.save(out)


def talk(chat: Chat, options: Options, pictures: list[Path]) -> int:
    """A conversation with history until /quit."""
    sys.stdout.write(f"{options.model} is ready. Ask, or /help.\n")
    history: tuple[Any, ...] = ()
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            sys.stdout.write("\n")
            return 0
        if line == "/quit":
            return 0
        try:
            if line == "/reset":
                history, pictures = (), []
            elif line.startswith("/"):
                _command(line, history, pictures)
            elif line:
                history = answer(chat, options, line, pictures, history).messages
                pictures = []
        except (ValueError, OSError) as error:  # the conversation goes on
            sys.stdout.write(f"{error}\n")
        except KeyboardInterrupt:  # ends the answer, not the conversation
            sys.stdout.write("\n")


def _command(line: str, history: Sequence[Any], pictures: list[Path]) -> None:
    verb, _, rest = line.partition(" ")
    if verb == "/image" and rest:
        pictures += split_words([rest] if _is_file(rest) else [rest, ""])[0]
    elif verb == "/save" and rest:
        plain = [{**message, "images": [str(i) for i in message.get("images", ())]} for message in history]
        Path(rest).write_text(json.dumps(plain, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"{len(plain)} messages in {rest}\n")
    else:
        sys.stdout.write(HELP)
