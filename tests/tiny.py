"""Models and tokenizers that build in milliseconds: one per architecture, random weights from a seed."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from internvl.config import ChatConfig
from internvl.models.build import build, build_dual
from internvl.models.chat import ChatModel
from internvl.models.contrastive import DualModel
from internvl.tokens import SPECIAL_TOKENS
from internvl.zoo import CHAT, DUAL, VIT_TINY_6B

FAMILIES = ("llama", "qwen2", "phi3", "internlm2")
IMAGE_TOKEN_ID = 9


def unchecked(function: Any) -> Any:
    """The function as users run it: tests that give a wrong type see its own error, not that of the shape checks."""
    plain = inspect.unwrap(function)
    return plain.__get__(function.__self__) if hasattr(function, "__self__") else plain


def tiny_chat_config(
    family: str = "llama", *, vision: str = "300m", vocab_size: int = 160, **changes: Any
) -> ChatConfig:
    """Config of `tiny-<family>`; `vision` is "300m" or "6b"; other fields of ChatConfig by keyword."""
    config = CHAT[f"tiny-{family}"]
    settings = {**config.language.settings, "vocab_size": vocab_size}
    if vision == "6b":
        changes.setdefault("vision", VIT_TINY_6B)
    return replace(config, language=replace(config.language, settings=settings), **changes)


def tiny_model(
    family: str = "llama",
    *,
    vision: str = "300m",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    image_token_id: int = IMAGE_TOKEN_ID,
    **changes: Any,
) -> ChatModel:
    """A random model whose every weight matters: norms, biases and scales are random too."""
    model = build(tiny_chat_config(family, vision=vision, **changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
    model.image_token_id = image_token_id
    return model.to(dtype)


def tiny_first(queries: bool = True, *, seed: int = 0, vocab_size: int = 160, **changes: Any) -> ChatModel:
    """A random chat model of 1.0, with or without QLLaMA's queries, whose every weight matters."""
    config = CHAT["tiny-1.0-qllama" if queries else "tiny-1.0"]
    settings = {**config.language.settings, "vocab_size": vocab_size}
    model = build(replace(config, language=replace(config.language, settings=settings), **changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
        if model.qllama is not None:
            model.qllama.queries.normal_(generator=generator)
    model.image_token_id = IMAGE_TOKEN_ID
    return model


def tiny_dual(seed: int = 0, **changes: Any) -> DualModel:
    """A random InternVL-G whose every weight matters; fields of DualConfig by keyword."""
    model = build_dual(replace(DUAL["tiny-dual"], **changes), seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).normal_(0.0, 0.1, generator=generator))
        model.qllama.queries.normal_(generator=generator)
    return model


def tiny_texts(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Ids of texts of full length, begun by 1 and ended by 2."""
    ids = torch.randint(3, 160, (rows, length), generator=torch.Generator().manual_seed(seed))
    ids[:, 0], ids[:, -1] = 1, 2
    return ids


def tiny_pictures(count: int, side: int = 56, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def tiny_batch(num_text: int = 6, num_tiles: int = 2, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of ids with the image tokens of `num_tiles` tiles inside, and the tiles."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(10, 160, (num_text,), generator=generator)
    half = num_text // 2
    ids = torch.cat([text[:half], torch.full((4 * num_tiles,), IMAGE_TOKEN_ID), text[half:]])
    return ids[None], torch.randn(num_tiles, 3, 56, 56, generator=generator)


def plain_tokenizer(extra: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<|end|>")) -> Any:
    """A tokenizer of a language model alone: bytes and control tokens, none of ours."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({p: i for i, p in enumerate(["<pad>", "<s>", "</s>", *extra, *alphabet])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    out = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    out.add_tokens(list(extra), special_tokens=True)
    return out


@lru_cache
def tiny_tokenizer(merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """A byte-level tokenizer with the nine special tokens: six control tokens, 256 bytes, merges, nine special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    control = ["<pad>", "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    pieces = [*control, *alphabet, *(first + second for first, second in merges)]
    core = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *SPECIAL_TOKENS], special_tokens=True)
    return tokenizer
