"""How `pocket` is made from its packaged base weights: a connector warm-up, then adapters on both sides.

Two stages as in paper 2.5, table 3 (stage 1 warms the connector up, stage 2 trains the rest), with adapters in place
of full weights so that what ships stays small. Data: `internvl data build`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from internvl.train.run import RunConfig
from internvl.train.settings import Data, Distill, Optimiser, Part, Schedule, Tokens

BASE = "runs/pocket-base"
DATA = "data/pocket"
DISTILL = "data/distill"
"""Collected pictures but for those of the classes that judge the encoder (data/stamp_classes.py)."""


def pocket_align_connector() -> RunConfig:
    """`pocket`, warm start, part 1: the connector alone towards word embeddings, on features seen once and kept.

    Not in the papers: neither ViT nor language model run after the first epoch, so a picture costs a thousandth of a
    pass through the language model, which two cores need. Rates found by trying. Scenes alone: features of 26,000
    take 5 GB of memory.
    Command: internvl train pocket_align_connector
    """
    return RunConfig(
        out="runs/pocket_align_connector",
        stage="align",
        model=BASE,
        connector=Part("full"),
        data=Data(
            meta=f"{DATA}/scenes.jsonl",
            held_out=f"{DATA}/heldout/meta.json",
            held_out_samples=400,
            batch_samples=64,
            augment="off",
            features="memory",
        ),
        optimiser=Optimiser(peak_lr=2e-3, betas=(0.9, 0.98), weight_decay=0.05, clip=2.0),
        schedule=Schedule(steps=4000, warmup_share=0.04),
        precision="bf16",
        compile=True,
        log_every=50,
        save_every=500,
        eval_every=1000,
    )


def pocket_align() -> RunConfig:
    """`pocket`, warm start, part 2: connector and ViT (LoRA 64) towards word embeddings and places, from part 1.

    Higher rates undo what part 1 learnt. Command: internvl train pocket_align
    """
    run = pocket_align_connector()
    return replace(
        run,
        out="runs/pocket_align",
        model="runs/pocket_align_connector/model",
        vision=Part("lora", rank=64, dropout=0.0),
        connector=Part("full", lr_scale=0.5),
        data=replace(run.data, meta=f"{DATA}/meta.json", batch_samples=16, augment="as_given", features="none"),
        optimiser=Optimiser(peak_lr=3e-4, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(steps=5000, warmup_share=0.03),
        log_every=10,
        save_every=250,
        eval_every=500,
    )


def pocket_told() -> RunConfig:
    """`pocket`, before stage 2: LoRA 32 on the language model learns to read visual tokens from perfect ones.

    Tokens say the regions of a record as `pocket_align` wants the connector to, with noise; a sixth of the records is
    seen as it is. Not in the papers: what the ViT still gets wrong hides from the language model how names, colours and
    places are to be read, and a picture costs no ViT. Command: internvl train pocket_told
    """
    run = pocket_sft_cpu()
    return replace(
        run,
        out="runs/pocket_told",
        connector=Part(),
        data=replace(run.data, max_tiles=1, told=0.85),
        schedule=Schedule(steps=1500, warmup_share=0.03),
        eval_every=0,
    )


def pocket_told_boxes() -> RunConfig:
    """`pocket`, between pocket_told and stage 2: from told tokens, boxes alone, until they are found.

    Among other questions a box stays the average box for as long as we tried. Boxes of single things alone break that,
    boxes of several then follow. The rest is unlearned, so stage 2 begins with the mean of both.
    Command: internvl train pocket_told_boxes
    """
    run = _told_alone("boxes", start="pocket_told", steps=600)
    return replace(run, optimiser=replace(run.optimiser, peak_lr=1e-3))


def pocket_told_counts() -> RunConfig:
    """`pocket`, amid stage 2: from told tokens, nothing but counting, until it is found.

    In conversations numbers are learned from what was asked and answered before: asked alone, three things were counted
    right in a quarter of the scenes even when told. Stage 2 goes on afterwards, as this unlearns the rest.
    Command: internvl train pocket_told_counts
    """
    return _told_alone("counts", start="pocket_sft_cpu", steps=700)


def pocket_connector() -> RunConfig:
    """`pocket`, stage 1: the connector and the rows of the nine image tokens; ViT and language model frozen.

    Peak rate 1e-3 as for a fresh projector over frozen parts (LLaVA-1.5, table 9), above the 2e-4 of paper 2.5,
    table 3, whose batches are a hundred times larger. Command: internvl train pocket_connector
    """
    return RunConfig(
        out="runs/pocket_connector",
        model=BASE,
        connector=Part("full"),
        tokens=Tokens(learn=True),
        data=_data(),
        optimiser=Optimiser(peak_lr=1e-3, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(steps=600, warmup_steps=50),
        precision="bf16",
        log_every=20,
        save_every=300,
        eval_every=300,
    )


def pocket_sft() -> RunConfig:
    """`pocket`, stage 2: connector, image-token rows, LoRA 32 on the language model and LoRA 64 on the ViT.

    Starts from stage 1. Adapter rate 4e-4: ten times the full rate of paper 2.5, table 3 (LoRA wants about ten times
    the rate of full weights: arXiv 2106.09685, appendix D); scale 2 x rank and every linear layer as officially,
    no dropout (officially 0.05): the records outnumber the steps;
    square weighting and JPEG augmentation (where the sets say so) as paper 2.5, section 3.4.
    Command: internvl train pocket_sft
    """
    return replace(
        pocket_connector(),
        out="runs/pocket_sft",
        model="runs/pocket_connector/model",
        vision=Part("lora", rank=64, dropout=0.0),
        connector=Part("full", lr_scale=0.5),
        language=Part("lora", rank=32, dropout=0.0),
        tokens=Tokens(learn=True, lr_scale=0.5),
        data=_data(),
        optimiser=Optimiser(peak_lr=4e-4, betas=(0.9, 0.98), weight_decay=0.0, clip=1.0),
        schedule=Schedule(steps=7000, warmup_share=0.03),
        save_every=1000,
        eval_every=1000,
    )


def pocket_connector_cpu() -> RunConfig:
    """Stage 1 on two cores: features of the frozen ViT are kept on disk, so every further epoch skips it.

    Command: internvl train pocket_connector_cpu
    """
    run = pocket_connector()
    return replace(
        run,
        out="runs/pocket_connector_cpu",
        data=_data_cpu(run.data),
        schedule=Schedule(steps=1200, warmup_steps=50),
        log_every=10,
        save_every=100,
        eval_every=400,
    )


def pocket_sft_cpu() -> RunConfig:
    """Stage 2 on two cores, from the align stage: connector, image-token rows, LoRA 32 on the language model.

    `--start runs/pocket_told/parts runs/pocket_told_boxes/parts` begins with the mean of the adapters and rows of both,
    as `weights/pocket` did. The ViT keeps what the align stage taught it. Blocks are compiled, batches hold 1,600
    positions.
    Command: internvl train pocket_sft_cpu
    """
    run = pocket_sft()
    data = replace(run.data, batch_samples=None, batch_tokens=1600, batch_tiles=16, workers=0, held_out_samples=128)
    return replace(
        run,
        out="runs/pocket_sft_cpu",
        model="runs/pocket_align/model",
        vision=Part("frozen"),
        connector=Part("full", lr_scale=0.3),
        data=data,
        optimiser=replace(run.optimiser, peak_lr=6e-4),
        schedule=Schedule(steps=6000, warmup_share=0.03),
        compile=True,
        log_every=10,
        save_every=100,
        eval_every=1000,
    )


def pocket_distill() -> RunConfig:
    """`pocket`, its ViT from EfficientNet-Lite0: the last three blocks, cosine of patch tokens, on two cores.

    Not the papers' (there: InternViT-6B to 300M). The package's ViT was tuned for saliency and lost class knowledge
    that Lite0 has. The first eight blocks stay: they are good, and need no backward pass. Rates found by trying.
    Command: internvl train pocket_distill
    """
    return RunConfig(
        out="runs/pocket_distill",
        stage="distill",
        model=BASE,
        vision=Part("full", layers_from=-3),
        data=Data(meta=f"{DISTILL}/pictures.jsonl", batch_samples=32, max_tiles=1, augment="off"),
        optimiser=Optimiser(peak_lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05),
        schedule=Schedule(steps=2000, warmup_share=0.05),
        precision="bf16",
        log_every=20,
        save_every=200,
        distill=Distill("efficientnet-lite0", fit=256, relation=4.0, flip=True),
    )


def prepare(run: RunConfig) -> None:
    """Assemble the base weights where a recipe starts from them; ValueError where an earlier recipe has not run."""
    folder = Path(run.model)
    if run.data.meta == f"{DISTILL}/pictures.jsonl" and not Path(run.data.meta).is_file():
        from internvl.data.stamp_classes import write_others

        write_others(Path(DISTILL))
    if run.model == BASE and not (folder / "config.json").is_file():
        write_base(folder, run.seed)
    for option, given in (("model", run.model), *(("start", start) for start in run.start)):
        earlier = Path(given)
        if given != BASE and earlier.parts[:1] == ("runs",) and not earlier.is_dir():
            raise ValueError(
                f"{given} is not there: this recipe starts from what `internvl train {earlier.parent.name}` leaves; "
                f"run that first, or give another --{option}"
            )


def write_base(folder: Path, seed: int = 0) -> None:
    """The packaged ViT and language model in the official layout, between them a random connector."""
    import tempfile

    import torch
    from safetensors.torch import save_file

    from internvl.models.build import build
    from internvl.pocket import assemble
    from internvl.zoo import CHAT

    connector = build(CHAT["pocket"], seed=seed).connector
    with tempfile.TemporaryDirectory() as source:
        save_file(connector.state_dict(), Path(source) / "connector.safetensors")
        folder.parent.mkdir(parents=True, exist_ok=True)
        assemble(Path(source), folder, torch.float32)


def _told_alone(name: str, start: str, steps: int) -> RunConfig:
    """One set, all of it told, from the parts that another recipe leaves."""
    run = pocket_told()
    return replace(
        run,
        out=f"runs/pocket_told_{name}",
        start=(f"runs/{start}/parts",),
        data=replace(run.data, meta=f"{DATA}/{name}.jsonl", held_out="", held_out_samples=None, told=1.0),
        schedule=Schedule(steps=steps, warmup_share=0.03),
    )


def _data_cpu(data: Data) -> Data:
    """One tile a picture. Both stages read the records in the same order, so the second finds the first's features."""
    return replace(
        data,
        batch_samples=16,
        batch_tokens=None,
        batch_tiles=None,
        workers=0,
        max_tiles=1,
        augment="off",
        features="disk",
        features_folder="runs/pocket-features",
        held_out_samples=128,
    )


def _data() -> Data:
    """Batches by positions and tiles: pictures of one tile and of five would pad each other otherwise."""
    return Data(
        meta=f"{DATA}/meta.json",
        held_out=f"{DATA}/heldout/meta.json",
        held_out_samples=1024,
        batch_samples=512,
        batch_tokens=24576,
        batch_tiles=384,
        workers=12,
        max_length=1024,
        max_tiles=4,
        weighting="square",
    )
