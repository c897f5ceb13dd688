"""Memory of a model from its config alone: parameters, weights, key-value cache, activations, and what fits where.

Counts are exact; activations follow the two formulas below (docs/plan.md derives them). Nothing is built or read but
config.json: what a driver, an allocator or another process takes is not known here and comes on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from internvl.config import ChatConfig, DualConfig
from internvl.convert import dual
from internvl.convert.files import read_json
from internvl.convert.layouts import read_config
from internvl.locate import locate
from internvl.zoo import CHAT, DUAL, RELEASED

Dtype = Literal["fp32", "bf16", "int8", "int4"]
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "int8", "int4")
INT4_GROUP = 32
"""Numbers that share a scale and a zero, both bfloat16, in 4-bit weights (models/four_bit.py)."""
SCALE_BYTES, INT8_SCALE_BYTES = 2, 4
"""Of int4, in bfloat16, and of int8, in float32."""
TEXT_TOKENS = 1000
"""Positions of question, history and answer that a plan counts beside one picture, when nothing else is asked."""


def config_of(name: str | Path) -> ChatConfig:
    """Config of a name of the zoo, or of a checkpoint folder or hub id. A folder wins over a release's name."""
    if str(name) in CHAT:
        return CHAT[str(name)]
    if str(name) in RELEASED and not Path(name).is_dir():
        return RELEASED[str(name)].config
    return read_config(locate(name))


def assumed_of(name: str | Path) -> tuple[str, ...]:
    """Fields of that config which no published file confirmed; none where a checkpoint's own config.json is read."""
    known = str(name) in RELEASED and not Path(name).is_dir()
    return RELEASED[str(name)].unverified if known else ()


@dataclass(frozen=True)
class Part:
    """A piece of the model that stays on one device; sizes in bytes."""

    name: str
    parameters: int
    weights: int
    cache: int = 0
    activation: int = 0
    """While this piece runs, at its peak; pieces run one after another."""


