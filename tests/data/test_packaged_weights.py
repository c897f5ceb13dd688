"""Readers of packaged weights and of pictures that need a font, against small files made here in the same formats."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close
from transformers import LlamaForCausalLM

from internvl.config import LanguageConfig
from internvl.data.packaged import backgrounds, efficientnet, noto, vision
from internvl.data.packaged.language import SmolFile
from internvl.models.language import transformers_config

WIDTH, HEADS, KV_HEADS, DEPTH = 32, 4, 2, 2
WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "a", "b", "1", "2", "ab", "Ġ", "Ġa"]


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order of rotary pairs: row i of a head's first half, then row i of its second half."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1)
    return halves.transpose(0, 2, 1, 3).reshape(weight.shape)


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, np.ndarray]]:
    """A Llama of two layers with the fields of the packaged one; its weights under transformers' names."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    writer, rng = gguf.GGUFWriter(str(path), "llama"), np.random.default_rng(0)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(48)
    writer.add_context_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_block_count(DEPTH)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3, *[1] * (len(WORDS) - 3)])
    writer.add_token_merges(["a b", "Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages[0].content }}")
    wanted = {}

    def put(theirs: str, ours: str, *shape: int, heads: int = 0) -> None:
        values = rng.standard_normal(shape, np.float32)
        wanted[ours] = values
        writer.add_tensor(theirs, interleaved(values, heads) if heads else values)

    put("token_embd.weight", "model.embed_tokens.weight", len(WORDS), WIDTH)
    put("output_norm.weight", "model.norm.weight", WIDTH)
    for n in range(DEPTH):
        block, layer = f"blk.{n}.", f"model.layers.{n}."
        put(f"{block}attn_norm.weight", f"{layer}input_layernorm.weight", WIDTH)
        put(f"{block}ffn_norm.weight", f"{layer}post_attention_layernorm.weight", WIDTH)
        put(f"{block}attn_q.weight", f"{layer}self_attn.q_proj.weight", WIDTH, WIDTH, heads=HEADS)
        put(f"{block}attn_k.weight", f"{layer}self_attn.k_proj.weight", WIDTH // 2, WIDTH, heads=KV_HEADS)
        put(f"{block}attn_v.weight", f"{layer}self_attn.v_proj.weight", WIDTH // 2, WIDTH)
        put(f"{block}attn_output.weight", f"{layer}self_attn.o_proj.weight", WIDTH, WIDTH)
        put(f"{block}ffn_gate.weight", f"{layer}mlp.gate_proj.weight", 48, WIDTH)
        put(f"{block}ffn_up.weight", f"{layer}mlp.up_proj.weight", 48, WIDTH)
        put(f"{block}ffn_down.weight", f"{layer}mlp.down_proj.weight", WIDTH, 48)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, wanted


def test_a_gguf_file_gives_the_weights_in_transformers_order(gguf_file: tuple[Path, dict[str, np.ndarray]]) -> None:
    path, wanted = gguf_file
    file = SmolFile(path)
    found = file.weights()
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert_close(found[name], torch.from_numpy(values), rtol=0, atol=0)
    model = LlamaForCausalLM(transformers_config(LanguageConfig("llama", file.settings())))
    report = model.load_state_dict(found, strict=False)
    assert report.missing_keys == ["lm_head.weight"]  # tied
    assert not report.unexpected_keys


def test_a_gguf_file_gives_settings_and_tokenizer(gguf_file: tuple[Path, dict[str, np.ndarray]]) -> None:
    file = SmolFile(gguf_file[0])
    settings = file.settings()
    assert (settings["hidden_size"], settings["num_attention_heads"], settings["num_key_value_heads"]) == (32, 4, 2)
    assert (settings["rms_norm_eps"], settings["rope_theta"], settings["vocab_size"]) == (1e-5, 100000.0, len(WORDS))
    tokenizer = file.tokenizer()
    assert tokenizer.encode("<|im_start|>ab a12", add_special_tokens=False) == [1, 7, 9, 5, 6]
    assert tokenizer.decode([1, 7, 9, 5, 6]) == "<|im_start|>ab a12"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "ab"


def onnx_file(path: Path, width: int) -> dict[str, np.ndarray]:
    """The graph of the packaged encoder, without what it computes: named arrays, and matrices before their bias."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper, numpy_helper

    rng, arrays, nodes = np.random.default_rng(1), {}, []
    embeddings = "backbone.embeddings."
    arrays[f"{embeddings}cls_token"] = rng.standard_normal((1, 1, width), np.float32)
    arrays[f"{embeddings}patch_embeddings.projection.weight"] = rng.standard_normal((width, 3, 14, 14), np.float32)
    arrays[f"{embeddings}patch_embeddings.projection.bias"] = rng.standard_normal(width, np.float32)
    arrays["onnx::class"] = rng.standard_normal((1, 1, width), np.float32)
    arrays["onnx::grid"] = rng.standard_normal((1, width, 37, 37), np.float32).reshape(1, -1, width)
    for layer in range(vision.DEPTH + 1):  # the last block is left alone
        block = f"backbone.encoder.layer.{layer}."
        for part in (
            "layer_scale1.lambda1",
            "layer_scale2.lambda1",
            *(f"norm{n}.{x}" for n in "12" for x in ("weight", "bias")),
        ):
            arrays[block + part] = rng.standard_normal(width, np.float32)
        for part in (
            *(f"attention.attention.{x}" for x in ("query", "key", "value")),
            "attention.output.dense",
            "mlp.fc1",
            "mlp.fc2",
        ):
            name = block + part
            into = {"mlp.fc1": 2 * width}.get(part, width)
            arrays[f"onnx::{name}"] = rng.standard_normal((2 * width if part == "mlp.fc2" else width, into), np.float32)
            arrays[f"{name}.bias"] = rng.standard_normal(into, np.float32)
            nodes.append(helper.make_node("MatMul", ["x", f"onnx::{name}"], [f"{name}.product"]))
            nodes.append(helper.make_node("Add", [f"{name}.bias", f"{name}.product"], [f"{name}.out"]))
    graph = helper.make_graph(
        nodes,
        "vit",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)],
        [helper.make_tensor_value_info(nodes[-1].output[0], TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    onnx.save(helper.make_model(graph), str(path))
    return arrays


def test_an_onnx_file_gives_official_vision_weights(tmp_path: Path) -> None:
    width = 8
    arrays = onnx_file(tmp_path / "v.onnx", width)
    state = vision.read(tmp_path / "v.onnx", grid=37)
    assert len(state) == 4 + 14 * vision.DEPTH
    position = state["vision_model.embeddings.position_embedding"]
    assert position.shape == (1, 1 + 37 * 37, width)
    assert_close(position[:, :1], torch.from_numpy(arrays["onnx::class"]))
    assert_close(position[:, 1:], torch.from_numpy(arrays["onnx::grid"]))  # the stored size: nothing to interpolate
    for layer in (0, vision.DEPTH - 1):
        ours, theirs = f"vision_model.encoder.layers.{layer}.", f"backbone.encoder.layer.{layer}."
        qkv = [arrays[f"onnx::{theirs}attention.attention.{x}"].T for x in ("query", "key", "value")]
        assert_close(state[f"{ours}attn.qkv.weight"], torch.from_numpy(np.concatenate(qkv)))
        assert_close(state[f"{ours}mlp.fc1.weight"], torch.from_numpy(arrays[f"onnx::{theirs}mlp.fc1"].T.copy()))
        assert_close(state[f"{ours}mlp.fc2.bias"], torch.from_numpy(arrays[f"{theirs}mlp.fc2.bias"]))
        assert_close(state[f"{ours}ls2"], torch.from_numpy(arrays[f"{theirs}layer_scale2.lambda1"]))
    assert vision.read(tmp_path / "v.onnx", grid=4)["vision_model.embeddings.position_embedding"].shape == (
        1,
        17,
        width,
    )


def test_keys_of_another_network_are_named(tmp_path: Path) -> None:
    torch.save(
        {"_conv_stem.weight": torch.ones(2), "_blocks.3._depthwise_conv.weight": torch.ones(1)}, tmp_path / "a.pth"
    )
    assert list(efficientnet.read(tmp_path / "a.pth")) == ["stem.conv.weight", "blocks.3.depthwise.conv.weight"]
    torch.save({"layer1.0.conv1.weight": torch.ones(1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b.pth: layer1.0.conv1.weight is no weight of EfficientNet-Lite0"):
        efficientnet.read(tmp_path / "b.pth")


def test_photos_of_landscapes_have_no_words(tmp_path: Path) -> None:
    folder = tmp_path / "usr/share/backgrounds/mate/nature"
    folder.mkdir(parents=True)
    for name, content in (("Sea.jpg", b"sea"), ("Dune.jpg", b"dune"), ("README", b"text")):
        (folder / name).write_bytes(content)
    found = list(backgrounds.read(tmp_path))
    assert [(one.path, one.data, one.title, one.kind, one.series) for one in found] == [
        ("Dune.jpg", b"dune", "", "background", "mate/Dune"),
        ("Sea.jpg", b"sea", "", "background", "mate/Sea"),
    ]


def test_a_font_draws_the_emoji_that_it_has(tmp_path: Path) -> None:
    """An outline font in the place of the package's: it knows the sun, and draws the fox like anything unknown."""
    matplotlib = pytest.importorskip("matplotlib")
    (tmp_path / "fonts").mkdir()
    shutil.copy(Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf"), tmp_path / "fonts/NotoColorEmoji.ttf")
    table = {"☀️": {"en": ":sun:"}, "🦊": {"en": ":fox:"}, "☂☀": {"en": ":umbrella_and_sun:"}}
    (tmp_path / "names").mkdir()
    (tmp_path / "names/emoji.json").write_text(json.dumps(table), encoding="utf-8")
    for language, word in (("fr", "soleil"), ("zh", "太阳")):
        (tmp_path / f"names/emoji_{language}.json").write_text(json.dumps({"☀️": f":{word}:"}), encoding="utf-8")
    (sun,) = noto.read(tmp_path / "fonts", tmp_path / "names")
    assert (sun.title, sun.names, sun.path, sun.series) == (
        "sun",
        {"fr": "soleil", "zh": "太阳"},
        "2600.png",
        "emoji/☀",
    )
    with Image.open(io.BytesIO(sun.data)) as drawn:
        assert drawn.mode == "RGBA"
        assert drawn.getbbox() == (0, 0, *drawn.size)  # nothing empty around it
