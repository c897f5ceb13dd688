"""The parts that models share: a vision encoder, a language model."""

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
