"""Runs on pairs: resumed = uninterrupted, frozen stays, learning happens, exported = trained, what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import break_off
from safetensors.torch import load_file, save_file
from tiny_pairs import assert_alike, contrastive, generative, learned, write_inputs
from torch.testing import assert_close

import internvl
from internvl.load_dual import load_dual, save_dual
from internvl.models.build import build_dual
from internvl.train.loop import Trainer, train
from internvl.train.settings import Optimiser, Pairs, Part, Schedule
from internvl.train.stages import open_stage


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("dual"))


# the loop


@pytest.mark.parametrize("make", [contrastive, generative])
def test_resumed_equals_uninterrupted_to_the_bit(inputs: Path, tmp_path: Path, make: Any) -> None:
    changes: dict[str, Any] = {"export": "none"}
    if make is generative:
        changes["data"] = replace(make(inputs, tmp_path).data, features="memory")
    whole = make(inputs, tmp_path / "whole", **changes)
    train(whole, open_stage(whole))
    broken = replace(whole, out=str(tmp_path / "broken"))
    break_off(broken, 5)
    torch.manual_seed(123)
    assert train(broken, open_stage(broken)).finished
    expected, found = learned(whole), learned(broken)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_workers_do_not_move_what_drop_path_draws(inputs: Path, tmp_path: Path) -> None:
    """Whole, and gone on with after step 4: what a run without workers learns, to the bit."""
    plain = contrastive(inputs, tmp_path / "plain", export="none", pairs=Pairs(drop_path=0.5))
    helped = replace(plain, out=str(tmp_path / "helped"), data=replace(plain.data, workers=1))
    train(plain, open_stage(plain))
    train(helped, open_stage(helped))
    expected, found = learned(plain), learned(helped)
    shutil.rmtree(tmp_path / "helped" / "checkpoints" / "step-00000006")
    (tmp_path / "helped" / "checkpoints" / "latest").write_text("step-00000004\n")
    assert train(helped, open_stage(helped), resume=True).finished
    again = learned(helped)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
        assert torch.equal(value, again[name]), name


@pytest.mark.parametrize("make", [contrastive, generative])
def test_twenty_steps_lower_the_loss_on_few_pairs(inputs: Path, tmp_path: Path, make: Any) -> None:
    lines = (inputs / "pairs.jsonl").read_text().splitlines(keepends=True)[:8]
    few = inputs / f"few_{make.__name__}.jsonl"
    few.write_text("".join(lines).replace("pairs_pictures/", f"{inputs}/pairs_pictures/"))
    run = make(inputs, tmp_path, schedule=Schedule(steps=20), save_every=0, export="none")
    run = replace(run, data=replace(run.data, meta=str(few)), pairs=replace(run.pairs, mask_share=0.0, drop_path=0.0))
    train(run, open_stage(run))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if "loss" in json.loads(line)]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 1.0


def test_what_learns_moves_and_what_is_frozen_stays(inputs: Path, tmp_path: Path) -> None:
    """Stage 2 as in the paper: the ViT, all of the LLaMA, its head, text_projection and the patches' pooling stay."""
    before = load_file(inputs / "model" / "model.safetensors")
    run = generative(inputs, tmp_path / "g")
    train(run, open_stage(run))
    after = load_file(tmp_path / "g" / "model" / "model.safetensors")
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    starts = ("query_tokens", "clip_projector2.", "itm_head.", "logit_scale")
    expected = {name for name in before if ".cross_attn.q_proj" in name or name.startswith(starts)}
    assert moved >= expected - {"clip_projector2.cross_attn.k_bias"}  # shifts all scores alike: no gradient
    assert all(name.startswith(starts) or ".cross_attn." in name for name in moved)
    parts = load_file(tmp_path / "g" / "parts" / "learned.safetensors")
    assert {"qllama.queries", "match_head.weight"} <= parts.keys()
    run = contrastive(inputs, tmp_path / "c", language=Part("full", layers_from=-1), vision=Part())
    train(run, open_stage(run))
    parts = load_file(tmp_path / "c" / "parts" / "learned.safetensors")
    assert {name.split(".")[0] for name in parts} == {"image_pool", "text_projection", "logit_scale", "qllama"}
    assert all(name.startswith("qllama.layers.3.") for name in parts if name.startswith("qllama"))
    assert not any(".cross." in name for name in parts)


def test_the_exported_model_opens_and_says_what_was_trained(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path)
    stage: Any = open_stage(run)
    train(run, stage)
    opened: Any = internvl.load(tmp_path / "model")
    texts = ["red beside blue", "green beside black"]
    picture = inputs / "pairs_pictures" / "red-blue.png"
    trained = internvl.Dual(replace(load_dual(inputs / "model"), model=stage.model))
    assert_close(opened.encode_text(texts), trained.encode_text(texts))
    assert_close(opened.encode_image([picture]), trained.encode_image([picture]))
    assert opened.model.vision.layers[0].drop_path.rate == 0.0


