"""Sizes and keys of InternVL-C and -G, against the figures of the specification and without memory for weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from internvl.config import DualConfig, LanguageConfig
from internvl.convert import dual
from internvl.convert.keys import expand
from internvl.models.build import build_dual
from internvl.models.internvit import InternViT
from internvl.zoo import DUAL, VISION

LARGE = DUAL["InternVL-14B-224px"]


def sizes(config: DualConfig) -> dict[str, int]:
    return {key: tensor.numel() for key, tensor in build_dual(config, device="meta").state_dict().items()}


def test_vision_encoder_6b() -> None:
    with torch.device("meta"):
        state = InternViT(VISION["InternViT-6B-224px"]).state_dict()
    assert len(state) == 628
    assert sum(x.numel() for x in state.values()) == 5_902_793_600 == VISION["InternViT-6B-224px"].num_parameters
    assert VISION["InternViT-6B-224px"].block_parameters == 122_918_400


def test_14b_has_the_tensors_and_numbers_of_the_release() -> None:
    found = sizes(LARGE)
    assert len(found) == 1048
    assert sum(found.values()) == 13_834_975_747 == LARGE.num_parameters

    def part(*prefixes: str) -> int:
        return sum(size for key, size in found.items() if key.startswith(prefixes))

    assert part("vision.") == 5_902_793_600
    crosses = {n: part(f"qllama.layers.{n}.cross.") for n in range(32)}
    assert crosses == {n: 0 if n % 2 else 59_776_128 for n in range(32)}
    assert LARGE.cross_parameters == 59_776_128
    assert part("qllama.") - sum(crosses.values()) - 96 * 4096 == 6_885_494_784
    assert (part("image_pool."), part("query_pool.")) == (33_207_168, 53_515_008)
    assert (part("match_head."), part("text_projection")) == (8_194, 3_145_728)
    learned = sum(crosses.values()) + part("qllama.queries", "query_pool.", "match_head.", "logit_scale")
    assert learned == 1_010_334_467  # what stage 2 trains


def test_other_sizes() -> None:
    assert round(DUAL["InternVL-C-13B-224px"].num_parameters / 1e9, 2) == 12.62
    grown = DUAL["InternVL-14B-Flickr30K-FT-364px"].num_parameters - LARGE.num_parameters
    assert grown == (677 - 257) * 3200
    for name in ("InternVL-C-13B-224px", "tiny-dual", "InternVL-14B-FlickrCN-FT-364px"):
        assert sum(sizes(DUAL[name]).values()) == DUAL[name].num_parameters


def official_keys(config: DualConfig) -> set[str]:
    """Spelled out from the specification, not from our rules."""
    keys = {"query_tokens", "text_projection", "logit_scale", "itm_head.weight", "itm_head.bias"}
    keys |= {"qllama.model.embed_tokens.weight", "qllama.lm_head.weight", "qllama.model.norm.weight"}
    embeddings = ("class_embedding", "position_embedding", "patch_embedding.weight", "patch_embedding.bias")
    keys |= {f"vision_model.embeddings.{name}" for name in embeddings}
    block = ["norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "ls1"]
    block += ["ls2", "attn.proj.weight", "attn.proj.bias"]
    block += [f"mlp.{name}.{kind}" for name in ("fc1", "fc2") for kind in ("weight", "bias")]
    keys |= {f"vision_model.encoder.layers.{n}.{name}" for n in range(config.vision.depth) for name in block}
    layer = [f"self_attn.{p}_proj.weight" for p in "qkvo"] + [f"mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
    layer += ["input_layernorm.weight", "post_attention_layernorm.weight"]
    cross = [f"cross_attn.{p}_proj.weight" for p in "qkvo"] + [f"cross_attn.norm{n}.weight" for n in (1, 2)]
    for n in range(config.language.depth):
        keys |= {f"qllama.model.layers.{n}.{name}" for name in [*layer, *(cross if n % 2 == 0 else [])]}
    pool = [f"norm1_{p}.{kind}" for p in "qkv" for kind in ("weight", "bias")] + [f"cross_attn.{p}_bias" for p in "qkv"]
    pool += [f"cross_attn.{p}.weight" for p in "qkv"] + ["cross_attn.proj.weight", "cross_attn.proj.bias"]
    return keys | {f"{name}.{leaf}" for name in ("clip_projector", "clip_projector2") for leaf in pool}


@pytest.mark.parametrize("name", ["InternVL-14B-224px", "tiny-dual"])
def test_keys_are_the_official_ones(name: str) -> None:
    entries = expand(dual.OFFICIAL_RULES, sizes(DUAL[name]))
    keys = [key for entry in entries for key in entry.disk]
    assert len(keys) == len(set(keys))
    assert set(keys) == official_keys(DUAL[name])


@pytest.mark.parametrize("name", DUAL)
def test_rows_survive_config_json(name: str) -> None:
    assert dual.from_official(dual.to_official(DUAL[name])) == DUAL[name]


def test_frequency_of_cross_attention_is_kept() -> None:
    config = replace(DUAL["tiny-dual"], cross_every=3, num_queries=7)
    settings = dual.to_official(config)
    assert settings["qllama_config"]["cross_attention_frequency"] == 3
    assert dual.from_official(settings) == config
    keys = sizes(config)
    assert [n for n in range(4) if any(key.startswith(f"qllama.layers.{n}.cross.") for key in keys)] == [0, 3]


def test_impossible_sizes_say_what_to_do() -> None:
    tiny = DUAL["tiny-dual"]
    settings = tiny.language.settings
    with pytest.raises(ValueError, match="vision width 64 is not a multiple of 5 pooling heads"):
        replace(tiny, pool_heads=5)
    with pytest.raises(ValueError, match="image size 50 is not a multiple of patch size 14"):
        replace(tiny, image_size=50)
    with pytest.raises(ValueError, match="0 queries, cross-attention every 2 layers; both must be 1 or more"):
        replace(tiny, num_queries=0)
    with pytest.raises(ValueError, match=r"QLLaMA extends a plain LLaMA: family 'llama'.*set: attention_bias"):
        replace(tiny, language=LanguageConfig("llama", {**settings, "attention_bias": True}))
    assert replace(tiny, language=LanguageConfig("llama", {**settings, "rope_theta": 5e5})).rope_base == 5e5
