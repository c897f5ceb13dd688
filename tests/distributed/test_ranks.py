"""Laws of ranks, over gloo: sharded = single, whatever each rank sees; resumed on another number of ranks; no hang."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from forked import run_ranks

from internvl.train import tensors
from internvl.train.log import read_metrics

COPIES = (("full", 1, 2), ("full", 2, 1), ("full", 2, 2), ("full", 4, 2), ("lora", 1, 2), ("lora", 2, 1))
"""Runs that go on from step 2 of another: kind, ranks that wrote it, ranks that go on."""

FIELDS = ("loss", "grad_norm", "held_out_loss")


def saved(out: Path, step: int = 4, kind: str = "learned") -> dict[str, torch.Tensor]:
    """Tensors of a checkpoint of any number of ranks, whole."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    path = out / "checkpoints" / f"step-{step:08d}"
    names = tensors.names(path, kind)
    assert names
    if (path / tensors.SHARDS).is_dir():
        sizes = HuggingFaceStorageReader(str(path / tensors.SHARDS)).read_metadata().state_dict_metadata
        whole = {name: torch.zeros(sizes[f"{kind}/{name}"].size) for name in names}  # type: ignore[union-attr]
        tensors.read(path, kind, whole)
        return whole
    from safetensors.torch import load_file

    return load_file(path / f"{kind}.safetensors")


def close(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor], atol: float = 1e-6) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        torch.testing.assert_close(b[name].view_as(value), value, rtol=0, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs by one, two and four processes, and by others going on from them; each job's law is in jobs.py."""
    out = tmp_path_factory.mktemp("ranks")
    (out / "copies.txt").write_text("".join(f"{kind} {before} {now}\n" for kind, before, now in COPIES))
    jobs = ["1:run_all", "2:run_all", "4:run_all", "1:copy", "1:run_copies", "2:run_copies"]
    jobs += ["2:gathers", "2:joint", "2:stop", "2:not_finite", "2:hang=75"]
    (out / "output.txt").write_text(run_ranks("jobs", out, *jobs))
    return out


@pytest.mark.parametrize(("kind", "size"), [("full", 2), ("full", 4), ("lora", 2)])
def test_sharded_equals_single_whatever_each_rank_sees(folder: Path, kind: str, size: int) -> None:
    one, many = folder / f"{kind}-1", folder / f"{kind}-{size}"
    for a, b in zip(read_metrics(one / "metrics.jsonl"), read_metrics(many / "metrics.jsonl"), strict=True):
        assert [field in a for field in FIELDS] == [field in b for field in FIELDS]
        for field in a.keys() & set(FIELDS):
            assert b[field] == pytest.approx(a[field], rel=1e-5), (a["step"], field)
    close(saved(one), saved(many))
    if kind == "full":
        close(saved(one, kind="ema"), saved(many, kind="ema"))
    assert not (one / "checkpoints" / "step-00000004" / "shards").exists()


@pytest.mark.parametrize(("kind", "before", "now"), COPIES)
def test_another_number_of_ranks_goes_on(folder: Path, kind: str, before: int, now: int) -> None:
    whole, copy = folder / f"{kind}-1", folder / f"{kind}-{before}-to-{now}"
    close(saved(whole), saved(copy))
    if before == now:  # to the bit
        close(saved(folder / f"{kind}-{now}"), saved(copy), atol=0)
        close(saved(folder / f"{kind}-{now}", kind="optimizer"), saved(copy, kind="optimizer"), atol=0)


def test_a_stage_that_deals_for_itself(folder: Path) -> None:
    close(saved(folder / "full-2"), saved(folder / "joint"), atol=0)


def test_ranks_stop_together(folder: Path) -> None:
    assert (folder / "stopped" / "checkpoints" / "latest").read_text() == "step-00000002\n"


def test_a_rank_that_hangs_is_named_by_all(folder: Path) -> None:
    output = (folder / "output.txt").read_text()
    for rank in (0, 1):
        text = (folder / "stuck" / f"stuck-{rank}.txt").read_text()
        assert f"rank {rank} of 2: step 2 has not ended in 3 s" in text
        assert f"rank {rank} of 2: step 2" in output
    assert "sleep(3600)" in (folder / "stuck" / "stuck-0.txt").read_text()
    assert "samples before" in output
