"""A vision tower in a folder of its own, an InternViT or InternVL-G with its queries; and chat folders of 1.0, which
need one. What becomes of the weights is opened.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from internvl.config import ChatConfig, DualConfig, VisionConfig
from internvl.convert import dual, llava, official
from internvl.convert.files import Weights, open_weights, read_json, some
from internvl.convert.keys import Entry, check_keys, expand, matches
from internvl.convert.parts import VISION_CONSTANTS, VISION_RULES, vision_config
from internvl.convert.pickled import open_pickled
from internvl.models.internvit import InternViT
from internvl.models.qllama import QLLaMA
from internvl.zoo import DUAL, VISION

VISION_TYPE = VISION_CONSTANTS["model_type"]
ENCODER = "vision_model."
"""What the keys of an encoder begin with inside another model."""
POSITIONS = f"{ENCODER}embeddings.position_embedding"


@dataclass(frozen=True)
class JoinedWeights(Weights):
    """Tensors of several folders, under names of their own."""

    owners: Mapping[str, tuple[Weights, str]] = field(default_factory=dict)
    """Name -> whose it is, and its key there."""

    def get(
        self,
        key: str,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        mapped: bool = False,
    ) -> Tensor:
        weights, stored = self.owners[key]
        return weights.get(stored, dtype, device, mapped)


def join(parts: Iterable[tuple[Weights, Mapping[str, str]]], where: object) -> JoinedWeights:
    """Each part with what its keys are called: name -> stored key. ValueError where two have the same name."""
    owners: dict[str, tuple[Weights, str]] = {}
    for weights, names in parts:
        twice = sorted(names.keys() & owners.keys())
        if twice:
            raise ValueError(f"{where}: {some(twice)} twice; which one is meant?")
        owners |= {name: (weights, key) for name, key in names.items()}
    files, shapes, types = (
        {name: getattr(weights, table)[key] for name, (weights, key) in owners.items()}
        for table in ("files", "shapes", "types")
    )
    return JoinedWeights(files, shapes, types, owners)


@dataclass(frozen=True)
class Tower:
    """What looks at pictures: sizes, and its weights by their names in InternVL-G (`vision_model.`, `qllama.`)."""

    folder: Path
    vision: VisionConfig
    queries: DualConfig | None
    """InternVL-G where the folder is one; its texts and heads are left unread."""
    weights: Weights
    names: Mapping[str, str]
    """Name -> stored key."""

    @property
    def encoder_names(self) -> dict[str, str]:
        """Of the encoder alone."""
        return {name: key for name, key in self.names.items() if name.startswith(ENCODER)}

    def entries(self, with_queries: bool = False) -> tuple[list[Entry], dict[str, torch.Size]]:
        """Our keys (`vision.`, and `qllama.` with the queries), checked against the folder, and their shapes."""
        with torch.device("meta"):
            modules: dict[str, nn.Module] = {"vision": InternViT(self.vision)}
            if with_queries and self.queries is not None:
                modules["qllama"] = QLLaMA(self.queries, reads=False)
        ours = {f"{part}.{k}": x.shape for part, module in modules.items() for k, x in module.state_dict().items()}
        entries = expand([*VISION_RULES, *dual.QUERY_RULES], ours)
        names = self.names if with_queries else self.encoder_names
        check_keys(entries, ours, {name: self.weights.shapes[key] for name, key in names.items()}, self.folder)
        return entries, ours


def open_tower(folder: Path, allow_pickle: bool = False) -> Tower:
    """The encoder of an InternViT folder, or encoder and queries of InternVL-G. Weights stay on disk."""
    path = folder / "config.json"
    settings = read_json(path)
    if dual.is_dual(settings):
        queries = dual.from_official(settings, path)
        # What an encoder's config says beyond its sizes is not kept twice.
        queries = replace(queries, unknown={k: v for k, v in queries.unknown.items() if k != "vision_config"})
        vision = queries.vision
    elif settings.get("model_type") == VISION_TYPE:
        vision, queries = vision_config(settings, path), None
    else:
        raise ValueError(
            f"{path}: model_type is {settings.get('model_type')!r}, must be {VISION_TYPE!r} (an InternViT) or "
            f"{dual.MODEL_TYPE!r} (InternVL-G)"
        )
    weights = _weights(folder, allow_pickle)
    tower = Tower(folder, vision, queries, weights, _names(weights.shapes, queries is not None))
    return _stored_grid(tower, queries.side if queries is not None else vision.image_size)


def open_llava(
    folder: Path,
    settings: Mapping[str, Any],
    tower_folder: Path | None,
    tile_size: int | None = None,
    allow_pickle: bool = False,
) -> tuple[ChatConfig, Weights]:
    """Config and weights, by the names of `llava_rules`, of a chat folder of 1.0 and its tower.

    A tower inside the folder is taken before that of `tower_folder`, which then says its sizes alone; without
    `tower_folder` they are those of the released encoder that config.json names.
    """
    path, weights = folder / "config.json", _weights(folder, allow_pickle)
    keys = [key for key in weights.shapes if not matches(key, llava.DERIVED_KEYS)]
    inside = {key.removeprefix(llava.INSIDE): key for key in keys if key.startswith(llava.INSIDE)}
    chat = {llava.plain_key(key): key for key in keys if not key.startswith(llava.INSIDE)}
    if tower_folder is not None:
        tower = open_tower(tower_folder, allow_pickle)
    else:
        vision, queries = _named(settings, path, bool(inside))
        tower = Tower(folder, vision, queries, weights, {})
    if inside:
        tower = replace(tower, weights=weights, names=_names(inside, tower.queries is not None))
        tower = replace(tower, names={name: inside[key] for name, key in tower.names.items()})
    config = llava.from_llava(settings, tower.vision, tower.queries, path, tile_size)
    tower = _stored_grid(tower, config.tile_size)
    config = replace(config, vision=tower.vision, queries=tower.queries)
    return config, join([(weights, chat), (tower.weights, tower.names)], folder)


def _weights(folder: Path, allow_pickle: bool) -> Weights:
    """Safetensors where the folder has them; what the releases of 1.0 have is read where that is allowed."""
    return open_pickled(folder) if allow_pickle and not any(folder.glob("*.safetensors")) else open_weights(folder)


def _names(keys: Iterable[str], has_queries: bool) -> dict[str, str]:
    """Name in InternVL-G -> key of a tower's folder."""
    keys = list(keys)
    if not has_queries:
        found = {key if key.startswith(ENCODER) else f"{ENCODER}{key}": key for key in keys}
        return {name: key for name, key in found.items() if not matches(name, official.DERIVED_KEYS)}
    return {key: key for key in keys if not matches(key, (*dual.BESIDE_QUERIES, *dual.DERIVED_KEYS))}


