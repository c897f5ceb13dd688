"""Packed equals unpacked in every language family; weights are exact over ranks and micro-batches; what a run logs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny_stage import IMAGE_ID, VOCAB, sample

from internvl.batch import ChatBatch, Company
from internvl.data.collate import collate, collate_packed
from internvl.data.sample import Sample
from internvl.data.weighting import Weighting
from internvl.models.attention import _varlen, attend
from internvl.parallel import collectives
from internvl.tokens import IGNORE_INDEX
from internvl.train import log
from internvl.train.run import RunConfig
from internvl.train.settings import Schedule
from internvl.train.stages.sft import Sft
from tiny import FAMILIES, tiny_model, tiny_tokenizer

WEIGHTINGS: tuple[Weighting, ...] = ("token", "sample", "square")


def samples(count: int = 7) -> list[Sample]:
    """Records of unequal lengths and tiles, some without a picture."""
    made = []
    for index in range(count):
        ids, labels, tiles = sample(index)
        made.append(Sample(torch.tensor(ids), torch.tensor(labels), tiles, f"record {index}"))
    return made


def stage(family: str = "llama") -> Sft:
    model = tiny_model(family, vocab_size=VOCAB, image_token_id=IMAGE_ID).eval()
    return Sft(RunConfig(schedule=Schedule(steps=1)), model, tiny_tokenizer(), None, None)  # type: ignore[arg-type]


def step(sft: Sft, batches: list[ChatBatch], weight: float | None = None) -> tuple[float, torch.Tensor]:
    """Loss and gradients of micro-batches, divided by their weights together."""
    sft.model.zero_grad(set_to_none=True)
    weight = sum(sft.weights(batch)["next_token"] for batch in batches) if weight is None else weight
    total = torch.zeros(())
    for batch in batches:
        loss = sft.losses(sft.prepare(batch))["next_token"] / weight
        loss.backward()
        total += loss.detach()
    grads = [p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in sft.model.parameters()]
    return float(total), torch.cat(grads).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked(family: str) -> None:
    sft, made = stage(family), samples()
    packed = step(sft, [collate_packed(made[:4], 0, "square"), collate_packed(made[4:], 0, "square")])
    padded = step(sft, [collate(made, 0, "square")])
    alone = step(sft, [collate([one], 0, "square") for one in made])
    for other in (padded, alone):
        assert abs(packed[0] - other[0]) / other[0] < 1e-5
        assert float(torch.cosine_similarity(packed[1], other[1], dim=0)) > 0.99999
        assert float((packed[1] - other[1]).norm() / other[1].norm()) < 1e-4


def test_a_neighbour_changes_nothing() -> None:
    """What isolation means: another sample beside it leaves the loss of a sample alone."""
    sft, made = stage(), samples()
    weights = [sft.weights(collate([one], 0))["next_token"] for one in made]

    def loss_of_first(*others: Sample) -> float:
        batch = collate_packed([made[1], *others], 0)
        only = torch.arange(batch.labels.shape[1]) < len(made[1].input_ids)
        labels = torch.where(only, batch.labels, IGNORE_INDEX)
        return float(sft.losses(sft.prepare(_with(batch, labels)))["next_token"].detach()) / weights[1]

    assert loss_of_first(made[2]) == pytest.approx(loss_of_first(made[3], made[5]), rel=1e-6)


def _with(batch: ChatBatch, labels: torch.Tensor) -> ChatBatch:
    return replace(batch, labels=labels, loss_weights=batch.loss_weights * (labels != IGNORE_INDEX))


def _on_rank(rank: int, ranks: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{ranks}", rank=rank, world_size=ranks)
    sft, found = stage(), {}
    for weighting in WEIGHTINGS:
        # unequal: two micro-batches on a rank, rows of different counts; one rank may have nothing to learn
        mine = [collate_packed(group, 0, weighting) for group in deal(rank, ranks)]
        weight = torch.tensor([sum(sft.weights(batch)["next_token"] for batch in mine)], dtype=torch.float64)
        everywhere = float(collectives.total(weight))
        loss, grads = step(sft, mine, everywhere / ranks)
        # data-parallel training averages gradients over ranks
        found[weighting] = float(collectives.total(torch.tensor([loss]))) / ranks, collectives.total(grads) / ranks
    if rank == 0:
        torch.save(found, f"{folder}/found{ranks}.pt")
    dist.barrier()
    dist.destroy_process_group()


def deal(rank: int, ranks: int) -> list[list[Sample]]:
    """Seven samples in rows of 2, 1, 3 and 1, taken in turns."""
    made = samples()
    rows = [made[:2], made[2:3], made[3:6], made[6:]]
    return rows[rank::ranks]


def run_ranks(folder: str) -> None:
    """In a process that has not used autograd, so that its forks may."""
    for ranks in (1, 2, 3):
        mp.start_processes(_on_rank, (ranks, folder), nprocs=ranks, start_method="fork")


@pytest.fixture(scope="module")
def over_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    folder, here = str(tmp_path_factory.mktemp("ranks")), Path(__file__).parent
    paths = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    code = f"import test_train_packed; test_train_packed.run_ranks({folder!r})"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return {ranks: torch.load(f"{folder}/found{ranks}.pt", weights_only=True) for ranks in (1, 2, 3)}


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_weights_are_exact_over_ranks_and_micro_batches(over_ranks: dict[int, Any], weighting: Weighting) -> None:
    sft, made = stage(), samples()
    whole_loss, whole = step(sft, [collate(made, 0, weighting)])
    for ranks in (1, 2, 3):
        loss, grads = over_ranks[ranks][weighting]
        assert loss == pytest.approx(whole_loss, rel=1e-5)
        assert float((grads - whole).norm() / whole.norm()) < 1e-4


def test_rows_are_measured_in_the_log() -> None:
    sft, made = stage(), samples()
    meter = log.Meter()
    batches = [collate_packed(made[:4], 0), collate_packed(made[4:], 0)]
    lengths, tiles = [b.input_ids.numel() for b in batches], [b.num_tiles for b in batches]
    company = Company(2, sum(lengths), sum(tiles), max(lengths), max(tiles))
    for batch in batches:
        meter.add(sft.sizes(replace(batch, room=80, company=company)), 0.0)
    line = json.loads(json.dumps(meter.read()))
    assert line["fill"] == pytest.approx(sum(lengths) / 160, abs=1e-4)
    assert line["samples_per_row"] == 3.5
    assert line["tiles_per_row"] == sum(tiles) / 2
    assert line["idle_tokens"] == pytest.approx(1 - sum(lengths) / (2 * max(lengths)), abs=1e-4)
    assert line["idle_tiles"] == pytest.approx(1 - sum(tiles) / (2 * max(tiles)), abs=1e-4)
    meter.add(sft.sizes(collate(made, 0)), 0.0)
    assert "fill" not in meter.read()


def test_one_kernel_for_all_segments_gets_what_it_needs() -> None:
    """Without a GPU: shapes and arguments of torch's own kernel, checked on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 4, 10, 64, device="cuda", dtype=torch.bfloat16)
        k = torch.empty(1, 2, 10, 64, device="cuda", dtype=torch.bfloat16)
        out = _varlen(q, k, k, [0, 4, 10], True, None)
    assert out.shape == q.shape


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_one_kernel_equals_segment_by_segment() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    q, k, v = (
        torch.randn(1, h, 300, 64, device="cuda", generator=generator).bfloat16().requires_grad_() for h in (4, 2, 2)
    )
    bounds = torch.tensor([0, 7, 130, 300], dtype=torch.int32)
    out = attend(q, k, v, causal=True, segments=bounds)
    parts = [attend(*(x[:, :, a:b] for x in (q, k, v)), causal=True) for a, b in ((0, 7), (7, 130), (130, 300))]
    expected = torch.cat(parts, 2)
    torch.testing.assert_close(out, expected, atol=2e-2, rtol=2e-2)
    for a, b in zip(
        torch.autograd.grad(out.float().square().sum(), [q, k, v]),
        torch.autograd.grad(expected.float().square().sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-1, rtol=5e-2)
