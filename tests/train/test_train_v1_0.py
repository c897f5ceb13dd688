"""Recipes of InternVL 1.0 and pocket-dual: the paper's numbers, every one in small, the tiny ones as commands."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import internvl
from internvl.commands.train import main
from internvl.load_dual import extend_llama
from internvl.models.build import build_dual
from internvl.train.dry import dry_run
from internvl.train.recipes import RECIPES, find_recipe, v1_0
from internvl.train.run import from_json, to_json
from internvl.train.settings import DUAL_STAGES
from internvl.zoo import DUAL, VISION, VIT_TINY_6B

# recipes


def test_stage_1_begins_with_a_llama(tmp_path: Path) -> None:
    model = build_dual(DUAL["tiny-dual"])
    state = {k.removeprefix("qllama."): v for k, v in official(model).items() if k.startswith("qllama.")}
    state = {k: v.clone() for k, v in state.items() if ".cross_attn." not in k}
    (tmp_path / "config.json").write_text(json.dumps(dict(model.config.language.settings)))
    save_file(state, tmp_path / "model.safetensors")
    sizes = {"num_queries": 5, "embed_width": 24, "pool_heads": 4}
    found = extend_llama(tmp_path, VIT_TINY_6B, seed=3, **sizes).model
    assert torch.equal(found.qllama.layers[1].mlp.up_proj.weight, model.qllama.layers[1].mlp.up_proj.weight)
    assert torch.equal(found.qllama.head.weight, model.qllama.head.weight)
    save_file({**state, "model.extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.extra"):
        extend_llama(tmp_path, VIT_TINY_6B, **sizes)


def official(model: Any) -> dict[str, Tensor]:
    from internvl.convert import dual
    from internvl.convert.keys import expand

    state = model.state_dict()
    return {entry.disk[0]: state[entry.ours[0]] for entry in expand(dual.OFFICIAL_RULES, state)}


def test_recipes_state_the_paper() -> None:
    """Table 20: 28.7 billion pairs at 164K, then 1.6 billion at 20K; half a billion of the first unmasked."""
    first, second, third = v1_0.v1_0_contrastive(), v1_0.v1_0_contrastive_224(), v1_0.v1_0_generative()
    assert first.schedule.steps + second.schedule.steps == 175_000
    assert first.data.batch_samples * 175_000 == pytest.approx(28.7e9, rel=0.01)
    assert second.data.batch_samples * second.schedule.steps == pytest.approx(0.5e9, rel=0.01)
    assert third.data.batch_samples * third.schedule.steps == pytest.approx(1.6e9, rel=0.03)
    assert first.optimiser.peak_lr * first.language.lr_scale == pytest.approx(1e-4)
    assert second.optimiser.peak_lr == pytest.approx(7.95e-7, rel=0.01)
    assert (first.pairs.side, second.pairs.side) == (196, 224)
    assert VISION["InternViT-6B-224px"].image_size == 224
    for run in (first, second, third):
        assert from_json(json.loads(json.dumps(to_json(run)))) == run


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if recipe.make().stage in DUAL_STAGES])
def test_every_recipe_runs_two_steps_in_small(tmp_path: Path, name: str) -> None:
    run = find_recipe(name).make()
    found = dry_run(run, "", tmp_path)
    assert found.steps == len(found.losses) == 2
    assert min(found.losses) > 0
    kept = json.loads((tmp_path / "out" / "run.json").read_text())
    whole = json.loads(json.dumps(to_json(run)))
    for field in ("stage", "vision", "connector", "language", "optimiser", "precision", "grad_checkpoint"):
        assert kept[field] == whole[field], field
    assert kept["pairs"]["mask_share"] == run.pairs.mask_share
    internvl.load(tmp_path / "out" / "model")


def test_the_commands_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Those of the tiny runs as they stand, but for fewer steps; what they leave is named there and opens."""
    page = (Path(__file__).parents[2] / "docs" / "internvl-1.0.md").read_text(encoding="utf-8")
    commands = [words.split() for words in re.findall(r"^internvl train (tiny_\w+)$", page, flags=re.MULTILINE)]
    assert commands == [["tiny_contrastive"], ["tiny_generative"], ["tiny_retrieval"]]
    assert 'internvl.load("runs/tiny_generative/model")' in page
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="internvl train tiny_contrastive"):
        main(commands[1])
    for words in commands:
        assert main([*words, "--schedule.steps", "3", "--device", "cpu", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["finished"]
    assert "held_out_itm" in result["metrics"]
    dual: Any = internvl.load("runs/tiny_generative/model")
    picture = tmp_path / "runs/tiny-dual-inputs/pairs_pictures/red-blue.png"
    assert dual.match([picture], ["red beside blue"]).shape == (1,)
    assert (tmp_path / "runs/tiny_generative/parts/learned.safetensors").is_file()


def test_what_a_recipe_begins_with_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (
        ("v1_0_contrastive", "models/chinese_alpaca_lora_7b"),
        ("v1_0_generative", "v1_0_contrastive_224"),
    ):
        with pytest.raises(ValueError, match=folder):
            find_recipe(name).prepare(find_recipe(name).make())
    recipe = find_recipe("pocket_dual_contrastive")
    with pytest.raises(ValueError, match=r"data/pocket_dual/meta\.json is not there; `internvl data dual` makes it"):
        recipe.prepare(recipe.make())
