"""A checkpoint folder before its weights are in memory: configuration, keys and adapters, checked; and its writing.

Making a model of it is load.py's; from one layout into another without a model, rewrite.py's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import ChatConfig
from internvl.convert import llava, lora, native, official
from internvl.convert.files import (
    MAX_SHARD_BYTES,
    NUMBER_TYPES,
    Weights,
    open_weights,
    read_json,
    write_json,
    write_weights,
)
from internvl.convert.keys import Entry, check_keys, expand, matches, same
from internvl.convert.layouts import layout_of
from internvl.convert.lora import Pair
from internvl.locate import locate
from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.tower import open_llava

LAYOUTS = ("official", "native")
"""That are written; "llava", as InternVL-Chat 1.0 was released, is read alone."""
EMBEDDING, HEAD = "language.model.model.embed_tokens.weight", "language.model.lm_head.weight"


@dataclass(frozen=True)
class FirstGeneration:
    """What the folder of an InternVL-Chat 1.0 does not say by itself."""

    vision_tower: str | Path | None = None
    """Folder of its InternViT or InternVL-G, where it is not inside."""
    tile_size: int | None = None
    """Pixels; None: 448 where the tower's name says so, else 336 (official clip_encoder.py)."""
    allow_pickle: bool = False
    """Read `pytorch_model*.bin`, which the releases are, by torch's restricted unpickler."""


FIRST = FirstGeneration()


@dataclass(frozen=True)
class Opened:
    """A checkpoint whose configuration was read and whose keys fit it; no weight is in memory yet."""

    folder: Path
    layout: str
    settings: Mapping[str, Any]
    """config.json."""
    config: ChatConfig
    image_token_id: int | None
    """Where config.json says it; else the tokenizer does."""
    weights: Weights
    names: Mapping[str, str]
    """Key of the layout -> key in the file."""
    entries: tuple[Entry, ...]
    ours: Mapping[str, torch.Size]
    """Our key -> shape."""
    skeleton: ChatModel | None
    """On the meta device, in the number type that was asked for; who reads the weights fills it. None for one part."""
    adapters: tuple[Mapping[str, Pair], ...]
    """Each adapter: our weight key -> what changes it."""

    @cached_property
    def pairs(self) -> dict[str, list[Pair]]:
        """All changes of each of our weights."""
        out: dict[str, list[Pair]] = {}
        for adapter in self.adapters:
            for key, pair in adapter.items():
                out.setdefault(key, []).append(pair)
        return out

    def has(self, entry: Entry) -> bool:
        """False for the head of a tied model that stores it once."""
        return all(key in self.names for key in entry.disk)

    def read(
        self,
        entry: Entry,
        dtype: torch.dtype | None,
        device: torch.device | str = "cpu",
        merge: bool = True,
        mapped: bool = False,
    ) -> list[Tensor]:
        """Our tensors of one entry; adapters are added in float32 before rounding.

        Each has memory of its own, but `mapped` leaves in the file what it holds exactly as wanted.
        """
        changes = {key: self.pairs[key] for key in entry.ours if key in self.pairs} if merge else {}
        now = torch.float32 if changes else dtype
        mapped = mapped and not changes and entry.to_ours is same
        parts = entry.to_ours([self.weights.get(self.names[key], now, device, mapped) for key in entry.disk])
        # A part is a view of what was read where a matrix was split: give each its own memory.
        copies = [part.clone() if len(parts) > 1 else part for part in parts]
        if not changes:
            return copies
        for key, part in zip(entry.ours, copies, strict=True):
            for pair in changes.get(key, ()):
                part += pair.change().to(part.device)
        return [part.to(dtype or self.kind(entry)) for part in copies]

    def shapes(self, entry: Entry) -> list[torch.Size]:
        """Of our tensors of one entry."""
        return [self.ours[key] for key in entry.ours]

    def kind(self, entry: Entry) -> torch.dtype:
        """The stored number type of an entry, the wider one where several are fused."""
        kinds = [NUMBER_TYPES[self.weights.types[self.names[key]]] for key in entry.disk]
        return reduce(torch.promote_types, kinds)


