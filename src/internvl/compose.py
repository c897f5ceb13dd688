"""A new chat checkpoint from a vision encoder and a language model, tensor by tensor: what stage 1 starts from.

Of 1.2 and later, or in the form of 1.0, where an InternVL-G brings its queries. Progressive scaling (paper 2.5, section
3.3): an InternViT that was trained under a small language model moves under a larger one, and only the connector has to
be warmed up again. Training itself is train/'s.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internvl.config import FORM_1_0, ChatConfig, DualConfig, LanguageConfig, VisionConfig
from internvl.convert import dual, native, official
from internvl.convert.files import MAX_SHARD_BYTES, open_weights, read_json
from internvl.convert.keys import check_keys, expand, matches
from internvl.convert.parts import language_config, language_rules
from internvl.data.templates import find_template
from internvl.load import read_tokenizer
from internvl.models.fresh import empty_connector, fresh_connector, resize_rows
from internvl.models.internvit import InternViT
from internvl.models.language import LanguageModel
from internvl.models.layers import resize_positions
from internvl.opened import EMBEDDING, HEAD, Opened, open_checkpoint, write_checkpoint
from internvl.rewrite import forget_code, fresh_folder, reader
from internvl.tokens import IMAGE_TOKEN, SPECIAL_TOKENS
from internvl.tower import open_tower
from internvl.zoo import CHAT

POSITIONS = "vision.embeddings.position_embedding"
CHAT_TYPES = (official.MODEL_TYPE, native.MODEL_TYPE)
TEMPLATE_OF = {"phi3": "phi3-chat"}
"""Where the family has end-of-turn tokens of its own; else internvl2_5, whose tokens ChatML models have."""


Form = Literal["2", "1.0"]


@dataclass(frozen=True)
class Parts:
    """What to put together: folders; an encoder or language model may also be that of a chat checkpoint."""

    vision: Path
    """An InternViT, InternVL-G, or a chat checkpoint."""
    language: Path
    connector: Path | None = None
    """A chat checkpoint whose connector is carried over; None starts a fresh one."""
    template: str | None = None
    tile_size: int | None = None
    """Pixels; None takes that of the chat checkpoint, or the image size of the encoder."""
    max_tiles: int = 12
    """Without the thumbnail; in the form of 1.0 a picture is always one."""
    form: Form = "2"
    """"2": 1.2 and later. "1.0": every patch of the fourth hidden state from the last, one square a picture, no norm
    and no marks; from an InternVL-G its queries too."""
    dtype: torch.dtype | None = None
    """None takes that of the language model's embedding."""
    seed: int = 0


@dataclass(frozen=True)
class Composed:
    """What was written."""

    config: ChatConfig
    parameters: Mapping[str, int]
    """Of each part."""
    added: Mapping[str, int]
    """New tokens and their ids."""
    old_rows: int
    """Rows of the language model's embedding before; `config.language.vocab_size` after."""


