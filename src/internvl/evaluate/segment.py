"""Segmentation: mean IoU from one confusion matrix, and prediction of large pictures by a sliding window.

Heads are models/heads.py's, masks are read by data/labelled.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

IGNORED = 255
CROP_PX, STRIDE_PX = 504, 322  # official segmentation/configs/intern_vit_6b
PIXELS_AT_ONCE = 1 << 22
"""Pixels counted in one go: 34 MB of indices."""


@dataclass(frozen=True)
class Overlap:
    """Scores over all pixels of all pictures. Classes that occur neither in truth nor prediction are left out."""

    mean_iou: float
    mean_accuracy: float
    """Mean over classes of the share of their pixels that was found."""
    pixel_accuracy: float
    per_class: tuple[float | None, ...]
    """IoU of each class; None where it is left out."""
    num_pixels: int
    num_ignored: int


class Confusion:
    """Counts of (true class, predicted class), added up picture by picture; memory is classes x classes."""

    def __init__(self, num_classes: int, ignored: int = IGNORED) -> None:
        if num_classes < 1:
            raise ValueError(f"{num_classes} classes; at least 1 is needed")
        self.num_classes, self.ignored = num_classes, ignored
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.long)
        """Rows: truth; columns: prediction."""
        self.num_ignored = 0

    def add(self, predicted: Int[Tensor, "*pixels"], truth: Int[Tensor, "*pixels"]) -> None:
        """ValueError for different shapes, and for a class outside 0..num_classes - 1 that is not the ignored one."""
        if predicted.shape != truth.shape:
            raise ValueError(
                f"a prediction of shape {tuple(predicted.shape)} for a truth of {tuple(truth.shape)}; resize the "
                "scores to the picture before taking the best class"
            )
        said, wanted = predicted.flatten(), truth.flatten()
        for start in range(0, len(wanted), PIXELS_AT_ONCE):
            self._count(said[start : start + PIXELS_AT_ONCE].long(), wanted[start : start + PIXELS_AT_ONCE].long())

    def _count(self, said: Int[Tensor, " pixels"], wanted: Int[Tensor, " pixels"]) -> None:
        kept = wanted != self.ignored
        said, wanted = said[kept], wanted[kept]
        for name, classes in (("prediction", said), ("truth", wanted)):
            if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < self.num_classes:
                raise ValueError(
                    f"the {name} holds class {int(classes.max())} (least {int(classes.min())}), but there are "
                    f"{self.num_classes} classes and {self.ignored} is ignored; check the masks' numbering"
                )
        pairs = torch.bincount(wanted * self.num_classes + said, minlength=self.num_classes**2)
        self.counts += pairs.view(self.num_classes, -1).cpu()
        self.num_ignored += int((~kept).sum())

    def merge(self, other: Confusion) -> None:
        """Add the counts of another process."""
        self.counts += other.counts
        self.num_ignored += other.num_ignored

    def score(self) -> Overlap:
        if not int(self.counts.sum()):
            raise ValueError(f"no pixel to score ({self.num_ignored} ignored); add pictures first")
        right = self.counts.diag().double()
        true, said = self.counts.sum(1).double(), self.counts.sum(0).double()
        union = true + said - right
        return Overlap(
            mean_iou=float((right / union)[union > 0].mean()),
            mean_accuracy=float((right / true)[true > 0].mean()),
            pixel_accuracy=float(right.sum() / true.sum()),
            per_class=tuple(float(r / u) if u else None for r, u in zip(right, union, strict=True)),
            num_pixels=int(true.sum()),
            num_ignored=self.num_ignored,
        )


def windows(length: int, crop: int, stride: int) -> list[int]:
    """Starts of the windows along one side, in pixels: `stride` apart, the last one moved back to end at the border."""
    if not 1 <= stride <= crop:
        raise ValueError(
            f"stride {stride} with windows of {crop} px; it must be 1 <= stride <= crop or pixels are missed"
        )
    count = max(length - crop + stride - 1, 0) // stride + 1
    return [max(0, min(place * stride, length - crop)) for place in range(count)]


@torch.inference_mode()
def slide(
    predict: Callable[[Float[Tensor, "pictures 3 rows columns"]], Float[Tensor, "pictures classes _ _"]],
    pictures: Float[Tensor, "pictures 3 height width"],
    *,
    crop: int = CROP_PX,
    stride: int = STRIDE_PX,
    multiple: int = 1,
) -> Float[Tensor, "pictures classes height width"]:
    """Class scores of every pixel: windows of at most `crop` px are predicted alone and averaged where they overlap.

    `predict` may give scores at any resolution; they are brought to the window bilinearly. Windows smaller than `crop`
    (small pictures) are padded on the right and below with zeros to a multiple of `multiple` px, such as the patch.
    Source: mmsegmentation 0.30, `slide_inference`.
    """
    height, width = pictures.shape[-2:]
    total: Tensor | None = None
    seen = torch.zeros(height, width, device=pictures.device)
    for top in windows(height, crop, stride):
        for left in windows(width, crop, stride):
            part = pictures[..., top : top + crop, left : left + crop]
            rows, columns = part.shape[-2:]
            padded = F.pad(part, (0, -columns % multiple, 0, -rows % multiple))
            scores = F.interpolate(predict(padded).float(), padded.shape[-2:], mode="bilinear", align_corners=False)
            if total is None:
                total = scores.new_zeros(len(pictures), scores.shape[1], height, width)
            total[..., top : top + rows, left : left + columns] += scores[..., :rows, :columns]
            seen[top : top + rows, left : left + columns] += 1
    assert total is not None
    return total / seen
