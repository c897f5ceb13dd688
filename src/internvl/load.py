"""A folder or a name to a model, and back: where models and file layouts meet."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import ChatConfig, LanguageConfig
from internvl.convert import lora, native, official
from internvl.convert.files import (
    MAX_SHARD_BYTES,
    NUMBER_TYPES,
    Weights,
    open_weights,
    read_json,
    write_json,
    write_weights,
)
from internvl.convert.keys import Entry, check_keys, expand, matches
from internvl.convert.layouts import layout_of
from internvl.convert.lora import Pair
from internvl.locate import locate
from internvl.models import placement
from internvl.models.build import build, finish
from internvl.models.chat import ChatModel
from internvl.models.language import transformers_config
from internvl.tokens import IMAGE_TOKEN
from internvl.zoo import CHAT

LAYOUTS = ("official", "native")
EMBEDDING, HEAD = "language.model.model.embed_tokens.weight", "language.model.lm_head.weight"


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode, the tokenizer where the folder has one, and where they came from."""

    model: ChatModel
    tokenizer: Any
    config: ChatConfig
    layout: str
    """"official", "native", or "random" for a name of the zoo without weights."""


def load_checkpoint(
    path: str | Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    layout: str | None = None,
    adapters: Sequence[str | Path] = (),
    merge: bool = True,
    device_map: str | Mapping[str, str] | None = None,
    max_bytes: Mapping[str, int] | None = None,
) -> Loaded:
    """Open a checkpoint folder of either layout, a hub id, `pocket`, or a `tiny-*` model of random weights.

    `dtype` None keeps the stored number type, or float32 where several are mixed. `adapters` are folders in peft's
    layout, stacked; an adapter folder as `path` brings the model that it names. Adapters, and those that wrap an
    official checkpoint (use_llm_lora, use_backbone_lora), are folded into the weights in float32; with `merge` False
    they stay beside them, which needs peft. `device_map` "auto" spreads the model over all GPUs, or a mapping says
    which module goes where (`models/placement.py`); `max_bytes` limits each device.
    """
    path, adapters = _base(path, adapters)
    if str(path) in CHAT and str(path) != "pocket":
        if adapters or device_map is not None:
            raise ValueError(f"{path} has random weights: it takes neither adapters nor a device map")
        config = CHAT[str(path)]
        return Loaded(build(config, dtype or torch.float32, device), None, config, "random")
    opened = open_checkpoint(path, layout=layout, adapters=adapters)
    dtype = dtype or opened.weights.widest
    model = build(opened.config, dtype, "meta")
    places = None
    if device_map is not None:
        places = placement.place(model, device_map, max_bytes)
    _read(model, opened, dtype, device if places is None else places, merge)
    if opened.pairs and not merge:
        _attach(model, opened)
    if places is not None:
        placement.dispatch(model, places)
    tokenizer = read_tokenizer(opened.folder, opened.config.language)
    known = opened.image_token_id
    model.image_token_id = known if known is not None else _image_token(tokenizer, opened.settings)
    return Loaded(model, tokenizer, opened.config, opened.layout)


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
        self, entry: Entry, dtype: torch.dtype | None, device: torch.device | str = "cpu", merge: bool = True
    ) -> list[Tensor]:
        """Our tensors of one entry, each in memory of its own; adapters are added in float32 before rounding."""
        changes = {key: self.pairs[key] for key in entry.ours if key in self.pairs} if merge else {}
        now = torch.float32 if changes else dtype
        parts = entry.to_ours([self.weights.get(self.names[key], now, device) for key in entry.disk])
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


def open_checkpoint(path: str | Path, *, layout: str | None = None, adapters: Sequence[str | Path] = ()) -> Opened:
    """Read configuration and headers of a folder or `pocket`, and check every key and shape. Weights stay on disk."""
    path, adapters = _base(path, adapters)
    folder = locate(path)
    settings = read_json(folder / "config.json")
    layout = _known(layout or layout_of(settings, folder))
    weights, image_token_id = open_weights(folder), None
    wrapped: dict[str, Pair] = {}
    if layout == "native":
        config, image_token_id = native.from_native(settings, folder / "config.json")
        names = {native.current_key(key): key for key in weights.shapes}
    else:
        config = official.from_official(settings, folder / "config.json")
        ranks = lora.official_ranks(settings, folder / "config.json")
        names, wrapped = lora.unwrap(weights, ranks, folder)
    names = {name: key for name, key in names.items() if not matches(name, official.DERIVED_KEYS)}
    ours = {key: tensor.shape for key, tensor in build(config, device="meta").state_dict().items()}
    entries = expand(_rules(config, layout), ours)
    optional = [key for entry in entries if HEAD in entry.ours for key in entry.disk] if config.language.tied else []
    found = {name: weights.shapes[key] for name, key in names.items()}
    check_keys(entries, ours, found, folder, optional=optional)
    stacked = [_known_pairs(wrapped, config, ours, folder)] if wrapped else []
    stacked += [_known_pairs(lora.read_adapter(Path(a)), config, ours, a) for a in adapters]
    return Opened(
        folder, layout, settings, config, image_token_id, weights, names, tuple(entries), ours, tuple(stacked)
    )


