"""What a run is made of, as frozen dataclasses: parts, data, optimiser, schedule, and what single stages ask for.

`run.py` puts them together into a run and checks it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from internvl.data.packing import Packing

DUAL_STAGES = ("text", "contrastive", "generative")
"""Of InternVL-C and -G, on pairs or texts; their batch is one over all devices, a smaller one is another loss."""
PARTS = ("vision", "connector", "language")


@dataclass(frozen=True)
class Part:
    """How one part of the model learns."""

    learn: Literal["frozen", "full", "lora"] = "frozen"
    lr_scale: float = 1.0
    """Multiplies the peak learning rate for this part."""
    rank: int = 16
    """Of the adapters, when learn is lora."""
    alpha: int | None = None
    """Adapter scale; twice the rank when not given (official wrap_llm_lora)."""
    dropout: float = 0.05
    """Before each adapter (official wrap_llm_lora)."""
    layers_from: int = 0
    """First block that learns: -4 is the last four (official `unfreeze_vit_layers`). Language and vision, full only."""
    drop_path: float | None = None
    """Stochastic depth of the last block of the vision part, rising from 0 (official `drop_path_rate`); None: the
    model's own."""
    layer_decay: float = 1.0
    """Factor on the rate from each block to the one before it; the embeddings come before the first block (BEiT)."""


@dataclass(frozen=True)
class Tokens:
    """The rows of the added special tokens in the token table, beside a language model that is frozen or adapted."""

    learn: bool = False
    lr_scale: float = 1.0


@dataclass(frozen=True)
class Data:
    """What is learned from, and how it is cut into batches."""

    meta: str = ""
    """Meta JSON naming several sets, or one JSONL file of records."""
    held_out: str = ""
    """JSONL or meta JSON never trained on; its loss is the held-out loss."""
    held_out_samples: int | None = None
    """How many of them, the same ones each time, of every set in proportion; all when not given."""
    shares: Literal["length", "sqrt"] = "length"
    """Of the sets in an epoch: by their records, or by the square root of how many they are (official
    `use_data_resampling`, as it was meant)."""
    batch_samples: int | None = 16
    """Most samples in one micro-batch. In the stages of dual models: its pairs or texts, which all ranks share."""
    batch_tokens: int | None = None
    """Most positions in one micro-batch, padding included."""
    batch_tiles: int | None = None
    """Most tiles in one micro-batch."""
    grouped: bool = False
    """Samples of like length together (official `group_by_length`)."""
    packed: bool = False
    """One row of many samples, each attending to itself only, instead of padded rows."""
    workers: int = 0
    max_length: int = 8192
    """Positions of one sample (official `max_seq_length`)."""
    overlong: Literal["error", "cut"] = "error"
    """A longer sample ends the run, or loses its end (the official way)."""
    on_error: Literal["error", "skip", "quarantine"] = "error"
    """A record that cannot be used ends the run; or is left out, counted and named in `skipped.txt`; or is also
    written to `quarantine.jsonl`, whole, with file, line and reason."""
    max_tiles: int | None = None
    """Tiles of one image before the thumbnail; the model's own number when not given."""
    min_frames: int = 8
    """Of a video at least; their number is drawn anew each time (official `min_num_frame`)."""
    max_frames: int = 32
    """Of a video at most (official `max_num_frame`); each is a tile."""
    template: str | None = None
    """Of the prompts of this run alone, such as plain; the model's own when not given, and that is what it keeps."""
    pad_to_square: bool | None = None
    """Of this run alone, as `template`."""
    weighting: Literal["token", "sample", "square"] = "square"
    """Weight of a learned token among x of its sample: 1, 1/x, 1/sqrt(x) (paper 2.5, section 3.4)."""
    augment: Literal["as_given", "on", "off"] = "as_given"
    """JPEG re-encoding of tiles: as each set of the meta JSON says, or all, or none (paper 2.5, section 3.4)."""
    told: float = 0.0
    """Share of the records with regions and one tile whose visual tokens say the regions instead of what the encoder
    sees (train/told.py)."""
    features: Literal["none", "memory", "disk"] = "none"
    """Keep the features of each tile while the vision part is frozen, so that it is seen once."""
    features_folder: str = ""
    """Where features are kept on disk; inside the run's folder when empty."""
    packing: Packing = field(default_factory=Packing)
    """How packed rows are filled, when `packed` and `batch_tokens` are set."""
    worst_first: bool = False
    """Run the largest micro-batch of the epoch once before training, and forget it: an out-of-memory shows at once."""
    changed: Literal["error", "accept"] = "error"
    """Files that say something else when a run goes on: refuse, or go on with what they say now (docs/train.md)."""
    max_rejected: float = 0.01
    """Largest share of records left out before the run ends: of an epoch, or of all given so far if that is more."""


@dataclass(frozen=True)
class Optimiser:
    """AdamW (official scripts: 0.9, 0.999, 1e-8; clipping is the trainer's default)."""

    peak_lr: float = 4e-5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    """On matrices only; biases, norms and other vectors never decay."""
    clip: float = 1.0
    """Largest gradient norm; 0 switches clipping off."""


