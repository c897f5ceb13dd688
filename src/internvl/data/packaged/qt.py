"""Translations out of a compiled Qt message file (.qm), looked up by their source text. Pure Python.

Format as Qt's qtranslator.cpp reads it: tagged blocks, of which one maps hashes to places and one holds the messages.
"""

from __future__ import annotations

import struct

MAGIC = bytes.fromhex("3cb86418")
_HASHES, _MESSAGES = 0x42, 0x69
"""Tags of the blocks."""
_END, _TRANSLATION, _OBSOLETE = 1, 3, 5
"""Tags inside a message; all others carry a length and that many bytes."""
_ABSENT = 0xFFFFFFFF


class Messages:
    """`messages(text)` is its translation, or None."""

    def __init__(self, content: bytes, where: str = "the .qm file") -> None:
        if content[:4] != MAGIC:
            raise ValueError(f"{where}: begins with {content[:4].hex()}, a Qt message file with {MAGIC.hex()}")
        self.places: dict[int, list[int]] = {}
        self.messages = b""
        at = 16
        while at + 5 <= len(content):
            tag, length = struct.unpack_from(">BI", content, at)
            block = content[at + 5 : at + 5 + length]
            at += 5 + length
            if tag == _HASHES:
                for key, place in struct.iter_unpack(">II", block):
                    self.places.setdefault(key, []).append(place)
            elif tag == _MESSAGES:
                self.messages = block

    def __call__(self, text: str) -> str | None:
        found = (self._message(place) for place in self.places.get(elf_hash(text.encode()), []))
        return next((message for message in found if message), None)

    def _message(self, at: int) -> str | None:
        """The first translation of the message at this place: of a plural, its first form."""
        while (tag := self.messages[at]) != _END:
            at += 1
            if tag == _OBSOLETE:
                at += 4
                continue
            (length,) = struct.unpack_from(">I", self.messages, at)
            at += 4
            length = 0 if length == _ABSENT else length
            if tag == _TRANSLATION and length:
                return self.messages[at : at + length].decode("utf-16-be")
            at += length
        return None


def elf_hash(text: bytes) -> int:
    """The hash of ELF symbol tables, 1 in place of 0."""
    value = 0
    for byte in text:
        value = ((value << 4) + byte) & 0xFFFFFFFF
        high = value & 0xF0000000
        value = (value ^ high >> 24) & ~high
    return value or 1
