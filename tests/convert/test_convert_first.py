"""Files of InternVL-Chat 1.0: our layout there and back; folders as released, with the tower beside or inside."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import internvl
from hostile import trap
from internvl.cli import main
from internvl.convert.keys import expand
from internvl.convert.llava import llava_rules
from internvl.convert.official import from_official, to_official
from internvl.load import load_checkpoint, save_checkpoint
from internvl.load_dual import save_dual
from internvl.models.build import build_dual
from internvl.models.chat import ChatModel
from internvl.opened import FirstGeneration
from internvl.tokens import IMAGE_TOKEN
from internvl.zoo import CHAT
from tiny import IMAGE_TOKEN_ID, plain_tokenizer, tiny_first, tiny_pictures

FORMS = ["tiny-1.0", "tiny-1.0-qllama"]
# Fields of hub: InternVL-Chat-ViT-6B-Vicuna-7B, config.json, beside the sizes.
AS_RELEASED: dict[str, Any] = {
    "_name_or_path": "InternVL-Chat-ViT-6B-Vicuna-7B",
    "architectures": ["LlavaLlamaForCausalLM"],
    "freeze_mm_mlp_adapter": False,
    "image_aspect_ratio": "pad",
    "image_grid_pinpoints": None,
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -4,
    "model_type": "llava",
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "tune_mm_mlp_adapter": False,
    "use_cache": True,
    "use_mm_proj": True,
}
INSIDE = "model.vision_tower.vision_tower."


def logits(model: ChatModel, image_token_id: int) -> torch.Tensor:
    tokens = model.config.tokens_per_tile
    text = torch.randint(10, 160, (1, 9), generator=torch.Generator().manual_seed(1))
    ids = torch.cat([text[:, :4], torch.full((1, tokens), image_token_id), text[:, 4:]], dim=1)
    with torch.no_grad():
        return model(ids, tiny_pictures(1))


def equal(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


# our layout


@pytest.mark.parametrize("name", FORMS)
def test_written_back_identically(name: str, tmp_path: Path) -> None:
    model = tiny_first("qllama" in name)
    save_checkpoint(model, None, tmp_path / "one")
    loaded = load_checkpoint(tmp_path / "one")
    assert (loaded.config, loaded.layout) == (model.config, "official")
    equal(loaded.model.state_dict(), model.state_dict())
    save_checkpoint(loaded.model, None, tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert torch.equal(logits(loaded_with(loaded.model), 9), logits(model, 9))
    keys = load_file(tmp_path / "one" / "model.safetensors").keys()
    assert ("query_tokens" in keys) == ("mlp2.1.weight" in keys) == (model.qllama is not None)
    assert "mlp1.0.weight" not in keys


def loaded_with(model: ChatModel) -> ChatModel:
    model.image_token_id = IMAGE_TOKEN_ID
    return model


@pytest.mark.parametrize("name", FORMS)
def test_config_there_and_back(name: str) -> None:
    config = CHAT[name]
    assert from_official(json.loads(json.dumps(to_official(config)))) == config
    changed = replace(config, image_marks=True, connector_norm=True, crop=False)
    assert from_official(to_official(changed)) == changed
    own = {key for key in to_official(changed) if key.startswith("internvl_")}
    assert own == ({"internvl_queries"} if config.queries is not None else set())  # usual values are not written


def test_keys_are_strict(tmp_path: Path) -> None:
    save_checkpoint(tiny_first(), None, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "query_tokens"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="1 keys missing: query_tokens"):
        load_checkpoint(tmp_path)
    save_file({**state, "mlp2.0.weight": torch.ones(80)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys that the model does not use: mlp2\.0\.weight"):
        load_checkpoint(tmp_path)


def test_there_is_no_native_form(tmp_path: Path) -> None:
    for queries in (True, False):
        with pytest.raises(ValueError, match=r"1\.0 has no native form"):
            save_checkpoint(tiny_first(queries), None, tmp_path / "x", "native")


# as released


def tower(model: ChatModel, folder: Path) -> dict[str, torch.Tensor]:
    """An InternViT folder, or InternVL-G with texts and heads that the chat model does not have; its weights."""
    if model.config.queries is None:
        save_checkpoint(model, None, folder)
        stored = load_file(folder / "model.safetensors")
        weights = {k.removeprefix("vision_model."): v for k, v in stored.items() if k.startswith("vision_model.")}
        save_file(weights, folder / "model.safetensors")
        settings = json.loads((folder / "config.json").read_text())["vision_config"]
        (folder / "config.json").write_text(json.dumps(settings))
        return weights
    assert model.qllama is not None
    dual = build_dual(model.config.queries)
    dual.vision.load_state_dict(model.vision.state_dict())
    dual.qllama.load_state_dict(model.qllama.state_dict(), strict=False)
    save_dual(dual, None, folder)
    return load_file(folder / "model.safetensors")


def released(model: ChatModel, folder: Path, tokenizer: Any = None, **changes: Any) -> Path:
    """The folder of a chat model as it was released, its keys spelled out; `changes` of config.json."""
    config, state = model.config, model.state_dict()
    first = "mlp1." if config.queries is not None else ""
    names = {f"connector.fc1.{leaf}": f"model.mm_projector.{first}0.{leaf}" for leaf in ("weight", "bias")}
    names |= {f"connector.fc2.{leaf}": f"model.mm_projector.{first}2.{leaf}" for leaf in ("weight", "bias")}
    for number, layer in ((0, "query_fc1"), (2, "query_fc2")):
        names |= {
            f"connector.{layer}.{leaf}": f"model.mm_projector.mlp2.{number}.{leaf}" for leaf in ("weight", "bias")
        }
    prefix = "language.model."
    weights = {name: state[ours] for ours, name in names.items() if ours in state}
    weights |= {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    width = config.vision.width if config.queries is None else config.queries.language.width
    projector = "mlp2x_gelu" if config.queries is None else "two_mlp"
    settings = {**config.language.settings, **AS_RELEASED, "mm_hidden_size": width, "mm_projector_type": projector}
    settings["mm_vision_tower"] = "./pretrained/intern_vit_6b_224px"
    folder.mkdir()
    save_file({key: value.contiguous().clone() for key, value in weights.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**settings, **changes}))
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("queries", [True, False])
def test_a_released_folder_and_its_tower(queries: bool, tmp_path: Path) -> None:
    model = tiny_first(queries)
    tower(model, tmp_path / "tower")
    folder = released(model, tmp_path / "chat")
    loaded = load_checkpoint(folder, first=FirstGeneration(tmp_path / "tower", 56))
    assert loaded.layout == "llava"
    equal(loaded.model.state_dict(), model.state_dict())
    mine, theirs = loaded.config, model.config
    assert replace(mine, language=theirs.language, queries=theirs.queries) == theirs
    assert torch.equal(logits(loaded_with(loaded.model), 9), logits(model, 9))
    assert internvl.load(folder, vision_tower=tmp_path / "tower", tile_size=56).config == mine


@pytest.mark.parametrize("queries", [True, False])
def test_converted_to_our_layout(queries: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a tokenizer that has no token for pictures, as Vicuna's: it gets a name, and no row."""
    words = plain_tokenizer()
    model = tiny_first(queries, vocab_size=len(words))
    tower(model, tmp_path / "tower")
    folder = released(model, tmp_path / "chat", words)
    command = ["convert", str(folder), str(tmp_path / "new"), "--vision-tower", str(tmp_path / "tower")]
    assert main([*command, "--tile-size", "56", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["from"] == "llava"
    loaded = load_checkpoint(tmp_path / "new")
    equal(loaded.model.state_dict(), model.state_dict())
    assert loaded.tokenizer.get_vocab()[IMAGE_TOKEN] == len(words) == loaded.model.language.vocab_size
    assert loaded.model.image_token_id == len(words)
    assert torch.equal(logits(loaded.model, len(words)), logits(model, 9))
    assert main(["doctor", str(tmp_path / "new"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["conflicts"] == 0


@pytest.mark.parametrize("queries", [True, False])
def test_a_tower_inside_is_taken_first(queries: bool, tmp_path: Path) -> None:
    """The released folders hold the tower too; sizes then come from a folder, or from the name of a release."""
    model = tiny_first(queries)
    inside = tower(model, tmp_path / "tower")
    kept = {k: v for k, v in inside.items() if not k.startswith(("clip_", "itm_", "text_", "logit_"))}
    folder = released(model, tmp_path / "chat")
    state = load_file(folder / "model.safetensors")
    save_file({**state, **{INSIDE + k: v for k, v in kept.items()}}, folder / "model.safetensors")
    other = tiny_first(queries, seed=5)
    tower(other, tmp_path / "other")
    for seen in ("tower", "other"):
        loaded = load_checkpoint(folder, first=FirstGeneration(tmp_path / seen, 56))
        equal(loaded.model.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match=r"'intern_vit_6b_224px' is none of InternViT-6B-224px, .*--vision-tower"):
        load_checkpoint(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["mm_vision_tower"] = "OpenGVLab/InternVL-14B-224px" if queries else "OpenGVLab/InternViT-6B-224px"
    settings["mm_hidden_size"] = 4096 if queries else 3200
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"\d+ keys missing: "):
        load_checkpoint(folder)  # the sizes of the release are found, and are not these


@pytest.mark.parametrize("queries", [True, False])
def test_every_key_has_one_rule(queries: bool) -> None:
    model = tiny_first(queries)
    entries = expand(llava_rules(model.config), model.state_dict())
    disk = [key for entry in entries for key in entry.disk]
    assert len(disk) == len(set(disk)) == len(model.state_dict())


def test_pixels_follow_the_name_of_the_tower(tmp_path: Path) -> None:
    """336 px unless the name says 448 (official clip_encoder.py); positions may be stored for that size."""
    model = tiny_first(False)
    model.config = replace(model.config, tile_size=336)
    model.resize_positions()
    tower(model, tmp_path / "tower")
    settings = json.loads((tmp_path / "tower" / "config.json").read_text())
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**settings, "image_size": 56}))
    folder = released(model, tmp_path / "chat", mm_vision_tower="InternViT-6B-224px")
    loaded = load_checkpoint(folder, first=FirstGeneration(tmp_path / "tower"))
    assert (loaded.config.tile_size, loaded.config.vision.image_size, loaded.config.tokens_per_tile) == (336, 336, 576)
    equal(loaded.model.state_dict(), model.state_dict())
    sharp = released(
        model, tmp_path / "sharp", mm_vision_tower="x/InternViT-6B-448px-V1-0", image_aspect_ratio="square"
    )
    with pytest.raises(ValueError, match="position_embedding is 1x577x64, must be 1x17x64"):
        load_checkpoint(sharp, first=FirstGeneration(tmp_path / "tower"))
    (tmp_path / "tower" / "config.json").write_text(json.dumps({**settings, "image_size": 336}))
    config = load_checkpoint(sharp, first=FirstGeneration(tmp_path / "tower")).config
    assert (config.tile_size, config.tokens_per_tile, config.pad_to_square) == (448, 1024, False)


def test_a_pickle_is_read_where_it_is_allowed_and_runs_nothing(tmp_path: Path) -> None:
    model = tiny_first(False)
    tower(model, tmp_path / "tower")
    folder = released(model, tmp_path / "chat")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin but no safetensors"):
        load_checkpoint(folder, first=FirstGeneration(tmp_path / "tower", 56))
    loaded = load_checkpoint(folder, first=FirstGeneration(tmp_path / "tower", 56, allow_pickle=True))
    equal(loaded.model.state_dict(), model.state_dict())


def test_no_code_runs(tmp_path: Path) -> None:
    model = tiny_first(True)
    tower(model, tmp_path / "tower")
    folder = released(model, tmp_path / "chat", plain_tokenizer())
    marks = {trap(folder), trap(tmp_path / "tower")}
    load_checkpoint(folder, first=FirstGeneration(tmp_path / "tower", 56))
    assert not any(mark.exists() for mark in marks)


def test_what_does_not_fit_is_said(tmp_path: Path) -> None:
    asking, plain = tiny_first(True), tiny_first(False)
    tower(asking, tmp_path / "g")
    tower(plain, tmp_path / "vit")
    g, vit = (FirstGeneration(tmp_path / name, 56) for name in ("g", "vit"))
    folder = released(plain, tmp_path / "chat")
    with pytest.raises(ValueError, match="intern_vit_6b_224px lies in a folder of its own; give it: --vision-tower"):
        load_checkpoint(folder)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_checkpoint(folder, first=FirstGeneration(tmp_path / "missing", 56))
    with pytest.raises(ValueError, match="mm_projector_type is 'mlp2x_gelu', but the vision tower has queries"):
        load_checkpoint(folder, first=g)
    with pytest.raises(ValueError, match="mm_projector_type is 'two_mlp', but the vision tower has no queries"):
        load_checkpoint(released(asking, tmp_path / "asking"), first=vit)
    with pytest.raises(ValueError, match=r"model_type is 'llava', must be 'intern_vit_6b'.* or 'internvl'"):
        load_checkpoint(folder, first=FirstGeneration(folder))
    for number, (changes, message) in enumerate(
        (
            ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True, must be false"),
            ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature is 'cls_patch'"),
            ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear', must be one of mlp2x_gelu, two_mlp"),
            ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, the vision tower has 64"),
            ({"mm_vision_select_layer": -9}, "feature layer -9"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            logits(
                loaded_with(load_checkpoint(released(plain, tmp_path / f"odd{number}", **changes), first=vit).model), 9
            )
    state = load_file(folder / "model.safetensors")
    lost = {key: value for key, value in state.items() if key != "model.mm_projector.2.bias"}
    save_file(lost, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys missing: mm_projector\.2\.bias"):
        load_checkpoint(folder, first=vit)
    save_file({**state, "model.mm_projector.4.bias": torch.ones(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 keys that the model does not use: mm_projector\.4\.bias"):
        load_checkpoint(folder, first=vit)
    save_file(state, folder / "model.safetensors")
    seen = load_file(tmp_path / "vit" / "model.safetensors")
    save_file({**seen, "head.weight": torch.ones(3)}, tmp_path / "vit" / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not use: vision_model\.head\.weight"):
        load_checkpoint(folder, first=vit)


def test_other_commands_say_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = released(tiny_first(False), tmp_path / "chat")
    for command in ("plan", "doctor"):
        assert main([command, str(folder)]) == 1
        said = capsys.readouterr()
        assert "internvl convert" in said.out + said.err
    save_checkpoint(tiny_first(False), None, tmp_path / "ours")
    with pytest.raises(ValueError, match="this is the official layout; leave them out"):
        load_checkpoint(tmp_path / "ours", first=FirstGeneration(tmp_path))
