"""Laws of ranks for the stages of dual models: sharded = single, resumed on another number of ranks, 0-dim on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
from forked import run_ranks
from safetensors.torch import load_file
from test_ranks import close, saved

from internvl.train.log import read_metrics

KINDS = ("contrastive", "generative", "retrieval", "text")
COPIES = tuple((kind, *sizes) for kind in KINDS for sizes in ((1, 2), (2, 1)))
FIELDS = ("loss", "grad_norm", "loss_neighbours", "held_out_loss", "held_out_itm", "held_out_itc", "held_out_cosine")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by one and two processes, and by others going on from step 2; each job's law is in pair_jobs.py."""
    out = tmp_path_factory.mktemp("pair-ranks")
    (out / "copies.txt").write_text("".join(f"{kind} {before} {now}\n" for kind, before, now in COPIES))
    jobs = ["1:inputs", "1:run_all", "2:run_all", "1:copy", "1:run_copies", "2:run_copies", "2:refused"]
    run_ranks("pair_jobs", out, *jobs, limit_s=600)
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_sharded_equals_single(folder: Path, kind: str) -> None:
    one, two = folder / f"{kind}-1", folder / f"{kind}-2"
    lines = [read_metrics(path / "metrics.jsonl") for path in (one, two)]
    assert len(lines[0]) == 5
    for a, b in zip(*lines, strict=True):
        for field in (a.keys() | b.keys()) & set(FIELDS):
            assert b[field] == pytest.approx(a[field], rel=1e-5), (a["step"], field)
    close(saved(one), saved(two))


@pytest.mark.parametrize("kind", ["contrastive", "generative", "retrieval"])
def test_the_scale_learns_and_has_no_dimension_on_disk(folder: Path, kind: str) -> None:
    one, two = folder / f"{kind}-1", folder / f"{kind}-2"
    scale = saved(two)["logit_scale"]
    assert float(scale) != pytest.approx(float(saved(two, 2)["logit_scale"]), abs=1e-4)
    whole = load_file(one / "checkpoints" / "step-00000004" / "learned.safetensors")
    assert whole["logit_scale"].ndim == 0


def test_a_pair_that_cannot_be_used_is_named(folder: Path) -> None:
    """All pairs come once in four steps; so the law above holds with one that another stands in for."""
    assert "gone.png" in (folder / "contrastive-1" / "skipped.txt").read_text()


@pytest.mark.parametrize(("kind", "before", "now"), COPIES)
def test_another_number_of_ranks_goes_on(folder: Path, kind: str, before: int, now: int) -> None:
    close(saved(folder / f"{kind}-1"), saved(folder / f"{kind}-{before}-to-{now}"))
