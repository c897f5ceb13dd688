"""Files of InternVL-C and -G: both layouts there and back, strict keys, and pickles that are only tensors."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from internvl.convert.pickled import open_pickled
from internvl.load_dual import (
    FINE_TUNED,
    carry_over,
    load_dual,
    load_original,
    load_original_vision,
    save_dual,
    save_original,
)
from internvl.models.build import build_dual
from internvl.models.contrastive import AttentionPooling, DualModel
from internvl.zoo import DUAL
from tiny import tiny_dual, tiny_pictures, tiny_texts

TINY = DUAL["tiny-dual"]


@pytest.fixture(scope="module")
def model() -> DualModel:
    return tiny_dual()


@pytest.fixture
def folder(model: DualModel, tmp_path: Path) -> Path:
    save_dual(model, None, tmp_path / "one")
    return tmp_path / "one"


def equal(a: Any, b: Any) -> None:
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert torch.equal(value, b[key]), key


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    state = {**load_file(folder / "model.safetensors"), **tensors}
    save_file({key: x for key, x in state.items() if x is not None}, folder / "model.safetensors")


# the official folder


def test_written_back_identically(model: DualModel, folder: Path, tmp_path: Path) -> None:
    loaded = load_dual(folder)
    equal(loaded.model.state_dict(), model.state_dict())
    assert loaded.config == TINY
    save_dual(loaded.model, None, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "two" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((folder / "config.json").read_text())["model_type"] == "internvl"


def test_number_types(folder: Path) -> None:
    assert load_dual(folder, dtype=torch.bfloat16).model.logit_scale.dtype == torch.bfloat16
    assert load_dual(folder, dtype=None).model.text_projection.dtype == torch.float32


def test_missing_unused_and_misshapen_keys_are_errors(folder: Path) -> None:
    change(folder, query_tokens=None)
    with pytest.raises(ValueError, match="1 keys missing: query_tokens"):
        load_dual(folder)
    change(folder, query_tokens=torch.zeros(1, 5, 64), temp=torch.zeros(2))
    with pytest.raises(ValueError, match="1 keys that the model does not use: temp"):
        load_dual(folder)
    load_dual(folder, ignore=["temp"])
    change(folder, query_tokens=torch.zeros(1, 6, 64), temp=None)
    with pytest.raises(ValueError, match="query_tokens is 1x6x64, must be 1x5x64"):
        load_dual(folder)


def test_unlisted_tensors_of_the_fine_tuned_checkpoints_are_named_and_left(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their published sizes are 14 MB above their list of tensors; of no other checkpoint such keys are let pass."""
    change(folder, temp=torch.zeros(2), **{"ema.query_tokens": torch.zeros(1)})
    monkeypatch.setitem(DUAL, FINE_TUNED, replace(TINY, image_size=70))
    with pytest.raises(ValueError, match="2 keys that the model does not use"):
        load_dual(folder)
    monkeypatch.setitem(DUAL, FINE_TUNED, TINY)
    with pytest.warns(
        UserWarning, match=r"2 tensors that InternVL-G does not use are left unread: ema\.query_tokens, temp"
    ):
        load_dual(folder)
    change(folder, query_tokens=None)
    with pytest.warns(UserWarning, match="left unread"), pytest.raises(ValueError, match="1 keys missing"):
        load_dual(folder)


def test_stored_rotary_frequencies_are_ignored(folder: Path) -> None:
    change(folder, **{f"qllama.model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.zeros(8) for n in range(4)})
    load_dual(folder)


def test_fine_tuned_positions(tmp_path: Path) -> None:
    """Positions stored for force_image_size while vision_config still names the old size."""
    vision = replace(TINY.vision, image_size=84)
    save_dual(build_dual(replace(TINY, vision=vision, image_size=84)), None, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["vision_config"]["image_size"] = 56
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_dual(tmp_path)
    assert (loaded.config.side, loaded.config.vision.image_size) == (84, 84)


def test_config_without_optional_fields(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    for key in ("label_smoothing", "force_image_size", "use_backbone_lora"):
        del settings[key]
    settings |= {"max_txt_len": 32}
    (folder / "config.json").write_text(json.dumps(settings))
    assert load_dual(folder).config.unknown == {"max_txt_len": 32}
    (folder / "config.json").write_text(json.dumps({**settings, "use_qllama_lora": 16}))
    with pytest.raises(ValueError, match="use_qllama_lora is 16, must be 0"):
        load_dual(folder)
    (folder / "config.json").write_text(json.dumps({**settings, "model_type": "clip"}))
    with pytest.raises(ValueError, match="model_type is 'clip', must be 'internvl'"):
        load_dual(folder)


def test_tied_head_may_be_stored_once(tmp_path: Path) -> None:
    language = replace(TINY.language, settings={**TINY.language.settings, "tie_word_embeddings": True})
    save_dual(tiny_dual(language=language), None, tmp_path)
    for stored in (True, False):
        if not stored:
            change(tmp_path, **{"qllama.lm_head.weight": None})
        loaded = load_dual(tmp_path).model
        assert loaded.qllama.head.weight is loaded.qllama.embed_tokens.weight
    change(tmp_path, **{"qllama.lm_head.weight": torch.zeros(160, 64)})
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true but qllama\.lm_head\.weight differs"):
        load_dual(tmp_path)


# pickled files


def official_state(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_bin_shards_open_when_asked(model: DualModel, folder: Path) -> None:
    state = official_state(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    places = {key: f"pytorch_model-{1 + (n % 2)}.bin" for n, key in enumerate(names)}
    for shard in set(places.values()):
        torch.save({key: state[key] for key in names if places[key] == shard}, folder / shard)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(ValueError, match=r"holds pytorch_model-1\.bin.*are refused"):
        load_dual(folder)
    equal(load_dual(folder, allow_pickle=True).model.state_dict(), model.state_dict())
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"x": "../x.bin"}}))
    with pytest.raises(ValueError, match="no weight_map from keys to names of files beside it"):
        load_dual(folder, allow_pickle=True)


class Trap:
    def __reduce__(self) -> Any:
        return os.mkdir, ("sprung",)


def test_pickles_never_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pth"
    torch.save({"module": {"cls_token": Trap()}}, path)
    with pytest.raises(
        ValueError, match=r"not plain tensors that torch reads with weights_only.*nothing of it was run"
    ):
        open_pickled(path)
    assert not (tmp_path / "sprung").exists()
    cases = {
        "must be a mapping": [torch.zeros(1)],
        "a not tensors": {"a": 3},
        "b not tensors": {"b": torch.zeros(2, dtype=torch.int8)},
        "holds dict": {},
    }
    for message, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=message):
            open_pickled(path)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(ValueError, match="download it again"):
        open_pickled(path)
    with pytest.raises(FileNotFoundError, match="no such file of weights"):
        open_pickled(tmp_path / "none.pth")


# the original names


def original_keys() -> set[str]:
    """Spelled out from the specification for `tiny-dual`."""
    keys = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    block = ["norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight"]
    block += ["attn.proj.weight", "attn.proj.bias", "ls1.gamma", "ls2.gamma"]
    block += [f"mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")]
    keys |= {f"blocks.{n}.{name}" for n in range(3) for name in block}
    layer = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    keys |= {f"transformer.layers.{n}.{name}" for n in range(4) for name in layer}
    keys |= {"transformer.embed_tokens.weight", "transformer.norm.weight", "text_projection", "logit_scale"}
    pool = [f"norm1_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")] + [f"cross_attn.{p}_bias" for p in "qkv"]
    pool += [f"cross_attn.{p}.weight" for p in "qkv"] + ["cross_attn.proj.weight", "cross_attn.proj.bias"]
    return keys | {f"clip_projector.{leaf}" for leaf in pool}


