"""InternVL-C and -G."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from internvl.config.parts import LanguageConfig, VisionConfig


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

    @property
    def look_parameters(self) -> int:
        """Numbers that the queries of a picture pass through: their own, layers, cross-attention and the last norm."""
        language, num_crosses = self.language, sum(map(self.crosses, range(self.language.depth)))
        trunk = language.depth * language.layer_parameters + language.width
        return trunk + num_crosses * self.cross_parameters + self.num_queries * language.width

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
        heads = self.pool_parameters(width) + 2 * (width + 1)
        return shared + self.look_parameters + language.embedding_parameters * (1 if language.tied else 2) + heads
