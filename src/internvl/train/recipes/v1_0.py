"""InternVL 1.0 (arXiv 2312.14238): contrastive pre-training in two phases, the generative stage; tiny runs of both.

Settings are those of table 20 and appendix A.3 of the paper; its stage 1 ran on 640 GPUs with 256 pairs each, its stage
2 on 160 with 128 each. Any number of GPUs shares the same batch: `pairs.micro_batch` is what one embeds at a time.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

from internvl.train.recipes.tiny import COLOURS, byte_tokenizer, missing
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Pairs, Part, Schedule

BASE = "runs/v1_0_base"
LLAMA = "models/chinese_alpaca_lora_7b"
"""The multilingual LLaMA-7B that the paper begins with, as a folder of transformers."""
ENCODER = "InternViT-6B-224px"

STAGE_1_STEPS, STAGE_1_WARMUP = 175_000, 5_000
STAGE_1_PIECE, STAGE_2_PIECE = 256, 128
STAGE_1_BATCH, STAGE_2_BATCH = 640 * STAGE_1_PIECE, 160 * STAGE_2_PIECE
UNMASKED_PAIRS = 500_000_000
"""The last of 28.7 billion pairs are seen whole at 224 px (appendix A.3)."""
UNMASKED_STEPS = round(UNMASKED_PAIRS / STAGE_1_BATCH)

TINY = "runs/tiny-dual-inputs"


def v1_0_contrastive() -> RunConfig:
    """InternVL 1.0, stage 1, first phase: everything learns, 28.2 billion pairs at 196 px, half of the patches seen.

    Paper 1.0, table 20: AdamW 0.9, 0.95, decay 0.1, peak 1e-3 (pictures) and 1e-4 (texts), 5,000 steps of warm-up,
    cosine, joint batch 164K, uniform drop path 0.2, half of the patches masked, random resized crop, bf16. The two
    projections learn at the rate of the pictures; the share of a crop is that of the official fine-tuning data.
    Command: internvl train v1_0_contrastive --data.meta pairs/meta.json
    """
    return RunConfig(
        out="runs/v1_0_contrastive",
        stage="contrastive",
        model=BASE,
        vision=Part("full"),
        connector=Part("full"),
        language=Part("full", lr_scale=0.1),
        data=Data(batch_samples=STAGE_1_BATCH, workers=8, on_error="skip"),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Schedule(steps=STAGE_1_STEPS - UNMASKED_STEPS, warmup_steps=STAGE_1_WARMUP),
        precision="bf16",
        grad_checkpoint=True,
        save_every=1000,
        pairs=Pairs(micro_batch=STAGE_1_PIECE, side=196, mask_share=0.5, drop_path=0.2),
    )


def v1_0_contrastive_224() -> RunConfig:
    """InternVL 1.0, stage 1, second phase: the last half billion pairs, whole pictures at 224 px.

    Paper 1.0, appendix A.3. The rate begins where one cosine over all 175,000 steps stands after the first phase.
    Command: internvl train v1_0_contrastive_224 --data.meta pairs/meta.json
    """
    run = v1_0_contrastive()
    share = (STAGE_1_STEPS - UNMASKED_STEPS - STAGE_1_WARMUP) / (STAGE_1_STEPS - STAGE_1_WARMUP)
    peak = run.optimiser.peak_lr * 0.5 * (1 + math.cos(math.pi * share))
    return replace(
        run,
        out="runs/v1_0_contrastive_224",
        model="runs/v1_0_contrastive/model",
        optimiser=replace(run.optimiser, peak_lr=peak),
        schedule=Schedule(steps=UNMASKED_STEPS, warmup_steps=0),
        pairs=replace(run.pairs, side=224, mask_share=0.0),
    )


def v1_0_generative() -> RunConfig:
    """InternVL 1.0, stage 2: cross-attention, queries and heads learn contrast, matching, captions; 1.6 billion pairs.

    Paper 1.0, table 20: AdamW 0.9, 0.98, decay 0.05, peak 5e-5, 2,000 steps of warm-up, cosine, joint batch 20K, 80,000
    steps, 224 px, no drop path, bf16; losses 1 : 1 : 1. Negatives of matching as in the official code;
    `--pairs.negatives hard` draws similar ones as BLIP-2 does.
    Command: internvl train v1_0_generative --data.meta pairs/strict.json
    """
    run = v1_0_contrastive()
    return replace(
        run,
        out="runs/v1_0_generative",
        stage="generative",
        model="runs/v1_0_contrastive_224/model",
        vision=Part(),
        language=Part(),
        data=replace(run.data, batch_samples=STAGE_2_BATCH),
        optimiser=Optimiser(peak_lr=5e-5, betas=(0.9, 0.98), weight_decay=0.05),
        schedule=Schedule(steps=80_000, warmup_steps=2_000),
        pairs=Pairs(micro_batch=STAGE_2_PIECE),
    )


def v1_0_retrieval() -> RunConfig:
    """InternVL 1.0 fine-tuned for retrieval on Flickr30K or Flickr30K-CN: all learns, 10 epochs at 364 px.

    Paper 1.0, table 21; official shell/finetune: joint batch 1,024, peak 1e-6, decay 0.05, AdamW 0.9, 0.999, 100 steps
    of warm-up, cosine, layer-wise decay 0.9 in ViT and QLLaMA, drop path 0.3 rising, bf16. Contrast of both image
    vectors, and matching; captions are cleaned.
    Command: internvl train v1_0_retrieval --model path/to/InternVL-14B-224px --data.meta flickr30k/meta.json
    """
    run = v1_0_generative()
    decayed = Part("full", layer_decay=0.9)
    return replace(
        run,
        out="runs/v1_0_retrieval",
        model="runs/v1_0_generative/model",
        vision=decayed,
        connector=decayed,
        language=decayed,
        data=replace(run.data, batch_samples=1024),
        optimiser=Optimiser(peak_lr=1e-6, betas=(0.9, 0.999), weight_decay=0.05),
        schedule=Schedule(epochs=10, warmup_steps=100),
        pairs=Pairs(micro_batch=32, side=364, drop_path=0.3, drop_path_schedule="linear", losses="retrieval"),
    )


def v1_0_retrieval_coco() -> RunConfig:
    """InternVL 1.0 fine-tuned for retrieval on COCO: as v1_0_retrieval, 5 epochs.

    Official shell/finetune.
    Command: internvl train v1_0_retrieval_coco --model path/to/InternVL-14B-224px --data.meta coco/meta.json
    """
    run = v1_0_retrieval()
    return replace(run, out="runs/v1_0_retrieval_coco", schedule=replace(run.schedule, epochs=5))


def tiny_contrastive() -> RunConfig:
    """Stage 1 of InternVL 1.0 in seconds: a random model tells 30 two-coloured pictures apart, half of each seen.

    Rates found by trying. Command: internvl train tiny_contrastive
    """
    return RunConfig(
        out="runs/tiny_contrastive",
        stage="contrastive",
        model=f"{TINY}/model",
        vision=Part("full"),
        connector=Part("full"),
        language=Part("full"),
        data=Data(meta=f"{TINY}/pairs.jsonl", held_out=f"{TINY}/held_out.jsonl", batch_samples=30),
        optimiser=Optimiser(peak_lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1),
        schedule=Schedule(steps=60, warmup_share=0.1),
        log_every=10,
        save_every=20,
        eval_every=20,
        pairs=Pairs(micro_batch=8, area=(0.9, 1.0), mask_share=0.5, drop_path=0.1),
    )


def tiny_generative() -> RunConfig:
    """Stage 2 of InternVL 1.0 in seconds, from what tiny_contrastive leaves: matching and captions of 30 pictures.

    Rates found by trying. Command: internvl train tiny_generative
    """
    run = tiny_contrastive()
    return replace(
        run,
        out="runs/tiny_generative",
        stage="generative",
        model="runs/tiny_contrastive/model",
        vision=Part(),
        language=Part(),
        data=replace(run.data, features="memory"),
        optimiser=Optimiser(peak_lr=3e-3, betas=(0.9, 0.98), weight_decay=0.05),
        pairs=Pairs(area=(1.0, 1.0), negatives="hard"),
    )


def tiny_retrieval() -> RunConfig:
    """Fine-tuning for retrieval in seconds, from what tiny_generative leaves: all parts learn, at another picture size.

    Rates found by trying. Command: internvl train tiny_retrieval
    """
    run, decayed = tiny_contrastive(), Part("full", layer_decay=0.9)
    return replace(
        run,
        out="runs/tiny_retrieval",
        stage="generative",
        model="runs/tiny_generative/model",
        vision=decayed,
        connector=decayed,
        language=decayed,
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
        schedule=Schedule(steps=20, warmup_share=0.1),
        pairs=Pairs(micro_batch=8, side=70, drop_path=0.1, drop_path_schedule="linear", losses="retrieval"),
    )


def prepare(run: RunConfig) -> None:
    """The model that a first stage begins with, where it is missing; ValueError where an earlier recipe has not run."""
    from internvl.train.recipes.pocket import prepare as earlier

    folder = Path(run.model)
    if run.model == BASE and not (folder / "config.json").is_file():
        write_base(folder, run.seed)
    earlier(run)


def write_base(folder: Path, seed: int = 0, llama: str = LLAMA) -> None:
    """A random InternViT-6B (table 20: random) beside the LLaMA, with the parts of stage 2 already there, random.

    In float32: 83 GB of memory, 55 GB on disk.
    """
    from internvl.load_dual import extend_llama, save_dual
    from internvl.zoo import VISION

    if not (Path(llama) / "config.json").is_file():
        raise ValueError(
            f"{llama} is not there: stage 1 begins with the multilingual LLaMA-7B; put its folder (config.json, "
            "safetensors, tokenizer) there, or give --model a folder of your own"
        )
    loaded = extend_llama(llama, VISION[ENCODER], seed=seed)
    save_dual(loaded.model, loaded.tokenizer, folder)


def prepare_tiny(run: RunConfig) -> None:
    """The random model and the pictures of the tiny runs, where they are missing."""
    from internvl.train.recipes.pocket import prepare as earlier

    if run.model == f"{TINY}/model" and not Path(run.model).is_dir():
        write_tiny_model(Path(run.model))
    earlier(run)
    for path, is_held_out in missing(run, tiny_contrastive()):
        write_tiny_pairs(path, 9 * is_held_out)


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """`tiny-dual` with a tokenizer of bytes, in the official layout."""
    from internvl.load_dual import save_dual
    from internvl.models.build import build_dual
    from internvl.zoo import DUAL

    tokenizer, config = byte_tokenizer(), DUAL["tiny-dual"]
    settings = {**config.language.settings, "vocab_size": len(tokenizer)}
    model = build_dual(replace(config, language=replace(config.language, settings=settings)), seed=seed)
    save_dual(model, tokenizer, folder)


def write_tiny_pairs(path: Path, change: int = 0) -> None:
    """A picture of every two colours side by side, and its caption."""
    from PIL import Image

    folder = path.parent / f"{path.stem}_pictures"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for left, first in COLOURS.items():
        for right, second in COLOURS.items():
            if left == right:
                continue
            picture = Image.new("RGB", (56, 56), _changed(first, change))
            picture.paste(_changed(second, -change), (28, 0, 56, 56))
            name = f"{left}-{right}.png"
            picture.save(folder / name)
            caption = f"{left} beside {right}"
            lines.append({"id": name, "image": f"{folder.name}/{name}", "caption": caption, "language": "en"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _changed(colour: tuple[int, int, int], change: int) -> tuple[int, int, int]:
    red, green, blue = (min(255, max(0, value + change)) for value in colour)
    return red, green, blue
