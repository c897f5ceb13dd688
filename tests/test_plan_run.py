"""internvl plan RECIPE: rehearsed memory against the allocator, operations against torch's count, sizes, steps."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

from internvl.cli import main
from internvl.data.loader import BatchSize
from internvl.models.build import build
from internvl.plan_run import _steps, changes, more_gpus, plan_run, subject
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import cost, log
from internvl.train.dry import write_model, write_records
from internvl.train.loop import Trainer, train
from internvl.train.recipes.tiny import byte_tokenizer
from internvl.train.rehearse import rehearse
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule, Tokens
from internvl.train.stages import open_stage
from internvl.train.stages.sft import LOSS, Sft
from internvl.zoo import CHAT, RELEASED
from tiny import tiny_chat_config

FULL: dict[str, Any] = {"vision": Part("full"), "connector": Part("full"), "language": Part("full")}


def benchmark() -> ModuleType:
    """benchmarks/plan.py, which measures."""
    path = Path(__file__).parents[1] / "benchmarks" / "plan.py"
    spec = importlib.util.spec_from_file_location("plan_benchmark", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


MEASURES = benchmark()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plan")
    write_model(folder / "model", tiny_chat_config())
    write_records(folder / "records" / "records.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _here(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INTERNVL_CACHE", str(inputs / "cache"))
    monkeypatch.setattr(log, "draw_curve", lambda *_: None)


def run_of(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    data = Data(
        meta=str(inputs / "records" / "records.jsonl"), batch_samples=2, grouped=True, max_tiles=6, max_length=2048
    )
    settings: dict[str, Any] = {"schedule": Schedule(steps=3), "save_every": 0, "log_every": 1, "device": "cpu"}
    settings["optimiser"] = Optimiser(peak_lr=1e-3)
    return RunConfig(**{"out": str(out), "model": str(inputs / "model"), "data": data, **FULL, **settings, **changes})


# memory


@pytest.mark.parametrize("name", ["full", "full, bf16, checkpointing, two micro-batches", "adapters", "connector"])
def test_rehearsed_memory_is_that_of_the_allocator(name: str) -> None:
    config = MEASURES.grown(tiny_chat_config())
    packed = name == "connector"
    batch = MEASURES.batch_of(config, 4, 60, 4, 20, packed)
    planned, found = MEASURES.compare(config, batch, packed, **MEASURES.CASES[name])
    assert planned == pytest.approx(found, rel=0.05)


def test_parts_of_the_memory() -> None:
    config, run = MEASURES.grown(tiny_chat_config()), RunConfig(schedule=Schedule(steps=1), **FULL)
    batch = MEASURES.batch_of(config, 2, 30, 1, 10)
    memory = rehearse(run, config, byte_tokenizer(), batch)
    assert memory.learned == config.num_parameters
    assert memory.gradients == 4 * memory.learned
    assert memory.optimiser == 8 * memory.learned
    assert 4 * memory.learned <= memory.parameters < 4 * memory.learned + 4096  # rotary frequencies beside
    assert memory.activations > 0
    frozen = replace(run, precision="bf16", vision=Part(), language=Part("lora", rank=4))
    less = rehearse(frozen, config, byte_tokenizer(), batch)
    assert less.parameters < 0.7 * memory.parameters
    assert less.optimiser == 8 * less.learned < 0.2 * memory.optimiser
    longer = MEASURES.batch_of(config, 2, 90, 1, 80)
    assert rehearse(run, config, byte_tokenizer(), longer).peak > memory.peak
    on_four = memory.on_gpus(4)
    held = memory.parameters + memory.optimiser + memory.peak_gradients
    assert on_four - 2 * memory.largest_unit - memory.activations == -(-held // 4)
    assert memory.on_gpus(1) == memory.peak


@pytest.mark.parametrize("shape", ["tiny-llama", "tiny-1.0-qllama"])
def test_features_that_are_kept_need_no_vision_pass(shape: str) -> None:
    config = MEASURES.grown(CHAT[shape])
    vision = replace(config.vision, mlp_width=4096)
    queries = None if config.queries is None else replace(config.queries, vision=vision)
    config = replace(config, vision=vision, queries=queries)
    run = RunConfig(schedule=Schedule(steps=1), connector=Part("full"))
    batch = MEASURES.batch_of(config, 4, 30, 8, 10)
    kept = replace(run, data=replace(run.data, features="memory", augment="off"))
    tokenizer = byte_tokenizer()
    assert rehearse(kept, config, tokenizer, batch).peak < rehearse(run, config, tokenizer, batch).peak


@pytest.mark.parametrize("release", ["InternVL2_5-1B", "Mini-InternVL-Chat-4B-V1-5"])
def test_a_release_is_rehearsed_without_memory(release: str) -> None:
    """LongRoPE and dynamic rotary angles choose by values, which a rehearsal has not."""
    config = RELEASED[release].config
    few = replace(config.language, settings={**config.language.settings, "num_hidden_layers": 2})
    config = MEASURES.grown(replace(config, language=few, vision=replace(config.vision, depth=2)))
    run = RunConfig(schedule=Schedule(steps=1), precision="bf16", grad_checkpoint=True, **FULL)
    memory = rehearse(run, config, byte_tokenizer(), MEASURES.batch_of(config, 1, 500, 4, 100))
    assert memory.learned == config.num_parameters
    assert memory.peak > 16 * memory.learned  # fp32 weights, two moments, gradients at the end


# operations


@pytest.mark.parametrize(
    ("learning", "shape"),
    [
        (FULL, ""),
        ({**FULL, "grad_checkpoint": True}, ""),
        ({"connector": Part("full"), "tokens": Tokens(learn=True)}, ""),
        ({**FULL, "vision": Part("full", layers_from=-1)}, ""),
        ({"language": Part("full")}, ""),
        ({"connector": Part("full")}, "1.0"),
        ({"connector": Part("full"), "language": Part("full")}, "1.0"),
    ],
)
def test_operations_are_those_that_torch_counts(learning: dict[str, Any], shape: str) -> None:
    config = MEASURES.grown(CHAT["tiny-1.0-qllama"] if shape == "1.0" else tiny_chat_config())
    run = RunConfig(schedule=Schedule(steps=1), device="cpu", **learning)
    batch = MEASURES.batch_of(config, 2, 50, 2, 20)
    model = build(config)
    model.image_token_id = token_id(byte_tokenizer(), SPECIAL_TOKENS[2])
    stage = Sft(run, model, byte_tokenizer(), None, None)  # type: ignore[arg-type]
    stage.begin(run, torch.device("cpu")).train_mode()
    prepared = stage.prepare(batch)
    with FlopCounterMode(display=False) as counter:
        stage.losses(prepared)[LOSS].backward()
    length = batch.input_ids.shape[1]
    # torch counts neither fused attention on a CPU nor products in place (the head's gradient): squares are 0
    size = BatchSize(2, 2 * length, 2 * length, 0, 4)
    assert cost.operations(run, config, size, 40) == pytest.approx(counter.get_total_flops(), rel=0.06)
    more = cost.operations(run, config, size._replace(squares=length**2), 40) - cost.operations(run, config, size, 40)
    passes = 4 if run.grad_checkpoint else 3 if run.language.learn == "full" else 2
    language = config.language  # two products over half a square, in every layer
    assert more == passes * language.depth * 2 * length**2 * language.heads * language.head_width


# sizes, steps, idle devices


@pytest.mark.parametrize("packed", [False, True])
def test_sizes_are_those_of_the_batches(inputs: Path, tmp_path: Path, packed: bool) -> None:
    run = run_of(inputs, tmp_path)
    samples = None if packed else 3
    run = replace(
        run, data=replace(run.data, packed=packed, batch_samples=samples, batch_tokens=700 if packed else None)
    )
    stage = open_stage(run)
    assert isinstance(stage, Sft)
    sizes = stage.loader.sizes()
    before = stage.cursor()
    for number, size in enumerate(sizes):
        batch = stage.loader.make(number)
        found = stage.sizes(batch)
        assert (size.samples, size.tokens, size.tiles) == (found["samples"], found["tokens"], found["tiles"])
        assert size.positions == batch.input_ids.numel()
        if batch.segments is not None:
            assert size.squares == int((batch.segments.diff().long() ** 2).sum())
        else:
            assert size.squares == batch.input_ids.shape[0] * batch.input_ids.shape[1] ** 2
    assert stage.cursor() == before
    assert len(sizes) == stage.batches_per_epoch()


def test_idle_share_by_hand() -> None:
    assert list(_steps([1, 2, 3, 4, 5], 4, 2)) == [[4, 6], [5, 0]]
    assert list(_steps([1, 2, 3], 1, 1)) == [[1], [2], [3]]


def test_the_plan_of_a_run(inputs: Path, tmp_path: Path) -> None:
    about = subject(run_of(inputs, tmp_path))
    one, two = plan_run(about, 1, "cpu"), plan_run(about, 2, "cpu")
    assert about.notes == ()
    assert (one.samples, one.steps, one.steps_per_epoch) == (8, 3, 4)
    assert (two.steps_per_epoch, one.idle) == (2, 0.0)
    assert 0 < two.idle < 0.5
    assert two.tokens == one.tokens <= one.positions
    assert one.operations == pytest.approx(one.slowest)
    assert two.operations == pytest.approx(two.slowest * 2 * (1 - two.idle))
    assert one.seconds(one.slowest) == pytest.approx(3 / 4)
    assert one.worst.positions == max(size.positions for size in open_stage(about.run).loader.sizes())  # type: ignore[attr-defined]
    epochs = replace(about.run, schedule=Schedule(epochs=2), accumulate=2)
    assert plan_run(replace(about, run=epochs), 1, "cpu").steps == 4
    with pytest.raises(ValueError, match="0 GPUs"):
        plan_run(about, 0)


def test_changes_make_it_fit_and_the_cheapest_come_first(inputs: Path, tmp_path: Path) -> None:
    about = subject(run_of(inputs, tmp_path))
    plan = plan_run(about, 1, "cpu")
    limit = round(0.8 * plan.memory.peak)
    found = changes(about, limit, device="cpu")
    assert len(found) == 3
    assert all(change.need <= limit < plan.memory.peak for change in found)
    assert found[0].words == "micro-batches of half, accumulate 2"
    assert found[0].price == "the same learning"
    small = replace(about.run, precision="bf16", grad_checkpoint=True, vision=Part(), language=Part())
    small = replace(small, data=replace(small.data, batch_samples=1, max_tiles=1))
    assert changes(replace(about, run=small), 1000, device="cpu") == []
    more = more_gpus(plan.memory, round(0.95 * plan.memory.peak), 1)
    assert more is None or more.need <= 0.95 * plan.memory.peak


# the command


def test_the_command(inputs: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["plan", "tiny_sft", "--gpus", "2", "--json", "--rate", "0.001"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["epoch"]["samples"], found["steps"], found["learned"]) == (36, 60, found["parameters"])
    assert found["seconds"] > 0
    assert main([*words[:2], "--memory", "0.0065"]) == 1
    shown = capsys.readouterr().out
    assert "does not fit" in shown
    assert "the same learning" in shown
    records = str(inputs / "records" / "records.jsonl")
    assert main([*words, "--data", records, "--set", "data.max-tiles=1", "data.batch-samples=2"]) == 0
    fewer = json.loads(capsys.readouterr().out)
    assert (fewer["epoch"]["samples"], fewer["worst"]["samples"]) == (8, 2)
    assert main(["plan", "tiny_sft", "--calibrate", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rate"] > 1e6
    assert main(["plan", "tiny_sft", "--set", "x"]) == 1
    assert "write FIELD=VALUE" in capsys.readouterr().err


def test_a_release_without_its_files_says_what_it_assumed(inputs: Path) -> None:
    from internvl.train.recipes import RECIPES

    run = RECIPES["v2_5_finetune_lora_1b"].make()
    about = subject(replace(run, data=replace(run.data, meta="x")), "InternVL2_5-1B")
    assert "a position a byte" in about.notes[0]
    assert about.config.vision == RELEASED["InternVL2_5-1B"].config.vision
    with pytest.raises(ValueError, match="stage 'preference'; `internvl plan` knows runs of the stages sft, align"):
        subject(replace(run, stage="preference"))


# the worst micro-batch first


def test_the_worst_first_changes_nothing(inputs: Path, tmp_path: Path) -> None:
    """Drop path and adapter dropout draw numbers; gradients accumulate."""
    parts = {"vision": Part("full", drop_path=0.5), "connector": Part("full"), "language": Part("lora", dropout=0.5)}
    plain = run_of(inputs, tmp_path / "plain", accumulate=2, **parts)
    first = replace(plain, out=str(tmp_path / "first"), data=replace(plain.data, worst_first=True))
    seen: list[int] = []
    for run in (plain, first):
        stage = open_stage(run)
        inner = stage.losses

        def losses(prepared: Any, inner: Any = inner) -> Any:
            seen.append(prepared.batch.input_ids.numel())
            return inner(prepared)

        stage.losses = losses  # type: ignore[method-assign]
        train(run, stage)
    assert len(seen) == 6 + 8
    assert seen[6] == seen[7] == max(seen)
    ends = [
        load_file(Path(run.out) / "checkpoints" / "step-00000003" / "learned.safetensors") for run in (plain, first)
    ]
    for name, value in ends[0].items():
        assert torch.equal(value, ends[1][name]), name


def test_out_of_memory_shows_at_once(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of(inputs, tmp_path)
    run = replace(run, data=replace(run.data, worst_first=True))
    stage = open_stage(run)

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Trainer, "_backward", full)
    with pytest.raises(ValueError, match=r"largest micro-batch of the epoch \(\d+ tokens and \d+ tiles in 2 samples\)"):
        train(run, stage)
