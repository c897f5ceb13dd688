"""Wrapped official checkpoints and adapter folders: what they compute, folded or kept beside, is the same."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import internvl
from internvl.load import Loaded, load_checkpoint, save_checkpoint
from internvl.models import adapters
from internvl.models.chat import ChatModel
from tiny import FAMILIES, IMAGE_TOKEN_ID, tiny_batch, tiny_model, tiny_tokenizer
from wrapped import ROOT, TARGETS, wrap


def logits(model: ChatModel) -> torch.Tensor:
    model.image_token_id = IMAGE_TOKEN_ID
    ids, tiles = tiny_batch()
    with torch.no_grad():
        return model.eval()(ids, tiles.to(next(model.parameters()).dtype))


def plain(folder: Path, family: str = "llama", **options: object) -> Path:
    save_checkpoint(tiny_model(family, **options), None, folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("old_peft", [False, True])
def test_folded_is_kept_is_the_sum(tmp_path: Path, family: str, old_peft: bool) -> None:
    """Folded at opening, kept beside by peft, and weights that were added by hand in float64."""
    before = logits(tiny_model(family))
    wanted = wrap(plain(tmp_path / "wrapped", family), family, old_peft=old_peft)
    folded = load_checkpoint(tmp_path / "wrapped").model
    kept = load_checkpoint(tmp_path / "wrapped", merge=False).model
    assert any(".lora_" in key for key in kept.state_dict())
    assert (logits(kept) - before).abs().max() > 0.1
    assert_close(logits(folded), logits(kept), atol=5e-5, rtol=1e-4)
    save_checkpoint(folded, None, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert_close(found[key], value, atol=1e-6, rtol=1e-6, msg=key)
    settings = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (settings["use_llm_lora"], settings["use_backbone_lora"]) == (0, 0)
    assert adapters.merge(kept) < 1e-3
    assert_close(logits(kept), logits(folded), atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3"])
def test_what_peft_itself_wraps_opens(tmp_path: Path, family: str) -> None:
    """wrap_llm_lora in the official code: get_peft_model around the language model, then the whole state dict."""
    from peft import LoraConfig, get_peft_model

    plain(tmp_path, family)
    weights = load_file(tmp_path / "model.safetensors")
    rank, model = 4, load_checkpoint(tmp_path).model
    targets = list(TARGETS.get(family, TARGETS["llama"]))
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets, task_type="CAUSAL_LM")
    peer = get_peft_model(model.language.model, config).eval()
    for name, parameter in peer.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    stored = {key: value for key, value in weights.items() if not key.startswith("language_model.")}
    stored |= {f"language_model.{key}": value.clone() for key, value in peer.state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    settings_of(tmp_path, use_llm_lora=rank)
    ids, _ = tiny_batch(20, 0)
    with torch.no_grad():
        wanted = peer(input_ids=ids).logits
        assert_close(load_checkpoint(tmp_path, merge=False).model(ids), wanted, atol=1e-6, rtol=1e-5)
        assert_close(load_checkpoint(tmp_path).model(ids), wanted, atol=5e-5, rtol=1e-4)
        for layer in peer.modules():
            if hasattr(layer, "lora_A"):
                layer.scaling = dict.fromkeys(layer.scaling, 0.0)
        assert (peer(input_ids=ids).logits - wanted).abs().max() > 0.1


@pytest.mark.parametrize(("vision_rank", "language_rank"), [(4, 0), (0, 4)])
def test_one_part_alone_is_wrapped(tmp_path: Path, vision_rank: int, language_rank: int) -> None:
    wrap(plain(tmp_path), "llama", vision_rank=vision_rank, language_rank=language_rank)
    kept = load_checkpoint(tmp_path, merge=False).model
    parts = {key.split(".")[0] for key in kept.state_dict() if ".lora_" in key}
    assert parts == {"vision" if vision_rank else "language"}
    assert_close(logits(load_checkpoint(tmp_path).model), logits(kept), atol=5e-5, rtol=1e-4)


def test_bfloat16_is_folded_in_float32(tmp_path: Path) -> None:
    wanted = wrap(plain(tmp_path, "internlm2", dtype=torch.bfloat16), "internlm2")
    loaded = load_checkpoint(tmp_path, dtype=None).model
    save_checkpoint(loaded, None, tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    different = sum(int((found[key] != value).sum()) for key, value in wanted.items())
    assert different <= 2  # float32 and float64 sums that round to two neighbours


def test_stacked_changes_are_rounded_once(tmp_path: Path) -> None:
    base = plain(tmp_path / "base", dtype=torch.bfloat16)
    folders = [*adapter(tmp_path / "first", seed=1), *adapter(tmp_path / "second", seed=2)]
    model = load_checkpoint(base, dtype=None, adapters=folders).model
    key = "model.layers.1.mlp.up_proj"
    exact = load_file(base / "model.safetensors")[f"language_model.{key}.weight"].double()
    for folder in folders:
        halves = load_file(folder / "adapter_model.safetensors")
        down, up = (halves[f"{ROOT}{key}.lora_{side}.weight"].double() for side in "AB")
        exact = exact + 2 * up @ down
    found = model.state_dict()[f"language.model.{key}.weight"]
    assert int((found != exact.to(torch.bfloat16)).sum()) <= 2


def edited(folder: Path, change: object) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)  # type: ignore[operator]
    save_file(weights, folder / "model.safetensors")
    return folder


def settings_of(folder: Path, **fields: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return folder


A = "language_model.base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight"

BASE = A.replace("lora_A.default", "base_layer")


def move(weights: dict, old: str, new: str) -> None:
    weights[new] = weights.pop(old)


@pytest.mark.parametrize(
    ("change", "fields", "message"),
    [
        (lambda w: w.pop(A), {}, r"self_attn\.q_proj\.lora_B\.default\.weight has no other half"),
        (lambda w: w.update({A: torch.zeros(5, 64)}), {}, r"q_proj\.weight is 64x3 times 5x64, .* rank 3"),
        (lambda w: w.update({A: torch.zeros(3, 63)}), {}, r"changes 64x63, the weight is 64x64"),
        (lambda w: move(w, A, A.replace("lora_A", "lora_magnitude_vector")), {}, "lora_magnitude_vector.*not one half"),
        (lambda w: w.update({A.replace("default", "more"): w[A].clone()}), {}, "two adapters of one weight"),
        (lambda w: move(w, A, A.replace("layers.0", "layers.7")), {}, "no other half"),
        (lambda w: move(w, A, A.replace(ROOT, 2 * ROOT)), {}, "wrapped twice"),
        (lambda w: move(w, A, "mlp1.1.lora_A.default.weight"), {}, r"mlp1\.1\..* neither the vision nor the language"),
        (lambda w: w.update({BASE.replace(".base_layer", ""): w[BASE].clone()}), {}, "are the same weight"),
        (lambda w: None, {"use_llm_lora": 0}, "use_llm_lora is 0 in config.json, so its strength is unknown"),
        (lambda w: None, {"use_llm_lora": 8}, "rank 8"),
        (lambda w: None, {"use_llm_lora": "many"}, r"config\.json: use_llm_lora is 'many', must be 0 or the rank"),
        (lambda w: None, {"use_llm_lora": True}, "use_llm_lora is True, must be"),
    ],
)
def test_damaged_wrapping_names_the_key(tmp_path: Path, change: object, fields: dict, message: str) -> None:
    wrap(plain(tmp_path), "llama")
    with pytest.raises(ValueError, match=message):
        load_checkpoint(settings_of(edited(tmp_path, change), **fields))


def test_a_rank_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"use_llm_lora is 16 in config\.json but no key.*set it to 0"):
        load_checkpoint(settings_of(plain(tmp_path), use_llm_lora=16))


def adapter(folder: Path, family: str = "llama", seed: int = 0, parts: tuple[str, ...] = ("language",)) -> list[Path]:
    """Folders that training leaves, one a part."""
    model = tiny_model(family)
    adapters.add_adapters(model, rank=2, parts=parts)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    for part in parts:
        adapters.save(model, folder / part, part)
    return [folder / part for part in parts]


@pytest.mark.parametrize("family", FAMILIES)
def test_adapter_folders_are_stacked(tmp_path: Path, family: str) -> None:
    base = plain(tmp_path / "base", family)
    first = adapter(tmp_path / "first", family, 1, ("language", "vision"))
    second = adapter(tmp_path / "second", family, 2)
    kept = load_checkpoint(base, adapters=[*first, *second], merge=False).model
    folded = load_checkpoint(base, adapters=[*first, *second]).model
    alone = load_checkpoint(base, adapters=first).model
    assert_close(logits(folded), logits(kept), atol=5e-5, rtol=1e-4)
    assert (logits(alone) - logits(folded)).abs().max() > 0.1
    assert_close(logits(load_checkpoint(base, adapters=[*second, *first]).model), logits(folded), atol=5e-5, rtol=1e-4)
    one = tiny_model(family)
    for folder, part in zip(first, ("language", "vision"), strict=True):
        adapters.load(one, folder, part)
    assert_close(logits(alone), logits(one), atol=5e-5, rtol=1e-4)
    assert adapters.merge(kept) < 1e-3
    assert_close(logits(kept), logits(folded), atol=5e-5, rtol=1e-4)


def test_an_adapter_on_a_wrapped_checkpoint(tmp_path: Path) -> None:
    wrap(plain(tmp_path / "base"), "llama")
    folders = adapter(tmp_path / "more", parts=("language", "vision"))
    kept = load_checkpoint(tmp_path / "base", adapters=folders, merge=False).model
    assert_close(logits(load_checkpoint(tmp_path / "base", adapters=folders).model), logits(kept), atol=5e-5, rtol=1e-4)


def whole(folder: Path, target: Path, rename: dict[str, str]) -> Path:
    """The adapter of one part as one of the whole model, as other training tools write it."""
    shutil.copytree(folder, target)
    weights = load_file(folder / "adapter_model.safetensors")
    for old, new in rename.items():
        weights = {key.replace(old, new): value for key, value in weights.items()}
    save_file(weights, target / "adapter_model.safetensors")
    return target


def test_names_of_the_whole_model_are_known_in_every_layout(tmp_path: Path) -> None:
    base = plain(tmp_path / "base")
    (part,) = adapter(tmp_path / "part")
    wanted = logits(load_checkpoint(base, adapters=[part]).model)
    official = whole(part, tmp_path / "official", {"base_model.model.": "base_model.model.language_model."})
    native = whole(part, tmp_path / "native", {"base_model.model.model.": "base_model.model.model.language_model."})
    for folder in (official, native):
        assert torch.equal(logits(load_checkpoint(base, adapters=[folder]).model), wanted)


def test_an_adapter_folder_brings_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = plain(tmp_path / "base")
    (folder,) = adapter(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"adapter_config\.json: base_model_name_or_path is None.*open the model"):
        load_checkpoint(folder)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(base)}))
    loaded: Loaded = load_checkpoint(folder)
    assert torch.equal(logits(loaded.model), logits(load_checkpoint(base, adapters=[folder]).model))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not read"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "r is 0"),
        ({"r": 7}, "rank 7"),
    ],
)
def test_adapters_that_compute_something_else_are_refused(tmp_path: Path, fields: dict, message: str) -> None:
    base = plain(tmp_path / "base")
    (folder,) = adapter(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(base, adapters=[folder])


def test_damaged_adapter_files_are_named(tmp_path: Path) -> None:
    base = plain(tmp_path / "base")
    (folder,) = adapter(tmp_path / "adapter")
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    some = sorted(weights)[0]
    save_file({key.replace("layers.0", "layers.9"): value for key, value in weights.items()}, path)
    with pytest.raises(ValueError, match=r"7 adapted weights that the model does not have: .*layers\.9"):
        load_checkpoint(base, adapters=[folder])
    save_file({key: value for key, value in weights.items() if key != some}, path)
    with pytest.raises(ValueError, match="no other half"):
        load_checkpoint(base, adapters=[folder])
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_{}.weight"
    other = "base_model.model.language_model.model.layers.0.mlp.up_proj.lora_{}.weight"
    save_file({**weights, **{other.format(s): weights[name.format(s)].clone() for s in "AB"}}, path)
    with pytest.raises(
        ValueError, match=r"and another pair both change language\.model\.model\.layers\.0\.mlp\.up_proj"
    ):
        load_checkpoint(base, adapters=[folder])
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=r"adapter_model\.safetensors: not a whole"):
        load_checkpoint(base, adapters=[folder])
    path.rename(folder / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: can run code"):
        load_checkpoint(base, adapters=[folder])


def test_a_conversation_takes_adapters(tmp_path: Path) -> None:
    base = tmp_path / "base"
    save_checkpoint(tiny_model(vocab_size=len(tiny_tokenizer())), tiny_tokenizer(), base)
    model = tiny_model(vocab_size=len(tiny_tokenizer()))
    adapters.add_adapters(model, rank=2, parts=("language",))
    for name, parameter in model.named_parameters():
        if ".lora_B" in name:
            torch.nn.init.normal_(parameter)
    adapters.save(model, tmp_path / "mine", "language")
    chat = internvl.load(base, dtype="float32", adapters=[tmp_path / "mine"])
    wanted = load_checkpoint(base, adapters=[tmp_path / "mine"]).model.state_dict()
    assert all(torch.equal(value, wanted[key]) for key, value in chat.model.state_dict().items())
    assert not torch.equal(chat.model.state_dict()[KEY], load_checkpoint(base).model.state_dict()[KEY])


KEY = "language.model.model.layers.0.self_attn.q_proj.weight"


def test_root_scaling_is_read(tmp_path: Path) -> None:
    base = plain(tmp_path / "base")
    (folder,) = adapter(tmp_path / "adapter")
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    folded, kept = (logits(load_checkpoint(base, adapters=[folder], merge=m).model) for m in (True, False))
    assert_close(folded, kept, atol=5e-5, rtol=1e-4)


def test_models_of_random_weights_take_no_adapters(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="takes no adapters, device map or vision tower"):
        load_checkpoint("tiny-llama", adapters=adapter(tmp_path))
