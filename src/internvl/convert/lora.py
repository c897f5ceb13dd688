"""Low-rank adapters on disk: official checkpoints whose weights are wrapped in them, and folders in peft's layout.

Reads and names them only: putting pairs beside a model's modules is models/adapters.py's, reading weights files.py's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from internvl.convert.files import Weights, open_file, read_json, save_tensors, write_json
from internvl.convert.keys import Entry

ROOT = "base_model.model."
"""What peft puts before the names of the model that it wraps."""

RANK_FIELDS = {"vision_model.": "use_backbone_lora", "language_model.": "use_llm_lora"}
"""The wrapped part of an official checkpoint, and the field of config.json with its rank."""

ALPHA_PER_RANK = 2
"""wrap_backbone_lora and wrap_llm_lora are called with lora_alpha = 2 * rank (modeling_internvl_chat.py)."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SIDE = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<name>[^.]+))?\.weight")
PARTS = {"vision": "vision.", "language": "language.model."}
"""Our parts that take adapters, and what their keys begin with."""

NOT_READ: dict[str, tuple[object, ...]] = {
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layer_replication": (None,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
}
"""Fields of adapter_config.json that change the computation, with the values under which they do not."""


@dataclass(frozen=True)
class Pair:
    """A change of one matrix: `strength * up @ down`."""

    down: Float[Tensor, "rank columns"]
    up: Float[Tensor, "rows rank"]
    alpha: float
    root_scaled: bool = False
    """rsLoRA: alpha is divided by the root of the rank."""

    @property
    def strength(self) -> float:
        rank = self.down.shape[0]
        return float(self.alpha / (rank**0.5 if self.root_scaled else rank))

    def change(self) -> Float[Tensor, "rows columns"]:
        """In float32, whatever the stored type."""
        return self.strength * (self.up.float() @ self.down.float())


def official_ranks(settings: Mapping[str, Any], where: object) -> dict[str, int]:
    """Rank of each wrapped part of an official config.json; empty where nothing is wrapped."""
    ranks = {prefix: settings.get(field) or 0 for prefix, field in RANK_FIELDS.items()}
    for prefix, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0:
            raise ValueError(f"{where}: {RANK_FIELDS[prefix]} is {rank!r}, must be 0 or the rank of the adapters")
    return {prefix: rank for prefix, rank in ranks.items() if rank}


def unwrap(weights: Weights, ranks: Mapping[str, int], where: object) -> tuple[dict[str, str], dict[str, Pair]]:
    """Plain key -> stored key, and the pair of each adapted plain key, of an official checkpoint.

    peft before 0.6 kept the plain weight as `X.weight`, later ones as `X.base_layer.weight`; both are read.
    ValueError where keys and ranks contradict each other.
    """
    names: dict[str, str] = {}
    sides: dict[str, dict[str, str]] = {}
    for key in weights.shapes:
        plain = _plain(key, ranks, where)
        if ".lora_" in plain:
            _side(sides, plain, key, where)
            continue
        if plain in names:
            raise ValueError(f"{where}: {key} and {names[plain]} are the same weight; which one is meant?")
        names[plain] = key
    for prefix, rank in ranks.items():
        if not any(key.startswith(prefix) for key in sides):
            raise ValueError(
                f"{where}: {RANK_FIELDS[prefix]} is {rank} in config.json but no key of {prefix}* is wrapped in an "
                f"adapter; set it to 0 if the adapters were merged"
            )
    pairs = {}
    for key, found in sides.items():
        rank = next(rank for prefix, rank in ranks.items() if key.startswith(prefix))
        pairs[key] = _pair(weights, key, found, rank, float(ALPHA_PER_RANK * rank), where)
    return names, pairs


def read_adapter(folder: Path) -> dict[str, Pair]:
    """Weight name (as the adapter has it, without peft's prefix) -> pair, of a folder in peft's layout."""
    settings = read_json(folder / CONFIG)
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{folder / CONFIG}: peft_type is {settings.get('peft_type')!r}, must be 'LORA'")
    for field, harmless in NOT_READ.items():
        if settings.get(field) not in harmless:
            raise ValueError(f"{folder / CONFIG}: {field} is {settings[field]!r}, which is not read; merge with peft")
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{folder / CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; both must be positive numbers")
    weights = open_file(folder / WEIGHTS)
    sides: dict[str, dict[str, str]] = {}
    for key in weights.shapes:
        _side(sides, key.removeprefix(ROOT), key, folder / WEIGHTS)
    root_scaled = bool(settings.get("use_rslora"))
    return {key: _pair(weights, key, found, rank, float(alpha), folder, root_scaled) for key, found in sides.items()}


def is_adapter(folder: Path) -> bool:
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> str:
    """The model that an adapter folder says it belongs to."""
    base = read_json(folder / CONFIG).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{folder / CONFIG}: base_model_name_or_path is {base!r}, so the model is not known; "
            f"open the model and give this folder as its adapter"
        )
    return base