def compose(parts: Parts, target: Path) -> Composed:
    """Write the official-layout folder `target`, which must be empty or not there; one shard in memory at a time.

    ValueError where the parts do not fit: widths of the connector, a template whose end-of-turn token the tokenizer
    does not have, a tile size that the patches do not divide.
    """
    vision_config, queries, seen = _vision(parts.vision)
    language, brings_chat = _language(parts.language)
    template = parts.template or (brings_chat.template if brings_chat else TEMPLATE_OF.get(language.family))
    config = _config(parts, vision_config, language, template or "internvl2_5", seen)
    config = _formed(parts, config, brings_chat, queries)
    vision_read, vision_kinds = _open(parts.vision, config, "vision")
    language_read, language_kinds = _open(parts.language, config, "language")
    tokenizer, added = _tokenizer(parts.language, config)
    dtype = parts.dtype or language_kinds[EMBEDDING].dtype
    kinds = {key: kind.to(dtype) for key, kind in (vision_kinds | language_kinds).items()}
    new_rows = len(added) if config.image_marks else 0
    rows, size = kinds[EMBEDDING].shape[0], len(tokenizer) - len(added) + new_rows
    kinds |= {key: torch.empty(size, language.width, dtype=dtype, device="meta") for key in (EMBEDDING, HEAD)}
    positions = (1, (config.tile_size // config.vision.patch_size) ** 2 + 1, config.vision.width)
    kinds[POSITIONS] = torch.empty(positions, dtype=dtype, device="meta")
    connector = _connector(parts, config)
    kinds |= {key: torch.empty_like(value, dtype=dtype, device="meta") for key, value in connector.items()}

    def read(key: str) -> Tensor:
        if key in connector:
            return connector[key].to(dtype)
        if key.startswith("qllama."):
            return vision_read(key).to(dtype)
        if not key.startswith("vision."):
            tensor = language_read(key)
            if key in (EMBEDDING, HEAD):
                std = float(language.settings.get("initializer_range", 0.02))
                tensor = resize_rows(tensor, size, new_rows, std, key == HEAD, parts.seed)
            return tensor.to(dtype)
        tensor = vision_read(key)
        if key == POSITIONS:
            side = config.tile_size // config.vision.patch_size
            tensor = resize_positions(tensor, side, side)
        return tensor.to(dtype)

    config = _grown(config, size)
    with fresh_folder(target) as folder:
        write_checkpoint(folder, config, "official", added.get(IMAGE_TOKEN), kinds, read, MAX_SHARD_BYTES)
        tokenizer.save_pretrained(str(folder))
        if (parts.language / "generation_config.json").is_file():
            shutil.copyfile(parts.language / "generation_config.json", folder / "generation_config.json")
        forget_code(folder)
    counts = {part: sum(k.numel() for name, k in kinds.items() if name.startswith(f"{part}.")) for part in PARTS}
    return Composed(config, {part: count for part, count in counts.items() if count}, added, rows)


PARTS = ("vision", "qllama", "connector", "language")


def open_vision(folder: Path, dtype: torch.dtype | None = torch.float32) -> tuple[InternViT, ChatConfig | None]:
    """The encoder of an InternViT folder or of a chat checkpoint, read alone; the latter's config too."""
    vision, _, seen = _vision(folder)
    config = seen or ChatConfig(vision, CHAT["tiny-llama"].language, tile_size=vision.image_size)
    read, kinds = _open(folder, config, "vision")
    with torch.device("meta"):
        encoder = InternViT(vision)
    encoder.load_state_dict({key.removeprefix("vision."): read(key).to(dtype) for key in kinds}, assign=True)
    return encoder.eval(), seen


def vision_of(folder: Path) -> tuple[VisionConfig, ChatConfig | None]:
    """The encoder's config, and that of the chat checkpoint where it is part of one."""
    vision, _, seen = _vision(folder)
    return vision, seen


def _vision(folder: Path) -> tuple[VisionConfig, DualConfig | None, ChatConfig | None]:
    """The encoder's config, and that of the InternVL-G or of the chat checkpoint that it is part of."""
    if _is_chat(read_json(folder / "config.json")):
        config = open_checkpoint(folder).config
        return config.vision, config.queries, config
    tower = open_tower(folder)
    return tower.vision, tower.queries, None


def _is_chat(settings: Mapping[str, Any]) -> bool:
    return settings.get("model_type") in CHAT_TYPES and not dual.is_dual(settings)


def _language(folder: Path) -> tuple[LanguageConfig, ChatConfig | None]:
    settings = read_json(folder / "config.json")
    if _is_chat(settings):
        config = open_checkpoint(folder).config
        return config.language, config
    settings = {key: value for key, value in settings.items() if key != "auto_map"}  # names code of another folder
    return language_config(settings, folder / "config.json"), None


def _config(
    parts: Parts, vision: VisionConfig, language: LanguageConfig, template: str, seen: ChatConfig | None
) -> ChatConfig:
    """A v2 model with dynamic tiles; what the vision part learned with (layer, normalisation, shuffle) stays."""
    tile_size = parts.tile_size or (seen.tile_size if seen else vision.image_size)
    find_template(template)
    config = ChatConfig(vision, language, tile_size=tile_size, template=template, max_tiles=parts.max_tiles)
    if seen is None:
        return config
    return replace(config, feature_layer=seen.feature_layer, normalize=seen.normalize, downsample=seen.downsample)


def _formed(parts: Parts, config: ChatConfig, brings_chat: ChatConfig | None, queries: DualConfig | None) -> ChatConfig:
    """The system text comes with its template; the form of 1.0 is that of official internvl_chat_llava."""
    if brings_chat is not None and config.template == brings_chat.template:
        config = replace(config, system_message=brings_chat.system_message)
    if parts.form == "2":
        return config
    return replace(
        config,
        **FORM_1_0,
        queries=queries,
    )


def _grown(config: ChatConfig, size: int) -> ChatConfig:
    """The config of what is written: whole vocabulary, head of its own (official), positions of the tile size."""
    settings = {**config.language.settings, "vocab_size": size, "tie_word_embeddings": False}
    language = replace(config.language, settings=settings)
    vision = replace(config.vision, image_size=config.tile_size)
    queries = None if config.queries is None else replace(config.queries, vision=vision)
    return replace(config, language=language, vision=vision, queries=queries)


def _open(folder: Path, config: ChatConfig, part: str) -> tuple[Callable[[str], Tensor], dict[str, Tensor]]:
    """A reader by our key for one part of a folder, and the kinds of its tensors; keys and shapes are checked."""
    opened = _opened(folder, config, part)
    prefixes = (f"{part}.", "qllama.") if part == "vision" and config.queries is not None else (f"{part}.",)
    mine = [entry for entry in opened.entries if entry.ours[0].startswith(prefixes)]
    kinds: dict[str, Tensor] = {}
    for entry in mine:
        dtype = opened.kind(entry) if opened.has(entry) else kinds[EMBEDDING].dtype
        for key in entry.ours:
            kinds[key] = torch.empty(opened.ours[key], dtype=dtype, device="meta")
    return reader(opened, None), kinds


def _opened(folder: Path, config: ChatConfig, part: str) -> Opened:
    settings = read_json(folder / "config.json")
    if _is_chat(settings):
        return open_checkpoint(folder)
    if part == "vision":
        tower = open_tower(folder)
        entries, ours = tower.entries(with_queries=config.queries is not None)
        weights, names = tower.weights, tower.names
        return Opened(folder, "official", settings, config, None, weights, names, tuple(entries), ours, None, ())
    weights, prefix = open_weights(folder), "language_model."
    names = {key if key.startswith(prefix) else prefix + key: key for key in weights.shapes}
    names = {name: key for name, key in names.items() if not matches(name, official.DERIVED_KEYS)}
    with torch.device("meta"):
        module = LanguageModel(config.language)
    ours = {f"{part}.{key}": tensor.shape for key, tensor in module.state_dict().items()}
    entries = expand(language_rules(config.language), ours)
    optional = _heads(entries) if config.language.tied else []
    check_keys(entries, ours, {name: weights.shapes[key] for name, key in names.items()}, folder, optional=optional)
    return Opened(folder, "official", settings, config, None, weights, names, tuple(entries), ours, None, ())


def _heads(entries: Iterable[Any]) -> list[str]:
    return [key for entry in entries if HEAD in entry.ours for key in entry.disk]


def _tokenizer(folder: Path, config: ChatConfig) -> tuple[Any, dict[str, int]]:
    """The language model's tokenizer with the nine tokens, and those that are new.

    In the form of 1.0 nothing stands around a picture, and its token is a name without a row (load.chat_tokenizer).
    """
    tokenizer = read_tokenizer(folder, config.language)
    if tokenizer is None:
        raise ValueError(f"{folder}: has no tokenizer; a chat model needs one beside the language model")
    end = find_template(config.template).stops[0]
    if end not in tokenizer.get_vocab():
        raise ValueError(
            f"{folder}: template {config.template} ends turns with {end!r}, which the tokenizer does not have as one "
            f"token; give a template whose end it has, or a chat version of the language model"
        )
    before = set(tokenizer.get_vocab())
    new = [token for token in (SPECIAL_TOKENS if config.image_marks else (IMAGE_TOKEN,)) if token not in before]
    tokenizer.add_tokens(new, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    return tokenizer, {token: int(vocabulary[token]) for token in new}


def _connector(parts: Parts, config: ChatConfig) -> dict[str, Tensor]:
    if parts.connector is None:
        return fresh_connector(config, parts.seed)
    opened = open_checkpoint(parts.connector)
    wanted = {key: tuple(value.shape) for key, value in empty_connector(config).items()}
    found = {key: tuple(shape) for key, shape in opened.ours.items() if key.startswith("connector.")}
    if found != wanted:
        other = opened.config
        widths = (other.connector_width, other.language.width), (config.connector_width, config.language.width)
        why = "" if widths[0] != widths[1] else ", with a norm or queries that the other has not"
        raise ValueError(
            f"{parts.connector}: its connector goes from {widths[0][0]} to {widths[0][1]} channels, this model needs "
            f"{widths[1][0]} to {widths[1][1]}{why}; leave the connector out to start a fresh one"
        )
    read = reader(opened, None)
    return {key: read(key) for key in wanted}
