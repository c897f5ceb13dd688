"""A chat model from its parts: rows, tokens, connector as the official scripts make them; it trains and goes out."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import InternVLForConditionalGeneration

from hostile import trap
from internvl.cli import main
from internvl.commands.compose import next_command
from internvl.commands.train import configure, parse
from internvl.compose import Parts, compose
from internvl.generate.session import Chat
from internvl.load import load_checkpoint, save_checkpoint
from internvl.load_dual import save_dual
from internvl.models.fresh import resize_rows
from internvl.tokens import SPECIAL_TOKENS
from tiny import FAMILIES, plain_tokenizer, tiny_batch, tiny_dual, tiny_model, tiny_tokenizer


def language_folder(
    folder: Path, family: str = "llama", *, rows: int | None = None, tied: bool = False, width: int = 64, **rest: Any
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A language model alone, as it is released: no prefix, its own tokenizer, `rows` of embedding."""
    tokenizer = plain_tokenizer(**rest)
    rows = len(tokenizer) if rows is None else rows
    model = tiny_model(family, vocab_size=rows)
    if width != 64:
        model = widened(family, rows, width)
    save_checkpoint(model, tokenizer, folder)
    stored = load_file(folder / "model.safetensors")
    prefix = "language_model."
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    if tied:
        del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["llm_config"]
    settings |= {"tie_word_embeddings": tied, "auto_map": {"AutoConfig": "x.y"}}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder, weights


def widened(family: str, rows: int, width: int) -> Any:
    from dataclasses import replace

    from internvl.models.build import build
    from tiny import tiny_chat_config

    config = tiny_chat_config(family, vocab_size=rows)
    settings = {**config.language.settings, "hidden_size": width}
    return build(replace(config, language=replace(config.language, settings=settings)))


def vision_folder(folder: Path, vision: str = "300m", seed: int = 5) -> tuple[Path, dict[str, torch.Tensor]]:
    """An InternViT alone: no prefix, model_type intern_vit_6b."""
    save_checkpoint(tiny_model("llama", vision=vision, seed=seed), None, folder)
    stored = load_file(folder / "model.safetensors")
    prefix = "vision_model."
    weights = {key.removeprefix(prefix): value for key, value in stored.items() if key.startswith(prefix)}
    save_file(weights, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text())["vision_config"]
    (folder / "config.json").write_text(json.dumps({**settings, "auto_map": {"AutoModel": "x.y"}}))
    return folder, weights


HEAD = {"internlm2": "output.weight"}
EMBEDDING = {"internlm2": "model.tok_embeddings.weight"}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vision", ["300m", "6b"])
def test_every_weight_of_both_parts_is_there(tmp_path: Path, family: str, vision: str) -> None:
    tower, vision_weights = vision_folder(tmp_path / "vit", vision)
    body, language_weights = language_folder(tmp_path / "llm", family)
    old = len(plain_tokenizer())
    composed = compose(Parts(tower, body), tmp_path / "out")
    assert composed.added == {token: old + n for n, token in enumerate(SPECIAL_TOKENS)}
    assert (composed.old_rows, composed.config.language.vocab_size) == (old, old + 9)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert {key for key in written if key.startswith("mlp1.")} == {
        f"mlp1.{n}.{leaf}" for n in (0, 1, 3) for leaf in ("weight", "bias")
    }
    for key, value in vision_weights.items():
        assert torch.equal(written.pop(f"vision_model.{key}"), value)
    head, embedding = HEAD.get(family, "lm_head.weight"), EMBEDDING.get(family, "model.embed_tokens.weight")
    grown = {key: written.pop(f"language_model.{key}") for key in (head, embedding)}
    for key, value in grown.items():
        assert value.shape == (old + 9, 64)
        assert torch.equal(value[:old], language_weights.pop(key))
    mean = grown[head][:old].mean(0)
    assert all(torch.allclose(row, mean, atol=1e-7) for row in grown[head][old:])
    assert 0.04 < float(grown[embedding][old:].std()) < 0.12  # initializer_range 0.08, no two rows alike
    assert len(grown[embedding][old:].unique(dim=0)) == 9
    for key, value in language_weights.items():
        assert torch.equal(written.pop(f"language_model.{key}"), value)
    assert {key.split(".")[0] for key in written} == {"mlp1"}
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (settings["ps_version"], settings["dynamic_image_size"], settings["use_thumbnail"]) == ("v2", True, True)
    assert settings["template"] == ("phi3-chat" if family == "phi3" else "internvl2_5")
    assert settings["llm_config"]["tie_word_embeddings"] is False
    assert "auto_map" not in settings["llm_config"]
    loaded = load_checkpoint(tmp_path / "out")
    assert len(loaded.tokenizer) == loaded.model.language.vocab_size == old + 9
    assert loaded.model.image_token_id == old + 2


