"""How a segmenter is trained and looked at: stated once, for the code and for the command line. No torch.

Source: InternVL paper, table 23; official segmentation/configs/intern_vit_6b.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

Kind = Literal["linear", "head", "full", "few"]


@dataclass(frozen=True)
class SegmentSettings:
    """The defaults are the paper's."""

    kind: Kind = "linear"
    """linear: batch norm and a 1 x 1 convolution; head: UperNet on the frozen encoder; full: all learns; few: all
    learns under the head of linear (few-shot, with --share)."""
    iterations: int = 80_000
    train_batch: int = 16
    """Crops of a step."""
    crop_px: Annotated[int, tyro.conf.arg(name="crop")] = 504
    """Pixels of a side, of training crops and test windows."""
    stride_px: Annotated[int, tyro.conf.arg(name="stride")] = 322
    """From one test window to the next."""
    learning_rate: Annotated[float, tyro.conf.arg(name="rate")] = 4e-5
    warmup: int = 1500
    upernet_width: Annotated[int, tyro.conf.arg(name="width")] = 1536
    """Channels of UperNet."""
    auxiliary_weight: float = 0.4
    """Of the loss of the auxiliary head."""
    share: int = 1
    """Learn from one of this many training pictures, drawn by seed (few-shot: 16, 8, 4, 2; the paper's iterations and
    warm-up are then 5000 and 100, 10000 and 200, 20000 and 400, 40000 and 800)."""
    seed: int = 0
    save_every: int = 1000

    def __post_init__(self) -> None:
        low = min(self.iterations, self.train_batch, self.crop_px, self.stride_px, self.upernet_width, self.share)
        if low < 1 or self.learning_rate <= 0 or self.stride_px > self.crop_px or self.save_every < 1:
            raise ValueError(
                f"iterations {self.iterations}, batch {self.train_batch}, crop {self.crop_px}, "
                f"stride {self.stride_px}, rate {self.learning_rate}; all at least 1, the rate above 0, the stride at "
                "most the crop"
            )

    @property
    def encoder_learns(self) -> bool:
        return self.kind in ("full", "few")

    @property
    def one_map(self) -> bool:
        """Whether the head sees one feature map, not a pyramid."""
        return self.kind in ("linear", "few")

    @property
    def weight_decay(self) -> float:
        return 0.0 if self.kind == "linear" else 0.05

    @property
    def layer_decay(self) -> float:
        return 0.95 if self.encoder_learns else 1.0

    @property
    def drop_path(self) -> float:
        return 0.4 if self.encoder_learns else 0.0

    def settings(self) -> SegmentSettings:
        """These alone, of what holds more beside them."""
        return SegmentSettings(**{f.name: getattr(self, f.name) for f in fields(SegmentSettings)})
