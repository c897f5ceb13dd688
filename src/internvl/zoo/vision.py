"""Every released vision encoder."""

from __future__ import annotations

from dataclasses import replace

from internvl.config import VisionConfig

_VIT_6B = VisionConfig(
    width=3200, depth=45, heads=25, mlp_width=12800, norm="rms_norm", qkv_bias=False, qk_norm=True, weight_std=1e-10
)
"""Three blocks fewer than before: the fourth-to-last block had the best features (paper 1.5, section 3.2)."""
_VIT_300M = VisionConfig()

VISION: dict[str, VisionConfig] = {
    "InternViT-6B-224px": replace(_VIT_6B, depth=48, image_size=224),
    "InternViT-6B-448px-V1-0": replace(_VIT_6B, depth=48),
    "InternViT-6B-448px-V1-2": _VIT_6B,
    "InternViT-6B-448px-V1-5": _VIT_6B,
    "InternViT-6B-448px-V2_5": _VIT_6B,
    "InternViT-300M-448px-Distill": _VIT_300M,
    "InternViT-300M-448px": _VIT_300M,
    "InternViT-300M-448px-V2_5": _VIT_300M,
}
"""Vision encoders (paper 2.5, table 1)."""
VISION_BILLIONS = {
    name: ("0.3" if "300M" in name else "5.9" if vision.depth == 48 else "5.5") for name, vision in VISION.items()
}
"""Published sizes, as printed."""
