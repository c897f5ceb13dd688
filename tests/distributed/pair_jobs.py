"""What ranks do in test_pair_ranks.py: the stages of dual models, from the beginning or from what other ranks left."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from jobs import copy
from tiny_pairs import contrastive, generative, write_inputs

from internvl.parallel import collectives
from internvl.train.loop import train
from internvl.train.recipes import tiny_text
from internvl.train.run import RunConfig
from internvl.train.settings import Optimiser, Pairs, Part, Schedule, Text, Watch
from internvl.train.stages import open_stage

__all__ = ["copy", "inputs", "refused", "run_all", "run_copies"]

KINDS = ("contrastive", "generative", "retrieval", "text")


def configured(folder: Path, out: Path, kind: str) -> RunConfig:
    """Gradient caching with a last piece that is smaller; stage 2 with hard negatives, in pieces and with a ViT that
    learns, so that gradients of pictures cross the ranks; retrieval, of which all learns; a pair that cannot be used;
    texts, in two micro-batches."""
    run = contrastive(folder, out, pairs=Pairs(micro_batch=3, mask_share=0.5, max_scale=14.4))
    held_out = "held_out.jsonl"
    if kind == "generative":
        pairs = Pairs(area=(1.0, 1.0), negatives="hard", micro_batch=3)
        run = generative(folder, out, pairs=pairs, vision=Part("full", layers_from=-1))
    if kind == "retrieval":
        parts = {"vision": Part("full"), "connector": Part("full"), "language": Part("full")}
        run = generative(folder, out, pairs=Pairs(negatives="hard", micro_batch=3, losses="retrieval"), **parts)
    if kind == "text":
        run = replace(run, stage="text", vision=Part(), pairs=Pairs(), text=Text(str(folder / "teacher")), accumulate=2)
        run = replace(run, data=replace(run.data, meta=str(folder / "texts.jsonl")))
        held_out = "held_out_texts.jsonl"
    samples = None if kind == "text" else 6
    return replace(
        run,
        # without a large eps, gradients of nothing but rounding would move weights by whole steps
        optimiser=Optimiser(peak_lr=1e-2, eps=1e-2),
        schedule=Schedule(steps=4, warmup_steps=1),
        keep=9,
        eval_every=4,
        export="none",
        data=replace(run.data, held_out=str(folder / held_out), held_out_samples=samples, on_error="skip"),
    )


def inputs(folder: Path) -> None:
    """The model, and what all runs learn from."""
    write_inputs(folder)
    with (folder / "pairs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"image": "gone.png", "caption": "red beside nothing"}\n')
    tiny_text.write_tiny_teacher(folder / "teacher")
    tiny_text.write_tiny_texts(folder / "texts.jsonl")
    with (folder / "texts.jsonl").open("a", encoding="utf-8") as file:  # one rank alone would encode it apart
        file.write(
            '{"caption": "red beside blue beside red beside blue beside red beside blue beside red beside blue"}\n'
        )
    tiny_text.write_tiny_texts(folder / "held_out_texts.jsonl", "under")


def run_all(folder: Path) -> None:
    for kind in KINDS:
        run = configured(folder, folder / f"{kind}-{collectives.num_ranks()}", kind)
        stage = open_stage(run)
        assert train(run, stage, evaluators=[stage.evaluate]).step == 4


def run_copies(folder: Path) -> None:
    """Folders that hold a checkpoint of another number of ranks: NAME-to-SIZE."""
    found = sorted(folder.glob(f"*-to-{collectives.num_ranks()}"))
    assert found
    for path in found:
        run = configured(folder, path, path.name.split("-")[0])
        run = replace(run, watch=Watch(save_behind=True))
        assert train(run, open_stage(run), resume=True).finished


def refused(folder: Path) -> None:
    """A batch that ranks cannot share."""
    run = configured(folder, folder / "odd", "contrastive")
    with pytest.raises(ValueError, match="batch_samples is 7 pairs a step, which 2 ranks cannot share evenly"):
        open_stage(replace(run, data=replace(run.data, batch_samples=7)))
