"""EfficientNet-Lite0 (arXiv 1905.11946; tensorflow/tpu, efficientnet/lite): a small CNN, a teacher for distillation.

Lite: no squeeze-and-excitation, ReLU6 in place of swish, stem and head of fixed width. Weights are read by
`data/packaged/efficientnet.py`.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SIDE = 224
WIDTH = 1280
"""Channels of the feature map, 7 x 7 at 224 px."""
STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
"""Blocks, kernel, stride of the first block, expansion, channels (tensorflow/tpu, efficientnet_lite_builder.py)."""
STEM = 32
NORM_EPS = 1e-3


class Unit(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm, and ReLU6 where asked."""

    def __init__(self, inner: int, outer: int, kernel: int = 1, stride: int = 1, groups: int = 1, bend: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, groups=groups, bias=False)
        self.norm = nn.BatchNorm2d(outer, NORM_EPS)
        self.bend = bend

    def forward(self, x: Float[Tensor, "tiles inner height width"]) -> Float[Tensor, "tiles outer rows columns"]:
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        missing = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]]
        top, left = (number // 2 for number in missing)  # an odd one goes below and to the right
        out = self.norm(self.conv(F.pad(x, (left, missing[1] - left, top, missing[0] - top))))
        return F.relu6(out) if self.bend else out


class Block(nn.Module):
    """Inverted bottleneck: widen, convolve each channel, narrow; a residual where shapes agree."""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        middle = inner * expansion
        self.expand = Unit(inner, middle) if expansion > 1 else nn.Identity()
        self.depthwise = Unit(middle, middle, kernel, stride, groups=middle)
        self.project = Unit(middle, outer, bend=False)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Float[Tensor, "tiles inner height width"]) -> Float[Tensor, "tiles outer rows columns"]:
        out: Tensor = self.project(self.depthwise(self.expand(x)))
        return x + out if self.residual else out


class EfficientNetLite0(nn.Module):
    """Pictures to a feature map, and to scores of the 1,000 classes of ImageNet-1k."""

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = Unit(3, STEM, 3, 2)
        blocks, inner = [], STEM
        for count, kernel, stride, expansion, outer in STAGES:
            for index in range(count):
                blocks.append(Block(inner, outer, kernel, stride if index == 0 else 1, expansion))
                inner = outer
        self.blocks = nn.Sequential(*blocks)
        self.head = Unit(inner, WIDTH)
        self.classify = nn.Linear(WIDTH, num_classes)

    def features(self, pixels: Float[Tensor, "tiles 3 height width"]) -> Float[Tensor, "tiles 1280 rows columns"]:
        """`pixels` are (value - 127) / 128, values 0 to 255 (tensorflow/tpu, lite models)."""
        out: Tensor = self.head(self.blocks(self.stem(pixels)))
        return out

    def forward(self, pixels: Float[Tensor, "tiles 3 height width"]) -> Float[Tensor, "tiles classes"]:
        out: Tensor = self.classify(self.features(pixels).mean((2, 3)))
        return out
