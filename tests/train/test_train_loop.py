"""Laws of the loop: resumed = uninterrupted to the bit, k x b = batch k*b, what is frozen stays."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken import break_off
from safetensors.torch import load_file
from tiny_stage import Records, collate, tiny_run, tiny_stage

from internvl.train.checkpoint import check_folder
from internvl.train.log import read_metrics
from internvl.train.loop import Trainer, train
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Optimiser, Part, Schedule, Tokens


def weights(out: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "learned.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("kind", ["full", "lora", "rows"])
def test_resumed_equals_uninterrupted_to_the_bit(tmp_path: Path, kind: str) -> None:
    changes: dict[str, Any] = {}
    if kind == "lora":
        changes = {"language": Part("lora", rank=4, dropout=0.3), "vision": Part("lora", rank=4, dropout=0.3)}
    if kind == "rows":
        changes = {"language": Part(), "vision": Part(), "tokens": Tokens(learn=True)}
    run = tiny_run(tmp_path / "whole", **changes)
    train(run, tiny_stage(run))
    broken = replace(run, out=str(tmp_path / "broken"))
    break_off(broken, 5, tiny_stage(broken))
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    result = train(broken, tiny_stage(broken))
    assert result.finished
    assert same(weights(tmp_path / "whole", 6), weights(tmp_path / "broken", 6))
    optimizer = "checkpoints/step-00000006/optimizer.safetensors"
    assert same(load_file(tmp_path / "whole" / optimizer), load_file(tmp_path / "broken" / optimizer))
    kept = [
        [(line["step"], line.get("loss")) for line in read_metrics(tmp_path / name / "metrics.jsonl")]
        for name in ("whole", "broken")
    ]
    assert kept[0] == kept[1]


@pytest.mark.parametrize(("warmup", "said"), [(8, True), (2, False)])
def test_a_warmup_longer_than_the_run_is_told(tmp_path: Path, capsys: Any, warmup: int, said: bool) -> None:
    run = tiny_run(tmp_path, schedule=Schedule(steps=2, warmup_steps=warmup))
    train(run, tiny_stage(run))
    told = " ".join(capsys.readouterr().err.split())
    assert ("warmup_steps is 8 but the run has 2 steps: the rate ends at 25% of its peak" in told) == said


def test_accumulating_equals_one_large_batch(tmp_path: Path) -> None:
    results = []
    for name, samples, accumulate in (("large", 6, 1), ("small", 2, 3)):
        run = tiny_run(
            tmp_path / name,
            data=Data(batch_samples=samples),
            accumulate=accumulate,
            optimiser=Optimiser(peak_lr=1e-3, clip=0.0),
            schedule=Schedule(steps=1),
        )
        trainer = Trainer(run, tiny_stage(run), (), None)
        seen: dict[str, torch.Tensor] = {}
        step = trainer.optimizer.step

        def record(trainer: Trainer = trainer, seen: dict[str, torch.Tensor] = seen, step: Any = step) -> None:
            seen.update({name: p.grad.clone() for name, p in trainer.learner.parameters.items() if p.grad is not None})
            step()

        trainer.optimizer.step = record  # type: ignore[method-assign]
        results.append((seen, trainer.fit().metrics["loss"]))
    (large, large_loss), (small, small_loss) = results
    assert small_loss == pytest.approx(large_loss, abs=1e-6)
    for name, gradient in large.items():
        torch.testing.assert_close(small[name], gradient, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("learns", "prefixes"),
    [
        ({"vision": Part(), "language": Part()}, ("connector.",)),
        ({"language": Part()}, ("vision.", "connector.")),
        ({}, ("vision.", "connector.", "language.")),
        ({"vision": Part("full", layers_from=-1), "connector": Part(), "language": Part()}, ("vision.layers.2.",)),
        ({"vision": Part(), "language": Part(), "tokens": Tokens(learn=True)}, ("connector.",)),
        ({"vision": Part("lora", rank=2), "connector": Part(), "language": Part("lora", rank=2)}, ()),
    ],
)
def test_what_learns_moves_and_what_is_frozen_stays(
    tmp_path: Path, learns: dict[str, Part], prefixes: tuple[str, ...]
) -> None:
    run = tiny_run(tmp_path, **learns)
    stage = tiny_stage(run)
    trainer = Trainer(run, stage, (), None)
    before = {name: value.clone() for name, value in stage.model.state_dict().items()}
    trainer.fit()
    moved = {name for name, value in stage.model.state_dict().items() if not torch.equal(before[name], value)}
    expected = {name for name in trainer.learner.parameters if not name.startswith("token_rows")}
    # a key bias shifts all scores alike, so its gradient is nothing but rounding
    assert moved == expected
    if prefixes:
        assert all(name.startswith(prefixes) for name in moved)
        assert moved >= {name for name in before if name.startswith(prefixes) and "language" not in name}


def test_loss_falls(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, schedule=Schedule(steps=30), optimiser=Optimiser(peak_lr=3e-3), save_every=0)
    stage = tiny_stage(run)
    result = train(run, stage, evaluators=[stage.evaluate])
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert result.metrics["loss"] < first["loss"] - 1.5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_held_out_loss_is_the_weighted_mean(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    stage.begin(run, torch.device("cpu"))
    with torch.no_grad():
        loss = stage.evaluate(torch.device("cpu"))["held_out_loss"]
        whole = collate(list(range(5)))
        expected = stage.losses(stage.prepare(whole))["next_token"] / stage.weights(whole)["next_token"]
    assert loss == pytest.approx(float(expected), abs=1e-5)


def test_bfloat16_trains_near_float32_and_keeps_learned_weights_in_float32(tmp_path: Path) -> None:
    losses = {}
    for precision in ("fp32", "bf16"):
        run = tiny_run(
            tmp_path / precision, precision=precision, language=Part("lora", rank=4), tokens=Tokens(learn=True)
        )
        trainer = Trainer(run, tiny_stage(run), (), None)
        losses[precision] = trainer.fit().metrics["loss"]
        kinds = {name: p.dtype for name, p in trainer.learner.model.named_parameters()}
        if precision == "bf16":
            assert {kinds[name] for name in trainer.learner.parameters if name in kinds} == {torch.float32}
            assert {p.dtype for _, p in trainer.learner.frozen()} == {torch.bfloat16}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    for name, on in (("kept", False), ("again", True)):
        run = tiny_run(tmp_path / name, grad_checkpoint=on, language=Part(), schedule=Schedule(steps=2))
        train(run, tiny_stage(run))
    assert same(weights(tmp_path / "kept", 2), weights(tmp_path / "again", 2))


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_kept_features_equal_fresh_ones(tmp_path: Path, where: str) -> None:
    losses = {}
    for name in ("none", where):
        run = tiny_run(tmp_path / name, vision=Part(), data=Data(batch_samples=4, features=name, augment="off"))  # type: ignore[arg-type]
        train(run, tiny_stage(run))
        losses[name] = [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]
    assert losses[where] == pytest.approx(losses["none"], abs=1e-6)


def test_kept_features_resume_to_the_bit(tmp_path: Path) -> None:
    data = Data(batch_samples=4, features="memory", augment="off")
    run = tiny_run(tmp_path / "whole", vision=Part(), data=data)
    train(run, tiny_stage(run))
    broken = replace(run, out=str(tmp_path / "broken"))
    break_off(broken, 3, tiny_stage(broken))
    train(broken, tiny_stage(broken))
    assert same(weights(tmp_path / "whole", 6), weights(tmp_path / "broken", 6))


def test_checkpoints_are_pruned_and_the_best_is_kept(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, keep=1, eval_every=1, save_every=1)
    values = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    train(run, tiny_stage(run), evaluators=[lambda _: {"held_out_loss": next(values)}])
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == [
        "latest",
        "step-00000002",
        "step-00000006",
    ]


def test_a_broken_save_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run(tmp_path)
    rename = Path.rename

    def fail(self: Path, target: Any) -> Any:
        if "00000004" in str(target):
            raise RuntimeError("killed")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(RuntimeError, match="killed"):
            train(run, tiny_stage(run))
    found = check_folder(run)
    assert found is not None
    assert found.name == "step-00000002"
    train(run, tiny_stage(run))
    assert not list((tmp_path / "checkpoints").glob(".step*"))
    whole = replace(run, out=str(tmp_path / "whole"))
    train(whole, tiny_stage(whole))
    assert same(weights(tmp_path, 6), weights(tmp_path / "whole", 6))


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    train(run, tiny_stage(run))
    other = replace(run, optimiser=replace(run.optimiser, peak_lr=5e-4), log_every=3)
    with pytest.raises(ValueError, match=r"optimiser\.peak_lr: 0\.001 -> 0\.0005") as error:
        train(other, tiny_stage(other))
    assert "log_every" not in str(error.value)
    with pytest.raises(ValueError, match="already holds"):
        check_folder(run, resume=False)
    with pytest.raises(ValueError, match="no checkpoint"):
        check_folder(replace(run, out=str(tmp_path / "empty")), resume=True)


def test_another_base_model_is_noticed(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, language=Part(), schedule=Schedule(steps=6))
    break_off(run, 3, tiny_stage(run))
    stage = tiny_stage(run)
    with torch.no_grad():
        stage.model.language.model.lm_head.weight.add_(0.1)
    with pytest.raises(ValueError, match="frozen weights differ"):
        train(run, stage)


def test_a_loss_that_is_not_a_number_names_step_and_samples(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, log_every=5)
    stage = tiny_stage(run)
    inner, calls = stage.losses, [0]

    def losses(prepared: Any) -> Any:
        calls[0] += 1
        values = inner(prepared)
        return {name: value * float("nan") for name, value in values.items()} if calls[0] == 3 else values

    stage.losses = losses  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 3: next_token is nan.*4 samples.*not_finite\.txt"):
        train(run, stage)


def test_nothing_learned_in_a_window_is_an_error(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    stage.weights = lambda batch: {"next_token": 0.0}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"step 1: no learned token.*samples before"):
        train(run, stage)


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, vision=Part(), connector=Part(), language=Part())
    with pytest.raises(ValueError, match="nothing learns"):
        train(run, tiny_stage(run))


def test_an_error_in_the_data_reaches_the_caller(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)

    class Bad(Records):
        def __iter__(self) -> Any:
            yield collate([0, 1])
            raise ValueError("file.jsonl:3: 2 <image> marks but 1 images; make them equal")

    stage.loader = Bad(4, 2)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"file\.jsonl:3"):
        train(run, stage)


def test_a_time_limit_stops_saved_and_the_same_command_goes_on(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, max_minutes=1e-6)
    first = train(run, tiny_stage(run))
    assert not first.finished
    assert first.step == 1
    result = train(replace(run, max_minutes=None), tiny_stage(run))
    assert result.finished
    assert result.step == 6


def test_a_schedule_over_time_ends_at_zero(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, schedule=Schedule(over="time"), max_minutes=0.02, save_every=0)
    result = train(run, tiny_stage(run))
    rates = [line["lr"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert result.finished
    assert rates[-1] < 0.1 * max(rates)


def test_epochs_count_every_record(tmp_path: Path) -> None:
    run: RunConfig = tiny_run(tmp_path, schedule=Schedule(epochs=2.0), data=Data(batch_samples=4))
    assert train(run, tiny_stage(run)).step == 6  # 10 records: 3 batches an epoch


def test_leftovers_of_a_kill_do_not_disturb(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    break_off(run, 3, tiny_stage(run))
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 3, "lo')
    partial = tmp_path / "checkpoints" / ".step-00000004.partial"
    partial.mkdir()
    (partial / "learned.safetensors").write_bytes(b"half")
    train(run, tiny_stage(run))
    steps = [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps == [1, 2, 3, 4, 5, 6]
    shutil.rmtree(tmp_path / "checkpoints")


def test_rows_padded_on_the_right_need_no_mask(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    stage.begin(run, torch.device("cpu"))
    batch = collate([0, 1, 2, 3])
    prepared = stage.prepare(batch)
    assert prepared.batch.attention_mask is None
    with torch.no_grad():
        bare, masked = stage.losses(prepared), stage.losses(replace(prepared, batch=batch))
        torch.testing.assert_close(bare, masked)
        left = replace(batch, attention_mask=batch.attention_mask.flip(1))  # type: ignore[union-attr]
    assert stage.prepare(left).batch.attention_mask is not None
