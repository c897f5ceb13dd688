"""Fine-tuning for retrieval: losses against a plain re-derivation, in pieces, and as a run that leaves a model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.testing import assert_close

from internvl.convert.files import read_json
from internvl.load_dual import load_dual
from internvl.models.contrastive import DualModel
from internvl.train.alignment import AlignmentBatch, Texts
from internvl.train.recipes import find_recipe, v1_0
from internvl.train.retrieval import retrieval_losses
from internvl.train.stages import open_stage
from internvl.train.stages.generative import Generative, Retrieval
from tiny import tiny_dual, tiny_pictures, tiny_texts

PAIRS = 5


def texts(length: int, seed: int, empty: dict[int, int]) -> Texts:
    ids = tiny_texts(PAIRS, length, seed)
    lengths = torch.tensor([empty.get(row, length - row % 3) for row in range(PAIRS)])
    mask = torch.arange(length) < lengths[:, None]
    return Texts(ids * mask, mask.long())


def batch(**changes: Any) -> AlignmentBatch:
    """Text 1 is empty for contrast, text 3 for matching; pairs 2 and 4 are of one picture."""
    unused = texts(6, 2, {})
    made = AlignmentBatch(
        *(tiny_pictures(PAIRS), texts(9, 0, {1: 5}), texts(7, 1, {3: 2}), unused, unused.ids),
        negatives=texts(6, 3, {0: 2}),
        same=torch.tensor([0, 1, 2, 3, 2]),
    )
    return replace(made, **changes)


def plain(model: DualModel, given: AlignmentBatch) -> tuple[Tensor, Tensor]:
    """Full matrices, one row of matching at a time."""
    features = model.vision(given.pixel_values)
    found = model.encode_text(given.contrast.ids, given.contrast.mask)
    valid = given.contrast.mask.sum(1) > 5
    targets = (given.same[:, None] == given.same).float()
    targets = targets / targets.sum(1, keepdim=True)
    itc = torch.zeros(())
    for images in (model.query_pool(model.qllama.look(features)), model.image_pool(features)):
        logits = model.logit_scale.exp() * F.normalize(images, dim=1) @ found.T
        for scores in (logits, logits.T):
            itc = itc + F.cross_entropy(scores[valid], targets[valid]) / 2
    losses = []
    for label, source in ((0, given.negatives), (1, given.match)):
        for n in range(PAIRS):
            length = int(source.mask[n].sum())
            if length > 2:
                logits = model.match_logits(features[n : n + 1], source.ids[n : n + 1, :length])
                losses.append(F.cross_entropy(logits, torch.tensor([label])))
    return itc, torch.stack(losses).mean()


@pytest.mark.parametrize("piece", [None, 2])
def test_losses_and_gradients_are_those_of_full_matrices(piece: int | None) -> None:
    model, given = tiny_dual(), batch()
    itc, itm = plain(model, given)
    (itc + itm).backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = retrieval_losses(model, given, features=model.vision(given.pixel_values), piece=piece)
    assert_close(found["itc"], itc, atol=1e-5, rtol=1e-5)
    assert_close(found["itm"], itm, atol=1e-5, rtol=1e-5)
    sum(found.values()).backward()
    untouched = {name for name, p in model.named_parameters() if p.grad is None}
    assert untouched == {"qllama.head.weight"}  # all else learns, both poolings too
    for name, expected in wanted.items():
        grad = model.get_parameter(name).grad
        assert_close(grad, expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max()), msg=name)


def test_pairs_that_do_not_count_and_missing_negatives() -> None:
    model = tiny_dual()
    features = model.vision(batch().pixel_values).detach()
    none = retrieval_losses(model, batch(valid=torch.zeros(PAIRS, dtype=torch.bool)), features=features)
    assert {name: float(loss.detach()) for name, loss in none.items()} == {"itc": 0.0, "itm": 0.0}
    with torch.no_grad():
        mined = [
            float(
                retrieval_losses(
                    model,
                    batch(negatives=None),
                    features=features,
                    negatives="hard",
                    generator=torch.Generator().manual_seed(seed),
                )["itm"]
            )
            for seed in (0, 0, 1, 2, 3, 4)
        ]
    assert mined[0] == mined[1]
    assert len(set(mined)) > 1
    with pytest.raises(ValueError, match="the batch has no negatives"):
        retrieval_losses(model, batch(negatives=None), features=features)


def test_the_recipes_are_table_21() -> None:
    run, coco = v1_0.v1_0_retrieval(), v1_0.v1_0_retrieval_coco()
    assert (run.data.batch_samples, run.schedule.epochs, coco.schedule.epochs, run.schedule.warmup_steps) == (
        1024, 10, 5, 100,
    )  # fmt: skip
    assert (run.optimiser.peak_lr, run.optimiser.weight_decay, run.optimiser.betas) == (1e-6, 0.05, (0.9, 0.999))
    assert (run.pairs.side, run.pairs.drop_path, run.pairs.drop_path_schedule) == (364, 0.3, "linear")
    assert {part.layer_decay for part in (run.vision, run.language, run.connector)} == {0.9}
    assert {part.learn for part in (run.vision, run.language, run.connector)} == {"full"}


def test_the_tiny_run_learns_on_cleaned_captions_and_keeps_its_picture_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    v1_0.write_tiny_model(tmp_path / "m")
    v1_0.write_tiny_pairs(tmp_path / "p.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    shouted = [{**line, "caption": f'"{line["caption"].upper()}"!'} for line in lines]
    (tmp_path / "loud.jsonl").write_text("".join(json.dumps(line) + "\n" for line in shouted))
    recipe = find_recipe("tiny_retrieval").make()
    run = replace(recipe, model=str(tmp_path / "m"), out=str(tmp_path / "o"))
    run = replace(run, data=replace(run.data, meta="p.jsonl", held_out="p.jsonl", batch_samples=6))
    quiet = open_stage(run)
    loud = open_stage(replace(run, data=replace(run.data, meta="loud.jsonl", held_out="loud.jsonl")))
    assert isinstance(quiet, Retrieval)
    assert isinstance(loud, Retrieval)
    for mine, theirs in ((quiet.loader, loud.loader), (quiet.held_out, loud.held_out)):
        one, other = next(iter(mine.once())), next(iter(theirs.once()))
        for kind in ("contrast", "match", "negatives"):
            assert torch.equal(getattr(one, kind).ids, getattr(other, kind).ids), kind
    learner = quiet.begin(run, torch.device("cpu"))
    assert "qllama.head.weight" not in learner.parameters
    learner.train_mode()
    shown = next(iter(quiet.batches()))
    losses = quiet.losses(quiet.prepare(shown))
    assert set(losses) == set(quiet.weights(shown)) == {"itc", "itm"}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in learner.parameters.values())
    quiet.export(learner, tmp_path / "o")
    assert read_json(tmp_path / "o/model/config.json")["force_image_size"] == 70
    assert load_dual(tmp_path / "o/model").config.side == 70
    assert type(open_stage(replace(run, pairs=replace(run.pairs, losses="all")))) is Generative
