"""internvl plan for all stages but sft: against the allocator, torch's count of operations, the batches of the run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internvl.cli import main
from internvl.load_dual import load_dual
from internvl.plan_run import calibrate, changes, open_outlook, plan_run, subject
from internvl.train import cost, trials
from internvl.train.dry import write_model, write_records
from internvl.train.outlook_pairs import PairOutlook
from internvl.train.outlook_texts import TextOutlook
from internvl.train.recipes import tiny_text, v1_0
from internvl.train.rehearse_others import rehearse_pairs, rehearse_text
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Distill, Pairs, Part, Schedule, Text
from internvl.train.stages import open_stage
from test_plan_run import MEASURES
from tiny import tiny_chat_config


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan-stages")
    v1_0.write_tiny_model(folder / "dual")
    v1_0.write_tiny_pairs(folder / "pairs.jsonl")
    write_model(folder / "chat", tiny_chat_config())
    write_records(folder / "records" / "records.jsonl")
    tiny_text.write_tiny_teacher(folder / "teacher")
    tiny_text.write_tiny_texts(folder / "texts.jsonl")
    return folder


def of_pairs(inputs: Path, stage: str = "contrastive", **changes: Any) -> RunConfig:
    run = v1_0.tiny_contrastive() if stage == "contrastive" else v1_0.tiny_generative()
    data = Data(meta=str(inputs / "pairs.jsonl"), batch_samples=16)
    base: dict[str, Any] = {"model": str(inputs / "dual"), "data": data, "device": "cpu", "stage": stage}
    return replace(run, **{**base, "pairs": Pairs(), **changes})


def of_pictures(inputs: Path, stage: str, **changes: Any) -> RunConfig:
    data = Data(meta=str(inputs / "records" / "records.jsonl"), batch_samples=6, max_tiles=4, augment="off")
    parts = {"vision": Part("full")} if stage == "distill" else {"vision": Part("full"), "connector": Part("full")}
    distill = Distill("tiny-6b-llama", layers=2, relation=1.0)
    base: dict[str, Any] = {"stage": stage, "model": str(inputs / "chat"), "data": data, "distill": distill}
    return RunConfig(**{**base, "schedule": Schedule(steps=3), "device": "cpu", **parts, **changes})


def of_texts(inputs: Path, **changes: Any) -> RunConfig:
    data = Data(meta=str(inputs / "texts.jsonl"), batch_samples=20)
    base: dict[str, Any] = {"model": str(inputs / "dual"), "data": data, "text": Text(str(inputs / "teacher"))}
    return replace(tiny_text.tiny_text(), **{**base, "device": "cpu", "out": str(inputs / "run"), **changes})


WHOLE = {"vision": Part("full"), "connector": Part("full"), "language": Part("full")}
PAIR_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "contrastive": ("contrastive", {}),
    "masked, in pieces": ("contrastive", {"pairs": Pairs(micro_batch=4, mask_share=0.5)}),
    "frozen, bf16, recomputed": ("contrastive", {"vision": Part(), "precision": "bf16", "grad_checkpoint": True}),
    "generative": ("generative", {}),
    "hard, in pieces": ("generative", {"pairs": Pairs(negatives="hard", micro_batch=4)}),
    "retrieval": ("generative", {**WHOLE, "pairs": Pairs(losses="retrieval")}),
    "retrieval, hard, in pieces, bf16": (
        "generative",
        {**WHOLE, "precision": "bf16", "pairs": Pairs(losses="retrieval", negatives="hard", micro_batch=4)},
    ),
}


@pytest.mark.parametrize("name", PAIR_CASES)
def test_rehearsed_memory_of_pairs_is_that_of_the_allocator(inputs: Path, name: str) -> None:
    stage, changes = PAIR_CASES[name]
    run = of_pairs(inputs, stage, **changes)
    found, _, batch = MEASURES.measured_stage(run)
    planned = rehearse_pairs(run, load_dual(run.model).config, batch, batch.pixels.shape[-1], "cpu")
    if found < 0.9 * planned.peak:  # the profiler now and then misses allocations
        found = max(found, MEASURES.measured_stage(run)[0])
    assert planned.peak == pytest.approx(found, rel=0.1)


TEXT_CASES: dict[str, dict[str, Any]] = {
    "texts": {},
    "in pieces, bf16": {"pairs": Pairs(micro_batch=6), "precision": "bf16"},
    "adapters, recomputed, two batches": {"language": Part("lora"), "grad_checkpoint": True, "accumulate": 2},
    "projection alone": {"language": Part(), "text": Text(cosine=0.0)},
}


@pytest.mark.parametrize("name", TEXT_CASES)
def test_rehearsed_memory_of_texts(inputs: Path, name: str) -> None:
    run = of_texts(inputs, **TEXT_CASES[name])
    run = replace(run, text=replace(run.text, teacher=str(inputs / "teacher")))
    found, stage, batch = MEASURES.measured_stage(run)
    planned = rehearse_text(run, stage.model.config, batch, len(stage.loader.english), "cpu")
    if found < 0.9 * planned.peak:  # the profiler now and then misses allocations
        found = max(found, MEASURES.measured_stage(run)[0])
    assert planned.peak == pytest.approx(found, rel=0.1)
    assert planned.learned == sum(p.numel() for p in stage.model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "changes", [{}, {"pairs": Pairs(micro_batch=6)}, {"grad_checkpoint": True}, {"language": Part()}]
)
def test_operations_of_texts_are_those_that_torch_counts(inputs: Path, changes: dict[str, Any]) -> None:
    run = of_texts(inputs, **changes)
    stage: Any = open_stage(run)
    stage.begin(run, torch.device("cpu")).train_mode()
    batch = next(stage.batches())
    with FlopCounterMode(display=False) as counter:
        sum(stage.losses(batch).values()).backward()
    outlook = open_outlook(subject(run))
    assert outlook.work()[0] == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_plan_of_texts_is_made_of_the_batches_of_the_run(inputs: Path) -> None:
    """One text is much longer; its batch is the worst, and its half of it where two devices share it."""
    lines = (inputs / "texts.jsonl").read_text().splitlines(keepends=True)
    (inputs / "long.jsonl").write_text("".join([*lines, json.dumps({"caption": "red beside blue, " * 4}) + "\n"]))
    run = of_texts(inputs, data=Data(meta=str(inputs / "long.jsonl"), batch_samples=20))
    about = subject(run)
    outlook = open_outlook(about)
    assert isinstance(outlook, TextOutlook)
    stage: Any = open_stage(run)
    batches = [batch for _, batch in zip(range(4), stage.batches(), strict=False)]
    sizes = outlook.sizes()
    assert [size.tokens for size in sizes] == [stage.sizes(batch)["tokens"] for batch in batches]
    seen: list[int] = []
    inner = stage.model.encode_text

    def counted(ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        seen.append(ids.numel())
        said: torch.Tensor = inner(ids, mask)
        return said

    stage.model.encode_text = counted
    for size, batch in zip(sizes, batches, strict=True):
        seen.clear()
        stage.vectors(batch)
        assert sum(seen) == size.positions
    one, two = plan_run(about, 1, "cpu"), plan_run(about, 2, "cpu")
    longest = max(range(4), key=lambda n: batches[n].texts.ids.shape[1])
    assert one.worst == sizes[longest]
    assert (two.worst.samples, one.tiles, one.steps_per_epoch) == (10, 0, 4)
    assert two.worst.positions < one.worst.positions
    assert two.memory.activations < one.memory.activations
    with pytest.raises(ValueError, match="20 texts a step, which 3 GPUs cannot share evenly"):
        plan_run(about, 3, "cpu")
    found = changes(about, round(0.95 * one.memory.peak), device="cpu")
    assert found[0].words.startswith("--pairs.micro-batch ")
    assert not any("accumulate" in change.words or "max-tiles" in change.words for change in found)


@pytest.mark.parametrize("student", ["chat", "dual"])
@pytest.mark.parametrize("features", ["none", "memory"])
def test_planned_memory_of_distillation(inputs: Path, student: str, features: Any) -> None:
    """A chat model cuts pictures into tiles, InternVL-G sees each as one."""
    distill = Distill("tiny-6b-llama", layers=2, relation=1.0, features=features)
    run = of_pictures(inputs, "distill", model=str(inputs / student), distill=distill)
    found, stage, batch = MEASURES.measured_stage(run)
    plan = plan_run(subject(run), 1, "cpu")
    assert plan.memory.peak == pytest.approx(found, rel=0.1)
    assert plan.memory.learned == sum(p.numel() for p in stage.model.vision.parameters()) + sum(
        p.numel() for behind in stage.projections for p in behind.parameters()
    )
    assert (plan.worst.tiles, plan.samples, plan.micro_batches) == (len(batch.tiles), 6, 1)
    assert plan.tokens == len(batch.tiles) * stage.model.config.vision.num_positions
    assert calibrate(subject(run)) > 1e6


@pytest.mark.parametrize("vision", ["full", "frozen"])
def test_planned_memory_of_alignment(inputs: Path, vision: Any) -> None:
    """By way of the whole plan: tokens that are looked at are counted from the regions alone."""
    run = of_pictures(inputs, "align", vision=Part(vision))
    found, _, batch = MEASURES.measured_stage(run)
    plan = plan_run(subject(run), 1, "cpu")
    assert plan.memory.peak == pytest.approx(found, rel=0.1)
    assert plan.worst_learned == len(batch.tokens)
    assert (plan.worst.tiles, plan.samples, plan.micro_batches) == (6, 6, 1)


@pytest.mark.parametrize("stage", ["align", "distill"])
def test_pictures_are_planned_in_the_order_of_the_stage(inputs: Path, stage: str) -> None:
    """Sets that are repeated too, where the stage repeats them."""
    run = of_pictures(inputs, stage, schedule=Schedule(epochs=1))
    meta = inputs / "thrice.json"
    root = str(Path(run.data.meta).parent)
    meta.write_text(json.dumps({"thrice": {"annotation": run.data.meta, "root": root, "repeat_time": 3}}))
    run = replace(run, data=replace(run.data, meta=str(meta)))
    opened: Any = open_stage(run)
    outlook: Any = open_outlook(subject(run))
    assert [number for batch in outlook.batches() for number in batch] == opened.order(0)[: 6 * len(outlook.batches())]
    assert len(outlook.batches()) == opened.batches_per_epoch()
    assert max(map(opened.order(0).count, range(opened.num_pictures()))) == (3 if stage == "align" else 1)


def test_the_worst_part_of_a_batch_is_planned(inputs: Path) -> None:
    """One caption is much longer: the plan knows it without a picture."""
    lines = (inputs / "pairs.jsonl").read_text().splitlines(keepends=True)
    long = json.loads(lines[3]) | {"caption": "red beside blue, " * 4}
    path = inputs / "long.jsonl"
    path.write_text("".join([*lines[:3], json.dumps(long) + "\n", *lines[4:]]))
    run = of_pairs(inputs, data=Data(meta=str(path), batch_samples=10))
    about = subject(run)
    plan, usual = (
        plan_run(about, 1, "cpu"),
        plan_run(subject(of_pairs(inputs, data=replace(run.data, meta=str(inputs / "pairs.jsonl")))), 1, "cpu"),
    )
    outlook = open_outlook(about)
    assert isinstance(outlook, PairOutlook)
    assert plan.worst.positions == 10 * outlook.lengths[3, 0] > usual.worst.positions
    assert plan.memory.peak > usual.memory.peak
    stage: Any = open_stage(run)
    seen = [batch.contrast.ids.numel() for _, batch in zip(range(3), stage.batches(), strict=False)]
    assert [size.positions for size in outlook.sizes()] == seen


def test_retrieval_is_planned_without_captions_and_by_clean_texts(inputs: Path) -> None:
    lines = [json.loads(line) for line in (inputs / "pairs.jsonl").read_text().splitlines()]
    loud = [line | {"caption": line["caption"] + " !" * 15} for line in lines]
    (inputs / "loud.jsonl").write_text("".join(json.dumps(line) + "\n" for line in loud))
    base = of_pairs(inputs, "generative", data=Data(meta=str(inputs / "loud.jsonl"), batch_samples=16), **WHOLE)
    run = replace(base, pairs=Pairs(losses="retrieval"))
    plan, other = plan_run(subject(run), 1, "cpu"), plan_run(subject(base), 1, "cpu")
    stage: Any = open_stage(run)
    batch = next(stage.batches())
    outlook = open_outlook(subject(run))
    assert isinstance(outlook, PairOutlook)
    assert outlook.sizes()[0].tokens == int(batch.contrast.mask.sum() + batch.match.mask.sum())
    assert plan.worst_learned == int(outlook.parts[0][:, 0].sum())
    assert plan.tokens < other.tokens / 2
    learner = stage.begin(run, torch.device("cpu"))
    assert plan.memory.learned == sum(p.numel() for p in learner.parameters.values()) > 0
    assert other.memory.learned != plan.memory.learned


def test_pairs_are_shared_by_the_gpus(inputs: Path) -> None:
    about = subject(of_pairs(inputs))
    one, two = plan_run(about, 1, "cpu"), plan_run(about, 2, "cpu")
    assert (one.steps_per_epoch, two.steps_per_epoch) == (2, 2)
    assert (one.worst.samples, two.worst.samples, two.idle) == (16, 8, 0.0)
    assert two.slowest == pytest.approx(one.slowest / 2, rel=0.1)
    assert two.memory.activations < 0.7 * one.memory.activations
    with pytest.raises(ValueError, match="16 pairs a step, which 3 GPUs cannot share evenly"):
        plan_run(about, 3, "cpu")
    found = changes(about, round(0.9 * one.memory.peak), device="cpu")
    assert found[0].words.startswith("--pairs.micro-batch ")
    assert found[0].price == "the same learning, one more forward pass"


@pytest.mark.parametrize("name", [name for name in PAIR_CASES if "recomputed" not in name])
def test_operations_of_pairs_are_those_that_torch_counts(inputs: Path, name: str) -> None:
    stage_name, changes = PAIR_CASES[name]
    run = of_pairs(inputs, stage_name, **changes)
    stage: Any = open_stage(run)
    stage.begin(run, torch.device("cpu")).train_mode()
    batch = next(stage.batches())
    with FlopCounterMode(display=False) as counter:
        sum(stage.losses(batch).values()).backward()
    settings, whole = stage.loader.encoder.settings, stage_name == "generative"
    captions = whole and run.pairs.losses == "all"
    others = (batch.match.ids.numel() if whole else 0, batch.caption.ids.numel() if captions else 0)
    learned = int((batch.labels != -100).sum()) if captions else 0
    shown = (settings.num_patches + 1, settings.num_kept + 1)
    size = cost.PairSize(16, *shown, batch.contrast.ids.numel(), *others, learned)
    assert cost.pair_operations(run, stage.model.config, size, 16) == pytest.approx(counter.get_total_flops(), rel=0.1)


def test_the_command(inputs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "tiny_contrastive", "--gpus", "2", "--json", "--rate", "0.001"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epoch"]["samples"], found["steps"], found["worst"]["samples"]) == (30, 60, 15)
    assert found["seconds"] > 0
    records = ["--data", str(inputs / "pairs.jsonl")]
    assert main(["plan", "v1_0_generative", *records, "--set", "data.batch-samples=32", "--gpus", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"] == 13_834_975_747
    assert found["learned"] == 1_010_334_467
    assert main(["plan", "tiny_text", "--calibrate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epoch"]["samples"], found["epoch"]["tiles"], found["worst"]["samples"]) == (60, 0, 15)
    assert found["rate"] > 1e6
    assert found["seconds"] == pytest.approx(found["epoch"]["operations"] / found["rate"] * found["steps"] / 4)


@pytest.mark.parametrize("stage", ["contrastive", "generative", "text", "distill", "align"])
def test_every_stage_is_timed_on_what_it_does(inputs: Path, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rate is operations over seconds: against torch's count of the pass that is timed."""
    if stage == "text":
        run = of_texts(inputs)
    elif stage in ("contrastive", "generative"):
        run = of_pairs(inputs, stage, pairs=Pairs(micro_batch=4))
    else:
        run = of_pictures(inputs, stage, distill=Distill("tiny-6b-llama", features="none"))
    about = subject(run)
    losses, operations = open_outlook(about).trial(torch.device("cpu"))
    with FlopCounterMode(display=False) as counter:
        sum(losses().values()).backward()  # type: ignore[union-attr]
    assert operations == pytest.approx(counter.get_total_flops(), rel=0.15)
    assert calibrate(about) > 1e6
    monkeypatch.setattr(trials, "LARGEST", about.config.num_parameters - 1)
    with pytest.raises(ValueError, match="billion parameters is not built to be timed; give --rate"):
        calibrate(about)
