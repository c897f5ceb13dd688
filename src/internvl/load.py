"""A folder or a name to a model, and back: where models and file layouts meet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.config import ChatConfig, LanguageConfig
from internvl.convert import lora
from internvl.models import placement
from internvl.models.build import build, finish
from internvl.models.chat import ChatModel
from internvl.models.int8 import is_rounded
from internvl.models.language import transformers_config
from internvl.opened import (
    EMBEDDING,
    FIRST,
    HEAD,
    FirstGeneration,
    Opened,
    base_and_adapters,
    open_checkpoint,
    write_checkpoint,
)
from internvl.tokens import IMAGE_TOKEN
from internvl.zoo import CHAT


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
    first: FirstGeneration = FIRST,
) -> Loaded:
    """Open a checkpoint folder of either layout, a hub id, `pocket`, or a `tiny-*` model of random weights.

    `dtype` None keeps the stored number type, or float32 where several are mixed. `adapters` are folders in peft's
    layout, stacked; an adapter folder as `path` brings the model that it names. Adapters, and those that wrap an
    official checkpoint (use_llm_lora, use_backbone_lora), are folded into the weights in float32; with `merge` False
    they stay beside them, which needs peft. `device_map` "auto" spreads the model over all GPUs, or a mapping says
    which module goes where (`models/placement.py`); `max_bytes` limits each device. `first`: what a folder of
    InternVL-Chat 1.0, as released, does not say by itself.

    Weights stored in the type that is asked for stay in the file, mapped: replace a folder in use (as
    `save_checkpoint` does), never write into its files.
    """
    path, adapters = base_and_adapters(path, adapters)
    if str(path) in CHAT and str(path) != "pocket":
        if adapters or device_map is not None or first != FIRST:
            raise ValueError(f"{path} has random weights: it takes no adapters, device map or vision tower")
        config = CHAT[str(path)]
        return Loaded(build(config, dtype or torch.float32, device), None, config, "random")
    opened = open_checkpoint(path, layout=layout, adapters=adapters, dtype=dtype, first=first)
    dtype, model = dtype or opened.weights.widest, opened.skeleton
    assert model is not None
    places = None
    if device_map is not None:
        places = placement.place(model, device_map, max_bytes)
    _read(model, opened, dtype, device if places is None else places, merge)
    if opened.pairs and not merge:
        _attach(model, opened)
    if places is not None:
        placement.dispatch(model, places)
    tokenizer = chat_tokenizer(opened.folder, opened.config)
    known = opened.image_token_id
    model.image_token_id = known if known is not None else _image_token(tokenizer, opened.settings)
    return Loaded(model, tokenizer, opened.config, opened.layout)


def save_checkpoint(model: ChatModel, tokenizer: Any, out: str | Path, layout: str = "official") -> None:
    """Write weights, config and tokenizer; other tools load the folder. Each file appears only when it is whole."""
    state = model.state_dict()
    if any(".lora_" in key for key in state):
        raise ValueError(
            "the model has adapters; merge them with internvl.models.adapters.merge before saving it whole"
        )
    if any(is_rounded(value) for value in state.values()):
        raise ValueError("the model has int8 or int4 weights, which no layout holds; save it before quantising it")
    write_checkpoint(Path(out), model.config, layout, model.image_token_id, state, state.__getitem__)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(out))


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


def _read(
    model: ChatModel,
    opened: Opened,
    dtype: torch.dtype,
    device: torch.device | str | Mapping[str, str],
    merge: bool,
) -> None:
    """Assign every weight, one tensor at a time or mapped, so that memory never holds the model twice."""
    tied = opened.config.language.tied
    loaded: dict[str, Tensor] = {}
    # Embedding and head first: where they are one, the second copy is gone before the rest is read.
    for entry in sorted(filter(opened.has, opened.entries), key=lambda e: {EMBEDDING, HEAD}.isdisjoint(e.ours)):
        where = placement.device_of(entry.ours[0], device) if isinstance(device, Mapping) else device
        passing = tied and HEAD in entry.ours  # compared and forgotten: mapped, its pages would stay
        loaded |= zip(entry.ours, opened.read(entry, dtype, where, merge, mapped=not passing), strict=True)
        if tied and HEAD in loaded and EMBEDDING in loaded and loaded[HEAD] is not loaded[EMBEDDING]:
            if not torch.equal(loaded[HEAD], loaded[EMBEDDING]):
                head = next(key for entry in opened.entries if HEAD in entry.ours for key in entry.disk)
                raise ValueError(
                    f"{opened.folder}: tie_word_embeddings is true but {head} differs from the embedding; "
                    f"set it to false in the language model's config"
                )
            loaded[HEAD] = loaded[EMBEDDING]
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


def chat_tokenizer(folder: Path, config: ChatConfig) -> Any:
    """As `read_tokenizer`. That of 1.0 has no token for pictures, nor a row for one (there id -200): it gets the name
    of one here, with the next id, which no text contains.
    """
    tokenizer = read_tokenizer(folder, config.language)
    if tokenizer is not None and not config.image_marks and IMAGE_TOKEN not in tokenizer.get_vocab():
        tokenizer.add_tokens([IMAGE_TOKEN], special_tokens=True)
    return tokenizer


def _image_token(tokenizer: Any, settings: Mapping[str, Any]) -> int | None:
    if tokenizer is not None and IMAGE_TOKEN in tokenizer.get_vocab():
        return int(tokenizer.convert_tokens_to_ids(IMAGE_TOKEN))
    known = settings.get("img_context_token_id")
    return int(known) if isinstance(known, int) else None