@dataclass(frozen=True)
class Schedule:
    """How long, and the learning rate along the way: linear warm-up, then cosine to 0."""

    steps: int | None = None
    """Optimiser steps; either this or epochs."""
    epochs: float | None = None
    warmup_steps: int | None = None
    """Replaces `warmup_share` when given."""
    warmup_share: float = 0.03
    over: Literal["steps", "time"] = "steps"
    """time: progress is elapsed / max_minutes, so that a time-boxed run ends at 0 (its resume is not bit-exact)."""


@dataclass(frozen=True)
class Pairs:
    """Training on pictures with captions: the stages `contrastive` and `generative` of InternVL 1.0."""

    micro_batch: int | None = None
    """Pairs that a rank embeds at a time; the loss is that of the whole batch, whatever fits into memory (gradient
    caching)."""
    side: int | None = None
    """Of a picture in pixels; the model's own when not given."""
    area: tuple[float, float] = (0.5, 1.0)
    """Least and greatest share of a picture in a random crop (official internvl_g dataset.py); 1 1: squashed whole."""
    mask_share: float = 0.0
    """Of the patches, left out of the vision encoder at random."""
    drop_path: float = 0.0
    """Of a vision encoder that learns."""
    drop_path_schedule: Literal["uniform", "linear"] = "uniform"
    """uniform as the paper (1.0, appendix A.3), linear as the official code."""
    max_scale: float | None = 100.0
    """The learned factor of the logits is kept at or below it (CLIP, section 2.5); official code has no bound."""
    negatives: Literal["random", "hard"] = "random"
    """Of matching: a caption of any other picture (official code), or similar ones of the batch, of any rank
    (BLIP-2)."""
    losses: Literal["all", "retrieval"] = "all"
    """Of the generative stage. all: contrast, matching, captions (stage 2 of the paper); retrieval: contrast of both
    image vectors and matching, on cleaned captions (the official fine-tuning for retrieval)."""
    output_head: str = ""
    """Folder of the LLaMA whose output head InternVL-G takes where the run begins with InternVL-C alone."""


@dataclass(frozen=True)
class Distill:
    """From a large vision encoder to the model's vision part (paper Mini-InternVL, section 3.1): stage `distill`."""

    teacher: str = ""
    """Chat, InternVL-C/-G or InternViT folder, hub id, tiny-* name, or efficientnet-lite0."""
    layers: int = 1
    """Last hidden states that are compared (the paper's K, which it does not state)."""
    projection: Literal["linear", "mlp"] = "linear"
    """From the student's width to the teacher's behind a LayerNorm, one a hidden state, thrown away afterwards."""
    projection_lr_scale: float = 1.0
    fit: int = 0
    """Pictures, the first ones: their mean state is taken away from the teacher's (that of a CNN is large and hides
    what tells pictures apart), and a ridge regression on them starts a linear projection. 0: neither, as the paper."""
    relation: float = 0.0
    """Weight of a second loss: similarities between the tiles of a batch are the teacher's (not in the paper)."""
    class_weight: float = 1.0
    """Of the class token, beside 1 for the mean over all patches."""
    features: Literal["memory", "disk", "none"] = "memory"
    """Keep what the teacher says about each tile, so that it sees each one once."""
    features_folder: str = ""
    """Where they are kept on disk; inside the run's folder when empty."""
    flip: bool = False
    """Every other time a tile is seen mirrored; both views are kept."""
    area: tuple[float, float] = (1.0, 1.0)
    """Share of a picture that its one tile shows, drawn between these; less than all needs features "none"."""


@dataclass(frozen=True)
class Text:
    """From a sentence encoder to the text side of InternVL-C, in all languages (arXiv 2004.09813): stage `text`."""

    teacher: str = ""
    """Folder of an English sentence encoder, the mean of a BERT's last states; the packaged all-MiniLM-L6-v2 when not
    given. As wide as the model's embeddings."""
    temperature: float = 0.05
    """Of the main loss, which of the joint batch's English texts a text is near to (that of sentence-transformers' own
    in-batch loss: scale 20)."""
    cosine: float = 1.0
    """Weight of a second loss, 1 - cosine to the teacher's vector."""


@dataclass(frozen=True)
class Ranks:
    """How the model lies on several ranks (docs/ranks.md); one rank needs none of it."""

    replicas: int = 1
    """Copies of the model, each in shards over ranks / replicas ranks; as many as there are ranks: no sharding."""
    reshard: bool = True
    """Free the gathered weights of a block after its forward pass: less memory, one more gathering."""
    offload: bool = False
    """Shards and optimiser state on the host, where GPUs are too small."""


@dataclass(frozen=True)
class Watch:
    """What a run keeps and tells beside what it learns."""

    ema: float = 0.0
    """Decay of a moving average of the weights, such as 0.999; 0 keeps none. `--export ema` exports it."""
    step_limit_s: float = 1800.0
    """A step that takes longer ends every rank, each naming its last samples and its stack; 0 waits for ever."""
    save_behind: bool = False
    """Write checkpoints beside training; costs a copy of what is written."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where the lines of metrics.jsonl go too."""
    samples: int = 0
    """Held-out records answered at every evaluation, into samples.jsonl."""
    sample_tokens: int = 48
    """Most tokens of such an answer."""
