"""Two-way key rules: rename, split, fuse. Strict: every key of ours and of the file belongs to exactly one rule.

`*` in a pattern stands for one or more characters and is carried to the other side, in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Change = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def same(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    return tensors


@dataclass(frozen=True)
class Rule:
    """Keys of one side that become keys of the other; by default one key and the tensor unchanged."""

    ours: tuple[str, ...]
    disk: tuple[str, ...]
    to_ours: Change = same
    to_disk: Change = same


def rename(ours: str, disk: str) -> Rule:
    return Rule((ours,), (disk,))


@dataclass(frozen=True)
class Entry:
    """A rule applied to real keys."""

    ours: tuple[str, ...]
    disk: tuple[str, ...]
    to_ours: Change
    to_disk: Change


def expand(rules: Iterable[Rule], ours: Iterable[str]) -> list[Entry]:
    """Entries that cover our keys, each once; the first rule that fits a key holds."""
    compiled = [(rule, [re.compile(_pattern(key)) for key in rule.ours]) for rule in rules]
    entries: list[Entry] = []
    covered: set[str] = set()
    for key in ours:
        if key in covered:
            continue
        entry = _entry(key, compiled)
        entries.append(entry)
        covered.update(entry.ours)
    return entries


def check_keys(
    entries: Iterable[Entry],
    ours: Mapping[str, torch.Size],
    found: Mapping[str, tuple[int, ...]],
    where: object,
    optional: Iterable[str] = (),
) -> None:
    """ValueError unless the file has exactly the keys and shapes that the entries ask for."""
    wanted: dict[str, tuple[int, ...]] = {}
    for entry in entries:
        shaped = entry.to_disk([torch.empty(ours[key], device="meta") for key in entry.ours])
        wanted |= {key: tuple(tensor.shape) for key, tensor in zip(entry.disk, shaped, strict=True)}
    missing = sorted(wanted.keys() - found.keys() - set(optional))
    unused = sorted(found.keys() - wanted.keys())
    if missing or unused:
        parts = [f"{len(missing)} keys missing: {_some(missing)}"] if missing else []
        parts += [f"{len(unused)} keys that the model does not use: {_some(unused)}"] if unused else []
        raise ValueError(f"{where}: {'; '.join(parts)}. Does config.json belong to these weights?")
    wrong = [
        f"{key} is {_size(found[key])}, must be {_size(shape)}"
        for key, shape in wanted.items()
        if key in found and tuple(found[key]) != shape
    ]
    if wrong:
        raise ValueError(f"{where}: {_some(wrong)}. Does config.json belong to these weights?")


def matches(key: str, patterns: Iterable[str]) -> bool:
    return any(re.fullmatch(_pattern(pattern), key) for pattern in patterns)


def fuse(parts: Sequence[Tensor]) -> Sequence[Tensor]:
    """Three matrices stacked by rows: q, k, v to qkv."""
    return [torch.cat(list(parts))]


def thirds(whole: Sequence[Tensor]) -> Sequence[Tensor]:
    return list(whole[0].chunk(3))


@dataclass(frozen=True)
class GroupedQKV:
    """InternLM2's wqkv: for each kv head its queries, then its key, then its value (spec 9.4)."""

    heads: int
    kv_heads: int

    def split(self, whole: Sequence[Tensor]) -> Sequence[Tensor]:
        fused = whole[0]
        groups = self.heads // self.kv_heads
        rows = fused.unflatten(0, (self.kv_heads, groups + 2, -1))
        parts = rows[:, :groups], rows[:, groups], rows[:, groups + 1]
        return [part.reshape(-1, *fused.shape[1:]) for part in parts]

    def fuse(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        q, k, v = (part.unflatten(0, (self.kv_heads, -1)) for part in parts)
        return [torch.cat([q, k, v], dim=1).flatten(0, 1)]


def _entry(key: str, compiled: list[tuple[Rule, list[re.Pattern[str]]]]) -> Entry:
    for rule, patterns in compiled:
        for pattern in patterns:
            match = pattern.fullmatch(key)
            if match:
                words = match.groups()
                ours = tuple(_fill(k, words) for k in rule.ours)
                return Entry(ours, tuple(_fill(k, words) for k in rule.disk), rule.to_ours, rule.to_disk)
    raise AssertionError(f"no rule for our key {key!r}")


def _pattern(key: str) -> str:
    return "(.+)".join(re.escape(piece) for piece in key.split("*"))


def _fill(key: str, words: Sequence[str]) -> str:
    pieces = key.split("*")
    return "".join(piece + word for piece, word in zip(pieces, [*words, ""], strict=True))


def _size(shape: Iterable[int]) -> str:
    return "x".join(str(side) for side in shape) or "a number"


def _some(words: list[str]) -> str:
    return ", ".join(words[:8]) + (f" and {len(words) - 8} more" if len(words) > 8 else "")
