"""The three losses of stage 2 against the official code, and against a plain re-derivation from BLIP-2's text."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.testing import assert_close

from internvl.convert import dual
from internvl.convert.keys import expand
from internvl.models.contrastive import DualModel
from internvl.models.qllama import visible
from internvl.train.alignment import AlignmentBatch, MatchRows, Texts, alignment_losses, given_rows, hard_rows
from internvl.zoo import DUAL
from reference import official_dual, part
from tiny import tiny_dual, tiny_pictures, tiny_texts, unchecked


@pytest.fixture(scope="module")
def reference() -> tuple[DualModel, dict[str, torch.Tensor], dict[str, Any]]:
    return official_dual("g_stage2.safetensors")


def official_batch(tensors: dict[str, torch.Tensor]) -> AlignmentBatch:
    train = part(tensors, "train/")

    def texts(kind: str) -> Texts:
        return Texts(train[f"{kind}input_ids"], train[f"{kind}attention_mask"])

    return AlignmentBatch(
        *(train["pixel_values"], texts("summarize_"), texts("positive_"), texts("")),
        *(train["labels"], texts("negative_")),
    )


def test_losses_and_gradients_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    losses = alignment_losses(model, official_batch(tensors))
    for name, loss in losses.items():
        assert_close(loss, tensors[f"out/stage2_loss_{name}"], atol=1e-5, rtol=0)
    total = sum(losses.values())
    assert_close(total, tensors["out/stage2_loss"], atol=1e-5, rtol=0)
    total.backward()
    ours = {e.disk[0]: e.ours[0] for e in expand(dual.OFFICIAL_RULES, model.state_dict())}
    parameters = dict(model.named_parameters())
    for key, expected in part(tensors, "grad/").items():
        found = parameters[ours[key]].grad
        assert_close(found, expected, rtol=1e-3, atol=1e-6 + 1e-4 * float(expected.abs().max()), msg=key)
    model.zero_grad()


# a re-derivation: one pass of 3 B rows, loops over rows, no function of ours but the model


def tiny_align_batch(pairs: int = 5, seed: int = 0) -> AlignmentBatch:
    """Text 1 is empty for contrast, text 3 for matching; captions and texts are padded."""

    def texts(length: int, kind: int, empty: dict[int, int]) -> Texts:
        ids = tiny_texts(pairs, length, 10 * seed + kind)
        lengths = [empty.get(row, length - row % 3) for row in range(pairs)]
        mask = torch.arange(length) < torch.tensor(lengths)[:, None]
        return Texts(ids * mask, mask.long())

    caption = texts(8, 2, {})
    labels = caption.ids.masked_fill(caption.mask == 0, -100)
    labels[:, :3] = -100
    return AlignmentBatch(
        *(tiny_pictures(pairs, seed=seed), texts(9, 0, {1: 5}), texts(7, 1, {3: 2}), caption, labels),
        negatives=texts(6, 3, {0: 2}),
    )


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    return [x - top - math.log(sum(math.exp(y - top) for y in row)) for x in row]


def plain_losses(model: DualModel, batch: AlignmentBatch, smoothing: float) -> dict[str, float]:
    """What the paper and BLIP-2 section 3.2 say: contrast of unit vectors both ways; matching of each query, averaged;
    captions after the queries."""
    pairs, queries = len(batch.pixel_values), model.config.num_queries
    features = model.vision(batch.pixel_values)

    def states(task: str, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = torch.cat([model.qllama.queries.repeat(len(ids), 1, 1), model.qllama.embed_tokens(ids)], 1)
        return model.qllama(x, visible(task, mask.bool(), queries), features=features)

    contrast = states("itc", batch.contrast.ids, batch.contrast.mask)
    ends = [int(mask.sum()) - 1 for mask in batch.contrast.mask]
    images = [v / v.norm() for v in model.query_pool(contrast[:, :queries])]
    texts = [contrast[n, queries + end] @ model.text_projection for n, end in enumerate(ends)]
    texts = [v / v.norm() for v in texts]
    scale = math.exp(float(model.logit_scale))
    itc = []
    for n in range(pairs):
        if ends[n] == 4:
            continue
        for mine, others in ((images[n], texts), (texts[n], images)):
            logs = log_softmax([scale * float(mine @ other) for other in others])
            itc.append(-(1 - smoothing) * logs[n] - smoothing / pairs * sum(logs))
    negative = pairs - pairs // 2
    itm = []
    for n in range(pairs):
        source = batch.negatives if n < negative else batch.match
        num_tokens = int(source.mask[n].sum())
        if num_tokens == 2:
            continue
        ids = source.ids[n : n + 1, :num_tokens]
        x = torch.cat([model.qllama.queries, model.qllama.embed_tokens(ids)], 1)
        alone = model.qllama(
            x, torch.ones(1, 1, x.shape[1], x.shape[1], dtype=torch.bool), features=features[n : n + 1]
        )
        logits = torch.stack([model.match_head(q) for q in alone[0, :queries]]).mean(0)
        itm.append(-log_softmax(logits.tolist())[int(n >= negative)])
    captioned = states("itg", batch.caption.ids, batch.caption.mask)[:, queries:]
    itg = []
    for n in range(pairs):
        for place in range(batch.labels.shape[1] - 1):
            label = int(batch.labels[n, place + 1])
            if label != -100:
                itg.append(-log_softmax(model.qllama.head(captioned[n, place]).tolist())[label])
    return {name: sum(v) / len(v) for name, v in (("itc", itc), ("itm", itm), ("itg", itg))}


@torch.no_grad()
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_equal_a_plain_derivation(smoothing: float) -> None:
    model, batch = tiny_dual(label_smoothing=smoothing), tiny_align_batch()
    expected = plain_losses(model, batch, smoothing)
    for name, loss in alignment_losses(model, batch).items():
        assert float(loss) == pytest.approx(expected[name], abs=1e-5), name


def test_given_rows_are_half_and_half() -> None:
    batch = tiny_align_batch()
    rows = given_rows(batch)
    assert rows.labels.tolist() == [-100, 0, 0, -100, 1]  # 0 has an empty negative, 3 an empty text
    assert rows.image_of_row.tolist() == [0, 1, 2, 3, 4]
    assert torch.equal(rows.texts.ids[4], batch.match.ids[4])
    assert torch.equal(rows.texts.ids[1, :6], batch.negatives.ids[1])


def hard(logits: torch.Tensor, same: torch.Tensor | None = None, usable: torch.Tensor | None = None) -> MatchRows:
    pairs = len(logits)
    texts = Texts(torch.arange(pairs)[:, None].expand(-1, 3), torch.ones(pairs, 3, dtype=torch.long))
    usable = torch.ones(pairs, dtype=torch.bool) if usable is None else usable
    return hard_rows(texts, both_ways(logits), usable, same, torch.Generator().manual_seed(0))


def both_ways(logits: torch.Tensor) -> torch.Tensor:
    """Of pictures and of texts, on one process."""
    return torch.stack([logits, logits.T])


def test_hard_negatives_are_the_similar_ones_and_never_the_own() -> None:
    logits = torch.full((4, 4), -9.0)
    logits.fill_diagonal_(99.0)
    for image, text in ((0, 2), (1, 3), (2, 1), (3, 0)):
        logits[image, text] = 20.0
    rows = hard(logits)
    assert rows.labels.tolist() == [1] * 4 + [0] * 8
    assert rows.texts.ids[:, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 2, 3, 1, 0]
    assert rows.image_of_row.tolist() == [0, 1, 2, 3, 3, 2, 0, 1, 0, 1, 2, 3]


def test_hard_negatives_follow_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0]] * 3)
    generator, found = torch.Generator().manual_seed(1), []
    texts = Texts(torch.arange(3)[:, None], torch.ones(3, 1, dtype=torch.long))
    for _ in range(2000):
        found.append(int(hard_rows(texts, both_ways(logits), torch.ones(3).bool(), None, generator).texts.ids[6, 0]))
    assert found.count(2) / 2000 == pytest.approx(math.e / (1 + math.e), abs=0.03)
    assert 0 not in found


def test_hard_negatives_spare_other_captions_of_one_picture_and_empty_texts() -> None:
    rows = hard(torch.zeros(4, 4), same=torch.tensor([7, 7, 8, 8]), usable=torch.tensor([True, True, True, False]))
    assert rows.labels.tolist() == [1, 1, 1, -100, 0, 0, 0, -100, 0, 0, 0, -100]
    assert set(rows.texts.ids[8:10, 0].tolist()) == {2}
    assert hard(torch.zeros(1, 1)).labels.tolist() == [1, -100, -100]


def test_texts_that_read_the_same_are_no_negatives() -> None:
    texts = Texts(torch.tensor([[5], [5], [6]]), torch.ones(3, 1, dtype=torch.long))
    rows = hard_rows(texts, torch.zeros(2, 3, 3), torch.ones(3).bool(), None, torch.Generator().manual_seed(0))
    assert rows.texts.ids[6:8, 0].tolist() == [6, 6]
    assert rows.image_of_row[3:5].tolist() == [2, 2]


def test_hard_matching_learns_both_kinds() -> None:
    model, batch = tiny_dual(), tiny_align_batch()
    losses = [
        alignment_losses(model, batch, negatives="hard", generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1, 2, 3)
    ]
    assert torch.equal(losses[0]["itm"], losses[1]["itm"])
    assert any(not torch.equal(losses[0]["itm"], other["itm"]) for other in losses[2:])
    assert torch.equal(losses[0]["itg"], losses[2]["itg"])
    sum(losses[0].values()).backward()
    learned = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert {"qllama.queries", "match_head.weight", "query_pool.proj.weight", "logit_scale"} <= learned
    assert "image_pool.proj.weight" not in learned


def test_features_of_a_frozen_encoder_stand_for_the_pictures() -> None:
    model, batch = tiny_dual(), tiny_align_batch()
    with torch.no_grad():
        whole = alignment_losses(model, batch)
        features = model.vision(batch.pixel_values)
        again = alignment_losses(model, batch, features=features)
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_missing_negatives_say_what_to_do() -> None:
    model, batch = tiny_dual(), replace(tiny_align_batch(), negatives=None)
    with pytest.raises(ValueError, match="the batch has no negatives; draw one text of another picture"):
        alignment_losses(model, batch)
    with pytest.raises(ValueError, match="negatives 'soft'; they are 'given' or 'hard'"):
        unchecked(alignment_losses)(model, batch, negatives="soft")
    assert DUAL["tiny-dual"].label_smoothing == 0.0


# two processes


def rows_of(batch: AlignmentBatch, index: torch.Tensor) -> AlignmentBatch:
    texts = {name: getattr(batch, name).rows(index) for name in ("contrast", "match", "caption", "negatives")}
    return replace(batch, pixel_values=batch.pixel_values[index], labels=batch.labels[index], **texts)


def losses_and_gradients(batch: AlignmentBatch) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    model = tiny_dual()
    losses = alignment_losses(model, batch)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


def _on_rank(rank: int, ranks: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    found = losses_and_gradients(rows_of(tiny_align_batch(8), torch.arange(4) + 4 * rank))
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path) -> None:
    """The mean over ranks of losses and of gradients, as data-parallel training takes it, though ranks have different
    numbers of empty texts and of caption tokens."""
    mp.start_processes(_on_rank, (2, str(tmp_path)), nprocs=2, start_method="spawn")
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    one = losses_and_gradients(tiny_align_batch(8))
    for part_of in (0, 1):
        assert ranks[0][part_of].keys() == one[part_of].keys()
        for name, expected in one[part_of].items():
            joint = (ranks[0][part_of][name] + ranks[1][part_of][name]) / 2
            assert_close(joint, expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()), msg=name)