def pairs_of_ours(pairs: Mapping[str, Pair], layouts: Iterable[Iterable[Entry]], where: object) -> dict[str, Pair]:
    """Pairs by our weight key. Names may be ours or those of any layout, of the whole model or of one part.

    A matrix that is several of ours (InternLM2's wqkv) gives each its rows of `up`; all share `down`.
    """
    entries = [entry for layout in layouts for entry in layout]
    ours = {key for entry in entries for key in entry.ours}
    by_disk = {entry.disk[0]: entry for entry in entries if len(entry.disk) == 1}
    out: dict[str, Pair] = {}
    unknown = []
    for name, pair in pairs.items():
        found = _place(name, pair, ours, by_disk)
        if found is None:
            unknown.append(name)
            continue
        twice = found.keys() & out.keys()
        if twice:
            raise ValueError(f"{where}: {name} and another pair both change {min(twice)}; merge one of them first")
        out |= found
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} adapted weights that the model does not have: {', '.join(sorted(unknown)[:5])}"
        )
    return out


def check_shapes(pairs: Mapping[str, Pair], ours: Mapping[str, torch.Size], where: object) -> None:
    """ValueError where a change does not have the shape of its weight."""
    for key, pair in pairs.items():
        shape = (pair.up.shape[0], pair.down.shape[1])
        if shape != tuple(ours[key]):
            wanted = "x".join(map(str, ours[key]))
            raise ValueError(f"{where}: the adapter of {key} changes {shape[0]}x{shape[1]}, the weight is {wanted}")


def write_adapter(pairs: Mapping[str, Pair], folder: Path, part: str) -> None:
    """One part's pairs as peft reads them; names as in `models/adapters.py`. All pairs must have one rank and alpha."""
    prefix = PARTS[part]
    mine = {
        key.removeprefix(prefix).removesuffix(".weight"): pair for key, pair in pairs.items() if key.startswith(prefix)
    }
    kinds = {(pair.down.shape[0], pair.alpha, pair.root_scaled) for pair in mine.values()}
    if len(kinds) != 1:
        raise ValueError(f"{len(kinds)} different ranks or strengths in the {part} adapters; merge them instead")
    rank, alpha, root_scaled = kinds.pop()
    names = {name: _vision_name(name) if part == "vision" else name for name in mine}
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for name, pair in mine.items():
        tensors |= {f"{ROOT}{names[name]}.lora_A.weight": pair.down, f"{ROOT}{names[name]}.lora_B.weight": pair.up}
    save_tensors(folder / WEIGHTS, tensors)
    targets = sorted({".".join(name.split(".")[-2:]) for name in names.values()})
    settings = {"r": rank, "lora_alpha": alpha, "use_rslora": root_scaled, "target_modules": targets}
    plain = {"peft_type": "LORA", "bias": "none", "lora_dropout": 0.0, "inference_mode": True}
    write_json(folder / CONFIG, {**plain, **settings})


def _plain(key: str, ranks: Mapping[str, int], where: object) -> str:
    """The key without what peft puts around it; ValueError where the part is not wrapped, or twice."""
    prefix = next((p for p in RANK_FIELDS if key.startswith(p + ROOT)), None)
    if prefix is None:
        if ".lora_" in key:
            raise ValueError(
                f"{where}: {key} is an adapter of neither the vision nor the language part; merge it first"
            )
        return key
    if prefix not in ranks:
        field = RANK_FIELDS[prefix]
        raise ValueError(
            f"{where}: {key} is wrapped in an adapter but {field} is 0 in config.json, so its strength is "
            f"unknown; set {field} to the rank it was trained with"
        )
    plain = prefix + key.removeprefix(prefix + ROOT)
    if ROOT in plain:
        raise ValueError(f"{where}: {key} is wrapped twice; the inner adapter has no rank in config.json")
    return plain.replace(".base_layer.", ".")


def _vision_name(name: str) -> str:
    return re.sub(r"^layers\.", "encoder.layers.", name).replace("attention.", "attn.")


def _side(sides: dict[str, dict[str, str]], plain: str, key: str, where: object) -> None:
    match = SIDE.fullmatch(plain)
    if match is None:
        raise ValueError(f"{where}: {key} is not one half of a plain low-rank pair (lora_A, lora_B)")
    side = match["side"]
    found = sides.setdefault(f"{match['module']}.weight", {})
    if side in found:
        raise ValueError(f"{where}: {key} and {found[side]} are two adapters of one weight; merge one of them first")
    found[side] = key


def _pair(
    weights: Weights,
    key: str,
    sides: Mapping[str, str],
    rank: int,
    alpha: float,
    where: object,
    root_scaled: bool = False,
) -> Pair:
    if len(sides) != 2:
        raise ValueError(f"{where}: {next(iter(sides.values()))} has no other half; download the file again")
    down, up = weights.get(sides["A"]), weights.get(sides["B"])
    if down.ndim != 2 or up.ndim != 2 or not down.shape[0] == up.shape[1] == rank:
        raise ValueError(
            f"{where}: the adapter of {key} is {'x'.join(map(str, up.shape))} times {'x'.join(map(str, down.shape))}, "
            f"but the configuration says rank {rank}"
        )
    return Pair(down, up, alpha, root_scaled)


def _place(name: str, pair: Pair, ours: set[str], by_disk: Mapping[str, Entry]) -> dict[str, Pair] | None:
    """Our keys of one pair; None where nothing has that name."""
    for prefix in ("", *RANK_FIELDS):
        entry = by_disk.get(prefix + name)
        if entry is not None:
            ups = entry.to_ours([pair.up])
            return {
                key: Pair(pair.down, up.contiguous(), pair.alpha, pair.root_scaled)
                for key, up in zip(entry.ours, ups, strict=True)
            }
    for prefix in ("", *PARTS.values()):
        if prefix + name in ours:
            return {prefix + name: pair}
    return None
