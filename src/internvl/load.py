"""A folder or a name to a model, and back: where models and file layouts meet."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import ChatConfig
from internvl.convert import native, official
from internvl.convert.files import Weights, open_weights, read_json, write_json, write_weights
from internvl.convert.keys import Entry, check_keys, expand, matches
from internvl.convert.layouts import layout_of
from internvl.locate import locate
from internvl.models.build import build, finish
from internvl.models.chat import ChatModel
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
) -> Loaded:
    """Open a checkpoint folder of either layout, a hub id, `pocket`, or a `tiny-*` model of random weights.

    `dtype` None keeps the stored number type, or float32 where several are mixed.
    """
    if str(path) in CHAT and str(path) != "pocket":
        config = CHAT[str(path)]
        return Loaded(build(config, dtype or torch.float32, device), None, config, "random")
    folder = locate(path)
    settings = read_json(folder / "config.json")
    layout = _known(layout or layout_of(settings, folder))
    if layout == "native":
        config, image_token_id = native.from_native(settings, folder / "config.json")
    else:
        config, image_token_id = official.from_official(settings, folder / "config.json"), None
    weights = open_weights(folder)
    dtype = dtype or weights.widest
    model = build(config, dtype, "meta")
    _read(model, weights, folder, layout, dtype, device)
    tokenizer = _tokenizer(folder, model)
    model.image_token_id = image_token_id if image_token_id is not None else _image_token(tokenizer, settings)
    return Loaded(model, tokenizer, config, layout)


def save_checkpoint(model: ChatModel, tokenizer: Any, out: str | Path, layout: str = "official") -> None:
    """Write weights, config and tokenizer; other tools load the folder. Each file appears only when it is whole."""
    folder = Path(out)
    if _known(layout) == "native":
        settings = native.to_native(model.config, model.image_token_id)
    else:
        settings = official.to_official(model.config)
    state = model.state_dict()
    if any(".lora_" in key for key in state):
        raise ValueError(
            "the model has adapters; merge them with internvl.models.adapters.merge before saving it whole"
        )
    folder.mkdir(parents=True, exist_ok=True)
    entries = expand(_rules(model.config, layout), state)
    readers = {key: (entry, index) for entry in entries for index, key in enumerate(entry.disk)}
    shapes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for entry in entries:
        on_disk = entry.to_disk([state[key].to("meta") for key in entry.ours])
        shapes |= {key: (tuple(x.shape), x.dtype) for key, x in zip(entry.disk, on_disk, strict=True)}

    def read(key: str) -> Tensor:
        entry, index = readers[key]
        return entry.to_disk([state[name] for name in entry.ours])[index]

    write_weights(folder, shapes, read)
    dtype = str(state[EMBEDDING].dtype).removeprefix("torch.")
    write_json(folder / "config.json", {**settings, "torch_dtype": dtype})
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))


def _rules(config: ChatConfig, layout: str) -> list[Any]:
    return native.native_rules(config) if layout == "native" else official.official_rules(config)


def _known(layout: str) -> str:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}; it is {' or '.join(LAYOUTS)}")
    return layout


def _read(
    model: ChatModel,
    weights: Weights,
    folder: Path,
    layout: str,
    dtype: torch.dtype,
    device: torch.device | str,
) -> None:
    """Assign every weight, one tensor at a time, so that memory never holds the model twice."""
    names = {_current(key, layout): key for key in weights.shapes if not matches(key, official.DERIVED_KEYS)}
    state = model.state_dict()
    entries = expand(_rules(model.config, layout), state)
    head = native.HEAD_KEY if layout == "native" else official.head_key(model.config)
    tied = model.config.language.tied
    check_keys(
        entries,
        {key: tensor.shape for key, tensor in state.items()},
        {name: weights.shapes[key] for name, key in names.items()},
        folder,
        optional=[head] if tied else [],
    )
    loaded = dict(_tensors(entries, weights, names, dtype, device))
    if tied and HEAD in loaded and not torch.equal(loaded[HEAD], loaded[EMBEDDING]):
        raise ValueError(
            f"{folder}: tie_word_embeddings is true but {head} differs from the embedding; "
            f"set it to false in the language model's config"
        )
    if tied:
        loaded[HEAD] = loaded[EMBEDDING]
    model.load_state_dict(loaded, assign=True)
    finish(model)


def _tensors(
    entries: Iterable[Entry], weights: Weights, names: Mapping[str, str], dtype: torch.dtype, device: Any
) -> Iterable[tuple[str, Tensor]]:
    for entry in entries:
        if any(key not in names for key in entry.disk):
            continue  # the optional head
        parts = entry.to_ours([weights.get(names[key], dtype, device) for key in entry.disk])
        # A part is a view of what was read where a matrix was split: give each its own memory.
        copies = [part.clone() if len(parts) > 1 else part for part in parts]
        yield from zip(entry.ours, copies, strict=True)


def _current(key: str, layout: str) -> str:
    return native.current_key(key) if layout == "native" else key


def _tokenizer(folder: Path, model: ChatModel) -> Any:
    """The folder's tokenizer, from its files alone; None where it has none."""
    from transformers import AutoTokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer.json").exists():  # exactly that file: transformers 5 would rebuild it by its class name
        return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
    if not any((folder / name).exists() for name in ("tokenizer.model", "vocab.json")):
        return None
    if (folder / "tokenizer.model").exists() and find_spec("sentencepiece") is None:
        raise ValueError(f"{folder / 'tokenizer.model'}: reading it needs: pip install 'internvl[slow-tokenizers]'")
    if model.config.language.family == "internlm2":  # InternLM2Tokenizer is remote code around a SentencePiece model
        options = {"legacy": False, "add_bos_token": True, "add_prefix_space": False}
        return LlamaTokenizer.from_pretrained(str(folder), local_files_only=True, **options)
    return AutoTokenizer.from_pretrained(
        str(folder), config=model.language.model.config, local_files_only=True, trust_remote_code=False
    )


def _image_token(tokenizer: Any, settings: Mapping[str, Any]) -> int | None:
    if tokenizer is not None and IMAGE_TOKEN in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    known = settings.get("img_context_token_id")
    return int(known) if isinstance(known, int) else None