def open_checkpoint(
    path: str | Path,
    *,
    layout: str | None = None,
    adapters: Sequence[str | Path] = (),
    dtype: torch.dtype | None = None,
    first: FirstGeneration = FIRST,
) -> Opened:
    """Read configuration and headers of a folder or `pocket`, and check every key and shape. Weights stay on disk.

    `dtype` is the skeleton's; the widest of the file when not given. `first` is for folders of 1.0 as released.
    """
    path, adapters = base_and_adapters(path, adapters)
    folder = locate(path)
    settings = read_json(folder / "config.json")
    layout = _known(layout or layout_of(settings, folder), *LAYOUTS, "llava")
    if first != FIRST and layout != "llava":
        raise ValueError(
            f"{folder}: vision_tower, tile_size and allow_pickle are for a chat folder of 1.0 as released, this is the "
            f"{layout} layout; leave them out"
        )
    image_token_id: int | None = None
    wrapped: dict[str, Pair] = {}
    if layout == "llava":
        tower = None if first.vision_tower is None else locate(first.vision_tower)
        config, weights = open_llava(folder, settings, tower, first.tile_size, first.allow_pickle)
        names = {name: name for name in weights.shapes}
    else:
        weights = open_weights(folder)
    if layout == "native":
        config, image_token_id = native.from_native(settings, folder / "config.json")
        names = {native.current_key(key): key for key in weights.shapes}
    elif layout == "official":
        config = official.from_official(settings, folder / "config.json")
        ranks = lora.official_ranks(settings, folder / "config.json")
        names, wrapped = lora.unwrap(weights, ranks, folder)
    names = {name: key for name, key in names.items() if not matches(name, official.DERIVED_KEYS)}
    skeleton = build(config, dtype or weights.widest, "meta")
    ours = {key: tensor.shape for key, tensor in skeleton.state_dict().items()}
    entries = expand(_rules(config, layout), ours)
    optional = [key for entry in entries if HEAD in entry.ours for key in entry.disk] if config.language.tied else []
    found = {name: weights.shapes[key] for name, key in names.items()}
    check_keys(entries, ours, found, folder, optional=optional)
    stacked = [_known_pairs(wrapped, config, ours, folder)] if wrapped else []
    stacked += [_known_pairs(lora.read_adapter(Path(a)), config, ours, a) for a in adapters]
    return Opened(
        folder, layout, settings, config, image_token_id, weights, names, tuple(entries), ours, skeleton, tuple(stacked)
    )


def write_checkpoint(
    folder: Path,
    config: ChatConfig,
    layout: str,
    image_token_id: int | None,
    kinds: Mapping[str, Tensor],
    read: Callable[[str], Tensor],
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Weights and config.json. `kinds` has the shape and number type of each of our keys (meta tensors do); `read`
    brings one when it is written, so that memory holds one shard at a time."""
    settings = _settings(config, layout, image_token_id)
    entries = disk_keys(config, layout, kinds, image_token_id)
    readers = {key: (entry, index) for entry in entries for index, key in enumerate(entry.disk)}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for entry in entries:
        on_disk = entry.to_disk([kinds[key].to("meta") for key in entry.ours])
        shapes |= {key: (tuple(x.shape), x.dtype) for key, x in zip(entry.disk, on_disk, strict=True)}

    def written(key: str) -> Tensor:
        entry, index = readers[key]
        return entry.to_disk([read(name) for name in entry.ours])[index]

    folder.mkdir(parents=True, exist_ok=True)
    write_weights(folder, shapes, written, max_shard_bytes)
    dtype = str(kinds[EMBEDDING].dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**settings, "torch_dtype": dtype})


def disk_keys(config: ChatConfig, layout: str, ours: Iterable[str], image_token_id: int | None) -> list[Entry]:
    """Our keys and those of a layout; ValueError where the layout has no place for the model."""
    _settings(config, layout, image_token_id)
    return expand(_rules(config, layout), ours)


def _settings(config: ChatConfig, layout: str, image_token_id: int | None) -> dict[str, Any]:
    if _known(layout, *LAYOUTS) == "native":
        return native.to_native(config, image_token_id)
    return official.to_official(config)


def base_and_adapters(path: str | Path, adapters: Sequence[str | Path]) -> tuple[str | Path, Sequence[str | Path]]:
    """The model to open and its adapters, where `path` is a folder of adapters alone."""
    if lora.is_adapter(Path(path)):
        return lora.base_of(Path(path)), (*adapters, path)
    return path, adapters


def _known_pairs(
    pairs: Mapping[str, Pair], config: ChatConfig, ours: Mapping[str, torch.Size], where: object
) -> dict[str, Pair]:
    """Pairs by our keys; names may be of either layout."""
    mine = lora.pairs_of_ours(pairs, [expand(_rules(config, layout), ours) for layout in LAYOUTS], where)
    lora.check_shapes(mine, ours, where)
    return mine


def _rules(config: ChatConfig, layout: str) -> list[Any]:
    if layout == "llava":
        return llava.llava_rules(config)
    return native.native_rules(config) if layout == "native" else official.official_rules(config)


def _known(layout: str, *layouts: str) -> str:
    if layout not in layouts:
        raise ValueError(f"layout {layout!r}; it is {' or '.join(layouts)}")
    return layout
