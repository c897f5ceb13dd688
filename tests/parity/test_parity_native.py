"""transformers' own InternVL opens what we write, and computes the same; and the other way round."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import InternVLForConditionalGeneration

from internvl.convert.keys import expand
from internvl.convert.native import native_rules
from internvl.convert.official import official_rules
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from reference import golden
from tiny import IMAGE_TOKEN_ID, tiny_batch, tiny_chat_config, tiny_model

CASES = [
    ("300m", "llama"),
    ("6b", "qwen2"),
    ("300m", "qwen2"),
    ("6b", "llama"),
    ("300m", "internlm2"),
    ("300m", "phi3"),
    ("6b", "phi3"),
]
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> InternVLForConditionalGeneration:
    model, notes = InternVLForConditionalGeneration.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(notes[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    return model.eval()


@pytest.mark.parametrize(("vision", "family"), CASES)
def test_logits_are_the_native_ones(tmp_path: Path, vision: str, family: str) -> None:
    ours = tiny_model(family, vision=vision).eval()
    save_checkpoint(ours, None, tmp_path, "native")
    peer = opened(tmp_path)
    ids, tiles = tiny_batch(9, 3)
    with torch.no_grad():
        assert_close(ours(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, **CLOSE)
        features = peer.model.get_image_features(pixel_values=tiles).pooler_output
        assert_close(ours.encode_tiles(tiles), features.view(3, 4, -1), **CLOSE)


@pytest.mark.parametrize(("vision", "family"), CASES[:2])
def test_bfloat16_is_within_the_noise_of_the_native_one(tmp_path: Path, vision: str, family: str) -> None:
    exact = tiny_model(family, vision=vision).eval()
    ours = tiny_model(family, vision=vision, dtype=torch.bfloat16).eval()
    exact.load_state_dict({key: value.float() for key, value in ours.state_dict().items()})
    save_checkpoint(ours, None, tmp_path, "native")
    peer = opened(tmp_path, torch.bfloat16)
    ids, tiles = tiny_batch(9, 3)
    with torch.no_grad():
        wanted = exact(ids, tiles.bfloat16().float())
        our_error = (ours(ids, tiles.bfloat16()).float() - wanted).abs()
        peer_error = (peer(input_ids=ids, pixel_values=tiles.bfloat16()).logits.float() - wanted).abs()
    assert our_error.max() <= 1.5 * peer_error.max()
    assert our_error.mean() <= 1.25 * peer_error.mean()


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    config = tiny_chat_config("qwen2")
    settings = {**config.language.settings, "tie_word_embeddings": True}
    ours = build(replace(config, language=replace(config.language, settings=settings)))
    ours.image_token_id = IMAGE_TOKEN_ID
    save_checkpoint(ours, None, tmp_path, "native")
    peer = opened(tmp_path)
    assert peer.lm_head.weight is peer.get_input_embeddings().weight
    ids, tiles = tiny_batch(9, 3)
    with torch.no_grad():
        assert_close(ours(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, **CLOSE)


@pytest.mark.parametrize("length", [100, 140])
def test_longrope_on_both_sides_of_the_original_length(tmp_path: Path, length: int) -> None:
    config = tiny_chat_config("phi3")
    scaling = {
        "type": "su",
        "short_factor": [1.0 + n / 8 for n in range(8)],
        "long_factor": [2.0 + n for n in range(8)],
    }
    ours = build(
        replace(
            config, language=replace(config.language, settings={**config.language.settings, "rope_scaling": scaling})
        )
    )
    ours.image_token_id = IMAGE_TOKEN_ID
    save_checkpoint(ours, None, tmp_path / "native", "native")
    ids, tiles = tiny_batch(length, 2)
    peer = opened(tmp_path / "native")
    with torch.no_grad():
        assert_close(ours(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, **CLOSE)
    back = load_checkpoint(tmp_path / "native").config.language.settings
    assert back["rope_scaling"] == scaling


@pytest.mark.parametrize(("vision", "family"), [*CASES[:2], ("300m", "phi3"), ("6b", "internlm2")])
def test_a_folder_that_transformers_wrote_opens_here(tmp_path: Path, vision: str, family: str) -> None:
    save_checkpoint(tiny_model(family, vision=vision), None, tmp_path / "ours", "native")
    peer = opened(tmp_path / "ours")
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.mul_(1.1)
    peer.save_pretrained(tmp_path / "theirs")
    back = load_checkpoint(tmp_path / "theirs")
    assert back.layout == "native"
    assert back.model.image_token_id == IMAGE_TOKEN_ID
    assert back.config.template == "internvl2_5"
    ids, tiles = tiny_batch(5, 2)
    with torch.no_grad():
        assert_close(back.model(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, **CLOSE)


def test_key_names_are_those_of_the_reference() -> None:
    """golden/hf_native.json records official -> native names; {q,k,v}_proj stands for three keys."""
    recorded = json.loads(golden("hf_native.json").read_text())["key_map"]
    for name, family in (("chat_llama", "llama"), ("chat_qwen2", "qwen2")):
        config = tiny_chat_config(family)
        state = build(config, device="meta").state_dict()
        to_official = {k: e.disk for e in expand(official_rules(config), state) for k in e.ours}
        to_native = {k: e.disk for e in expand(native_rules(config), state) for k in e.ours}
        found = {}
        for key in state:
            native = to_native[key]
            found[to_official[key][0]] = native[0] if len(native) == 1 else native[0].replace("q_proj", "{q,k,v}_proj")
        assert found == recorded[name]


def test_an_official_checkpoint_becomes_native_without_a_change_of_logits(tmp_path: Path) -> None:
    save_checkpoint(tiny_model("internlm2"), None, tmp_path / "official")
    loaded = load_checkpoint(tmp_path / "official").model
    loaded.image_token_id = IMAGE_TOKEN_ID
    save_checkpoint(loaded, None, tmp_path / "native", "native")
    settings = json.loads((tmp_path / "native" / "config.json").read_text())
    assert settings["text_config"]["rope_scaling"] == {"type": "dynamic", "factor": 2.0}
    ids, tiles = tiny_batch(600, 1)  # beyond max_position_embeddings, where the dynamic scaling acts
    peer = opened(tmp_path / "native")
    with torch.no_grad():
        assert_close(loaded(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, **CLOSE)