def save_checkpoint(model: ChatModel, tokenizer: Any, out: str | Path, layout: str = "official") -> None:
    """Write weights, config and tokenizer; other tools load the folder. Each file appears only when it is whole."""
    state = model.state_dict()
    if any(".lora_" in key for key in state):
        raise ValueError(
            "the model has adapters; merge them with internvl.models.adapters.merge before saving it whole"
        )
    if any(value.dtype == torch.int8 for value in state.values()):
        raise ValueError("the model has int8 weights, which no layout holds; save it before quantising it")
    write_checkpoint(Path(out), model.config, layout, model.image_token_id, state, state.__getitem__)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))


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
    if _known(layout) == "native":
        return native.to_native(config, image_token_id)
    return official.to_official(config)


def _base(path: str | Path, adapters: Sequence[str | Path]) -> tuple[str | Path, Sequence[str | Path]]:
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


def _attach(model: ChatModel, opened: Opened) -> None:
    if find_spec("peft") is None:
        raise ValueError("adapters beside the weights need: pip install 'internvl[train]'; folding them in does not")
    from internvl.models import adapters

    for pairs in opened.adapters:
        for part, prefix in lora.PARTS.items():
            mine = {key.removeprefix(prefix): pair for key, pair in pairs.items() if key.startswith(prefix)}
            if mine:
                some = next(iter(mine.values()))
                halves = {key.removesuffix(".weight"): (pair.down, pair.up) for key, pair in mine.items()}
                adapters.attach(model, part, halves, some.alpha, root_scaled=some.root_scaled)


def _rules(config: ChatConfig, layout: str) -> list[Any]:
    return native.native_rules(config) if layout == "native" else official.official_rules(config)


def _known(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; it is {' or '.join(LAYOUTS)}")
    return layout


def _read(
    model: ChatModel,
    opened: Opened,
    dtype: torch.dtype,
    device: torch.device | str | Mapping[str, str],
    merge: bool,
) -> None:
    """Assign every weight, one tensor at a time, so that memory never holds the model twice."""
    tied = opened.config.language.tied
    loaded: dict[str, Tensor] = {}
    for entry in filter(opened.has, opened.entries):
        where = placement.device_of(entry.ours[0], device) if isinstance(device, Mapping) else device
        loaded |= zip(entry.ours, opened.read(entry, dtype, where, merge), strict=True)
    if tied and HEAD in loaded and not torch.equal(loaded[HEAD], loaded[EMBEDDING]):
        head = next(key for entry in opened.entries if HEAD in entry.ours for key in entry.disk)
        raise ValueError(
            f"{opened.folder}: tie_word_embeddings is true but {head} differs from the embedding; "
            f"set it to false in the language model's config"
        )
    if tied:
        loaded[HEAD] = loaded[EMBEDDING]
    model.load_state_dict(loaded, assign=True)
    finish(model)


def read_tokenizer(folder: Path, config: LanguageConfig) -> Any:
    """The folder's tokenizer, from its files alone; None where it has none."""
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():  # exactly that file: transformers 5 would rebuild it by its class name
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        return None
    if (folder / "tokenizer.model").exists() and find_spec("sentencepiece") is None:
        raise ValueError(f"{folder / 'tokenizer.model'}: reading it needs: pip install 'internvl[slow-tokenizers]'")
    if config.family == "internlm2":  # InternLM2Tokenizer is remote code around a SentencePiece model
        options = {"legacy": False, "add_bos_token": True, "add_prefix_space": False}
        return LlamaTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
    return AutoTokenizer.from_pretrained(
        str(folder), config=transformers_config(config), local_files_only=True, trust_remote_code=False
    )


def _image_token(tokenizer: Any, settings: Mapping[str, Any]) -> int | None:
    if tokenizer is not None and IMAGE_TOKEN in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    known = settings.get("img_context_token_id")
    return int(known) if isinstance(known, int) else None
