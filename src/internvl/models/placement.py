"""One model on several devices: which module goes where by its bytes, and moving tensors between them.

As in the official recipe (quick start of the InternVL documentation), the first device holds the vision part (with
QLLaMA where there is one), the connector, the embedding, the final norm, the head, and the first and the last layer, so
that pictures, ids and logits stay there; the other layers follow in order. The official recipe counts the first device
as half a device; here every module is counted in bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from internvl.models.chat import ChatModel

DECODER = "language.model.model"
FIRST = ("vision", "connector", f"{DECODER}.embed_tokens", f"{DECODER}.norm", "language.model.lm_head")
"""Modules of the first device, beside its layers."""
LAYERS = f"{DECODER}.layers."

SHARE_OF_FREE = 0.85
"""Of the free memory of a GPU: the rest is for activations and the KV cache."""


def budgets(max_bytes: Mapping[str, int] | None = None) -> dict[str, int]:
    """Bytes for weights on each device: as given, or a share of what every GPU has free; the CPU where none is."""
    if max_bytes is not None:
        if not max_bytes or any(limit <= 0 for limit in max_bytes.values()):
            raise ValueError(f"memory limits {dict(max_bytes)}; give each device a positive number of bytes")
        return dict(max_bytes)
    if not torch.cuda.is_available():
        return {"cpu": 2**62}
    free = {f"cuda:{n}": torch.cuda.mem_get_info(n)[0] for n in range(torch.cuda.device_count())}
    return {device: int(SHARE_OF_FREE * number) for device, number in free.items()}


def sizes(model: ChatModel) -> dict[str, int]:
    """Bytes of each module that is placed as a whole, in the number type of the model; memory may be on "meta"."""
    first = FIRST if model.qllama is None else ("qllama", *FIRST)
    names = [*first, *(f"{LAYERS}{n}" for n in range(model.config.language.depth))]
    out = {name: sum(p.nbytes for p in model.get_submodule(name).parameters()) for name in names}
    if model.config.language.tied:
        out["language.model.lm_head"] = 0  # the embedding, counted once
    return out


def assign(sizes: Mapping[str, int], budgets: Mapping[str, int]) -> dict[str, str]:
    """Module -> device. The fullest device, as a share of its budget, is as empty as whole layers allow.

    `sizes` in bytes as `sizes()` gives them, `budgets` in bytes, the first device first.
    ValueError with the numbers where the modules do not fit.
    """
    layers = [name for name in sizes if name.startswith(LAYERS)]
    fixed = [name for name in sizes if name not in layers] + layers[:1] + layers[1:][-1:]
    free = layers[1:-1]
    devices = list(budgets)
    taken = sum(sizes[name] for name in fixed)
    if taken > budgets[devices[0]]:
        raise ValueError(
            f"{devices[0]} has {_gib(budgets[devices[0]])} for weights but must hold {_gib(taken)}: the vision part, "
            f"embedding, head, first and last layer; put a larger device first or take a smaller number type"
        )
    counts = _fewest(free, sizes, budgets, taken)
    if counts is None:
        total = sum(sizes.values())
        raise ValueError(
            f"the model takes {_gib(total)} and the devices have {_gib(sum(budgets.values()))} "
            f"({', '.join(f'{d} {_gib(b)}' for d, b in budgets.items())}), whole layers each; "
            f"add a device or take a smaller number type"
        )
    places = dict.fromkeys(fixed, devices[0])
    order = [device for device, count in zip(devices, counts, strict=True) for _ in range(count)]
    places |= dict(zip(free, order, strict=True))
    return {name: places[name] for name in sizes}


def place(
    model: ChatModel, wanted: str | Mapping[str, str], max_bytes: Mapping[str, int] | None = None
) -> dict[str, str]:
    """Module -> device of a model: "auto" by bytes, or a mapping, where a prefix stands for all that is in it."""
    own = sizes(model)
    if isinstance(wanted, str):
        if wanted != "auto":
            raise ValueError(f"device map {wanted!r}; it is 'auto' or a mapping from modules to devices")
        return assign(own, budgets(max_bytes))
    chosen = {name: _covering(name, wanted) for name in own}
    missing = [name for name, key in chosen.items() if key is None]
    if missing:
        raise ValueError(f"the device map says nothing about {', '.join(missing[:5])}; it needs every module, or ''")
    unused = sorted(set(wanted) - set(chosen.values()))
    if unused:
        raise ValueError(f"the device map names {', '.join(map(repr, unused[:5]))}, which the model does not have")
    places = {name: str(wanted[key]) for name, key in chosen.items() if key is not None}
    if model.config.language.tied and len({places[f"{DECODER}.embed_tokens"], places["language.model.lm_head"]}) > 1:
        raise ValueError("the head is the embedding (tie_word_embeddings); put both on one device")
    return places


def device_of(key: str, places: Mapping[str, str]) -> str:
    """The device of a weight."""
    name = _covering(key, places)
    assert name is not None, key
    return places[name]


def dispatch(model: ChatModel, places: Mapping[str, str]) -> None:
    """Let every placed module fetch what it is called with to its own device. Results stay where they were made."""
    if len(set(places.values())) == 1:
        return
    for name, device in places.items():
        _fetching(model.get_submodule(name), torch.device(device))
    rotary = model.language.model.model.rotary_emb
    _fetching(rotary, next(iter(rotary.buffers())).device)


def _fetching(module: nn.Module, device: torch.device) -> None:
    def fetch(_: nn.Module, words: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        # Bounds of packed samples are read on the host (language.py), wherever the layer is.
        moved = {key: value if key == "segments" else _moved(value, device) for key, value in named.items()}
        return _moved(words, device), moved

    module.register_forward_pre_hook(fetch, with_kwargs=True)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple) and not hasattr(value, "_fields"):
        return tuple(_moved(part, device) for part in value)
    return value  # a KV cache keeps each layer's keys where that layer made them


def _fewest(free: list[str], sizes: Mapping[str, int], budgets: Mapping[str, int], taken: int) -> list[int] | None:
    """How many free layers each device takes, with the lowest share of its budget that fits them all; None if none."""
    devices = list(budgets)
    loads = [taken if device == devices[0] else 0 for device in devices]
    low, high, best = 0.0, 1.0, _filled(free, sizes, list(budgets.values()), loads, 1.0)
    if best is None:
        return None
    for _ in range(60):  # halving: the share to 1e-18
        middle = (low + high) / 2
        counts = _filled(free, sizes, list(budgets.values()), loads, middle)
        if counts is None:
            low = middle
        else:
            high, best = middle, counts
    return best


def _filled(
    free: list[str], sizes: Mapping[str, int], limits: list[int], loads: list[int], share: float
) -> list[int] | None:
    """Layers in order onto devices in order, each up to a share of its limit; None where some are left over."""
    counts, rest = [], list(free)
    for limit, load in zip(limits, loads, strict=True):
        count = 0
        while rest and load + sizes[rest[0]] <= share * limit:
            load += sizes[rest.pop(0)]
            count += 1
        counts.append(count)
    return None if rest else counts


def _covering(name: str, places: Mapping[str, Any]) -> str | None:
    """The longest key that is the name or what it is in; "" covers all."""
    words = name.split(".")
    keys = (".".join(words[:length]) for length in range(len(words), -1, -1))
    return next((key for key in keys if key in places), None)


def _gib(number: int) -> str:
    return f"{number / 2**30:.2f} GiB"
