"""Features of tiles, kept while the vision part is frozen: each tile is seen once. Which tiles, is the stage's.

On disk: `features.bin`, records of one size, and `digests.bin`, 16 bytes each, in the same order; both only grow, and
a record counts once its digest is written, so a kill loses nothing but the last one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from internvl.config import ChatConfig
from internvl.train.run import RunConfig

DIGEST_BYTES = 16

Compute = Callable[[Tensor], Tensor]
"""uint8 tiles -> features."""


def digests(tiles: UInt8[Tensor, "tiles 3 side side"]) -> list[bytes]:
    """A content hash of each tile."""
    return [hashlib.blake2b(tile.numpy().tobytes(), digest_size=DIGEST_BYTES).digest() for tile in tiles]


def key(vision: nn.Module, **settings: Any) -> str:
    """Names everything the features depend on: every weight of what looks, and the settings given."""
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=8)
    for name, parameter in vision.named_parameters():
        digest.update(name.encode())
        digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_store(
    run: RunConfig, config: ChatConfig, vision: nn.Module, compute: Compute, device: torch.device
) -> MemoryStore | None:
    """Where `run` keeps the features that `compute` gives for tiles; None where it keeps none.

    ValueError where they would change from step to step: the vision part learns, or tiles are augmented.
    """
    data = run.data
    if data.features == "none":
        return None
    if run.vision.learn != "frozen" or data.augment != "off":
        raise ValueError(
            f"data.features is {data.features!r}, but vision.learn is {run.vision.learn!r} and data.augment "
            f"is {data.augment!r}; features are kept of a frozen vision part and of tiles that never change (off)"
        )
    if data.features == "memory":
        return MemoryStore()
    settings = {"layer": config.feature_layer, "normalize": config.normalize, "side": config.tile_size}
    name = key(vision, **settings, precision=run.precision, device=device.type)
    probe = torch.zeros(1, 3, config.tile_size, config.tile_size, dtype=torch.uint8, device=device)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=run.precision == "bf16"):
        shape = compute(probe)
    return DiskStore(Path(data.features_folder or f"{run.out}/features") / name, shape.shape[1:], shape.dtype)


class MemoryStore:
    """Features in memory; the store on disk adds files to it."""

    def __init__(self) -> None:
        self._kept: dict[bytes, Tensor] = {}

    def gather(
        self, tiles: UInt8[Tensor, "tiles 3 side side"], names: Sequence[bytes], compute: Compute
    ) -> Float[Tensor, "tiles patches width"]:
        """Features of every tile, on the device of `tiles`; those not yet known are computed and kept.

        On CPU one tile at a time: then a feature never depends on which tiles were missing with it, bit for bit.
        """
        missing = list({name: index for index, name in enumerate(names) if name not in self}.items())
        size = 1 if tiles.device.type == "cpu" else 64
        for start in range(0, len(missing), size):
            some = missing[start : start + size]
            with torch.no_grad():
                found = compute(tiles[[index for _, index in some]])
            for (name, _), feature in zip(some, found.cpu(), strict=True):
                self.put(name, feature.clone())
        return torch.stack([self.get(name) for name in names]).to(tiles.device)

    def __contains__(self, name: bytes) -> bool:
        return name in self._kept

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, name: bytes) -> Tensor:
        return self._kept[name]

    def put(self, name: bytes, feature: Tensor) -> None:
        self._kept[name] = feature


class DiskStore(MemoryStore):
    """Features in two files below a folder of their key."""

    def __init__(self, folder: Path, shape: Sequence[int], dtype: torch.dtype) -> None:
        super().__init__()
        self._shape, self._dtype = tuple(shape), dtype
        self._bytes = dtype.itemsize * torch.Size(shape).numel()
        folder.mkdir(parents=True, exist_ok=True)
        self._features = (folder / "features.bin").open("a+b")
        self._digests = (folder / "digests.bin").open("a+b")
        self._places = self._read()

    def _read(self) -> dict[bytes, int]:
        self._digests.seek(0)
        text = self._digests.read()
        whole = min(len(text) // DIGEST_BYTES, self._features.seek(0, 2) // self._bytes)
        self._digests.truncate(whole * DIGEST_BYTES)
        self._features.truncate(whole * self._bytes)
        return {text[i * DIGEST_BYTES : (i + 1) * DIGEST_BYTES]: i for i in range(whole)}

    def __contains__(self, name: bytes) -> bool:
        return name in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, name: bytes) -> Tensor:
        self._features.flush()
        self._features.seek(self._places[name] * self._bytes)
        data = bytearray(self._features.read(self._bytes))
        return torch.frombuffer(data, dtype=self._dtype).view(self._shape)

    def put(self, name: bytes, feature: Tensor) -> None:
        if feature.shape != self._shape or feature.dtype != self._dtype:
            raise ValueError(
                f"a feature of {tuple(feature.shape)} {feature.dtype} for a store of {self._shape} {self._dtype}; "
                "delete its folder, or set data.features_folder to another"
            )
        self._features.seek(0, 2)
        self._features.write(feature.contiguous().view(torch.uint8).numpy().tobytes())
        self._features.flush()
        self._digests.write(name)
        self._digests.flush()
        self._places[name] = len(self._places)
