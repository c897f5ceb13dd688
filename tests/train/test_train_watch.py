"""What a run keeps and tells beside learning: averages, where numbers end, trackers, losses by set, answers, rates."""

from __future__ import annotations

import json
import sys
import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_stage import IMAGE_ID, Records, collate, tiny_run, tiny_stage

from internvl.data.collate import collate_nothing
from internvl.tokens import IGNORE_INDEX
from internvl.train import checkpoint, export, trainable
from internvl.train.loop import Trainer, train
from internvl.train.run import RunConfig
from internvl.train.samples import Answers, questions
from internvl.train.settings import Part, Schedule, Watch
from internvl.train.stages.sft import by_set
from internvl.train.track import open_trackers


def weights(out: Path, step: int, kind: str = "learned") -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / f"{kind}.safetensors")


@pytest.fixture(scope="module")
def averaged(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Four steps, each saved, with a moving average."""
    out = tmp_path_factory.mktemp("averaged")
    watch = Watch(ema=0.75, save_behind=True)
    run = tiny_run(out, vision=Part(), schedule=Schedule(steps=4), save_every=1, keep=4, watch=watch, export="ema")
    trainer = Trainer(run, tiny_stage(run), (), None)
    torch.save({n: p.detach().clone() for n, p in trainer.learner.parameters.items()}, out / "begin.pt")
    trainer.stage.export = lambda learner, partial: partial.mkdir()  # type: ignore[method-assign]
    trainer.fit()
    trainer.close()
    return run


def test_the_moving_average_is_its_definition(averaged: RunConfig) -> None:
    out = Path(averaged.out)
    expected = torch.load(out / "begin.pt", weights_only=True)
    for step in (1, 2, 3, 4):
        for name, value in weights(out, step).items():
            expected[name] = 0.75 * expected[name] + 0.25 * value
    torch.testing.assert_close(weights(out, 4, "ema"), expected)


def test_export_takes_the_weights_that_were_asked_for(averaged: RunConfig) -> None:
    out = Path(averaged.out)
    for how, average, expected in (
        ("ema", 1, weights(out, 4, "ema")),
        ("last", 1, weights(out, 4)),
        ("last", 3, {n: sum(weights(out, s)[n] for s in (2, 3, 4)) / 3 for n in weights(out, 4)}),
    ):
        run = replace(averaged, export=how)  # type: ignore[arg-type]
        stage = tiny_stage(run)
        learner = stage.begin(run, torch.device("cpu"))
        state = export.load_wanted(run, learner, checkpoint.fingerprint(learner), average)
        assert state.step == 4
        torch.testing.assert_close({n: p.detach() for n, p in learner.parameters.items()}, expected)
    with pytest.raises(ValueError, match=r"holds 4 checkpoints, 9 are to be averaged.*--keep 9"):
        export.newest(out, 9)


def test_an_average_that_nobody_keeps_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"watch\.ema is 0; set --watch\.ema"):
        tiny_run(tmp_path, export="ema")
    with pytest.raises(ValueError, match=r"watch\.ema is 1\.5"):
        tiny_run(tmp_path, watch=Watch(ema=1.5))
    with pytest.raises(ValueError, match=r"vision\.layer_decay is 0"):
        tiny_run(tmp_path, vision=Part("full", layer_decay=0.0))


def test_layer_decay_lowers_the_rate_block_by_block(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, vision=Part("full", layer_decay=0.5, lr_scale=3.0))
    learner = tiny_stage(run).begin(run, torch.device("cpu"))
    rates = {name: g["lr_scale"] for g in trainable.groups(learner) for name in g["names"]}
    depth = len(learner.model.vision.layers)
    for index in range(depth):
        assert rates[f"vision.layers.{index}.attention.qkv.weight"] == 3.0 * 0.5 ** (depth - index)
    assert rates["vision.embeddings.class_embedding"] == 3.0 * 0.5 ** (depth + 1)
    assert {rate for name, rate in rates.items() if not name.startswith("vision.")} == {1.0}


@pytest.mark.parametrize(
    ("where", "message"),
    [("output", "the output of vision.layers.1.mlp"), ("gradient", "the gradient at .*vision.layers.1")],
)
def test_the_first_module_that_is_not_finite_is_named(tmp_path: Path, where: str, message: str) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    layer = stage.model.vision.layers[1].mlp
    count = [0]

    def spoil(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor | None:
        count[0] += 1
        if count[0] < 3:
            return None
        if where == "output":
            return output * float("nan")
        output.register_hook(lambda gradient: gradient * float("inf"))
        return output

    layer.register_forward_hook(spoil)
    with pytest.raises(ValueError, match=rf"step 3: .*; first in {message}.* with 4 samples before"):
        train(run, stage)
    assert (tmp_path / "not_finite.txt").read_text().startswith("first in the")
    assert all(bool(p.isfinite().all()) for p in stage.model.parameters())  # found before the weights were touched


def test_trackers_get_the_lines_or_say_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    class Fake:
        id = "abc"

        def __init__(self, *_: Any, **settings: Any) -> None:
            told.append(settings)

        def log(self, numbers: dict[str, float], step: int) -> None:
            told.append((step, numbers["loss"]))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            if name == "loss":
                told.append((step, value))

        def flush(self) -> None: ...

        def close(self) -> None: ...

        finish = close

    for name in ("tensorboard", "wandb"):
        run = tiny_run(tmp_path / name, schedule=Schedule(steps=2), watch=Watch(trackers=(name,)))  # type: ignore[arg-type]
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "torch.utils.tensorboard", None)
            patch.setitem(sys.modules, "wandb", None)
            with pytest.raises(ValueError, match=rf"{name}, which needs: pip install"):
                open_trackers(run, 0)
        tensorboard, wandb = types.ModuleType("tensorboard"), types.ModuleType("wandb")
        tensorboard.SummaryWriter = Fake  # type: ignore[attr-defined]
        wandb.init = Fake  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", tensorboard)
        monkeypatch.setitem(sys.modules, "wandb", wandb)
        told.clear()
        train(run, tiny_stage(run))
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert told[1:] == [(line["step"], line["loss"]) for line in lines]


class Named(Records):
    """Held-out records of two sets, some batches of both."""

    def once(self) -> Any:
        for batch in super().once():
            yield replace(batch, sources=tuple(f"some/{'ab'[k % 2]}.jsonl:{k}" for k in range(batch.num_samples)))


def test_the_held_out_loss_of_each_set(tmp_path: Path) -> None:
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    stage.held_out = Named(5, 2)  # type: ignore[assignment]
    stage.begin(run, torch.device("cpu"))
    with torch.no_grad():
        line = stage.evaluate(torch.device("cpu"))
        for name, numbers in (("a", [0, 2, 4]), ("b", [1, 3])):
            whole = collate(numbers)
            weight = (whole.loss_weights * (whole.labels != IGNORE_INDEX)).sum()
            # the weights of tiny samples follow their number, so a set apart weighs as in the mixture
            expected = stage.losses(stage.prepare(whole))["next_token"] / weight
            assert line[f"held_out_loss/{name}"] == pytest.approx(float(expected), rel=1e-5)


def test_sets_of_a_packed_row() -> None:
    batch = replace(
        collate_nothing(0, 56, packed=True),
        input_ids=torch.zeros(1, 9, dtype=torch.int64),
        segments=torch.tensor([0, 3, 7, 9], dtype=torch.int32),
        sources=("a.jsonl:1", "b.jsonl:1", "a.jsonl:2"),
    )
    found = by_set(batch, torch.tensor([1, 3, 6, 7]))
    assert {name: places.tolist() for name, places in found.items()} == {"a": [0, 3], "b": [1, 2]}


def test_answers_are_those_without_a_cache(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, watch=Watch(samples=3), schedule=Schedule(steps=2))
    stage = tiny_stage(run)
    answers = Answers(stage, 3, 5)
    train(run, stage, evaluators=[stage.evaluate, answers])
    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 2, 2]
    asked = [q for batch in stage.held_out.once() for q in questions(batch, IMAGE_ID, 4)][:3]  # type: ignore[union-attr]
    with torch.no_grad():
        stage.model.eval()
        for question, line in zip(asked, lines, strict=True):
            assert (question.ids == IMAGE_ID).sum() == 4 * len(question.tiles)
            ids, found = question.ids, list[int]()
            for _ in range(5):
                visual = stage.see(question.tiles) if len(question.tiles) else None
                hidden = stage.model.hidden(ids, visual=visual)
                found.append(int(stage.model.language.head(hidden[:, -1]).argmax()))
                if found[-1] in (2, question.expected[-1]):
                    found.pop()
                    break
                ids = torch.cat([ids, torch.tensor([found[-1:]])], dim=1)
            assert line["answer"] == stage.tokenizer.decode(found, skip_special_tokens=True)
            assert line["expected"] == stage.tokenizer.decode(question.expected, skip_special_tokens=True)


def test_a_batch_from_which_nothing_is_learned_changes_nothing(tmp_path: Path) -> None:
    """And a text batch whose vision part runs blank: gradients of exactly zero, not none."""
    run = tiny_run(tmp_path)
    stage = tiny_stage(run)
    learner = stage.begin(run, torch.device("cpu"))
    for batch in (collate_nothing(0, 56, packed=False), collate_nothing(0, 56, packed=True), collate([0, 4])):
        prepared = stage.prepare(batch)
        nothing = stage.see(prepared.batch.tiles)
        assert nothing.shape[0] == 0
        hidden = stage.model.hidden(
            prepared.batch.input_ids, visual=nothing, num_image_tokens=0, segments=prepared.batch.segments
        )
        torch.testing.assert_close(
            hidden, stage.model.hidden(prepared.batch.input_ids, segments=prepared.batch.segments)
        )
        hidden.square().sum().backward()
        for name, parameter in learner.parameters.items():
            if name.startswith(("vision.", "connector.")):
                assert parameter.grad is not None
                assert not parameter.grad.any(), name