def test_the_fresh_connector_is_drawn_as_torch_draws_it(tmp_path: Path) -> None:
    tower, _ = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        compose(Parts(tower, body, seed=seed), tmp_path / name)
    a, b, c = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(a["mlp1.1.weight"], c["mlp1.1.weight"])
    assert torch.equal(a["mlp1.0.weight"], torch.ones(256))
    for name, columns in (("mlp1.1", 256), ("mlp1.3", 64)):
        reference = torch.nn.Linear(columns, 64)
        for leaf in ("weight", "bias"):
            mine = a[f"{name}.{leaf}"]
            limit = columns**-0.5
            assert mine.abs().max() <= limit
            assert mine.abs().max() > 0.9 * limit
            assert float(mine.std()) == pytest.approx(float(getattr(reference, leaf).std()), rel=0.25)


def test_padding_rows_beyond_the_tokenizer_go(tmp_path: Path) -> None:
    """Qwen pads its embedding: the matrix shrinks to the tokenizer, new input rows are the padding that was there."""
    tower, _ = vision_folder(tmp_path / "vit")
    body, weights = language_folder(tmp_path / "llm", "qwen2", rows=300)
    old = len(plain_tokenizer())
    compose(Parts(tower, body), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    embedding, head = (written[f"language_model.{key}"] for key in ("model.embed_tokens.weight", "lm_head.weight"))
    assert torch.equal(embedding, weights["model.embed_tokens.weight"][: old + 9])
    assert torch.equal(head[:old], weights["lm_head.weight"][:old])
    assert_close(head[old:], weights["lm_head.weight"][:old].mean(0).expand(9, -1), atol=1e-7, rtol=1e-6)


def test_a_tied_language_model_gets_a_head_of_its_own(tmp_path: Path) -> None:
    tower, _ = vision_folder(tmp_path / "vit")
    body, weights = language_folder(tmp_path / "llm", "qwen2", tied=True)
    old = len(plain_tokenizer())
    compose(Parts(tower, body), tmp_path / "out")
    written = load_file(tmp_path / "out" / "model.safetensors")
    head = written["language_model.lm_head.weight"]
    assert torch.equal(head[:old], weights["model.embed_tokens.weight"])
    assert not torch.equal(head[old:], written["language_model.model.embed_tokens.weight"][old:])
    loaded = load_checkpoint(tmp_path / "out").model
    assert loaded.language.model.lm_head.weight is not loaded.language.model.get_input_embeddings().weight


@pytest.mark.parametrize(("rows", "size", "added"), [(20, 24, 4), (20, 15, 4), (20, 20, 0), (20, 26, 4), (20, 12, 0)])
def test_rows_follow_the_official_rule(rows: int, size: int, added: int) -> None:
    """resize_token_embeddings(len(tokenizer)), then the last `added` output rows become the mean of the others."""
    weight = torch.randn(rows, 8)
    for is_output in (False, True):
        model = torch.nn.Embedding(rows, 8)
        model.weight.data = weight.clone()
        mine = resize_rows(weight, size, added, 0.02, is_output)
        assert mine.shape == (size, 8)
        kept = min(rows, size - added if is_output else size)
        assert torch.equal(mine[:kept], weight[:kept])
        if is_output and added:
            assert_close(mine[-added:], mine[:-added].mean(0).expand(added, -1), atol=1e-7, rtol=1e-6)


def test_progressive_scaling_moves_the_vision_part(tmp_path: Path) -> None:
    """A ViT under a small language model moves under a larger one: its weights, tile size and layer come along."""
    small = tiny_model("llama", vision="6b", feature_layer=-2, tile_size=56)
    save_checkpoint(small, tiny_tokenizer(), tmp_path / "small")
    save_checkpoint(small, tiny_tokenizer(), tmp_path / "small-native", "native")
    large, _ = language_folder(tmp_path / "large", "qwen2", width=96)
    for source in ("small", "small-native"):
        composed = compose(Parts(tmp_path / source, large), tmp_path / f"out-{source}")
        assert composed.config.feature_layer == -2
        loaded = load_checkpoint(tmp_path / f"out-{source}").model
        tiles = tiny_batch()[1]
        with torch.no_grad():
            assert torch.equal(loaded.vision(tiles), small.eval().vision(tiles))
        assert loaded.encode_tiles(tiles).shape == (2, 4, 96)


def test_a_connector_is_carried_where_it_fits(tmp_path: Path) -> None:
    source = tiny_model("internlm2")
    save_checkpoint(source, tiny_tokenizer(), tmp_path / "chat")
    same, _ = language_folder(tmp_path / "same", "llama")
    other, _ = language_folder(tmp_path / "other", "llama", width=96)
    compose(Parts(tmp_path / "chat", same, connector=tmp_path / "chat"), tmp_path / "out")
    tiles = tiny_batch()[1]
    with torch.no_grad():
        mine = load_checkpoint(tmp_path / "out").model.encode_tiles(tiles)
        assert torch.equal(mine, source.eval().encode_tiles(tiles))
    with pytest.raises(ValueError, match=r"from 256 to 64 channels, this model needs 256 to 96; leave the connector"):
        compose(Parts(tmp_path / "chat", other, connector=tmp_path / "chat"), tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_the_language_part_of_a_chat_model_keeps_its_tokens(tmp_path: Path) -> None:
    chat = tiny_model("internlm2", vocab_size=len(tiny_tokenizer()), template="Hermes-2", system_message="Be brief.")
    save_checkpoint(chat, tiny_tokenizer(), tmp_path / "chat")
    tower, _ = vision_folder(tmp_path / "vit", "6b")
    composed = compose(Parts(tower, tmp_path / "chat"), tmp_path / "out")
    assert composed.added == {}
    assert (composed.config.template, composed.config.system_message) == ("Hermes-2", "Be brief.")
    other = compose(Parts(tower, tmp_path / "chat", template="internvl2_5"), tmp_path / "other")
    assert other.config.system_message is None
    loaded = load_checkpoint(tmp_path / "out").model.language.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in chat.language.state_dict().items())


def test_positions_are_resized_for_another_tile(tmp_path: Path) -> None:
    tower, weights = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm")
    composed = compose(Parts(tower, body, tile_size=84), tmp_path / "out")
    assert (composed.config.tile_size, composed.config.vision.image_size) == (84, 84)
    grown = load_file(tmp_path / "out" / "model.safetensors")["vision_model.embeddings.position_embedding"]
    stored = weights["embeddings.position_embedding"]
    assert grown.shape == (1, 37, 64)
    assert torch.equal(grown[:, 0], stored[:, 0])
    image = stored[:, 1:].reshape(1, 4, 4, 64).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(image, size=(6, 6), mode="bicubic").permute(0, 2, 3, 1)
    assert_close(grown[:, 1:].view(1, 6, 6, 64), wanted)
    assert load_checkpoint(tmp_path / "out").model.encode_tiles(torch.zeros(1, 3, 84, 84)).shape == (1, 9, 64)


def test_what_does_not_fit_is_said_and_nothing_is_left(tmp_path: Path) -> None:
    tower, _ = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm")
    chatless, _ = language_folder(tmp_path / "base", extra=("<|end|>",))
    out = tmp_path / "out"
    for parts, message in (
        (Parts(body, body), r"llm/config\.json: model_type is 'llama', must be 'intern_vit_6b'"),
        (Parts(tower, tower), r"vit/config\.json: language model 'InternVisionModel' is not one of"),
        (Parts(tower, body, tile_size=50), "tile size 50"),
        (Parts(tower, chatless), r"internvl2_5 ends turns with '<\|im_end\|>', which the tokenizer does not have"),
        (Parts(tower, body, template="chatty"), "chatty"),
    ):
        with pytest.raises(ValueError, match=message):
            compose(parts, out)
    assert compose(Parts(tower, chatless, template="phi3-chat"), tmp_path / "other").config.template == "phi3-chat"
    (body / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="has no tokenizer"):
        compose(Parts(tower, body), out)
    weights = load_file(tower / "model.safetensors")
    save_file(
        {key: value for key, value in weights.items() if "layers.1.norm1.bias" not in key}, tower / "model.safetensors"
    )
    with pytest.raises(ValueError, match=r"1 keys missing: vision_model\.encoder\.layers\.1\.norm1\.bias"):
        compose(Parts(tower, chatless, template="phi3-chat"), out)
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))


