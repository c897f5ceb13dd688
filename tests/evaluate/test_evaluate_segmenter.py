"""Segmentation on a tiny encoder: it learns, resumes exactly, freezes what it should; crops, colours, rates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dual_folder import make_dual
from internvl import cli
from internvl.config import VisionConfig
from internvl.data.labelled import read_ade20k, read_mask
from internvl.evaluate.catalog import published
from internvl.evaluate.dual_result import PROTOCOLS
from internvl.evaluate.segment import Confusion
from internvl.evaluate.segment_settings import SegmentSettings
from internvl.evaluate.segment_train import fit, score
from internvl.evaluate.segmenter import (
    IGNORED,
    Segmenter,
    distorted,
    groups,
    layer_level,
    overlay,
    palette,
    rate_at,
    scaled_pixels,
    task_of,
    training_crop,
)
from internvl.models.internvit import InternViT
from tiny import tiny_dual

SETTINGS = SegmentSettings(
    iterations=4, train_batch=2, crop_px=28, stride_px=21, learning_rate=0.02, warmup=2, upernet_width=4, save_every=2
)


def make_ade(folder: Path, train: int = 4, test: int = 3) -> Path:
    """Dark left and bright right halves, at random places; class 0 ("other") along the border."""
    for split, count in (("training", train), ("validation", test)):
        for n in range(count):
            draw = np.random.default_rng(len(split) * 100 + n)
            edge = int(draw.integers(20, 60))
            mask = np.full((60, 80), 2, dtype=np.uint8)
            mask[:, :edge] = 1
            pixels = np.where(mask[..., None] == 1, 30, 220) + draw.integers(-20, 20, (60, 80, 3))
            mask[:2] = 0
            for kind, array in (("images", pixels.astype(np.uint8)), ("annotations", mask)):
                path = folder / kind / split / f"p{n}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
    return folder


def segmenter(settings: SegmentSettings, seed: int = 0) -> Segmenter:
    torch.manual_seed(seed)
    return Segmenter(tiny_dual().vision, 2, settings)


@pytest.mark.parametrize("kind", ["linear", "head", "full", "few"])
def test_a_resumed_training_is_the_uninterrupted_one(kind: str, tmp_path: Path) -> None:
    data = read_ade20k(make_ade(tmp_path / "ade"), "training")
    settings = replace(SETTINGS, kind=kind, learning_rate=1e-3)
    whole, cut, again = (segmenter(settings) for _ in range(3))
    before = {key: x.clone() for key, x in whole.state_dict().items()}
    fit(whole, data, 2, settings, tmp_path / "whole", "same")
    fit(cut, data, 2, settings, tmp_path / "cut", "same", stop=2)
    done: list[int] = []
    fit(again, data, 2, settings, tmp_path / "cut", "same", advance=done.append)
    assert done[0] == 2
    for key, x in whole.state_dict().items():
        assert torch.equal(x, again.state_dict()[key]), key
        moved = not torch.equal(x, before[key])
        if key.startswith("vision."):
            assert moved == (kind in ("full", "few")), key
    assert any(not torch.equal(x, before[key]) for key, x in whole.state_dict().items() if "head" in key)
    with pytest.raises(ValueError, match="of another run"):
        fit(again, data, 2, settings, tmp_path / "cut", "other")


def test_the_command_learns_scores_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_dual(tmp_path / "m")
    make_ade(tmp_path / "ade", 6, 4)
    (tmp_path / "ade/images/validation/p3.png").write_bytes(b"\x89PNG")
    words = ["evaluate", "segment", "m", "ade", "--classes", "2", "--iterations", "24", "--train-batch", "3"]
    words += ["--crop", "56", "--stride", "42", "--rate", "0.05", "--warmup", "4", "--save-every", "12"]
    words += ["--dtype", "float32", "--out", "o", "--name", "ADE20K"]
    assert cli.main(words) == 3
    (result,) = json.loads(Path("o/result.json").read_text())["results"]
    assert result["scores"]["mean IoU"] > 0.7
    assert result["task"] == "segmentation, linear probe"
    assert (result["head"], result["counts"]["pictures"]) == ("encoder", 3)
    assert "p3.png" in result["left_out"][0]["source"]
    assert any("crop_px: 56 here, 504 in the paper" in why for why in result["published"]["why_not"])
    assert Path("o/sheet.html").read_text().count("data:image/jpeg") == 3 * 3
    assert Image.open("o/sheet.png").width > 0
    stamp = Path("o/segmenter.safetensors").stat().st_mtime_ns
    assert cli.main(words) == 3
    assert Path("o/segmenter.safetensors").stat().st_mtime_ns == stamp
    assert json.loads(Path("o/result.json").read_text())["results"][0]["scores"] == result["scores"]


def test_other_classes_and_masks_are_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was counted with other masks is no score of these; weights of another head do not fit."""
    monkeypatch.chdir(tmp_path)
    make_dual(tmp_path / "m")
    make_ade(tmp_path / "ade", 2, 3)
    Image.new("L", (9, 9), 1).save("ade/annotations/validation/p1.png")
    words = ["evaluate", "segment", "m", "ade", "--iterations", "1", "--train-batch", "2", "--crop", "56"]
    words += ["--stride", "42", "--dtype", "float32", "--out", "o", "--no-sheet"]
    assert cli.main([*words, "--classes", "2"]) == 3
    assert "a mask of 9 x 9 px for a picture of 80 x 60" in " ".join(capsys.readouterr().out.split())
    for other in (["--classes", "3"], ["--classes", "3", "--no-reduce-zero"]):
        assert cli.main([*words, *other]) == 1
        assert "of another run; give another --out" in capsys.readouterr().err
    for limit in ("0", "-1"):
        assert cli.main([*words, "--classes", "2", "--limit", limit]) == 1
        assert f"--limit {limit}; at least one item is needed" in capsys.readouterr().err


