"""Options of the tasks of dual models: `internvl evaluate TASK`. What they do is evaluate_dual.py's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from internvl.evaluate.segment_settings import SegmentSettings

RUNS = Path("runs/evaluate")
Language = Literal["en", "zh", "ja", "ar", "it"]


@dataclass(frozen=True)
class Common:
    """What every task takes."""

    model: tyro.conf.Positional[str]
    """Checkpoint folder in the official layout, or hub id."""
    data: tyro.conf.Positional[Path]
    """The data; docs/tasks.md lists the layouts."""
    name: str | None = None
    """What the paper calls the data (COCO, Flickr30K, ImageNet-1K, ADE20K): its numbers then stand beside."""
    out: Path | None = None
    """Folder for result.json and sheet.html; one a model, task and setting under runs/evaluate when left out."""
    features: Path = RUNS / "features"
    """Folder of what was computed once; tasks and settings share it."""
    limit: int | None = None
    """This many items, spread over the data."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    batch: int = 32
    """Pictures or texts that go together."""
    sheet: bool = True
    """Draw sheet.html."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False
    """The result as JSON on standard output."""


@dataclass(frozen=True)
class Listed(Common):
    """Of data that is a list of pictures or videos."""

    root: Path | None = None
    """Folder of the pictures or videos that a list names; that of the list when left out."""
    split: str = "test"
    """Of lists that hold several."""
    frames: int = 8
    """Of each video."""
    columns: tuple[str, str] = ("image", "caption")
    """Of parquet files: picture, and caption or class."""


@dataclass(frozen=True)
class ZeroShot(Listed):
    """Zero-shot classification of pictures or videos, with ensembles of prompts in several languages."""

    names: str | None = None
    """Class names: a file (one a line, in the order of the folders) or a benchmark of the package (imagenet1k); the
    names of the folders when left out."""
    order: Path | None = None
    """Where the folders are not all classes of --names, or in another order: a file with a folder's name first on each
    line, in the order of --names (ImageNet's LOC_synset_mapping.txt, for ImageNet-A and -R)."""
    templates: str | None = None
    """Prompts: a file, one a line, {} for the name, or a benchmark of the package; those of --names where that is one
    when left out, else "a photo of a {}."."""
    languages: tuple[Language, ...] = ("en",)
    """Of names and prompts of the package; pictures are looked at once for all."""
    head: Literal["c", "g"] = "c"
    fit: Literal["squash", "crop"] = "crop"


@dataclass(frozen=True)
class Retrieval(Listed):
    """Retrieval both ways: text and picture, or text and video; R@1, R@5, R@10."""

    head: Literal["c", "g"] = "c"
    fit: Literal["squash", "crop"] | None = None
    """squash for pictures and crop for videos when left out, as published."""
    captions: Literal["auto", "clean", "raw"] = "auto"
    """clean: as the official script does before it embeds them; auto: of pictures, not of videos nor of data whose
    --name begins with XTD."""
    rerank: int = 0
    """Put this many of the best in the order of image-text matching (InternVL-G); the paper does not."""
    dual_softmax: float | None = None
    """Multiply scores by their softmax over the queries at this scale (official MSR-VTT script: 1)."""


@dataclass(frozen=True)
class Captions(Listed):
    """Zero-shot captions of InternVL-G: CIDEr-D, BLEU, ROUGE-L."""

    beams: int = 5
    min_tokens: int = 8
    max_tokens: int = 30


@dataclass(frozen=True)
class Probe(Common):
    """A probe on the frozen encoder. DATA holds class folders below train/ and val/ (or test/)."""

    kind: Literal["linear", "attention", "logistic"] = "linear"
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates for 512 pictures a batch; several are compared on a tenth of the training pictures."""
    epochs: int = 10
    probe_batch: int = 1024
    """Pictures of a step of the head."""
    seed: int = 0


@dataclass(frozen=True)
class Segment(SegmentSettings, Common):
    """Segmentation on ADE20K's layout: DATA/images and DATA/annotations with training/ and validation/."""

    classes: int = 150
    reduce_zero: bool = True
    """Class 0 of the masks is not scored (ADE20K)."""


@dataclass(frozen=True)
class Compare:
    """Results side by side: C against G, one stage against another; what was not equal stands below."""

    files: tyro.conf.Positional[tuple[Path, ...]]
    """result.json of two or more runs, or their folders."""
    json: Annotated[bool, tyro.conf.arg(name="json")] = False


TASKS: dict[str, type] = {
    "zero-shot": ZeroShot,
    "retrieval": Retrieval,
    "captions": Captions,
    "probe": Probe,
    "segment": Segment,
    "compare": Compare,
}
