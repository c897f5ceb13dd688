"""The table of releases: sizes against published ones and against modules, keys against the official layout."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from internvl.config import ChatConfig, DualConfig, LanguageConfig, VisionConfig
from internvl.convert.keys import expand
from internvl.convert.official import from_official, official_rules, to_official
from internvl.data.templates import TEMPLATES
from internvl.models.build import build
from internvl.tokens import SPECIAL_TOKENS
from internvl.zoo import CHAT, LANGUAGES, RELEASED, VISION
from internvl.zoo.vision import VISION_BILLIONS
from tiny import FAMILIES, tiny_chat_config

EVERY = tuple(RELEASED)
PAGE = Path(__file__).parents[1] / "docs" / "zoo.md"
TWICE_ROUNDED = {"4.2": 4.1469}
"""Phi-3 releases: 4.1469B became 4.15B on the model page and 4.2B in the tables."""


# what is in the table


def test_catalogue_is_whole() -> None:
    names = [f"InternVL-Chat-ViT-6B-Vicuna-{size}B{side}" for size in (7, 13) for side in ("", "-448px")]
    names += [f"InternVL-Chat-QLLaMA-Vicuna-{size}B-{side}px" for size in (7, 13) for side in (224, 336)]
    names += ["InternVL-Chat-V1-1", "InternVL-Chat-V1-2", "InternVL-Chat-V1-2-Plus", "InternVL-Chat-V1-5"]
    names += ["Mini-InternVL-Chat-2B-V1-5", "Mini-InternVL-Chat-4B-V1-5", "InternVL2-8B-MPO"]
    names += [f"InternVL2-{size}" for size in ("1B", "2B", "4B", "8B", "26B", "40B", "Llama3-76B")]
    for size in (1, 2, 4, 8, 26, 38, 78):
        names += [f"InternVL2_5-{size}B", f"InternVL2_5-{size}B-MPO"]
    names += [f"Mini-InternVL2-{s}B-DA-{d}" for s in (1, 2, 4) for d in ("Drivelm", "BDD", "RS", "Medical")]
    assert sorted(names) == sorted(EVERY)
    assert not set(EVERY) & set(CHAT)  # a release must never open with random weights


# 1.0: side in pixels, queries, tokens of a picture, numbers in the connector (specification of 1.0, section 4: 63.5M
# and 89.8M learn in the models with queries; a plain mlp2x_gelu is 3200 -> h -> h)
FIRST_GENERATION = {
    "InternVL-Chat-ViT-6B-Vicuna-7B": (336, 0, 576, 29_892_608),
    "InternVL-Chat-ViT-6B-Vicuna-13B": (336, 0, 576, 42_608_640),
    "InternVL-Chat-ViT-6B-Vicuna-7B-448px": (448, 0, 1024, 29_892_608),
    "InternVL-Chat-ViT-6B-Vicuna-13B-448px": (448, 0, 1024, 42_608_640),
    "InternVL-Chat-QLLaMA-Vicuna-7B-224px": (224, 96, 96 + 256, 63_455_232),
    "InternVL-Chat-QLLaMA-Vicuna-7B-336px": (336, 96, 96 + 576, 63_455_232),
    "InternVL-Chat-QLLaMA-Vicuna-13B-224px": (224, 96, 96 + 256, 89_804_800),
    "InternVL-Chat-QLLaMA-Vicuna-13B-336px": (336, 96, 96 + 576, 89_804_800),
}


@pytest.mark.parametrize("name", FIRST_GENERATION)
def test_first_generation_is_as_specified(name: str) -> None:
    config = RELEASED[name].config
    found = (config.tile_size, config.num_queries, config.tokens_per_tile, config.connector_parameters)
    assert found == FIRST_GENERATION[name]
    assert (config.feature_layer, config.template, config.picture_marks, config.connector_norm) == (-4, "v1", 0, False)
    assert not config.dynamic_tiles
    with torch.device("meta"):
        model = build(config, torch.bfloat16, "meta")
        pixels = torch.zeros(2, 3, config.tile_size, config.tile_size, dtype=torch.bfloat16)
        assert model.encode_tiles(pixels).shape == (2, config.tokens_per_tile, config.language.width)


def test_bytes_of_a_released_checkpoint_of_1_0() -> None:
    """Four shards of 9.95, 9.9, 9.96 and 8.12 GB in bfloat16 (hub: InternVL-Chat-ViT-6B-Vicuna-13B)."""
    config = RELEASED["InternVL-Chat-ViT-6B-Vicuna-13B"].config
    assert abs(2 * config.num_parameters / 1e9 - (9.95 + 9.9 + 9.96 + 8.12)) < 0.03


# name: vision width, depth; language width, depth, heads, kv heads, mlp (None: not published), vocabulary (likewise),
# template, pixel shuffle, tap, most tiles. From the catalogue of the specification.
PUBLISHED = {
    "InternVL-Chat-V1-1": (3200, 48, 5120, 40, 40, 40, 13824, None, "internvl_zh", "v1", None, 1),
    "InternVL-Chat-V1-2": (3200, 45, 7168, 60, 56, 8, 20480, None, "Hermes-2", "v1", -1, 1),
    "InternVL-Chat-V1-5": (3200, 45, 6144, 48, 48, 8, None, 92553, "internlm2-chat", "v2", -1, 12),
    "Mini-InternVL-Chat-2B-V1-5": (1024, 24, 2048, 24, 16, 8, 8192, 92553, "internlm2-chat", "v2", -1, 12),
    "Mini-InternVL-Chat-4B-V1-5": (1024, 24, 3072, 32, 32, 32, 8192, 32020, "phi3-chat", "v2", -1, 12),
    "InternVL2-1B": (1024, 24, 896, 24, 14, 2, None, 151655, "Hermes-2", "v2", -1, 12),
    "InternVL2-2B": (1024, 24, 2048, 24, 16, 8, 8192, 92553, "internlm2-chat", "v2", -1, 12),
    "InternVL2-4B": (1024, 24, 3072, 32, 32, 32, 8192, 32020, "phi3-chat", "v2", -1, 12),
    "InternVL2-8B-MPO": (1024, 24, 4096, 32, 32, 8, None, 92553, "internlm2-chat", "v2", -1, 12),
    "InternVL2-26B": (3200, 45, 6144, 48, 48, 8, None, 92553, "internlm2-chat", "v2", -1, 12),
    "InternVL2-40B": (3200, 45, 7168, 60, 56, 8, 20480, None, "Hermes-2", "v2", -1, 12),
    "InternVL2-Llama3-76B": (3200, 45, 8192, 80, 64, 8, None, None, "internlm2-chat", "v2", -1, 12),
    "InternVL2_5-1B": (1024, 24, 896, 24, 14, 2, None, 151674, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-2B": (1024, 24, 2048, 24, 16, 8, 8192, 92553, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-4B": (1024, 24, 2048, 36, 16, 2, 11008, 151674, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-8B": (1024, 24, 4096, 32, 32, 8, None, 92553, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-26B": (3200, 45, 6144, 48, 48, 8, None, 92553, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-38B": (3200, 45, 5120, 64, 40, 8, None, 151674, "internvl2_5", "v2", -1, 12),
    "InternVL2_5-78B-MPO": (3200, 45, 8192, 80, 64, 8, None, 151674, "internvl2_5", "v2", -1, 12),
    "Mini-InternVL2-4B-DA-RS": (1024, 24, 3072, 32, 32, 32, 8192, 32020, "phi3-chat", "v2", -1, None),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_as_published(name: str) -> None:
    row, config = PUBLISHED[name], RELEASED[name].config
    vision, language = config.vision, config.language
    found = (
        *(vision.width, vision.depth, language.width, language.depth, language.heads, language.kv_heads),
        *(language.mlp_width, language.vocab_size, config.template, config.pixel_shuffle),
        *(config.feature_layer, config.max_tiles),
    )
    assert [a for a, b in zip(found, row, strict=True) if b is not None] == [b for b in row if b is not None]
    silent = {"language.intermediate_size": 6, "language.vocab_size": 7, "feature_layer": 10, "max_tiles": 11}
    marked = RELEASED[name].unverified
    assert all(field in marked for field, place in silent.items() if row[place] is None)
    assert config.dynamic_tiles == config.thumbnail == (config.pixel_shuffle == "v2")
    assert (config.tile_size, config.tokens_per_tile, config.downsample) == (448, 256, 0.5)
    assert not language.tied


def test_system_message_of_the_plus() -> None:
    assert RELEASED["InternVL-Chat-V1-2-Plus"].config.system_message == "Answer the questions."
    assert [r.name for r in RELEASED.values() if r.config.system_message] == ["InternVL-Chat-V1-2-Plus"]


@pytest.mark.parametrize("name", EVERY)
def test_unverified_names_are_fields(name: str) -> None:
    release = RELEASED[name]
    parts = {"": ChatConfig, "vision.": VisionConfig}
    known = {prefix + field.name for prefix, kind in parts.items() for field in fields(kind)}
    known |= {f"language.{key}" for key in release.config.language.settings}
    assert set(release.unverified) <= known
    assert len(set(release.unverified)) == len(release.unverified)


@pytest.mark.parametrize("name", EVERY)
def test_rows_are_configs_of_the_official_layout(name: str) -> None:
    release = RELEASED[name]
    assert from_official(to_official(release.config)) == release.config
    assert release.config.template in TEMPLATES
    assert release.config.vision == VISION[release.vision]
    assert release.config.language == LANGUAGES[release.language].config
    assert release.hub_id == (f"OpenGVLab/{name}" if release.on_hub else "")


def test_vocabulary_is_base_and_special_tokens() -> None:
    base = {"internlm2": 92544, "phi3": 32011}
    for name, release in RELEASED.items():
        language = release.config.language
        if language.family in base:
            assert language.vocab_size == base[language.family] + len(SPECIAL_TOKENS)
        if language.family == "qwen2":
            assert language.vocab_size == (151665 if "2_5" in name else 151646) + len(SPECIAL_TOKENS)


# the page


def test_page_shows_this_table() -> None:
    rows = re.findall(
        r"^\| (?!release |---)(.*) \|$", PAGE.read_text(encoding="utf-8").split("# 45\n")[1], re.MULTILINE
    )
    config = {name: release.config for name, release in RELEASED.items()}
    assert rows == [
        " | ".join(
            [
                *(name, f"{config[name].num_parameters / 1e9:.3f}", release.billions, release.language),
                *(release.vision.removeprefix("InternViT-"), release.config.template),
                *(str(config[name].language.vocab_size), config[name].pixel_shuffle, str(config[name].max_tiles)),
            ]
        )
        for name, release in RELEASED.items()
    ]


@pytest.mark.parametrize("page", ["zoo.md", "plan.md"])
def test_snippets_of_the_pages_print_what_they_say(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    snippets = re.findall(r"```python\n(.*?)```", (PAGE.parent / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), {})
        said = capsys.readouterr().out
        comments = re.findall(r"\)\s+# (.*)", snippet)
        assert comments
        assert all(comment in said for comment in comments)


# sizes


@pytest.mark.parametrize("name", EVERY)
def test_computed_size_is_the_published_one(name: str) -> None:
    release = RELEASED[name]
    computed = release.config.num_parameters / 1e9
    if not release.billions:
        assert name in FIRST_GENERATION
        return
    digits = len(release.billions.partition(".")[2])
    if release.billions in TWICE_ROUNDED:
        assert round(computed, 4) == TWICE_ROUNDED[release.billions]
        assert f"{round(computed, 2):.2f}" == "4.15"
        return
    assert f"{computed:.{digits}f}" == release.billions


@pytest.mark.parametrize("name", VISION)
def test_size_of_vision_encoders(name: str) -> None:
    assert f"{VISION[name].num_parameters / 1e9:.1f}" == VISION_BILLIONS[name]


def test_connector_sizes_of_the_specification() -> None:
    known = {"InternVL-Chat-V1-1": 91_786_240, "InternVL2_5-8B": 33_570_816, "InternVL2_5-26B": 116_429_824}
    assert {name: RELEASED[name].config.connector_parameters for name in known} == known


@pytest.mark.parametrize("name", EVERY)  # to 78B: on the meta device a model is only names and shapes
def test_counts_and_keys_of_the_module(name: str) -> None:
    config = RELEASED[name].config
    model = build(config, torch.bfloat16, "meta")
    state = model.state_dict()
    check_counts(config, {key: tensor.numel() for key, tensor in state.items()})
    entries = expand(official_rules(config), state)
    keys = [key for entry in entries for key in entry.disk]
    assert len(keys) == len(set(keys))
    assert set(keys) == official_keys(config)
    assert {key for entry in entries for key in entry.ours} == set(state)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["300m", "6b"])
def test_counts_of_small_modules(family: str, vision: str) -> None:
    config = tiny_chat_config(family, vision=vision)
    check_counts(config, {key: tensor.numel() for key, tensor in build(config, device="meta").state_dict().items()})


@pytest.mark.parametrize(
    ("family", "switch"),
    [("llama", "attention_bias"), ("llama", "mlp_bias"), ("internlm2", "bias"), ("llama", "tie_word_embeddings")],
)
def test_counts_with_biases_and_tied_heads(family: str, switch: str) -> None:
    config = tiny_chat_config(family)
    language = LanguageConfig(config.language.family, {**config.language.settings, switch: True})
    changed = ChatConfig(config.vision, language, tile_size=56)
    model = build(changed, device="meta")
    assert changed.num_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert changed.num_parameters != config.num_parameters


def check_counts(config: ChatConfig, sizes: dict[str, int]) -> None:
    def part(*prefixes: str) -> int:
        return sum(size for key, size in sizes.items() if key.startswith(prefixes))

    if config.queries is not None:
        assert part("qllama.") == config.queries.look_parameters
        assert part("qllama.layers.0.cross.") == config.queries.cross_parameters

    layers = "language.model.model.layers."
    assert part("vision.layers.0.") == config.vision.block_parameters
    assert part("vision.") == config.vision.num_parameters
    assert part("connector.") == config.connector_parameters
    assert part(f"{layers}0.") == config.language.layer_parameters
    matrices = [size for key, size in sizes.items() if key.startswith(f"{layers}1.") and "proj.weight" in key]
    assert sum(matrices) == config.language.matrix_parameters
    assert part("language.model.model.embed_tokens.") == config.language.embedding_parameters
    assert part("language.") == config.language.num_parameters
    assert sum(sizes.values()) == config.num_parameters


# keys of the official layout, spelled out from the specification and not from our rules


def official_keys(config: ChatConfig) -> set[str]:
    embeddings = ("class_embedding", "patch_embedding.weight", "patch_embedding.bias", "position_embedding")
    keys = {f"vision_model.embeddings.{name}" for name in embeddings}
    block = ["norm1.weight", "norm2.weight", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias", "ls1", "ls2"]
    block += [f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias")]
    if config.vision.width == 3200:
        block += ["attn.q_norm.weight", "attn.k_norm.weight"]
    else:
        block += ["norm1.bias", "norm2.bias", "attn.qkv.bias"]
    keys |= {f"vision_model.encoder.layers.{n}.{name}" for n in range(config.vision.depth) for name in block}
    keys |= {f"mlp1.{n}.{kind}" for n in (0, 1, 3)[not config.connector_norm :] for kind in ("weight", "bias")}
    if config.queries is not None:
        keys |= {f"mlp2.{n}.{kind}" for n in (1, 3) for kind in ("weight", "bias")} | query_keys(config.queries)
    layer, outside = LANGUAGE_KEYS[config.language.family]
    keys |= {f"language_model.{name}" for name in outside}
    keys |= {f"language_model.model.layers.{n}.{name}" for n in range(config.language.depth) for name in layer}
    return keys


def query_keys(queries: DualConfig) -> set[str]:
    """Of QLLaMA, without what reads and writes texts (specification of 1.0, section 2.5)."""
    layer, _ = LANGUAGE_KEYS["llama"]
    cross = [f"cross_attn.{name}.weight" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "norm1", "norm2")]
    keys = {f"qllama.model.layers.{n}.{name}" for n in range(queries.language.depth) for name in layer}
    keys |= {f"qllama.model.layers.{n}.{name}" for n in range(0, queries.language.depth, 2) for name in cross}
    return keys | {"qllama.model.norm.weight", "query_tokens"}


_NORMS = ("input_layernorm.weight", "post_attention_layernorm.weight")
_QKV = ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight")
_MLP = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
_OUTSIDE = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
_INTERNLM2 = ("attention.wqkv.weight", "attention.wo.weight", "attention_norm.weight", "ffn_norm.weight")
LANGUAGE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama": ((*_NORMS, *_QKV, "self_attn.o_proj.weight", *_MLP), _OUTSIDE),
    "qwen2": (
        (*_NORMS, *_QKV, *(key.replace("weight", "bias") for key in _QKV), "self_attn.o_proj.weight", *_MLP),
        _OUTSIDE,
    ),
    "phi3": (
        (
            *(*_NORMS, "self_attn.qkv_proj.weight", "self_attn.o_proj.weight"),
            *("mlp.gate_up_proj.weight", "mlp.down_proj.weight"),
        ),
        _OUTSIDE,
    ),
    "internlm2": (
        (*_INTERNLM2, "feed_forward.w1.weight", "feed_forward.w2.weight", "feed_forward.w3.weight"),
        ("model.tok_embeddings.weight", "model.norm.weight", "output.weight"),
    ),
}
