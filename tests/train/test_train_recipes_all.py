"""Every recipe of a released model: it runs on a tiny model of its family; numbers of papers and scripts."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from internvl.commands.train import main
from internvl.train import dry, log
from internvl.train.dry import dry_run, tiny_like
from internvl.train.recipes import GROUPS, RECIPES, find_recipe, mini, official, v1_5, v2_0, v2_5
from internvl.train.run import RunConfig, from_json, to_json
from internvl.train.trainable import choose
from internvl.zoo import RELEASED
from tiny import tiny_model

OFFICIAL = [name for name, recipe in RECIPES.items() if recipe.release]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models and records, made once for all recipes."""
    return tmp_path_factory.mktemp("dry")


@pytest.fixture(autouse=True)
def _nothing_drawn_or_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "draw_curve", lambda *_: None)
    monkeypatch.setenv("INTERNVL_CACHE", str(folder / "cache"))


@pytest.mark.parametrize("name", OFFICIAL)
def test_runs(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry, "STEPS", 1)  # the command's own two steps: test_the_command
    monkeypatch.setattr(dry, "MOST_ACCUMULATED", 1)
    recipe = RECIPES[name]
    run = recipe.make()
    out = folder / "out"
    if out.exists():
        out.rename(tmp_path / "before")
    found = dry_run(run, recipe.release, folder)
    assert found.steps == len(found.losses) == 1
    assert all(0 < loss < 8 for loss in found.losses)
    assert found.norm > 0
    parts = {part for part in ("vision", "connector", "language") if run.part(part).learn != "frozen"}
    assert {text.split()[0] for text in found.learns} - {"projections"} == parts
    kept = json.loads((out / "run.json").read_text())
    changed = {"out", "model", "device", "accumulate", "log_every", "save_every", "eval_every", "compile"}
    for field, value in json.loads(json.dumps(to_json(run))).items():
        if field not in {*changed, "data", "schedule", "distill"}:
            assert kept[field] == value, field
    for field in (
        "packed",
        "grouped",
        "batch_tokens",
        "batch_tiles",
        "max_length",
        "max_tiles",
        "weighting",
        "augment",
    ):
        assert kept["data"][field] == getattr(run.data, field)
    for field in ("warmup_steps", "warmup_share", "over"):
        assert kept["schedule"][field] == getattr(run.schedule, field)
    config = json.loads((out / "model" / "config.json").read_text())
    like = RELEASED[recipe.release].config
    assert (config["template"], config["ps_version"]) == (like.template, like.pixel_shuffle)
    assert config["vision_config"]["qk_normalization"] == like.vision.qk_norm


def test_a_broken_recipe_fails(folder: Path, tmp_path: Path) -> None:
    run = replace(RECIPES["v2_5_stage1_8b"].make(), connector=replace(official.Part()))
    (folder / "out").rename(tmp_path / "before") if (folder / "out").exists() else None
    with pytest.raises(ValueError, match="nothing learns"):
        dry_run(run, "InternVL2_5-8B", folder)


def test_every_release_has_a_recipe() -> None:
    """But for those of preference optimisation, which are another stage."""
    trained = {recipe.release for recipe in RECIPES.values()}
    assert {name for name in RELEASED if not name.endswith("-MPO")} == trained - {""}


