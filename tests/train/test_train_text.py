"""Stage `text`: pulled to the teacher, all languages to one target, resumed = uninterrupted, what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_pairs import learned
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

from internvl.commands.train import main
from internvl.load_dual import load_dual
from internvl.train.loop import train
from internvl.train.losses import neighbours_sum
from internvl.train.recipes import tiny_text, v1_0
from internvl.train.run import RunConfig
from internvl.train.sentences import SentenceEncoder, kept_vectors, open_sentences
from internvl.train.settings import Data, Part, Schedule, Text, Tokens
from internvl.train.stages import open_stage
from internvl.train.stages.text import KEPT, nearness


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    v1_0.write_tiny_model(folder / "model")
    tiny_text.write_tiny_teacher(folder / "teacher")
    tiny_text.write_tiny_texts(folder / "texts.jsonl")
    tiny_text.write_tiny_texts(folder / "held_out.jsonl", "under")
    return folder


def text_run(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    base: dict[str, Any] = {
        "out": str(out),
        "model": str(inputs / "model"),
        "data": Data(meta=str(inputs / "texts.jsonl"), batch_samples=8),
        "text": Text(teacher=str(inputs / "teacher")),
        "schedule": Schedule(steps=6),
        "save_every": 2,
        "eval_every": 0,
        "log_every": 1,
        "device": "cpu",
    }
    return replace(tiny_text.tiny_text(), **{**base, **changes})


# the losses


def unit_rows(seed: int, rows: int = 7, width: int = 5) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_neighbours_is_the_divergence_and_none_where_the_teacher_is_repeated() -> None:
    said, target = unit_rows(0), unit_rows(1)
    expected = 0.0
    for row in range(7):
        wanted = torch.softmax(target @ target[row] / 0.2, 0)
        found = torch.softmax(target @ said[row] / 0.2, 0)
        expected += float((wanted * (wanted / found).log()).sum())
    assert float(neighbours_sum(said, target, target, 0.2)) == pytest.approx(expected, rel=1e-5)
    assert float(neighbours_sum(target, target, target, 0.2)) == pytest.approx(0, abs=1e-6)


def test_the_gradient_pulls_towards_the_teacher() -> None:
    raw, target = torch.randn(7, 5, generator=torch.Generator().manual_seed(2)).requires_grad_(), unit_rows(3)
    optimizer, cosines = torch.optim.Adam([raw], lr=0.05), []
    for _ in range(400):
        said = F.normalize(raw, dim=-1)
        cosines.append(float((said * target).sum(-1).mean().detach()))
        optimizer.zero_grad()
        neighbours_sum(said, target, target, 0.5).backward()
        optimizer.step()
    assert cosines[10] > cosines[0]
    assert cosines[-1] > 0.95


def test_nearness_counts_the_own_sentence_alone() -> None:
    english = torch.eye(3)
    said = F.normalize(torch.tensor([[1.0, 0.1, 0.0], [0.0, 0.2, 1.0], [0.0, 1.0, 0.0]]), dim=-1)
    found = nearness(said, english, torch.tensor([0, 1, 1]), torch.tensor([False, True, True]))
    assert found["held_out_nearest"] == pytest.approx(2 / 3)
    assert found["held_out_nearest_translated"] == pytest.approx(1 / 2)
    assert found["held_out_cosine_translated"] == pytest.approx((0.2 / 1.04**0.5 + 1) / 2)
    assert "held_out_cosine_translated" not in nearness(said, english, torch.tensor([0, 1, 1]), torch.zeros(3).bool())


# the teacher


def test_the_teacher_is_the_mean_of_its_last_states_whatever_stands_beside(inputs: Path) -> None:
    teacher = open_sentences(str(inputs / "teacher"))
    texts = ["a", "red beside blue", "black"]
    vectors = teacher.encode(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = teacher.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = teacher.module(input_ids=ids).last_hidden_state[0]
        assert_close(vector, F.normalize(states.mean(0), dim=-1))
    assert len(teacher.encode([])) == 0


def test_what_the_teacher_said_is_kept_for_the_same_texts_alone(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, path = open_sentences(str(inputs / "teacher")), tmp_path / KEPT
    first = kept_vectors(teacher, ["red", "blue"], path, write=True)
    with monkeypatch.context() as patch:
        patch.setattr(SentenceEncoder, "encode", lambda *_: pytest.fail("the teacher spoke twice"))
        assert torch.equal(kept_vectors(teacher, ["red", "blue"], path, write=True), first)
    other = kept_vectors(teacher, ["blue", "red"], path, write=False)
    assert torch.equal(other, first.flip(0))
    assert torch.equal(load_file(path)["vectors"], first)


def test_other_teachers_are_refused(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"text\.teacher is 'runs/nothing', which has no config\.json; give the folder"
    ):
        open_sentences("runs/nothing")
    pooled = tmp_path / "cls"
    (pooled / "1_Pooling").mkdir(parents=True)
    (pooled / "config.json").write_text("{}")
    (pooled / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": false}')
    with pytest.raises(ValueError, match="is not pooled by the mean"):
        open_sentences(str(pooled))
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 10, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=300, **sizes)).save_pretrained(str(tmp_path / "wide"))
    open_sentences(str(inputs / "teacher")).tokenizer.save_pretrained(str(tmp_path / "wide"))
    run = text_run(inputs, tmp_path, text=Text(teacher=str(tmp_path / "wide")))
    with pytest.raises(ValueError, match=r"is 10 wide, the embeddings of .* give a teacher of that width"):
        open_stage(run)


# the stage


def test_all_languages_of_a_picture_are_pulled_to_its_english(inputs: Path, tmp_path: Path) -> None:
    run = text_run(inputs, tmp_path, data=Data(meta=str(inputs / "texts.jsonl"), batch_samples=60))
    stage: Any = open_stage(run)
    stage.begin(run, torch.device("cpu"))
    batch = next(stage.batches())
    said = stage.teacher.encode([stage.loader.english[n] for n in batch.english.tolist()])
    assert_close(stage.targets[batch.english].float(), said, atol=1e-3, rtol=0)
    assert len(stage.loader.english) == 30
    counts = torch.bincount(batch.english)
    assert counts.tolist() == [2] * 30
    assert int(batch.translated.sum()) == 30


def test_vectors_do_not_depend_on_what_else_is_in_the_batch(inputs: Path, tmp_path: Path) -> None:
    run = text_run(inputs, tmp_path)
    stage: Any = open_stage(run)
    stage.begin(run, torch.device("cpu"))
    stage.model.eval()
    lines = [{"caption": text} for text in ("a", "red beside blue", "a very long text " * 3, "gelb")]
    (tmp_path / "few.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    few: Any = open_stage(replace(run, data=replace(run.data, meta=str(tmp_path / "few.jsonl"), batch_samples=4)))
    batch = next(few.batches())
    with torch.no_grad():
        together = stage.vectors(batch)
        for row in range(4):
            ids = batch.texts.ids[row][batch.texts.mask[row]][None]
            assert_close(stage.model.encode_text(ids)[0], together[row], rtol=1e-4, atol=1e-5)
        stage.run = replace(run, pairs=replace(run.pairs, micro_batch=3))
        assert_close(stage.vectors(batch), together, rtol=1e-4, atol=1e-5)


def test_resumed_equals_uninterrupted_to_the_bit(inputs: Path, tmp_path: Path) -> None:
    whole = text_run(inputs, tmp_path / "whole", export="none")
    train(whole, open_stage(whole))
    broken = replace(whole, out=str(tmp_path / "broken"))
    stage: Any = open_stage(broken)
    inner, count = stage.losses, [0]

    def losses(prepared: Any) -> Any:
        count[0] += 1
        if count[0] > 5:
            raise RuntimeError("killed")
        return inner(prepared)

    stage.losses = losses
    with pytest.raises(RuntimeError, match="killed"):
        train(broken, stage)
    torch.manual_seed(123)
    assert train(broken, open_stage(broken)).finished
    expected, found = learned(whole), learned(broken)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name


def test_adapters_and_the_projection_learn_and_everything_else_stays(inputs: Path, tmp_path: Path) -> None:
    """Both ways to a lower loss; what is exported is what was trained; no head, cross-attention or ViT moves."""
    lora = Part("lora", rank=2, dropout=0.0)
    run = text_run(inputs, tmp_path, language=lora, schedule=Schedule(steps=20), save_every=0)
    run = replace(run, data=replace(run.data, held_out=str(inputs / "held_out.jsonl"), batch_samples=30))
    stage: Any = open_stage(run)
    result = train(run, stage, evaluators=[stage.evaluate])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 0.3
    assert {"loss_neighbours", "loss_cosine"} <= lines[0].keys()
    assert {"held_out_loss", "held_out_nearest", "held_out_cosine_translated"} <= result.metrics.keys()
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (inputs, tmp_path))
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert "text_projection" in moved
    rest = moved - {"text_projection"}
    assert rest
    assert all(name.startswith("qllama.model.layers.") and "cross_attn" not in name for name in rest)
    change = after["qllama.model.layers.1.mlp.up_proj.weight"] - before["qllama.model.layers.1.mlp.up_proj.weight"]
    assert int(torch.linalg.matrix_rank(change, atol=1e-5)) == 2
    ids = torch.tensor([[1, 40, 41, 2], [1, 50, 2, 0]])
    stage.model.eval()
    with torch.no_grad():
        trained, opened = stage.model.encode_text(ids), load_dual(tmp_path / "model").model.encode_text(ids)
    assert_close(opened, trained, rtol=1e-4, atol=1e-5)


def test_lines_without_english_are_counted_in_the_run(inputs: Path, tmp_path: Path) -> None:
    text = (inputs / "texts.jsonl").read_text()
    (tmp_path / "more.jsonl").write_text(text + '{"image": "no.png", "caption": "loup", "language": "fr"}\n')
    data = Data(meta=str(tmp_path / "more.jsonl"), batch_samples=8, on_error="skip", max_rejected=0.1)
    run = text_run(inputs, tmp_path / "run", data=data, schedule=Schedule(steps=1), export="none")
    train(run, open_stage(run))
    assert "more.jsonl:61: 'fr', but no English line has its picture" in (tmp_path / "run" / "skipped.txt").read_text()
    with pytest.raises(ValueError, match="no English line has its picture"):
        open_stage(replace(run, data=replace(data, on_error="error")))


def test_sets_come_in_the_shares_of_the_run(inputs: Path, tmp_path: Path) -> None:
    """By the square root of how many they are."""
    lines = (inputs / "texts.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "few.jsonl").write_text("".join(line for line in lines if '"en"' in line and "beside b" in line))
    sets = {"many": {"annotation": str(inputs / "texts.jsonl")}, "few": {"annotation": str(tmp_path / "few.jsonl")}}
    (tmp_path / "meta.json").write_text(json.dumps(sets))
    stage: Any = open_stage(text_run(inputs, tmp_path, data=Data(meta=str(tmp_path / "meta.json"), shares="sqrt")))
    many, few = (data.repeat * len(data) for data in stage.loader.sets)
    sizes = [len(data) for data in stage.loader.sets]
    assert many + few == pytest.approx(sum(sizes))
    assert many / few == pytest.approx((sizes[0] / sizes[1]) ** 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": Data()}, r"data\.meta is not given"),
        ({"vision": Part("full")}, r"vision\.learn is 'full'; stage text opens no picture"),
        ({"data": Data(meta="x", features="memory")}, r"data\.features is 'memory'; stage text opens no picture"),
        ({"data": Data(meta="x", batch_tokens=9)}, r"data\.batch_tokens and data\.batch_tiles have no meaning"),
        ({"data": Data(meta="x", on_error="quarantine")}, r"data\.on_error is 'quarantine'"),
        ({"data": Data(meta="x", held_out_samples=9)}, r"data\.held_out_samples is 9; stage text takes repeat_time"),
        ({"tokens": Tokens(learn=True)}, r"tokens\.learn is on"),
    ],
)
def test_runs_without_meaning_are_refused(inputs: Path, tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        open_stage(text_run(inputs, tmp_path, **changes))
    with pytest.raises(ValueError, match=r"text\.temperature is 0"):
        text_run(inputs, tmp_path, text=Text(temperature=0.0))


def test_the_tiny_recipe_runs_as_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["tiny_text", "--schedule.steps", "3", "--eval-every", "0", "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["finished"]
    assert found["metrics"]["held_out_loss"] > 0
    assert not list(tmp_path.rglob("*_pictures"))
