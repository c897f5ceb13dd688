"""internvl plan: sums against modules on the meta device, real cache tensors and live activations."""

from __future__ import annotations

import json
import weakref
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl.cli import main
from internvl.config import ChatConfig
from internvl.generate.engine import Engine
from internvl.load import save_checkpoint
from internvl.models.build import build
from internvl.models.decoder import PlainDecoder, Slots
from internvl.models.four_bit import GROUP, quantise
from internvl.models.products import BlockedProduct, blocked_is_available
from internvl.plan import DTYPES, INT4_GROUP, Plan, _need, config_of
from internvl.zoo import CHAT, RELEASED
from tiny import FAMILIES, tiny_chat_config, tiny_model

TORCH = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LiveBytes(TorchDispatchMode):
    """Bytes of all tensors that operations made and somebody still holds, at their peak; meta tensors count too."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given and storage._cdata not in self.seen:
                    self._hold(storage)
        self.peak = max(self.peak, self.now)
        return out

    def _hold(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.now += size

        def gone() -> None:
            self.seen.discard(key)
            self.now -= size

        weakref.finalize(storage, gone)


# weights

SIZES = ["InternVL2_5-1B", "InternVL2_5-26B", "Mini-InternVL-Chat-4B-V1-5", "pocket"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [*SIZES, "InternVL-Chat-QLLaMA-Vicuna-13B-336px"])
def test_weights_are_those_of_the_module(name: str, dtype: Any) -> None:
    config = config_of(name)
    model = build(config, torch.float32, "meta")
    size = 4 if dtype == "fp32" else 2
    total = 0
    for key, parameter in model.named_parameters():  # a tied head is there once
        in_layers = key.startswith("language.model.model.layers.") and parameter.ndim == 2
        if in_layers and dtype == "int8":
            total += parameter.numel() + 4 * len(parameter)
        elif in_layers and dtype == "int4":
            total += parameter.numel() // 2 + 4 * parameter.numel() // 32
        else:
            total += parameter.numel() * size
    plan = Plan(config, dtype)
    assert plan.weights == total
    assert sum(part.parameters for part in plan.parts) == config.num_parameters


def test_four_bits_are_counted_as_they_are_stored() -> None:
    assert INT4_GROUP == GROUP
    weight = torch.randn(128, 64)
    levels, scale_and_zero = quantise(weight)
    config = tiny_chat_config()
    per_number = (levels.numel() / 2 + scale_and_zero.nbytes) / weight.numel()
    assert Plan(config, "int4").matrix_bytes == per_number * config.language.matrix_parameters


# cache


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_cache_is_that_of_the_decoder(family: str, dtype: Any) -> None:
    model = tiny_model(family, dtype=TORCH[dtype])
    decoder = PlainDecoder(model.language)
    decoder.reserve(3, 70)
    plan = Plan(model.config, dtype, rows=3, tokens=70)
    assert sum(tensor.nbytes for tensor in (*decoder.slots.keys, *decoder.slots.values)) == plan.cache
    assert sum(part.cache for part in plan.parts) == plan.cache == 3 * 70 * plan.cache_bytes_per_token


def test_cache_of_a_release() -> None:
    config = RELEASED["InternVL2_5-78B"].config
    slots = Slots(80, 8, 128, torch.bfloat16, "meta")
    slots.reserve(1, 1000)
    kept = sum(tensor.nbytes for tensor in (*slots.keys, *slots.values))
    assert kept == 1000 * Plan(config).cache_bytes_per_token == 327_680_000


def test_pictures() -> None:
    plan = Plan(RELEASED["InternVL2_5-8B"].config)
    assert (plan.max_tiles, plan.picture_tokens(1), plan.picture_tokens(13)) == (13, 258, 3330)
    assert (plan.tiles, plan.tokens) == (13, 4330)
    assert Plan(RELEASED["InternVL-Chat-V1-1"].config).max_tiles == 1
    first = Plan(RELEASED["InternVL-Chat-QLLaMA-Vicuna-7B-224px"].config)
    assert (first.max_tiles, first.picture_tokens(1)) == (1, 96 + 256)  # nothing stands around them
    assert Plan(replace(tiny_chat_config(), max_tiles=1)).max_tiles == 1  # one tile needs no thumbnail
    assert Plan(replace(tiny_chat_config(), thumbnail=False)).max_tiles == 12


def test_prompt_of_a_largest_picture_has_that_many_positions() -> None:
    from PIL import Image

    from internvl.data.encode import Encoder
    from tiny import tiny_tokenizer

    config = tiny_chat_config(vocab_size=300, template="internvl2_5")
    encoder = Encoder(tiny_tokenizer(), config)
    bare = encoder.prompt([{"role": "user", "content": "\nHi"}]).input_ids
    full = encoder.prompt([{"role": "user", "content": "<image>\nHi"}], [Image.new("RGB", (56 * 4, 56 * 3))]).input_ids
    assert len(full) - len(bare) == Plan(config).picture_tokens(13)


# activations


@pytest.mark.parametrize("name", ["InternVL2_5-1B", "InternVL2_5-26B", "InternVL-Chat-QLLaMA-Vicuna-7B-336px"])
@pytest.mark.parametrize("tiles", [1, 4])
def test_activation_of_the_vit(name: str, tiles: int) -> None:
    """On the meta device the fused attention kernel has no scratch; on a GPU flash attention has next to none."""
    config = config_of(name)
    side = config.tile_size
    # Blocks run one after another: the peak does not depend on their number.
    vision = replace(config.vision, depth=2 if config.queries is None else 6)
    queries = None if config.queries is None else replace(config.queries, vision=vision)
    model = build(replace(config, vision=vision, queries=queries), torch.bfloat16, "meta")
    with torch.inference_mode(), LiveBytes() as live:
        model.encode_tiles(torch.empty(tiles, 3, side, side, dtype=torch.bfloat16, device="meta"))
    assert live.peak == pytest.approx(Plan(config, tiles=tiles).vision_activation, rel=0.02)


@pytest.mark.parametrize("name", ["InternVL2_5-1B", "InternVL2_5-26B", "InternVL2_5-78B", "Mini-InternVL-Chat-4B-V1-5"])
@pytest.mark.parametrize("rows", [1, 2])
def test_activation_of_prompts(name: str, rows: int) -> None:
    config = config_of(name)
    settings = {**config.language.settings, "num_hidden_layers": 2}
    settings.pop("rope_scaling", None)  # its dynamic kind looks at positions, which have no values here
    config = replace(config, language=replace(config.language, settings=settings))
    model = build(config, torch.bfloat16, "meta")
    with torch.inference_mode(), LiveBytes() as live:
        embeds = torch.empty(rows, 2000, config.language.width, dtype=torch.bfloat16, device="meta")
        model.language(embeds)
    assert live.peak == pytest.approx(Plan(config, rows=rows, tokens=2000).prompt_activation, rel=0.02)


# devices


@pytest.mark.parametrize("number", [1, 2, 3, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_split_is_the_best_one(number: int, tied: bool) -> None:
    """Against every way to cut the sequence of pieces."""
    config = tiny_chat_config(vocab_size=4000)
    settings = {**config.language.settings, "num_hidden_layers": 5, "tie_word_embeddings": tied}
    plan = Plan(replace(config, language=replace(config.language, settings=settings)), tokens=64)
    parts = plan.parts
    if tied and number > 1:
        parts[-1] = replace(parts[-1], weights=parts[-1].weights + 4000 * 64 * 2)
    cuts = [(0, *inner, len(parts)) for k in range(number) for inner in combinations(range(1, len(parts)), k)]
    best = min(max(_need(parts[a:b]) for a, b in pairwise(cut)) for cut in cuts)
    devices = plan.on_devices(number)
    assert max(devices) == best
    assert len(devices) <= number


@pytest.mark.parametrize("name", ["InternVL2_5-8B", "InternVL2_5-78B"])
def test_more_devices_need_less_each(name: str) -> None:
    plan = Plan(config_of(name))
    fullest = [max(plan.on_devices(number)) for number in (1, 2, 4, 8)]
    assert fullest == sorted(fullest, reverse=True)
    whole = plan.weights + plan.cache + max(part.activation for part in plan.parts)
    assert plan.on_devices(1) == [whole]
    assert all(sum(plan.on_devices(number)) >= plan.weights + plan.cache for number in (2, 4, 8))


def test_mistakes() -> None:
    for wrong in ({"dtype": "fp8"}, {"rows": 0}, {"tokens": -1}, {"tiles": -2}):
        with pytest.raises(ValueError, match=r"it (is one of|must be)"):
            Plan(tiny_chat_config(), **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="0 devices"):
        Plan(tiny_chat_config()).on_devices(0)


# the command


def test_configs_by_name_and_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("internlm2")
    save_checkpoint(model, None, tmp_path / "InternVL2_5-8B")
    assert config_of(tmp_path / "InternVL2_5-8B") == model.config
    assert config_of("pocket") == CHAT["pocket"]
    assert config_of("InternVL2_5-8B") == RELEASED["InternVL2_5-8B"].config
    monkeypatch.chdir(tmp_path)
    assert config_of("InternVL2_5-8B") == model.config  # the folder that is there says more than the table
    save_checkpoint(model, None, tmp_path / "native", "native")
    assert config_of(tmp_path / "native").num_parameters == model.config.num_parameters


def test_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "InternVL2_5-8B", "--dtype", "bf16", "--memory", "24", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    config: ChatConfig = RELEASED["InternVL2_5-8B"].config
    assert said["parameters"] == config.num_parameters
    assert said["weights"] == 2 * config.num_parameters == sum(p["weights"] for p in said["parts"].values())
    assert said["cache"]["per_1000_tokens"] == 2 * 32 * 8 * 128 * 2 * 1000
    assert [row["fits"] for row in said["devices"]] == [True, True, True, True]
    assert "language.intermediate_size" in said["assumed"]
    assert main(["plan", "InternVL2_5-26B", "--memory", "24", "--devices", "2", "--dtype", "fp32"]) == 0
    shown = capsys.readouterr().out
    assert " no " in shown
    assert " yes " not in shown
    assert main(["plan", "nothing"]) == 1
    assert "no such folder" in capsys.readouterr().err
    assert main(["plan", "pocket", "--memory", "0"]) == 1
    assert "--memory 0" in capsys.readouterr().err


@pytest.mark.skipif(not blocked_is_available(torch.float32), reason="torch was built without oneDNN")
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_copies_of_answers_on_a_cpu(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrices that an engine copies, to the number; a head is counted though the tied embedding is no matrix."""
    copied, make = [], BlockedProduct.__init__

    def counted(self: BlockedProduct, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        copied.append(weight.nbytes)
        make(self, weight, bias)

    monkeypatch.setattr(BlockedProduct, "__init__", counted)
    model = tiny_model(family)
    Engine(model)
    plan = Plan(model.config, "fp32")
    assert sum(copied) == (plan.copy_bytes if family == "llama" else Plan(model.config, "int8").copy_bytes * 2)
