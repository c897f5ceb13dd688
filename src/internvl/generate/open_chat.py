"""A name or a folder to a model to talk to. Talking is session.py's, reading weights load.py's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from internvl.convert.files import read_json
from internvl.generate.rounding import KL_LIMITS, check_steps, plain_logits, probe_ids
from internvl.generate.session import Chat
from internvl.load import load_checkpoint
from internvl.locate import locate
from internvl.models import int8
from internvl.models.chat import ChatModel
from internvl.models.choose import why_not_here
from internvl.models.products import fast_bfloat16
from internvl.models.torchao_layers import torchao_rounding
from internvl.opened import FirstGeneration

Dtype = Literal["auto", "float32", "bfloat16", "int8", "int4"]
Quantiser = Literal["auto", "own", "torchao"]


def load_chat(
    name_or_folder: str | Path,
    *,
    device: str = "cpu",
    dtype: Dtype | torch.dtype = "auto",
    max_tiles: int | None = None,
    max_rows: int = 16,
    adapters: Sequence[str | Path] = (),
    device_map: str | Mapping[str, str] | None = None,
    max_kl: float | None = None,
    quantiser: Quantiser = "auto",
    vision_tower: str | Path | None = None,
    tile_size: int | None = None,
    allow_pickle: bool = False,
) -> Chat:
    """Open a model by name, hub id or folder, of either layout, to chat with.

    dtype "auto" is bfloat16 where the hardware computes it, else float32; "int4" keeps bfloat16 for pictures and
    prompts and steps through 4-bit blocks of the language model's weights; "int8" halves the memory of its layers.
    Both are refused where they move the next token of a probe text by more than `max_kl` nats (generate/rounding.py).
    `quantiser` "torchao" rounds by torchao, prompts and steps alike; "auto" takes it for int4 where there are no 4-bit
    kernels here: on a GPU, and for language models without a fused path (docs/chat.md).
    device "auto" takes a GPU if there is one; `device_map` "auto" spreads the model over all GPUs. `adapters` are peft
    folders, folded in (docs/convert.md). `vision_tower`, `tile_size` and `allow_pickle` are for a folder of
    InternVL-Chat 1.0 as released (`opened.FirstGeneration`).
    """
    device = device_of(device)
    if quantiser != "auto" and dtype not in KL_LIMITS:
        raise ValueError(f"quantiser {quantiser!r} with dtype {dtype}: it rounds to {' or '.join(KL_LIMITS)}")
    loaded = load_checkpoint(
        name_or_folder,
        device=device,
        dtype=dtype_of(dtype, device),
        adapters=adapters,
        device_map=device_map,
        first=FirstGeneration(vision_tower, tile_size, allow_pickle),
    )
    limit = KL_LIMITS.get(str(dtype), math.inf) if max_kl is None else max_kl
    by_torchao = quantiser == "torchao" or (quantiser == "auto" and _needs_torchao(dtype, loaded.model))
    int4 = dtype == "int4" and not by_torchao
    if by_torchao or dtype == "int8":
        probe = partial(plain_logits, ids=_probe_ids(loaded.tokenizer))
        rounding = torchao_rounding("int4" if dtype == "int4" else "int8") if by_torchao else int8.Int8Linear
        int8.quantise(loaded.model, probe, limit, rounding=rounding)
    stop_ids = [] if loaded.layout == "random" else _generation_stops(locate(name_or_folder))
    chat = Chat(loaded.model, loaded.tokenizer, int4=int4, max_tiles=max_tiles, max_rows=max_rows, stop_ids=stop_ids)
    if int4 and limit < math.inf and loaded.tokenizer is not None:
        check_steps(chat.engine, probe_ids(loaded.tokenizer), limit)
    return chat


def _needs_torchao(dtype: Dtype | torch.dtype, model: ChatModel) -> bool:
    """4-bit blocks of the fused path run on a CPU, for the language models that it computes."""
    return dtype == "int4" and why_not_here(model.language) is not None


def _probe_ids(tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ValueError("rounded weights are checked on a text, and the model has no tokenizer; use bfloat16")
    return probe_ids(tokenizer)


def device_of(device: str) -> str:
    """A device by name: "auto" takes a GPU if there is one; ValueError for a GPU where torch sees none."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if str(device).startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r}, but torch sees no GPU here; give cpu or auto")
    return device


def dtype_of(dtype: str | torch.dtype, device: str) -> torch.dtype:
    """A number type by name; "auto" as in `load_chat`."""
    if isinstance(dtype, torch.dtype):
        return dtype
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int4": torch.bfloat16}
    known["int8"] = known["auto"] = torch.bfloat16 if device != "cpu" or fast_bfloat16() else torch.float32
    if dtype not in known:
        raise ValueError(f"dtype {dtype!r}; it is one of {', '.join(known)}")
    return known[dtype]


def _generation_stops(folder: Path) -> list[int]:
    """End-of-text ids of generation_config.json, where there is one."""
    path = folder / "generation_config.json"
    ends = read_json(path).get("eos_token_id") if path.is_file() else None
    return [int(end) for end in (ends if isinstance(ends, list) else [ends]) if end is not None]