@dataclass(frozen=True)
class Plan:
    """What inference of `rows` answers of `tokens` positions takes; pictures of `tiles` tiles are encoded at once."""

    config: ChatConfig
    dtype: Dtype = "bf16"
    rows: int = 1
    tokens: int = 0
    """Positions of each answer with its prompt; 0 is one largest picture and TEXT_TOKENS."""
    tiles: int = 0
    """Tiles encoded together; 0 is those of the largest picture."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r}; it is one of {', '.join(DTYPES)}")
        for name in ("rows", "tokens", "tiles"):
            if getattr(self, name) < (name == "rows"):
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a positive number")
        object.__setattr__(self, "tiles", self.tiles or self.max_tiles)
        object.__setattr__(self, "tokens", self.tokens or self.picture_tokens(self.max_tiles) + TEXT_TOKENS)

    # positions

    @property
    def max_tiles(self) -> int:
        """Tiles of the largest picture, with its thumbnail."""
        config = self.config
        if not config.dynamic_tiles:
            return 1
        return config.max_tiles + (config.thumbnail and config.max_tiles > 1)

    def picture_tokens(self, tiles: int) -> int:
        """Positions that a picture of `tiles` tiles takes in the prompt."""
        return tiles * self.config.tokens_per_tile + self.config.picture_marks

    # bytes

    @property
    def number_bytes(self) -> int:
        """Bytes of a number that is not rounded to integers: weights, activations and cache."""
        return 4 if self.dtype == "fp32" else 2

    @property
    def matrix_bytes(self) -> int:
        """Matrices of one language layer, the only weights that int8 and int4 round.

        int8: a byte a number, a scale an output row. int4: half a byte a number, scale and zero a group.
        """
        language = self.config.language
        if self.dtype == "int8":
            return language.matrix_parameters + INT8_SCALE_BYTES * language.matrix_rows
        if self.dtype == "int4":
            return language.matrix_parameters // 2 + 2 * SCALE_BYTES * (language.matrix_parameters // INT4_GROUP)
        return language.matrix_parameters * self.number_bytes

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one position in all layers."""
        language = self.config.language
        return 2 * language.depth * language.kv_heads * language.head_width * self.number_bytes

    @property
    def vision_activation(self) -> int:
        """Peak while the ViT encodes `tiles` tiles: pixels, block input, residual, normed, fc1's and GELU's output.

        Positions that were interpolated stay. Where queries ask the last block too, the tapped one waits; asking
        itself is less than a block.
        """
        vision, config = self.config.vision, self.config
        positions = (config.tile_size // vision.patch_size) ** 2 + 1
        pixels, waiting = 3 * config.tile_size**2, 0 if config.queries is None else vision.width
        each = pixels + positions * (waiting + 3 * vision.width + 2 * vision.mlp_width)
        kept = positions * vision.width if config.tile_size != vision.image_size else 0
        return self.number_bytes * (self.tiles * each + kept)

    @property
    def prompt_activation(self) -> int:
        """Peak while prompts are read: embeddings, layer input, residual, normed, and three MLP widths (Phi-3: four).

        A GPU reads the prompts of all rows together, a CPU one by one. Later steps need a `tokens`-th of it.
        """
        language = self.config.language
        copies = 4 if language.family == "phi3" else 3
        return self.number_bytes * self.rows * self.tokens * (4 * language.width + copies * language.mlp_width)

    @property
    def copy_bytes(self) -> int:
        """What `internvl chat` adds on a CPU for Llama-shaped models: a copy of matrices in the form that answers read.

        int4 keeps the bfloat16 matrices beside the blocks, which prompts are read with; int8 copies the ViT's alone.
        Not part of the other sums.
        """
        language, vision = self.config.language, self.config.vision
        copied = vision.depth * vision.width * (4 * vision.width + 2 * vision.mlp_width)
        if self.dtype != "int8":
            copied += language.depth * language.matrix_parameters
        if self.dtype in ("fp32", "bf16"):
            copied += language.embedding_parameters
        return copied * self.number_bytes

    # pieces

    @property
    def parts(self) -> list[Part]:
        """The model in the order in which it runs: vision to connector, embedding, layers, norm with head."""
        config, size = self.config, self.number_bytes
        language = config.language
        seen = config.tower_parameters + config.connector_parameters
        layer_bytes = self.matrix_bytes + (language.layer_parameters - language.matrix_parameters) * size
        layer_cache = self.cache_bytes_per_token // language.depth * self.tokens * self.rows
        head = language.width + (0 if language.tied else language.embedding_parameters)
        layers = [
            Part(f"layer {n}", language.layer_parameters, layer_bytes, layer_cache, self.prompt_activation)
            for n in range(language.depth)
        ]
        return [
            Part("vision", seen, seen * size, 0, self.vision_activation),
            Part("embedding", language.embedding_parameters, language.embedding_parameters * size),
            *layers,
            Part("head", head, head * size, 0, language.vocab_size * self.rows * 4),  # logits are float32
        ]

    @property
    def weights(self) -> int:
        return sum(part.weights for part in self.parts)

    @property
    def cache(self) -> int:
        return self.cache_bytes_per_token * self.tokens * self.rows

    def on_devices(self, number: int) -> list[int]:
        """Bytes that each device needs: neighbouring pieces together, the fullest device as empty as it can be.

        A tied head that lands on another device than the embedding is a copy.
        """
        parts = self.parts
        if number < 1:
            raise ValueError(f"{number} devices; at least one is needed")
        if self.config.language.tied and number > 1:
            last, copied = parts[-1], self.config.language.embedding_parameters * self.number_bytes
            parts[-1] = Part(last.name, last.parameters, last.weights + copied, last.cache, last.activation)
        low, high = max(_need([part]) for part in parts), _need(parts)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if len(_fill(parts, middle)) <= number else (middle + 1, high)
        return _fill(parts, low)


def _need(parts: Sequence[Part]) -> int:
    return sum(part.weights + part.cache for part in parts) + max((part.activation for part in parts), default=0)


def _fill(parts: Sequence[Part], capacity: int) -> list[int]:
    """Devices filled in order up to a capacity that every piece fits into."""
    devices: list[list[Part]] = [[]]
    for part in parts:
        if devices[-1] and _need([*devices[-1], part]) > capacity:
            devices.append([])
        devices[-1].append(part)
    return [_need(device) for device in devices]


PICTURES = 32
"""Pictures that a dual model looks at together, when nothing else is asked."""
TEXT_LENGTH, BEAMS = 80, 5
"""Tokens of a text at most, and beams of a caption (generate/dual.py, generate/captions.py)."""


def dual_config_of(name: str | Path) -> DualConfig | None:
    """Config of InternVL-C or -G by name, hub id or checkpoint folder; None for any other model."""
    if Path(name).is_dir():
        path = Path(name) / "config.json"
        settings = read_json(path)
        return dual.from_official(settings, path) if dual.is_dual(settings) else None
    return DUAL.get(Path(name).name)


@dataclass(frozen=True)
class DualPlan:
    """What InternVL-C or -G takes: `pictures` are looked at together, and captioned together."""

    config: DualConfig
    dtype: Dtype = "bf16"
    pictures: int = PICTURES

    def __post_init__(self) -> None:
        if self.dtype not in ("fp32", "bf16"):
            raise ValueError(f"dtype {self.dtype!r}; dual models have fp32 and bf16")
        if self.pictures < 1:
            raise ValueError(f"{self.pictures} pictures at once; at least 1")

    @property
    def number_bytes(self) -> int:
        return 4 if self.dtype == "fp32" else 2

    @property
    def parameters(self) -> dict[str, int]:
        """By part; their sum is `config.num_parameters`."""
        config, language = self.config, self.config.language
        found = {
            "vision": config.vision.num_parameters,
            "language model": language.depth * language.layer_parameters
            + language.width
            + language.embedding_parameters,
            "pooling of patches": config.pool_parameters(config.vision.width),
            "text projection and scale": language.width * config.embed_width + 1,
        }
        if config.generative:
            crosses = sum(map(config.crosses, range(language.depth)))
            found["cross-attention and queries"] = (
                crosses * config.cross_parameters + config.num_queries * language.width
            )
            found["pooling of queries"] = config.pool_parameters(language.width)
            found["matching"] = 2 * (language.width + 1)
            found["output head"] = 0 if language.tied else language.embedding_parameters
        return found

    @property
    def weights(self) -> int:
        return self.number_bytes * self.config.num_parameters

    @property
    def vision_activation(self) -> int:
        """Peak while pictures are looked at, by the formula of `Plan.vision_activation`."""
        vision, side = self.config.vision, self.config.side
        positions = (side // vision.patch_size) ** 2 + 1
        return self.pictures * self.number_bytes * (3 * side**2 + positions * (3 * vision.width + 2 * vision.mlp_width))

    @property
    def caption_cache(self) -> int:
        """Keys and values of the queries and a longest text of every beam of every picture; 0 for InternVL-C."""
        language = self.config.language
        if not self.config.generative:
            return 0
        each = 2 * language.depth * language.kv_heads * language.head_width * self.number_bytes
        return self.pictures * BEAMS * (self.config.num_queries + TEXT_LENGTH) * each

    @property
    def kept_picture(self) -> int:
        """A picture in a file of embeddings."""
        return 4 * self.config.embed_width