def test_the_command_composes_and_says_what_to_run_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, _ = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm")
    out = tmp_path / "out"
    command = ["compose", str(out), "--vision", str(tower), "--language", str(body), "--max-tiles", "6"]
    assert main([*command, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert shlex.split(said["next"]) == next_command(out)
    run = configure(parse(next_command(out)[2:]))
    assert (run.model, run.connector.learn, run.vision.learn, run.language.learn) == (
        str(out),
        "full",
        "frozen",
        "frozen",
    )
    assert run.optimiser.peak_lr == 2e-4
    assert said["vocabulary"] == [262, 271]
    assert said["added_tokens"]["<IMG_CONTEXT>"] == 264
    assert sum(said["parameters"].values()) == sum(p.numel() for p in load_checkpoint(out).model.parameters())
    assert json.loads((out / "config.json").read_text())["max_dynamic_patch"] == 6
    assert main(command) == 1
    assert "exists and is not an empty folder" in capsys.readouterr().err
    command[1] = str(tmp_path / "again")
    assert main([*command, "--dtype", "bfloat16"]) == 0
    assert "next          internvl train pocket_connector" in capsys.readouterr().out
    assert {value.dtype for value in load_file(tmp_path / "again" / "model.safetensors").values()} == {torch.bfloat16}


def test_no_code_of_the_parts_runs(tmp_path: Path) -> None:
    tower, _ = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm", "internlm2")
    marks = {trap(folder) for folder in (tower, body)}
    compose(Parts(tower, body), tmp_path / "out")
    assert not any(mark.exists() for mark in marks)
    assert not list((tmp_path / "out").glob("**/*.py"))
    assert load_checkpoint(tmp_path / "out").tokenizer.get_vocab().keys() >= set(SPECIAL_TOKENS)
    for path in (tmp_path / "out").glob("*.json"):
        assert '"auto_map"' not in path.read_text()


def test_a_composed_model_trains_and_goes_out(tmp_path: Path) -> None:
    """Stage 1 in small: only the connector learns, the loss falls; the native export computes the same."""
    tower, _ = vision_folder(tmp_path / "vit")
    body, _ = language_folder(tmp_path / "llm", "qwen2")
    compose(Parts(tower, body), tmp_path / "out")
    loaded = load_checkpoint(tmp_path / "out")
    model = loaded.model.train()
    ids, tiles = tiny_batch(12, 2)
    ids = torch.where(ids == 9, model.image_token_id, ids)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("connector."))
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(12):
        logits = model(ids, tiles)
        loss = torch.nn.functional.cross_entropy(logits[:, 13:-1].flatten(0, 1), ids[:, 14:].flatten())
        losses.append(float(loss.detach()))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[-1] < losses[0] - 0.05
    changed = {key.split(".")[0] for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"connector"}
    save_checkpoint(model.eval(), loaded.tokenizer, tmp_path / "native", "native")
    peer = InternVLForConditionalGeneration.from_pretrained(tmp_path / "native", dtype=torch.float32).eval()
    with torch.no_grad():
        assert_close(model(ids, tiles), peer(input_ids=ids, pixel_values=tiles).logits, atol=2e-5, rtol=1e-4)


# the form of 1.0


def dual_folder(folder: Path, seed: int = 4) -> dict[str, torch.Tensor]:
    """InternVL-G in small; its weights."""
    save_dual(tiny_dual(seed), None, folder)
    return load_file(folder / "model.safetensors")


def test_the_form_of_1_0_takes_encoder_and_queries(tmp_path: Path) -> None:
    seen = dual_folder(tmp_path / "g")
    body, language_weights = language_folder(tmp_path / "llm")
    old = len(plain_tokenizer())
    composed = compose(Parts(tmp_path / "g", body, form="1.0"), tmp_path / "out")
    config = composed.config
    assert (config.tokens_per_tile, config.num_queries, config.patch_tokens) == (5 + 16, 5, 16)
    assert (config.feature_layer, config.dynamic_tiles, config.crop, config.pad_to_square) == (-4, False, True, True)
    assert (config.connector_norm, config.image_marks, config.max_tiles) == (False, False, 1)
    assert set(composed.parameters) == {"vision", "qllama", "connector", "language"}
    written = load_file(tmp_path / "out" / "model.safetensors")
    for key, value in written.items():
        if key.startswith(("vision_model.", "qllama.", "query_tokens")):
            assert torch.equal(value, seen.pop(key)), key
    left = {key.split(".")[0] for key in seen} - {"qllama"}
    assert left == {"clip_projector", "clip_projector2", "itm_head", "text_projection", "logit_scale"}
    assert {key for key in seen if key.startswith("qllama.")} == {"qllama.lm_head.weight", EMBEDDING_OF_G}
    for key in ("model.embed_tokens.weight", "lm_head.weight"):  # the token of a picture has a name and no row
        assert torch.equal(written[f"language_model.{key}"], language_weights[key])
    assert (composed.added, composed.old_rows, config.language.vocab_size) == ({"<IMG_CONTEXT>": old}, old, old)
    for number, columns in ((1, 64), (3, 64)):
        for mlp in ("mlp1", "mlp2"):
            assert float(written[f"{mlp}.{number}.weight"].abs().max()) <= columns**-0.5
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.model.image_token_id == old
    assert sum(composed.parameters.values()) == loaded.config.num_parameters
    chat = Chat(loaded.model, loaded.tokenizer)
    assert chat.chat("What?", [np.zeros((20, 30, 3), np.uint8)], max_new_tokens=4).usage.image_tokens == 21


EMBEDDING_OF_G = "qllama.model.embed_tokens.weight"


def test_the_form_of_1_0_without_queries_and_the_encoder_of_a_dual_alone(tmp_path: Path) -> None:
    tower, _ = vision_folder(tmp_path / "vit", "6b")
    body, _ = language_folder(tmp_path / "llm")
    plain = compose(Parts(tower, body, form="1.0", tile_size=84), tmp_path / "plain").config
    assert (plain.queries, plain.tokens_per_tile, plain.vision.image_size) == (None, 36, 84)
    seen = dual_folder(tmp_path / "g")
    later = compose(Parts(tmp_path / "g", body), tmp_path / "later")
    assert (later.config.queries, later.config.tokens_per_tile, later.config.image_marks) == (None, 4, True)
    written = load_file(tmp_path / "later" / "model.safetensors")
    assert not [key for key in written if key.startswith(("qllama", "query"))]
    assert all(torch.equal(v, seen[k]) for k, v in written.items() if k.startswith("vision_model."))
    grown = compose(Parts(tmp_path / "g", body, form="1.0", tile_size=84), tmp_path / "grown").config
    assert grown.queries is not None
    assert (grown.tokens_per_tile, grown.queries.vision.image_size) == (5 + 36, 84)
    assert load_checkpoint(tmp_path / "grown").config == grown


def test_connectors_of_two_forms_do_not_pass_for_each_other(tmp_path: Path) -> None:
    dual_folder(tmp_path / "g")
    body, _ = language_folder(tmp_path / "llm")
    compose(Parts(tmp_path / "g", body, form="1.0", seed=3), tmp_path / "one")
    compose(Parts(tmp_path / "g", body, form="1.0", seed=5, connector=tmp_path / "one"), tmp_path / "again")
    one, again = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "again"))
    assert all(torch.equal(one[key], again[key]) for key in one)
    with pytest.raises(ValueError, match="with a norm or queries that the other has not; leave"):
        compose(Parts(tmp_path / "one", body, connector=tmp_path / "one"), tmp_path / "no")


def test_the_command_of_the_form_of_1_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dual_folder(tmp_path / "g")
    body, _ = language_folder(tmp_path / "llm")
    command = ["compose", str(tmp_path / "out"), "--vision", str(tmp_path / "g"), "--language", str(body)]
    assert main([*command, "--form", "1.0", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["tile"] == {"pixels": 56, "tokens": 21, "most": 1}
    assert said["vocabulary"] == [262, 262]
    run = configure(parse(shlex.split(said["next"])[2:]))
    assert (run.model, run.connector.learn, run.tokens.learn) == (str(tmp_path / "out"), "full", False)
    assert main(["compose", str(tmp_path / "x"), "--vision", "nothing", "--language", str(body)]) == 1
    assert "nothing: no such folder" in capsys.readouterr().err
