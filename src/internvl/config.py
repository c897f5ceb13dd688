"""Sizes of every architecture as frozen dataclasses; derived numbers are properties. No torch, no files.

Released checkpoints are rows of `zoo/`; reading and writing `config.json` is `convert/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

LanguageFamily = Literal["llama", "qwen2", "phi3", "internlm2"]


@dataclass(frozen=True)
class VisionConfig:
    """InternViT (paper 2.5, table 1; official configuration_intern_vit.py). Defaults: InternViT-300M-448px."""

    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 4096
    image_size: int = 448
    """Side in pixels of the grid that the stored position embedding was learnt for."""
    patch_size: int = 14
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-6
    qkv_bias: bool = True
    qk_norm: bool = False
    """RMSNorm over the flattened heads of queries and of keys (6B only)."""
    scale_init: float = 0.1
    """Initial LayerScale; `initializer_factor` on disk."""
    weight_std: float = 0.02
    """Standard deviation of random weights; `initializer_range` on disk."""
    drop_path: float = 0.0
    drop_path_schedule: Literal["linear", "uniform"] = "linear"

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"vision width {self.width} is not a multiple of {self.heads} heads; change either")
        if self.image_size % self.patch_size:
            raise ValueError(f"image size {self.image_size} is not a multiple of patch size {self.patch_size}")

    @property
    def head_width(self) -> int:
        return self.width // self.heads

    @property
    def grid(self) -> int:
        """Patches along one side of a square image."""
        return self.image_size // self.patch_size

    @property
    def num_positions(self) -> int:
        """Patches and the class token."""
        return self.grid**2 + 1

    @property
    def block_parameters(self) -> int:
        """Numbers in one block."""
        width, norm = self.width, self.width * (2 if self.norm == "layer_norm" else 1)
        attention = 4 * width**2 + width + 3 * width * self.qkv_bias + 2 * width * self.qk_norm
        mlp = 2 * width * self.mlp_width + self.mlp_width + width
        return attention + mlp + 2 * norm + 2 * width

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole encoder; equal to those of the module that `models/build.py` makes (tested)."""
        patch_embedding = 3 * self.patch_size**2 * self.width + self.width
        return self.depth * self.block_parameters + patch_embedding + (1 + self.num_positions) * self.width


