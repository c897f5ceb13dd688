"""Valid records and pictures, damaged at random: in the bytes, in the structure, in the files that they name."""

from __future__ import annotations

import io
import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP")
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1e308, 10**30, float("inf"), float("nan"), "", " ", "\u0000", "\ud800", "\u202e\u200b",
    "é" * 300, [], {}, [[]], [None], {"a": {"b": []}}, "<image>", "<image>" * 3, "<video>", "<|im_end|>", "../../x",
    "a" * 5000, ["a", 1], [0.5, 1.5], [10**400, 10**401], "human", "gpt", "system",
)  # fmt: skip


class Maker:
    """Lines of a set below a folder; what is random comes from one generator."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.rng, self.number = folder, np.random.default_rng(seed), 0
        self.pictures = [self._picture(kind) for kind in FORMATS]

    def pick(self, choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def lines(self, count: int) -> list[bytes]:
        """Three quarters damaged in one or two ways."""
        made = []
        for _ in range(count):
            record = self.record()
            for _ in range(int(self.pick((0, 1, 1, 2)))):
                self.pick((self.change_value, self.change_value, self.change_media, self.change_turns))(record)
            line = json.dumps(record, ensure_ascii=bool(self.rng.integers(2))).encode("utf-8", "surrogatepass")
            if self.rng.random() < 0.25:
                line = self.change_bytes(line)
            line = line.replace(b"\n", b" ")
            made.append(line if len(line) > 2 else b"{} {}")
        return made

    def record(self) -> dict[str, Any]:
        sort = self.pick(("text", "image", "images", "video"))
        marks = {
            "text": "",
            "image": "<image>\n",
            "images": "Image-1: <image>\nImage-2: <image>\n",
            "video": "<video>\n",
        }
        turns = [
            {"from": "human", "value": f"{marks[sort]}What is {self.number}?"},
            {"from": "gpt", "value": "A cat. 猫"},
        ]
        if self.rng.random() < 0.3:
            turns += [
                {"from": "human", "value": "Why?"},
                {"from": "gpt", "value": "because " * int(self.rng.integers(1, 9))},
            ]
        self.number += 1
        record: dict[str, Any] = {"id": self.number, "conversations": turns}
        if sort == "image":
            record |= {"image": self.pick(self.pictures), "width": 60, "height": 40}
        if sort == "images":
            record["image"] = [self.pick(self.pictures), self.pick(self.pictures)]
        if sort == "video":
            record |= {"video": self.pictures[2], "clip": [0.0, 1.5]}
        return record

    # damage

    def change_value(self, record: dict[str, Any]) -> None:
        """Any value of the tree becomes another, or its key goes."""
        at: Any = record
        while True:
            keys = list(at) if isinstance(at, dict) else list(range(len(at)))
            if not keys:
                return
            key = self.pick(keys)
            if isinstance(at[key], (dict, list)) and self.rng.random() < 0.7:
                at = at[key]
                continue
            if self.rng.random() < 0.15:
                del at[key]
            else:
                at[key] = deepcopy(self.pick(VALUES))
            return

    def change_turns(self, record: dict[str, Any]) -> None:
        turns = record.get("conversations")
        if not isinstance(turns, list) or not turns:
            return
        some = self.pick(turns)
        if self.rng.random() < 0.5:
            turns.insert(int(self.rng.integers(len(turns) + 1)), deepcopy(some))
        elif isinstance(some, dict):
            some[self.pick(("from", "value", "role", "content"))] = deepcopy(self.pick(VALUES))

    def change_media(self, record: dict[str, Any]) -> None:
        """The file is damaged, or not there, or of another sort."""
        self.number += 1
        name = f"bad_{self.number}.{self.pick(('jpg', 'png', 'gif', 'mp4'))}"
        path, content = self.folder / name, bytearray((self.folder / self.pick(self.pictures)).read_bytes())
        sort = self.pick(("missing", "empty", "folder", "cut", "flip", "flip", "header", "noise", "bomb"))
        if sort == "folder":
            path.mkdir()
        elif sort != "missing":
            path.write_bytes(bytes(self._damaged(sort, content)))
        field = self.pick(("image", "image", "video"))
        record[field] = name if self.rng.random() < 0.8 else [name, name]

    def _damaged(self, sort: str, content: bytearray) -> bytes | bytearray:
        if sort == "empty":
            return b""
        if sort == "cut":
            return content[: int(self.rng.integers(1, len(content)))]
        if sort == "noise":
            return self.rng.integers(0, 256, int(self.rng.integers(1, 300)), np.uint8).tobytes()
        if sort == "bomb":  # the size in the header of a BMP
            content = bytearray((self.folder / self.pictures[FORMATS.index("BMP")]).read_bytes())
            content[18:26] = self.rng.integers(0, 256, 8, np.uint8).tobytes()
            return content
        reach = 64 if sort == "header" else len(content)
        for _ in range(int(self.rng.integers(1, 6))):
            content[int(self.rng.integers(min(reach, len(content))))] = int(self.rng.integers(256))
        return content

    def change_bytes(self, line: bytes) -> bytes:
        at, end = sorted(int(place) for place in self.rng.integers(0, len(line) + 1, 2))
        junk = self.rng.integers(0, 256, int(self.rng.integers(1, 20)), np.uint8).tobytes()
        depth = int(self.pick((10, 900, 3000, 100_000)))
        return bytes(
            self.pick((
                line[:at],
                line[:at] + junk + line[at:],
                line[:at] + line[end:],
                line[:end] + line[at:],
                b"\xef\xbb\xbf" + line,
                line + b"{}",
                b"[" * depth + line + b"]" * depth,
                line[:-1] + b', "x": ' + b"[" * depth + b"]" * depth + b"}",
                line[:-1] + b', "clip": [0, ' + b"9" * int(self.pick((5, 400, 6000))) + b"]}",
                line.replace(b"conversations", b"conversation"),
                line[:-1] + b', "conversations": []}',
            ))
        )  # fmt: skip

    def _picture(self, kind: str) -> str:
        name = f"good.{kind.lower()}"
        pixels = self.rng.integers(0, 256, (2, 40, 60, 3), np.uint8)
        first, second = (Image.fromarray(some) for some in pixels)
        with io.BytesIO() as buffer:
            first.save(buffer, kind, **({"save_all": True, "append_images": [second]} if kind == "GIF" else {}))
            (self.folder / name).write_bytes(buffer.getvalue())
        return name
