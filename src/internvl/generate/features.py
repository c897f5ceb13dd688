"""Visual tokens of tiles seen before: a follow-up question costs no second pass of the vision encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2b

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

MAX_BYTES = 64 << 20


class FeatureCache:
    """Keyed by the pixels of a tile, least recently used first out."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.features: OrderedDict[bytes, Tensor] = OrderedDict()

    def lookup(
        self, tiles: UInt8[Tensor, "tiles 3 side side"], encode: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "tiles tokens width"]:
        """Features of all tiles, `encode` having seen only the new ones."""
        keys = [blake2b(tile.numpy().tobytes(), digest_size=16).digest() for tile in tiles]
        new = {key: index for index, key in enumerate(keys) if key not in self.features}
        fresh = dict(zip(new, encode(tiles[list(new.values())]), strict=True)) if new else {}
        out = torch.stack([fresh[key] if key in fresh else self.features[key] for key in keys])
        for key in keys:
            if key in self.features:
                self.features.move_to_end(key)
        for key, features in fresh.items():
            self.features[key] = features.clone()  # not a view that keeps its neighbours alive
            self.num_bytes += features.nbytes
        while self.num_bytes > self.max_bytes:
            self.num_bytes -= self.features.popitem(last=False)[1].nbytes
        return out