def test_few_shot_tunes_the_encoder_under_the_head_of_the_linear_probe() -> None:
    """Table 23: the last block, one map, weight decay 0.05, layer decay 0.95, drop path 0.4."""
    settings = replace(SETTINGS, kind="few", share=16)
    model = segmenter(settings)
    assert model.taps == (model.vision.config.depth,)
    assert type(model.head) is type(segmenter(SETTINGS).head)
    assert all(parameter.requires_grad for parameter in model.vision.parameters())
    assert (settings.weight_decay, settings.layer_decay, settings.drop_path) == (0.05, 0.95, 0.4)
    for share in (1, 2, 4, 8, 16):
        task = task_of(replace(settings, share=share))
        assert published("InternViT-6B-224px", task, "ADE20K", "mean IoU")
        paper = PROTOCOLS[task]
        assert (paper["share"], paper["iterations"]) == (share, 80_000 // share)


def test_counts_go_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from internvl.evaluate import segment_train

    data = read_ade20k(make_ade(tmp_path / "ade", 1, 5), "validation")
    model, seen = segmenter(SETTINGS), []
    whole, _ = score(model, data, 2, SETTINGS, tmp_path / "whole", "same")
    monkeypatch.setattr(segment_train, "SCORED_AT_ONCE", 2)
    original = segment_train.predict

    def predict(*arguments: object) -> torch.Tensor:
        seen.append(1)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(segment_train, "predict", predict)
    with pytest.raises(KeyboardInterrupt):
        score(model, data, 2, SETTINGS, tmp_path / "cut", "same")
    again, _ = score(model, data, 2, SETTINGS, tmp_path / "cut", "same")
    assert len(seen) == 4 + 3
    assert torch.equal(again.counts, whole.counts)
    assert again.num_ignored == whole.num_ignored == 5 * 2 * 80
    assert isinstance(again, Confusion)


def test_taps_decay_and_parameters_are_the_papers() -> None:
    vision = VisionConfig(
        width=3200, depth=48, heads=25, mlp_width=12800, image_size=224, norm="rms_norm", qkv_bias=False, qk_norm=True
    )
    with torch.device("meta"):
        encoder = InternViT(vision)
        linear = Segmenter(encoder, 150, SegmentSettings())
        head = Segmenter(encoder, 150, SegmentSettings(kind="head"))
    assert linear.taps == (45,)  # hidden state 45 is the output of block 44, counted from 0
    assert head.taps == (12, 24, 36, 48)
    learned = sum(p.numel() for p in linear.parameters() if p.requires_grad)
    assert learned == 486_550
    full = SegmentSettings(kind="full")
    assert (full.layer_decay, full.drop_path, full.weight_decay) == (0.95, 0.4, 0.05)
    assert (layer_level("vision.embeddings.class_embedding", 48), layer_level("vision.layers.0.x", 48)) == (0, 1)
    assert (layer_level("vision.layers.47.x", 48), layer_level("head.x", 48)) == (48, 49)
    tiny = segmenter(replace(SETTINGS, kind="full"))
    scales = {round(float(group["scale"]), 6) for group in groups(tiny, replace(SETTINGS, kind="full"))}
    assert {1.0, 0.95} <= scales
    assert min(scales) == pytest.approx(0.95 ** (tiny.vision.config.depth + 1), abs=1e-6)
    assert all(group["scale"] == 1 for group in groups(segmenter(SETTINGS), SETTINGS))


def test_the_rate_rises_and_falls() -> None:
    settings = SegmentSettings()
    assert rate_at(0, settings) == pytest.approx(1e-6)
    assert rate_at(1500, settings) == pytest.approx(1 - 1500 / 80_000)
    assert rate_at(79_999, settings) == pytest.approx(1 / 80_000)


@given(
    width=st.integers(1, 150),
    height=st.integers(1, 150),
    seed=st.integers(0, 99),
)
def test_a_crop_keeps_picture_and_mask_together(width: int, height: int, seed: int) -> None:
    """The mask is written into the picture's brightness: wherever a pixel is scored, both still agree."""
    truth = torch.from_numpy(np.random.default_rng(seed).integers(0, 2, (height, width)))
    truth = truth.repeat_interleave(4, 0).repeat_interleave(4, 1)
    shown = Image.fromarray((truth.numpy()[..., None] * 255).astype(np.uint8).repeat(3, 2))
    pixels, mask = training_crop(shown, truth, 56, np.random.default_rng(seed))
    assert pixels.shape == (3, 56, 56)
    assert mask.shape == (56, 56)
    scored = mask != IGNORED
    assert bool(scored.any())
    assert float((pixels.mean(0)[scored & (mask == 1)]).sum()) >= float((pixels.mean(0)[scored & (mask == 0)]).sum())
    assert bool((pixels[:, ~scored] == 0).all())


def test_colours_stay_in_range_and_follow_the_generator() -> None:
    array = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    made = [distorted(array, np.random.default_rng(seed)) for seed in range(20)]
    assert all(one.dtype == np.uint8 and one.shape == array.shape for one in made)
    assert np.array_equal(made[3], distorted(array, np.random.default_rng(3)))
    assert len({one.tobytes() for one in made}) > 15


@pytest.mark.parametrize(("width", "height"), [(60, 40), (40, 60), (500, 50), (7, 7)])
def test_test_pictures_are_whole_patches(width: int, height: int) -> None:
    pixels = scaled_pixels(Image.new("RGB", (width, height)), 56, 14)
    rows, columns = pixels.shape[-2:]
    assert rows % 14 == columns % 14 == 0
    assert max(rows, columns) <= 4 * 56 + 14
    assert min(rows, columns) >= min(56, 4 * 56 * min(width, height) // max(width, height))


def test_overlays_leave_what_is_not_scored() -> None:
    colours = palette(150)
    assert len(set(colours)) > 100
    base = Image.new("RGB", (4, 2), (100, 100, 100))
    classes = torch.tensor([[0, 1, IGNORED, 0], [1, 1, 0, IGNORED]])
    made = np.asarray(overlay(base, classes, colours))
    assert (made[0, 2] == 100).all()
    assert (made[0, 0] == made[0, 3]).all()
    assert (made[0, 0] != made[0, 1]).any()


def test_bad_settings_and_masks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the stride at most the crop"):
        SegmentSettings(stride_px=600)
    with pytest.raises(ValueError, match="they must be a multiple of 14"):
        segmenter(replace(SETTINGS, crop_px=60))
    with pytest.raises(ValueError, match="needs --dtype float32"):
        Segmenter(tiny_dual().vision.to(torch.bfloat16), 2, replace(SETTINGS, kind="full"))
    folder = make_ade(tmp_path / "ade")
    Image.new("L", (9, 9), 1).save(folder / "annotations/training/p0.png")
    assert read_mask(folder / "annotations/training/p0.png").shape == (9, 9)
    with pytest.raises(ValueError, match="a mask of 9 x 9 px for a picture of 80 x 60"):
        fit(segmenter(SETTINGS), read_ade20k(folder, "training")[:1], 2, SETTINGS, tmp_path / "o", "i")
