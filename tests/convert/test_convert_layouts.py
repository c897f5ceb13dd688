"""Both layouts: there and back is the identity, every key and field counts, and broken folders say what is wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from internvl.config import ChatConfig, VisionConfig
from internvl.convert.files import open_weights, write_weights
from internvl.convert.keys import GroupedQKV, check_keys, expand
from internvl.convert.official import from_official, official_rules, to_official
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from internvl.models.chat import ChatModel
from reference import golden
from tiny import FAMILIES, tiny_batch, tiny_chat_config, tiny_model, tiny_tokenizer


def same_weights(first: ChatModel, second: ChatModel) -> bool:
    mine, theirs = first.state_dict(), second.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def same_files(first: Path, second: Path) -> bool:
    mine, theirs = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    configs = [json.loads((folder / "config.json").read_text()) for folder in (first, second)]
    return (
        mine.keys() == theirs.keys()
        and all(torch.equal(mine[k], theirs[k]) and mine[k].dtype == theirs[k].dtype for k in mine)
        and configs[0] == configs[1]
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole official checkpoint to break."""
    save_checkpoint(tiny_model(), None, tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["300m", "6b"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_there_and_back_is_the_identity(tmp_path: Path, family: str, vision: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, vision=vision, dtype=dtype).eval()
    save_checkpoint(model, tiny_tokenizer(), tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a", dtype=dtype)
    assert loaded.config == model.config
    assert loaded.layout == "official"
    assert same_weights(model, loaded.model)
    assert loaded.model.image_token_id == tiny_tokenizer().convert_tokens_to_ids("<IMG_CONTEXT>")
    assert loaded.tokenizer.get_vocab() == tiny_tokenizer().get_vocab()
    save_checkpoint(loaded.model, None, tmp_path / "b")
    assert same_files(tmp_path / "a", tmp_path / "b")
    loaded.model.image_token_id = model.image_token_id
    ids, tiles = tiny_batch()
    with torch.no_grad():
        assert torch.equal(model(ids, tiles.to(dtype)), loaded.model(ids, tiles.to(dtype)))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["300m", "6b"])
def test_official_native_official_is_the_identity(tmp_path: Path, family: str, vision: str) -> None:
    config = tiny_chat_config(family, vision=vision)
    config = replace(config, max_tiles=7, template="Hermes-2", system_message="Be brief.", thumbnail=False)
    model = build(config)
    model.image_token_id = 9
    save_checkpoint(model, None, tmp_path / "official")
    first = load_checkpoint(tmp_path / "official").model
    first.image_token_id = 9
    save_checkpoint(first, None, tmp_path / "native", "native")
    second = load_checkpoint(tmp_path / "native")
    assert second.layout == "native"
    assert second.model.image_token_id == 9
    assert second.config == config
    save_checkpoint(second.model, None, tmp_path / "again")
    assert same_files(tmp_path / "official", tmp_path / "again")
    assert same_weights(model, second.model)


def test_native_without_our_field_still_opens(tmp_path: Path) -> None:
    model = tiny_model("qwen2")
    save_checkpoint(model, None, tmp_path, "native")
    settings = json.loads((tmp_path / "config.json").read_text())
    del settings["official_config"]
    (tmp_path / "config.json").write_text(json.dumps(settings))
    loaded = load_checkpoint(tmp_path)
    assert loaded.config.vision == model.config.vision
    assert same_weights(model, loaded.model)


def test_native_refuses_what_it_cannot_say(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="v1"):
        save_checkpoint(tiny_model(pixel_shuffle="v1"), None, tmp_path, "native")
    model = tiny_model()
    model.image_token_id = None
    with pytest.raises(ValueError, match="image_token_id"):
        save_checkpoint(model, None, tmp_path, "native")
    with pytest.raises(ValueError, match="'hf'"):
        save_checkpoint(model, None, tmp_path, "hf")
    assert not any(tmp_path.iterdir())


def test_unknown_fields_of_a_config_survive(folder: Path, tmp_path: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    settings |= {"auto_map": {"AutoModel": "x.y"}, "_commit_hash": None, "output_attentions": False}
    settings["vision_config"] |= {"use_flash_attn": True, "dropout": 0.0, "model_type": "intern_vit_300m"}
    settings["llm_config"] |= {"top_k": 50, "return_dict": True, "torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(settings))
    save_checkpoint(load_checkpoint(folder).model, None, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == settings


@given(
    st.builds(
        replace,
        st.just(tiny_chat_config()),
        pixel_shuffle=st.sampled_from(["v1", "v2"]),
        feature_layer=st.integers(-4, 3),
        template=st.sampled_from(["internvl2_5", "Hermes-2", "phi3-chat"]),
        system_message=st.none() | st.text(max_size=20),
        dynamic_tiles=st.booleans(),
        thumbnail=st.booleans(),
        min_tiles=st.integers(1, 3),
        max_tiles=st.integers(3, 40),
        pad_to_square=st.booleans(),
        tile_size=st.sampled_from([28, 56, 112]),
        normalize=st.sampled_from(["imagenet", "clip", "siglip"]),
        vision=st.builds(
            VisionConfig,
            width=st.sampled_from([32, 64]),
            depth=st.integers(1, 3),
            heads=st.sampled_from([1, 2, 4]),
            image_size=st.sampled_from([28, 56]),
            norm=st.sampled_from(["layer_norm", "rms_norm"]),
            qkv_bias=st.booleans(),
            qk_norm=st.booleans(),
            drop_path=st.sampled_from([0.0, 0.1]),
            drop_path_schedule=st.sampled_from(["linear", "uniform"]),
            scale_init=st.sampled_from([0.1, 1.0]),
        ),
    )
)
def test_config_there_and_back_is_the_identity(config: ChatConfig) -> None:
    assert from_official(json.loads(json.dumps(to_official(config)))) == config


def test_an_absent_pixel_shuffle_version_is_v1(folder: Path) -> None:
    settings = json.loads((folder / "config.json").read_text())
    del settings["ps_version"]
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.warns(UserWarning, match=r"config\.json: ps_version is absent, which means v1"):
        assert load_checkpoint(folder).model.connector.version == "v1"


BLOCK = (
    "attn.proj.bias attn.proj.weight attn.qkv.weight ls1 ls2 mlp.fc1.bias mlp.fc1.weight mlp.fc2.bias mlp.fc2.weight "
    "norm1.weight norm2.weight"
)
VIT_6B = VisionConfig(3200, 45, 25, 12800, norm="rms_norm", qkv_bias=False, qk_norm=True)


@pytest.mark.parametrize(
    ("vision", "block", "embeddings", "parameters"),
    [
        (
            VisionConfig(),
            f"attn.qkv.bias norm1.bias norm2.bias {BLOCK}",
            4,
            304_012_288,
        ),
        (
            VIT_6B,
            f"attn.k_norm.weight attn.q_norm.weight {BLOCK}",
            4,
            5_540_000_000,
        ),
    ],
    ids=["300m", "6b"],
)
def test_key_sets_of_the_released_vision_encoders(
    vision: VisionConfig, block: str, embeddings: int, parameters: int
) -> None:
    config = replace(tiny_chat_config(), vision=vision, tile_size=448)
    model = build(config, device="meta")
    keys = {key for entry in expand(official_rules(config), model.state_dict()) for key in entry.disk}
    inside = {key.removeprefix("vision_model.") for key in keys if key.startswith("vision_model.")}
    wanted = {f"encoder.layers.{n}.{leaf}" for n in range(vision.depth) for leaf in block.split()}
    names = ("class_embedding", "patch_embedding.weight", "patch_embedding.bias", "position_embedding")
    assert len(names) == embeddings
    assert inside == wanted | {f"embeddings.{name}" for name in names}
    count = sum(p.numel() for p in model.vision.parameters())
    assert count == pytest.approx(parameters, rel=0.002)


def test_internlm2_queries_keys_and_values_are_interleaved_by_group() -> None:
    """spec 9.4: (kv heads, groups + 2, head width, hidden); the last two slices are key and value."""
    heads, kv_heads, head, hidden = 6, 2, 3, 5
    whole = torch.arange(kv_heads * 5 * head * hidden).view(-1, hidden)
    grouped = whole.view(kv_heads, 5, head, hidden)
    qkv = GroupedQKV(heads, kv_heads)
    q, k, v = qkv.split([whole])
    for head_index in range(heads):
        group, place = divmod(head_index, 3)
        assert torch.equal(q[head_index * head : (head_index + 1) * head], grouped[group, place])
    assert torch.equal(k.view(kv_heads, head, hidden), grouped[:, 3])
    assert torch.equal(v.view(kv_heads, head, hidden), grouped[:, 4])
    assert torch.equal(qkv.fuse([q, k, v])[0], whole)


def test_missing_and_unused_keys_are_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["mlp1.9.weight"] = weights.pop("mlp1.1.weight")
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"1 keys missing: mlp1\.1\.weight; 1 keys .* not use: mlp1\.9\.weight"):
        load_checkpoint(folder)


def test_wrong_shapes_are_listed(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["mlp1.1.bias"] = torch.zeros(65)
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"mlp1\.1\.bias is 65, must be 64"):
        load_checkpoint(folder)


def test_derived_rotary_buffers_of_old_files_are_ignored(folder: Path) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights["language_model.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    save_file(weights, path)
    load_checkpoint(folder)


def test_shards_are_read_and_written(tmp_path: Path) -> None:
    model = tiny_model()
    save_checkpoint(model, None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in weights.items()}
    write_weights(tmp_path, shapes, weights.__getitem__, max_shard_bytes=200_000)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "model.safetensors" not in names
    assert len([name for name in names if name.startswith("model-")]) >= 4
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in weights.values())
    assert same_weights(model, load_checkpoint(tmp_path).model)
    save_checkpoint(model, None, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.fixture
def sharded(folder: Path) -> Path:
    weights = load_file(folder / "model.safetensors")
    shapes = {key: (tuple(value.shape), value.dtype) for key, value in weights.items()}
    write_weights(folder, shapes, weights.__getitem__, max_shard_bytes=300_000)
    return folder


def shards(folder: Path) -> list[Path]:
    return sorted(folder.glob("model-*.safetensors"))


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shards(sharded)[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"model-00002-of-.*safetensors"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("size", [0, 4, 20, 5000, -1])
def test_a_truncated_file_is_named(sharded: Path, size: int) -> None:
    path = shards(sharded)[1]
    content = path.read_bytes()
    path.write_bytes(content[:size])
    with pytest.raises(OSError, match=r"model-00002-of-"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "model.bin", "..", ""])
def test_an_index_that_points_elsewhere_is_refused(sharded: Path, name: str) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["mlp1.0.bias"] = name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"index\.json: shard .* same folder"):
        load_checkpoint(sharded)


@pytest.mark.parametrize("content", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "\ud800"])
def test_a_broken_index_is_named(sharded: Path, content: str) -> None:
    (sharded / "model.safetensors.index.json").write_bytes(content.encode("utf-8", "surrogatepass"))
    with pytest.raises(ValueError, match=r"index\.json"):
        load_checkpoint(sharded)


def test_an_index_that_names_the_wrong_shard_is_refused(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = sorted(content["weight_map"])[0]
    content["weight_map"][first] = shards(sharded)[-1].name
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{first} not in the shard"):
        load_checkpoint(sharded)


def test_pickle_files_are_refused_with_a_remedy(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin.*run code.*safetensors"):
        load_checkpoint(folder)


def test_folders_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"'llama'.*internvl_chat"):
        load_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(to_official(tiny_chat_config())))
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_config": {"architectures": ["GPT2LMHeadModel"]}}, "'GPT2LMHeadModel' is not one of"),
        ({"llm_config": {"architectures": ["LlamaForCausalLM"]}}, "hidden_size.*whole number"),
        ({"llm_config": None}, "llm_config is NoneType"),
        ({"vision_config": {"hidden_size": 65, "num_attention_heads": 4}}, "65 is not a multiple of 4"),
        ({"vision_config": {"hidden_size": "many"}}, "config.json"),
        ({"vision_config": {"hidden_act": "quick_gelu"}}, "quick_gelu"),
        ({"force_image_size": 60}, "tile size 60"),
        ({"downsample_ratio": 0}, "downsample_ratio is 0"),
        ({"template": None}, "template is None"),
        ({"ps_version": "v7"}, "v7"),
    ],
)
def test_impossible_configs_are_refused(folder: Path, change: dict, message: str) -> None:
    edit(folder, **change)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_a_tied_head_is_checked_and_shared(tmp_path: Path) -> None:
    config = tiny_chat_config()
    settings = {**config.language.settings, "tie_word_embeddings": True}
    config = replace(config, language=replace(config.language, settings=settings))
    model = build(config)
    save_checkpoint(model, None, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    head, embedding = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert torch.equal(weights[head], weights[embedding])
    loaded = load_checkpoint(tmp_path).model
    assert loaded.language.model.lm_head.weight is loaded.language.model.get_input_embeddings().weight
    assert same_weights(model, loaded)
    save_file({key: value for key, value in weights.items() if key != head}, tmp_path / "model.safetensors")
    loaded = load_checkpoint(tmp_path).model
    assert loaded.language.model.lm_head.weight is loaded.language.model.get_input_embeddings().weight
    save_file({**weights, head: weights[head] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tie_word_embeddings is true but .*lm_head.weight differs"):
        load_checkpoint(tmp_path)


def test_a_stored_grid_other_than_the_tile_is_kept_and_interpolated(tmp_path: Path) -> None:
    config = tiny_chat_config()
    config = replace(config, vision=replace(config.vision, image_size=84))
    model = build(config)
    model.image_token_id = 9
    save_checkpoint(model, None, tmp_path / "a")
    loaded = load_checkpoint(tmp_path / "a").model
    loaded.image_token_id = 9
    assert loaded.vision.embeddings.position_embedding.shape == (1, 37, 64)
    ids, tiles = tiny_batch()
    with torch.no_grad():
        assert torch.equal(model(ids, tiles), loaded(ids, tiles))
        before = loaded(ids, tiles)
        loaded.resize_positions()
        assert loaded.vision.embeddings.position_embedding.shape == (1, 17, 64)
        assert loaded.config.vision.image_size == loaded.config.tile_size == 56
        assert torch.equal(loaded(ids, tiles), before)
    save_checkpoint(loaded, None, tmp_path / "b")
    assert same_weights(loaded, load_checkpoint(tmp_path / "b").model)


def test_a_loaded_model_and_its_folder_leave_each_other_alone(folder: Path) -> None:
    """Weights are mapped from the file: changing them changes no file, replacing or deleting it changes no weight."""
    model = load_checkpoint(folder).model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    again = load_checkpoint(folder).model
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())
    save_checkpoint(model, None, folder)
    shutil.rmtree(folder)
    assert all(torch.equal(value, before[key]) for key, value in again.state_dict().items())


TEXTS = (
    "<img><IMG_CONTEXT></img>\nHello world",
    " a cat  sitting",
    "<|im_start|>user\nWhat?<|im_end|>\n",
    "中文 é",
    "a\n\nb",
)


@pytest.mark.parametrize(
    ("name", "family"), [("llama", "llama"), ("qwen", "qwen2"), ("phi3", "phi3"), ("internlm2", "internlm2")]
)
def test_the_tokenizer_is_the_one_of_the_file(folder: Path, name: str, family: str) -> None:
    shutil.rmtree(folder)
    save_checkpoint(tiny_model(family), None, folder)
    for path in golden(f"tokenizers/{name}").iterdir():
        shutil.copy(path, folder)
    loaded = load_checkpoint(folder)
    exact = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert loaded.model.image_token_id == exact.token_to_id("<IMG_CONTEXT>")
    for text in TEXTS:
        assert loaded.tokenizer(text).input_ids == exact.encode(text).ids
    (folder / "tokenizer.json").unlink()
    if name == "qwen" or (
        name == "internlm2" and find_spec("sentencepiece")
    ):  # the releases that come without tokenizer.json
        slow = load_checkpoint(folder).tokenizer
        for text in TEXTS:
            assert slow(text).input_ids == exact.encode(text).ids


def test_names_of_the_zoo_have_random_weights() -> None:
    loaded = load_checkpoint("tiny-llama", dtype=torch.bfloat16)
    assert loaded.layout == "random"
    assert loaded.tokenizer is None
    assert next(loaded.model.parameters()).dtype == torch.bfloat16


def test_every_key_belongs_to_one_rule() -> None:
    for family in FAMILIES:
        for vision in ("300m", "6b"):
            config = tiny_chat_config(family, vision=vision)
            model = build(config, device="meta")
            entries = expand(official_rules(config), model.state_dict())
            ours = [key for entry in entries for key in entry.ours]
            disk = [key for entry in entries for key in entry.disk]
            assert sorted(ours) == sorted(model.state_dict())
            assert len(set(disk)) == len(disk)


def test_check_keys_reports_a_scalar() -> None:
    model = build(tiny_chat_config(), device="meta")
    state = model.state_dict()
    entries = expand(official_rules(model.config), state)
    found = {key: tuple(state[entry.ours[0]].shape) for entry in entries for key in entry.disk}
    check_keys(entries, {k: v.shape for k, v in state.items()}, found, "here")
    with pytest.raises(ValueError, match=r"mlp1\.1\.bias is a number, must be 64"):
        check_keys(entries, {k: v.shape for k, v in state.items()}, {**found, "mlp1.1.bias": ()}, "here")


def test_open_weights_reads_headers_only(folder: Path) -> None:
    weights = open_weights(folder)
    assert weights.shapes["mlp1.1.weight"] == (64, 256)
    assert weights.get("mlp1.1.bias", torch.bfloat16).dtype == torch.bfloat16