def _named(settings: Mapping[str, Any], where: object, is_inside: bool) -> tuple[VisionConfig, DualConfig | None]:
    """Sizes of the released tower of the name in config.json; its weights are in the folder, or nowhere."""
    name = llava.tower_name(settings)
    if not is_inside:
        raise ValueError(
            f"{where}: the vision tower {name or '(not named)'} lies in a folder of its own; give it: --vision-tower, "
            "or vision_tower=, the folder of that InternViT or InternVL-G"
        )
    if name in DUAL and DUAL[name].generative:
        return DUAL[name].vision, DUAL[name]
    if name in VISION:
        return VISION[name], None
    raise ValueError(
        f"{where}: vision tower {name!r} is none of {', '.join(VISION)}, InternVL-14B-224px, so its sizes are not "
        "known; give a folder with its config.json: --vision-tower, or vision_tower="
    )


def _stored_grid(tower: Tower, side: int) -> Tower:
    """Positions may be stored for another size than config.json says: that of the pictures it was used with."""
    stored = tower.weights.shapes.get(tower.names.get(POSITIONS, ""), ())
    if side % tower.vision.patch_size or len(stored) != 3:
        return tower
    forced = replace(tower.vision, image_size=side)
    if stored[1] != forced.num_positions or stored[1] == tower.vision.num_positions:
        return tower
    queries = None if tower.queries is None else replace(tower.queries, vision=forced)
    return replace(tower, vision=forced, queries=queries)