@dataclass(frozen=True)
class LanguageConfig:
    """A causal language model, as the `llm_config` of a checkpoint describes it.

    `settings` is that mapping, untouched: it is read for the model class and written back as it was.
    """

    family: LanguageFamily
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def width(self) -> int:
        return int(self.settings["hidden_size"])

    @property
    def depth(self) -> int:
        return int(self.settings["num_hidden_layers"])

    @property
    def vocab_size(self) -> int:
        return int(self.settings["vocab_size"])

    @property
    def heads(self) -> int:
        return int(self.settings["num_attention_heads"])

    @property
    def kv_heads(self) -> int:
        return int(self.settings.get("num_key_value_heads") or self.heads)

    @property
    def head_width(self) -> int:
        return int(self.settings.get("head_dim") or self.width // self.heads)

    @property
    def mlp_width(self) -> int:
        return int(self.settings["intermediate_size"])

    @property
    def tied(self) -> bool:
        """Output head shares the input embedding. Official releases store both, so absent means untied."""
        return bool(self.settings.get("tie_word_embeddings", False))

    @property
    def matrix_parameters(self) -> int:
        """Numbers in the matrices of one layer, which are what weight-only quantisation rounds."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return 2 * self.width * (queries + keys) + 3 * self.width * self.mlp_width

    @property
    def matrix_rows(self) -> int:
        """Output rows of those matrices."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        return queries + 2 * keys + self.width + 2 * self.mlp_width + self.width

    @property
    def layer_parameters(self) -> int:
        """Numbers in one layer: matrices, two RMSNorms and the biases that the family has."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        biases = 0
        if self.family == "qwen2":
            biases = queries + 2 * keys
        elif self.settings.get({"llama": "attention_bias", "internlm2": "bias"}.get(self.family, "")):
            biases = queries + 2 * keys + self.width
        if self.family == "llama" and self.settings.get("mlp_bias"):
            biases += 2 * self.mlp_width + self.width
        return self.matrix_parameters + 2 * self.width + biases

    @property
    def embedding_parameters(self) -> int:
        """Numbers in the input embedding, and as many in the output head where it is not tied."""
        return self.vocab_size * self.width

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole language model, a tied head counted once."""
        return self.depth * self.layer_parameters + self.width + self.embedding_parameters * (1 if self.tied else 2)


@dataclass(frozen=True)
class ChatConfig:
    """InternVL-Chat: InternViT, pixel shuffle and MLP, language model (official configuration_internvl_chat.py)."""

    vision: VisionConfig
    language: LanguageConfig
    tile_size: int = 448
    """Side of a tile in pixels; `force_image_size` on disk."""
    downsample: float = 0.5
    """Pixel shuffle ratio per side: 0.5 makes one token of 2 x 2 patches."""
    pixel_shuffle: Literal["v1", "v2"] = "v2"
    """Token order: v1 column-major, v2 row-major. A checkpoint must run with the order it learnt."""
    feature_layer: int = -1
    """Index into [embeddings, block 1, ..., block L]; `select_layer` on disk."""
    template: str = "internvl2_5"
    system_message: str | None = None
    """Replaces the template's system text when given."""
    dynamic_tiles: bool = True
    thumbnail: bool = True
    min_tiles: int = 1
    max_tiles: int = 12
    pad_to_square: bool = False
    normalize: Literal["imagenet", "clip", "siglip"] = "imagenet"
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a config.json that nothing here reads; written back as they were."""

    def __post_init__(self) -> None:
        per_side = self.tile_size // self.vision.patch_size * self.downsample
        if self.tile_size % self.vision.patch_size or per_side != int(per_side):
            raise ValueError(
                f"tile size {self.tile_size} with patch size {self.vision.patch_size} and downsample "
                f"{self.downsample} gives {per_side} tokens a side; it must be a whole number"
            )

    @property
    def tokens_per_tile(self) -> int:
        """Language-model positions that one tile takes: 256 at 448 px, 64 at 224 px."""
        return int(self.tile_size // self.vision.patch_size * self.downsample) ** 2

    @property
    def connector_width(self) -> int:
        """Channels of one token after pixel shuffle."""
        return self.vision.width * round(1 / self.downsample) ** 2

    @property
    def connector_parameters(self) -> int:
        """Numbers in the connector: LayerNorm and two linear layers."""
        width, llm_width = self.connector_width, self.language.width
        return 2 * width + (width + 1) * llm_width + (llm_width + 1) * llm_width

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole model, a tied head counted once."""
        return self.vision.num_parameters + self.connector_parameters + self.language.num_parameters


@dataclass(frozen=True)
class DualConfig:
    """InternVL-C and -G: InternViT beside QLLaMA (paper 1.0, section 3; official configuration_internvl.py)."""

    vision: VisionConfig
    language: LanguageConfig
    """The LLaMA that QLLaMA extends."""
    image_size: int | None = None
    """Side of a picture in pixels; `force_image_size` on disk. None: the size that the positions were learnt for."""
    num_queries: int = 96
    cross_every: int = 2
    """Layers 0, n, 2n, ... have cross-attention; `cross_attention_frequency` on disk."""
    embed_width: int = 768
    pool_heads: int = 16
    """Heads of both attention poolings."""
    label_smoothing: float = 0.0
    """Of the contrastive loss of stage 2."""
    generative: bool = True
    """False: InternVL-C alone, without queries, cross-attention, their pooling, ITM head and output head."""
    unknown: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a config.json that nothing here reads; written back as they were."""

    def __post_init__(self) -> None:
        settings = self.language.settings
        odd = [key for key in ("attention_bias", "mlp_bias", "rope_scaling") if settings.get(key)]
        if self.language.family != "llama" or odd or settings.get("hidden_act", "silu") != "silu":
            raise ValueError(
                f"QLLaMA extends a plain LLaMA: family {self.language.family!r}, activation "
                f"{settings.get('hidden_act', 'silu')!r}, set: {', '.join(odd) or 'nothing'}; it must be 'llama', "
                f"'silu', without attention_bias, mlp_bias and rope_scaling"
            )
        for name, width in (("vision", self.vision.width), ("language", self.language.width)):
            if width % self.pool_heads:
                raise ValueError(f"{name} width {width} is not a multiple of {self.pool_heads} pooling heads")
        if self.side % self.vision.patch_size:
            raise ValueError(f"image size {self.side} is not a multiple of patch size {self.vision.patch_size}")
        if self.num_queries < 1 or self.cross_every < 1:
            raise ValueError(
                f"{self.num_queries} queries, cross-attention every {self.cross_every} layers; both must be 1 or more"
            )

    @property
    def side(self) -> int:
        """Side of a picture in pixels."""
        return self.image_size or self.vision.image_size

    @property
    def rope_base(self) -> float:
        """Base of the rotary angles; transformers 5 stores it inside `rope_parameters`."""
        newer = self.language.settings.get("rope_parameters") or {}
        return float(self.language.settings.get("rope_theta") or newer.get("rope_theta") or 10000.0)

    @property
    def norm_eps(self) -> float:
        return float(self.language.settings.get("rms_norm_eps", 1e-6))

    def crosses(self, layer: int) -> bool:
        """Whether this layer, counted from 0, has cross-attention."""
        return self.generative and layer % self.cross_every == 0

    @property
    def cross_parameters(self) -> int:
        """Numbers in one cross-attention: two norms, queries and output, keys and values."""
        width, seen = self.language.width, self.vision.width
        inner = self.language.heads * self.language.head_width
        return width + seen + 2 * inner * (width + seen)

    def pool_parameters(self, width: int) -> int:
        """Numbers in an attention pooling of vectors of this width."""
        return 6 * width + 3 * (width + 1) * width + (width + 1) * self.embed_width

    @property
    def num_parameters(self) -> int:
        """Numbers in the whole model, a tied head counted once."""
        width, language = self.language.width, self.language
        shared = self.vision.num_parameters + self.pool_parameters(self.vision.width) + width * self.embed_width + 1
        if not self.generative:
            return shared + language.depth * language.layer_parameters + width + language.embedding_parameters
        num_crosses = sum(map(self.crosses, range(language.depth)))
        heads = self.pool_parameters(width) + self.num_queries * width + 2 * (width + 1)
        return shared + language.num_parameters + num_crosses * self.cross_parameters + heads