def test_original_names_there_and_back(model: DualModel, tmp_path: Path) -> None:
    path = tmp_path / "internvl_c.pth"
    save_original(model, path)  # the C part of G
    content = torch.load(path, weights_only=True)["module"]
    assert set(content) == original_keys()
    loaded = load_original(path, TINY)
    assert not loaded.config.generative
    ids, pixels = tiny_texts(2, 6), tiny_pictures(2)
    with torch.no_grad():
        assert torch.equal(loaded.encode_text(ids), model.encode_text(ids))
        assert torch.equal(loaded.encode_image(pixels, "c"), model.encode_image(pixels, "c"))
    save_original(loaded, tmp_path / "again.pth")
    equal(torch.load(tmp_path / "again.pth", weights_only=True)["module"], content)
    save_dual(loaded, None, tmp_path / "folder")  # and through a folder of our own
    equal(load_dual(tmp_path / "folder").model.state_dict(), loaded.state_dict())


def test_original_files_are_strict(model: DualModel, tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    save_original(model, path)
    content = torch.load(path, weights_only=True)["module"]
    torch.save(
        {**content, "transformer.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8)}, path
    )  # flat, without the outer key
    load_original(path, TINY)
    torch.save({**content, "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="keys that the model does not use: extra"):
        load_original(path, TINY)
    load_original(path, TINY, ignore=["extra"])
    del content["logit_scale"]
    torch.save(content, path)
    with pytest.raises(ValueError, match="1 keys missing: logit_scale"):
        load_original(path, TINY)
    with pytest.raises(ValueError, match="configuration 'x'; it is one of InternVL-14B-224px"):
        load_original(path, "x")


def test_original_encoder_with_its_pooling(model: DualModel, tmp_path: Path) -> None:
    path = tmp_path / "intern_vit.pth"
    save_original(model, path)
    content = torch.load(path, weights_only=True)["module"]
    encoder = {key: x for key, x in content.items() if not key.startswith(("transformer.", "text_", "logit_"))}
    torch.save({"module": encoder}, path)
    vit, pooling = load_original_vision(path, TINY.vision)
    assert len(pooling) == 14
    pool = AttentionPooling(64, TINY.pool_heads, TINY.embed_width)
    pool.load_state_dict(pooling)
    pixels = tiny_pictures(2)
    with torch.no_grad():
        assert torch.equal(pool(vit(pixels)), model.encode_image(pixels, "c", raw=True))
    torch.save({key: x for key, x in encoder.items() if not key.startswith("clip_")}, path)
    assert load_original_vision(path, TINY.vision)[1] == {}
    torch.save({**encoder, "head.weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"does not use: head\.weight"):
        load_original_vision(path, TINY.vision)


def test_stage_2_begins_from_c(model: DualModel) -> None:
    source = build_dual(replace(TINY, generative=False), seed=5)
    target = tiny_dual(seed=6)
    kept = target.qllama.queries.clone()
    new = carry_over(source, target)
    assert {key.split(".")[0] for key in new} == {"qllama", "query_pool", "match_head"}
    assert torch.equal(target.qllama.queries, kept)
    ids = tiny_texts(2, 6)
    with torch.no_grad():
        assert torch.equal(source.encode_text(ids), target.encode_text(ids))
    with pytest.raises(ValueError, match="have no place of their shape"):
        carry_over(model, source)