def test_adapters_learn_and_are_merged(inputs: Path, tmp_path: Path) -> None:
    """LoRA on both towers: what is exported is the trained model, cross-attention is not touched, resume is exact."""
    lora = Part("lora", rank=2, dropout=0.3)
    run = contrastive(inputs, tmp_path / "a", vision=lora, language=lora, export="none")
    stage: Any = open_stage(run)
    train(run, stage)
    names = learned(run).keys()
    assert {name.split(".")[0] for name in names} == {
        "image_pool",
        "text_projection",
        "logit_scale",
        "vision",
        "qllama",
    }
    assert all(".lora_" in name for name in names if name.startswith(("vision", "qllama")))
    assert not any(".cross." in name for name in names)
    stage.model.eval()
    texts = torch.tensor([[1, 40, 41, 2], [1, 50, 2, 0]])
    with torch.no_grad():
        trained = stage.model.encode_text(texts)
    again: Any = open_stage(replace(run, export="last"))
    train(replace(run, export="last"), again)  # nothing left to do but to export
    opened = load_dual(tmp_path / "a" / "model").model
    with torch.no_grad():
        assert_close(opened.encode_text(texts), trained, rtol=1e-4, atol=1e-5)
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (inputs, tmp_path / "a"))
    change = (
        after["qllama.model.layers.1.self_attn.q_proj.weight"] - before["qllama.model.layers.1.self_attn.q_proj.weight"]
    )
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2


def test_kept_features_change_nothing(inputs: Path, tmp_path: Path) -> None:
    results = []
    for kind in ("none", "memory"):
        run = generative(inputs, tmp_path / kind, export="none")
        run = replace(run, data=replace(run.data, features=kind, held_out=str(inputs / "held_out.jsonl")))
        stage: Any = open_stage(run)
        result = train(run, stage, evaluators=[stage.evaluate])
        results.append((learned(run), result.metrics))
    assert stage.store is not None
    assert len(stage.store) == 60
    assert_alike(results[1][0], results[0][0])
    for name in ("held_out_loss", "held_out_itc", "held_out_itm", "held_out_itg"):
        assert results[1][1][name] == pytest.approx(results[0][1][name], abs=1e-3)


def test_generative_begins_with_what_c_learned(inputs: Path, tmp_path: Path) -> None:
    """From a folder of InternVL-C alone: its weights, the output head of the LLaMA, the rest random."""
    whole = load_dual(inputs / "model")
    alone = build_dual(replace(whole.config, generative=False))
    alone.load_state_dict(whole.model.state_dict(), strict=False)
    save_dual(alone, whole.tokenizer, tmp_path / "c")
    run = generative(inputs, tmp_path / "g", model=str(tmp_path / "c"))
    with pytest.raises(
        ValueError, match=r"is InternVL-C, which has no output head for captions; set pairs\.output_head"
    ):
        open_stage(run)
    (tmp_path / "llama").mkdir()
    save_file({"lm_head.weight": whole.model.qllama.head.weight.detach().clone()}, tmp_path / "llama/model.safetensors")
    run = replace(run, pairs=replace(run.pairs, output_head=str(tmp_path / "llama")))
    stage: Any = open_stage(run)
    for name, value in alone.state_dict().items():
        assert torch.equal(stage.model.state_dict()[name], value), name
    assert torch.equal(stage.model.qllama.head.weight, whole.model.qllama.head.weight)
    assert bool((stage.model.qllama.queries != 0).any())
    assert train(run, stage).finished


def test_the_temperature_learns_and_is_bounded(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path, pairs=Pairs(max_scale=14.0), optimiser=Optimiser(peak_lr=0.1), export="none")
    trainer = Trainer(run, open_stage(run), (), None)
    scale = trainer.learner.parameters["logit_scale"]
    first = float(scale.detach().exp())
    trainer.fit()
    assert float(scale.detach().exp()) != pytest.approx(first, abs=1e-3)
    trainer.stage.bound_scale()  # type: ignore[attr-defined]
    assert float(scale.detach().exp()) <= 14.0 + 1e-4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 2}, "accumulate is 2; pairs of another micro-batch would be no negatives"),
        ({"pairs": Pairs(micro_batch=0)}, "pairs.micro_batch is 0"),
        ({"vision": Part(), "connector": Part(), "language": Part()}, "nothing learns"),
        ({"vision": Part("full", layers_from=9)}, "layers_from is 9 but the part has 3 blocks"),
    ],
)
def test_runs_without_meaning_are_refused(inputs: Path, tmp_path: Path, changes: Any, message: str) -> None:
    run = contrastive(inputs, tmp_path, **changes)
    with pytest.raises(ValueError, match=message):
        open_stage(run).begin(run, torch.device("cpu"))


def test_features_of_changing_pictures_are_refused(inputs: Path, tmp_path: Path) -> None:
    run = contrastive(inputs, tmp_path)
    with pytest.raises(ValueError, match="features are kept of a frozen encoder and of pictures that never change"):
        open_stage(replace(run, data=replace(run.data, features="memory")))
    with pytest.raises(ValueError, match="stages on pairs keep features in memory, or none"):
        open_stage(replace(run, data=replace(run.data, features="disk")))
    with pytest.raises(ValueError, match=r"data\.meta is not given"):
        open_stage(replace(run, data=replace(run.data, meta="")))