@pytest.mark.parametrize("name", OFFICIAL)
def test_says_what_it_starts_from(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = RECIPES[name]
    run = recipe.make()
    assert run.out == f"runs/{name}"
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert "Source:" in (recipe.make.func.__doc__ or "")  # type: ignore[attr-defined]
    if run.model.startswith("OpenGVLab/"):
        assert run.model.split("/")[1] in RELEASED
        recipe.prepare(run)
        return
    with pytest.raises(ValueError, match=r"internvl (train|compose) ") as caught:
        recipe.prepare(run)
    if "internvl train" in str(caught.value):
        assert str(caught.value).split("`")[1].split()[-1] in RECIPES
    Path(run.model).mkdir(parents=True)
    (Path(run.model) / "config.json").write_text("{}")
    recipe.prepare(run)


def run_of(name: str) -> RunConfig:
    return RECIPES[name].make()


def row(run: RunConfig) -> tuple[Any, ...]:
    """What learns, rate, samples a step, decay, drop path, positions, tiles."""
    parts = "".join(p[0] for p in ("vision", "connector", "language") if run.part(p).learn == "full")
    parts += "".join(f"{p[0]}~{run.part(p).rank}" for p in ("vision", "language") if run.part(p).learn == "lora")
    size = (run.data.batch_samples or 1) * run.accumulate
    optimiser, data = run.optimiser, run.data
    return parts, optimiser.peak_lr, size, optimiser.weight_decay, run.vision.drop_path, data.max_length, data.max_tiles


TABLE = {  # official shell/internvl1.2 to 2.5, shell/mini_internvl; paper 2.5, table 3
    "v1_2_sft": ("vcl", 1e-5, 512, 0.05, 0.4, 2048, 1),
    "v1_2_finetune": ("cl", 1e-5, 128, 0.05, 0.0, 2048, 1),
    "v1_2_finetune_lora": ("l~16", 1e-5, 16, 0.05, 0.0, 2048, 1),
    "v1_5_pretrain_20b": ("vc", 1e-5, 2048, 0.05, 0.2, 4096, 12),
    "v1_5_sft_20b": ("vcl", 2e-5, 1024, 0.05, 0.4, 4096, 12),
    "v1_5_pretrain_34b": ("c", 1e-4, 2048, 0.05, 0.0, 4096, 12),
    "v1_5_sft_34b": ("vcl", 2e-5, 1024, 0.05, 0.4, 4096, 12),
    "v1_5_finetune_20b": ("cl", 2e-5, 128, 0.05, 0.4, 4096, 12),
    "mini_pretrain_2b": ("vc", 2e-5, 2048, 0.01, 0.1, 4096, 12),
    "mini_sft_2b": ("vcl", 4e-5, 1024, 0.01, 0.1, 8192, 12),
    "mini_pretrain_4b": ("c", 2e-4, 2048, 0.05, 0.0, 4096, 12),
    "mini_sft_4b": ("vcl", 4e-5, 1024, 0.05, 0.1, 8192, 12),
    "mini_finetune_2b": ("cl", 4e-5, 128, 0.01, 0.1, 4096, 12),
    "mini_finetune_lora_4b": ("l~16", 4e-5, 16, 0.05, 0.0, 4096, 12),
    "v2_0_finetune_1b": ("cl", 4e-5, 128, 0.01, 0.1, 4096, 6),
    "v2_0_finetune_8b": ("cl", 4e-5, 128, 0.05, 0.1, 4096, 6),
    "v2_0_finetune_lora_76b": ("l~16", 2e-5, 16, 0.05, 0.0, 4096, 6),
    "v2_5_finetune_26b": ("cl", 2e-5, 128, 0.05, 0.4, 8192, 6),
    "v2_5_finetune_lora_4b": ("l~16", 4e-5, 16, 0.01, 0.0, 8192, 6),
    "v2_5_stage1_78b": ("c", 2e-4, 512, 0.05, 0.0, 16384, 12),
    "v2_5_stage1_5_8b": ("vc", 1e-5, 1024, 0.05, 0.1, 16384, 12),
    "v2_5_stage1_5_26b": ("vc", 1e-5, 1024, 0.05, 0.4, 16384, 12),
    "v2_5_stage2_4b": ("vcl", 4e-5, 512, 0.01, 0.1, 16384, 12),
    "v2_5_stage2_38b": ("vcl", 2e-5, 512, 0.05, 0.4, 16384, 12),
    "mini_adapt_bdd_2b": ("vcl", 1e-5, 64, 0.01, 0.1, 8192, 12),
    "mini_adapt_drivelm_1b": ("vcl", 1e-5, 8, 0.01, 0.1, 8192, 12),
    "mini_adapt_medical_4b": ("vcl", 1e-5, 64, 0.01, 0.1, 8192, 12),
}


@pytest.mark.parametrize("name", TABLE)
def test_numbers(name: str) -> None:
    assert row(run_of(name)) == TABLE[name]


def test_second_fine_tuning_starts_from_the_release_that_the_script_names() -> None:
    assert run_of("v1_2_finetune").model == run_of("v1_2_finetune_lora").model == "OpenGVLab/InternVL-Chat-V1-2-Plus"


def test_steps_of_2_5() -> None:
    """Table 3: tokens of stages 1 and 1.5 in rows of 16,384; max_steps of stage 2 in the scripts."""
    assert run_of("v2_5_stage1_2b").schedule.steps == round(277e9 / (512 * 16384)) == 33021
    assert run_of("v2_5_stage1_5_26b").schedule.steps == round(146e9 / (1024 * 16384))
    steps = {size: run_of(f"v2_5_stage2_{size}").schedule.steps for size in v2_5.SIZES}
    assert list(steps.values()) == [22000, 22000, 11000, 5500, 5500, 5500, 5500]
    # 5,500 steps of 512 full rows are 46 billion positions, of which 44 billion tokens: rows are nearly full
    assert 44e9 < 5500 * 512 * 16384 < 47e9


def test_progressive_scaling() -> None:
    """Only 8b and 26b train the ViT under a small language model; the others start from what these made."""
    assert [name for name in RECIPES if name.startswith("v2_5_stage1_5")] == ["v2_5_stage1_5_8b", "v2_5_stage1_5_26b"]
    for size in ("1b", "2b", "4b", "38b", "78b"):
        assert "V2_5" in v2_5.SIZES[size].vision
        assert run_of(f"v2_5_stage2_{size}").model == f"runs/v2_5_stage1_{size}/model"
    for size in ("8b", "26b"):
        assert "V2_5" not in v2_5.SIZES[size].vision
        assert run_of(f"v2_5_stage2_{size}").model == f"runs/v2_5_stage1_5_{size}/model"


def test_the_scripts_share() -> None:
    for name in OFFICIAL:
        run = run_of(name)
        assert (run.precision, run.grad_checkpoint, run.optimiser.clip) == ("bf16", True, 1.0), name
        assert (run.optimiser.betas, run.optimiser.eps) == ((0.9, 0.999), 1e-8), name
        assert run.connector.lr_scale == run.vision.lr_scale == run.language.lr_scale == 1.0, name
        packed = name.startswith(("v2_5_stage", "mini_adapt"))
        assert (run.data.packed, run.data.weighting == "square") == (packed, packed), name
    assert v1_5.RELEASES["34b"] == v2_0.RELEASES["40b"]
    assert set(mini.ADAPTED) == {f"{d}_{s}" for d in mini.DOMAINS for s in ("1b", "2b", "4b")}


def test_drop_path_of_a_run_replaces_that_of_the_model() -> None:
    model = tiny_model(vision="6b")
    depth = len(model.vision.layers)
    run = replace(run_of("v1_2_sft"), precision="fp32")
    choose(model, run)
    rates = [block.drop_path.rate for block in model.vision.layers]
    assert rates == pytest.approx([0.4 * index / (depth - 1) for index in range(depth)])
    choose(model, replace(run, vision=official.Part("full")))
    assert [block.drop_path.rate for block in model.vision.layers] == rates  # not given: as it is
    with pytest.raises(ValueError, match="only the vision part drops paths"):
        replace(run, language=official.Part("full", drop_path=0.1))


def test_tiny_like_keeps_the_tap() -> None:
    config = tiny_like(RELEASED["InternVL-Chat-V1-1"].config)
    assert config.vision.depth + 1 + config.feature_layer == 3  # three blocks still run
    assert (config.pixel_shuffle, config.dynamic_tiles, config.vision.qk_norm) == ("v1", False, True)


def test_the_command(capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["v2_5_finetune_lora_1b", "--dry-run", "--json", "--optimiser.peak-lr", "1e-3"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learns"] == ["language rate 0.001"]
    assert any(text.startswith("model: 'OpenGVLab/InternVL2_5-1B'") for text in found["changed"])
    assert not list(tmp_path.iterdir())
    assert main(["pocket_sft", "--dry-run"]) == 0
    assert "changed for the dry run" in capsys.readouterr().out


def test_the_list_is_grouped_and_short(capsys: Any) -> None:
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) < 90
    assert max(map(len, lines)) <= 120
    assert [line for line in lines if not line.startswith(" ")] == list(GROUPS)
    for name, recipe in RECIPES.items():
        shown = f"{recipe.family}_SIZE" if recipe.family not in ("", name) else name
        assert any(line.split()[0] == shown for line in lines), name


def test_a_name_that_is_near(capsys: Any) -> None:
    with pytest.raises(ValueError, match=r"v2_5_stage2_SIZE.*near it: .*v2_5_stage2_8b"):
        find_recipe("v2_5_stage2_7b")
