"""Recipes of InternVL-Chat 1.0: their numbers, what learns, and a tiny model with queries that really learns."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import internvl
from internvl.batch import ChatBatch
from internvl.cli import main
from internvl.load import load_checkpoint
from internvl.tokens import IMAGE_TOKEN
from internvl.train import features, log
from internvl.train.dry import write_records
from internvl.train.recipes import RECIPES, v1_0_chat
from internvl.train.recipes.tiny import write_model
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Part, Schedule
from internvl.train.stages import open_stage
from internvl.train.stages.sft import LOSS, Sft
from internvl.zoo import RELEASED

# parts, rate, samples a step, decay, template, padding (specification of 1.0, section 4)
TABLE = {
    "v1_0_chat_connector_7b": ("c", 1e-3, 256, 0.0, "plain", False),
    "v1_0_chat_connector_13b_448": ("c", 1e-3, 256, 0.0, "plain", False),
    "v1_0_chat_13b": ("cl", 2e-5, 128, 0.0, None, None),
    "v1_0_chat_7b_448": ("cl", 2e-5, 128, 0.0, None, None),
    "v1_0_chat_qllama_connector_7b_224": ("c", 1e-3, 512, 0.0, None, None),
    "v1_0_chat_qllama_connector_13b_336": ("c", 1e-3, 512, 0.0, None, None),
    "v1_0_chat_qllama_13b_336": ("cl", 2e-5, 512, 0.0, None, None),
}


@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str) -> None:
    run = RECIPES[name].make()
    parts = "".join(part[0] for part in ("vision", "connector", "language") if run.part(part).learn == "full")
    size = (run.data.batch_samples or 1) * run.accumulate
    found = (parts, run.optimiser.peak_lr, size, run.optimiser.weight_decay, run.data.template, run.data.pad_to_square)
    assert found == TABLE[name]
    schedule = run.schedule
    assert (schedule.epochs, schedule.warmup_share, run.data.max_length, run.precision) == (1, 0.03, 2048, "bf16")
    assert RELEASED[RECIPES[name].release].config.template == "v1"


def test_stages_follow_each_other() -> None:
    for name in (*v1_0_chat.SIZES, *v1_0_chat.LARGE_SIZES):
        later = RECIPES[f"v1_0_chat_{name}" if name in v1_0_chat.SIZES else f"v1_0_chat_qllama_{name}"].make()
        before = Path(later.model).parent.name
        assert later.model == f"{RECIPES[before].make().out}/model"
        assert later.connector.learn == later.language.learn == "full"


def test_the_first_model_comes_from_the_right_tower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, said in (
        ("v1_0_chat_connector_7b", "--vision InternViT-6B-224px --language vicuna-7b-v1.5 --form 1.0 --tile-size 336"),
        ("v1_0_chat_connector_13b_448", "--vision InternViT-6B-448px-V1-0 --language vicuna-13b-v1.5 --form 1.0"),
        (
            "v1_0_chat_qllama_connector_7b_224",
            "--vision InternVL-14B-224px .* --form 1.0 --tile-size 224 --template v1",
        ),
    ):
        recipe = RECIPES[name]
        with pytest.raises(ValueError, match=said):
            recipe.prepare(recipe.make())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recipe as people run it, in a folder of its own."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(log, "draw_curve", lambda *_: None)
        assert main(["train", "tiny_chat_qllama", "--json"]) == 0
    return folder


def test_the_tiny_recipe_learns_with_its_tower_frozen(trained: Path) -> None:
    out = trained / "runs" / "tiny_chat_qllama"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert held_out[-1] < 0.75 * held_out[0]
    before = load_file(trained / v1_0_chat.TINY / "model" / "model.safetensors")
    after = load_file(out / "model" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"mlp1", "mlp2", "language_model"}
    learned = load_file(out / "parts" / "connector.safetensors")
    assert torch.equal(learned["query_fc1.weight"], after["mlp2.1.weight"])
    assert {"fc1.weight", "fc2.bias", "query_fc1.weight", "query_fc2.bias"} <= learned.keys()


def test_what_it_leaves_chats(trained: Path) -> None:
    chat = internvl.load(trained / "runs" / "tiny_chat_qllama" / "model")
    assert chat.config.num_queries == 5
    reply = chat.chat("Colour?", [Image.new("RGB", (56, 56), (220, 30, 30))], max_new_tokens=8)
    assert reply.usage.image_tokens == 21
    assert reply.text
    said = chat.batch(
        [{"question": "Colour?", "images": [Image.new("RGB", (56, 56), (220, 30, 30))]}], max_new_tokens=8
    )
    assert said[0].text == reply.text


@pytest.mark.parametrize("name", ["tiny_chat_qllama", "pocket_dual_chat"])
def test_recipes_of_here_run_dry(name: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(log, "draw_curve", lambda *_: None)
    assert main(["train", name, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"].endswith("-21")  # five queries and sixteen patches
    parts = {"connector", "language"} if name.startswith("tiny") else {"connector"}
    assert {text.split()[0] for text in found["learns"]} == parts


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    write_model(folder / "model", "tiny-1.0-qllama")
    write_records(folder / "records.jsonl")
    return folder


def stage_of(inputs: Path, **changes: Any) -> Sft:
    data = Data(
        meta=str(inputs / "records.jsonl"), batch_samples=3, max_length=512, overlong="cut", augment="off", **changes
    )
    run = RunConfig(model=str(inputs / "model"), data=data, connector=Part("full"), schedule=Schedule(steps=1))
    stage = open_stage(run)
    assert isinstance(stage, Sft)
    return stage


def first_batch(stage: Sft) -> ChatBatch:
    batch = next(batch for batch in stage.batches() if batch is not None)
    assert isinstance(batch, ChatBatch)
    return batch


def test_kept_features_give_the_same_loss_and_gradients(inputs: Path) -> None:
    """Both what the queries say and the patches are kept; the tower does not run again."""
    found = []
    for kept in ("none", "memory"):
        stage = stage_of(inputs, features=kept)
        stage.begin(stage.run, torch.device("cpu")).train_mode()
        prepared = stage.prepare(first_batch(stage))
        loss = stage.losses(prepared)[LOSS]
        loss.backward()
        found.append((float(loss.detach()), [p.grad for p in stage.model.connector.parameters()]))
        if kept == "memory":
            assert isinstance(stage.store, features.MemoryStore)
            assert len(stage.store) == len(set(prepared.digests))
            stage.model.vision.forward = None  # type: ignore[assignment, method-assign]
            assert float(stage.losses(prepared)[LOSS].detach()) == pytest.approx(float(loss.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert one is not None
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_features_of_other_queries_are_others(inputs: Path) -> None:
    model = load_checkpoint(inputs / "model").model
    before = features.key(model.eyes)
    with torch.no_grad():
        assert model.qllama is not None
        model.qllama.queries.add_(1.0)
    assert features.key(model.eyes) != before


def test_the_template_of_a_run_is_not_that_of_the_model(inputs: Path) -> None:
    stage = stage_of(inputs, template="plain", pad_to_square=False)
    batch = first_batch(stage)
    tokenizer = stage.tokenizer
    texts = [tokenizer.decode(row.tolist()).replace(IMAGE_TOKEN, "") for row in batch.input_ids]
    assert not any("USER" in text or "Colour" in text for text in texts)
    assert stage.model.config.template == "v1"
    assert stage.model.config.pad_to_square
    assert not stage.loader.encoder.config.pad_to_square


def test_a_model_without_rows_for_pictures_trains(tmp_path: Path) -> None:
    """A tokenizer of 1.0 knows the token of a picture by name only: its id is behind the last row."""
    from internvl.load import save_checkpoint
    from tiny import plain_tokenizer, tiny_first

    words = plain_tokenizer()
    save_checkpoint(tiny_first(vocab_size=len(words)), words, tmp_path / "model")
    write_records(tmp_path / "records.jsonl")
    stage = stage_of(tmp_path)
    assert stage.image_token_id == len(words) == stage.model.language.vocab_size
    stage.begin(stage.run, torch.device("cpu")).train_mode()
    stage.losses(stage.prepare(first_batch(stage)))[LOSS].backward()
    assert stage.model.connector.query_fc1.weight.grad is not None
    rows = replace(stage.run, tokens=replace(stage.run.tokens, learn=True))
    with pytest.raises(ValueError, match="has no token '<img>'"):
        Sft(rows, stage.model, stage.tokenizer, stage.loader, None).begin(rows, torch.device("cpu"))
