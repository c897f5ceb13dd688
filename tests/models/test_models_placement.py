"""A model over several devices: balanced in bytes, layers in order, the first device where pictures and logits are."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from internvl.config import ChatConfig, LanguageConfig, VisionConfig
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.models.decoder import PlainDecoder, Slots
from internvl.models.placement import FIRST, LAYERS, assign, budgets, device_of, dispatch, place, sizes
from tiny import FAMILIES, IMAGE_TOKEN_ID, tiny_batch, tiny_chat_config, tiny_model

GIB = 2**30
VIT_6B = VisionConfig(3200, 45, 25, 12800, norm="rms_norm", qkv_bias=False, qk_norm=True)
QWEN_72B = {
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 151674,
    "rope_theta": 1000000.0,
}


@pytest.fixture(scope="module")
def large() -> ChatModel:
    """InternVL2_5-78B without memory: the sizes of spec 1.1 and 1.2."""
    return build(ChatConfig(VIT_6B, LanguageConfig("qwen2", QWEN_72B)), torch.bfloat16, "meta")


def layers(places: dict[str, str]) -> list[str]:
    return [device for name, device in places.items() if name.startswith(LAYERS)]


def loads(places: dict[str, str], own: dict[str, int]) -> dict[str, int]:
    return {device: sum(own[name] for name in own if places[name] == device) for device in set(places.values())}


def test_sizes_are_all_of_the_model(large: ChatModel) -> None:
    own = sizes(large)
    assert sum(own.values()) == sum(p.nbytes for p in large.parameters())
    assert own["vision"] == pytest.approx(2 * 5.54e9, rel=0.01)
    tied = tiny_chat_config()
    settings = {**tied.language.settings, "tie_word_embeddings": True}
    small = build(replace(tied, language=replace(tied.language, settings=settings)))
    assert sum(sizes(small).values()) == sum(p.nbytes for p in small.parameters())


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
def test_equal_devices_are_balanced(large: ChatModel, count: int) -> None:
    own = sizes(large)
    places = assign(own, {f"cuda:{n}": 200 * GIB for n in range(count)})
    held = loads(places, own)
    layer = own[f"{LAYERS}0"]
    assert set(held) == {f"cuda:{n}" for n in range(count)}
    assert max(held.values()) <= sum(own.values()) / count + layer  # no split into whole layers does better
    alone = [n for device, n in zip(layers(places), range(80), strict=True) if device == "cuda:0"]
    if count > 1:  # the vision part, embedding and head take the place of layers
        others = [layers(places).count(f"cuda:{n}") for n in range(1, count)]
        assert len(alone) <= min(others) - (own["vision"] // layer) + 1 or count > 6


@st.composite
def problems(draw: st.DrawFn) -> tuple[dict[str, int], dict[str, int]]:
    sides = st.integers(1, 50)
    own = {name: draw(sides) for name in FIRST}
    own |= {f"{LAYERS}{n}": draw(sides) for n in range(draw(st.integers(1, 12)))}
    limits = {f"cuda:{n}": draw(st.integers(60, 600)) for n in range(draw(st.integers(1, 5)))}
    return own, limits


def best_share(own: dict[str, int], limits: dict[str, int]) -> float:
    """The lowest share of the fullest device over every way to cut the layers, by trying all."""
    names = [name for name in own if name.startswith(LAYERS)]
    free = [own[name] for name in names[1:-1]]
    fixed = sum(own.values()) - sum(free)
    sides = list(limits.values())

    def search(start: int, device: int, load: int) -> float:
        if device == len(sides) - 1:
            return (load + sum(free[start:])) / sides[device]
        out = float("inf")
        for end in range(start, len(free) + 1):
            share = (load + sum(free[start:end])) / sides[device]
            out = min(out, max(share, search(end, device + 1, 0)))
        return out

    return search(0, 0, fixed)


@given(problems())
def test_the_fullest_device_is_as_empty_as_can_be(problem: tuple[dict[str, int], dict[str, int]]) -> None:
    own, limits = problem
    best = best_share(own, limits)
    if best > 1:
        with pytest.raises(ValueError, match=r"for weights but must hold|devices have"):
            assign(own, limits)
        return
    places = assign(own, limits)
    assert list(places) == list(own)
    order = layers(places)
    assert all(places[name] == "cuda:0" for name in FIRST)
    assert order[0] == order[-1] == "cuda:0"
    numbers = [int(device.removeprefix("cuda:")) for device in order[:-1]]
    assert all(a <= b for a, b in pairwise(numbers))
    share = max(load / limits[device] for device, load in loads(places, own).items())
    assert share == pytest.approx(best, rel=1e-9)


def test_too_small_says_by_how_much(large: ChatModel) -> None:
    own = sizes(large)
    with pytest.raises(ValueError, match=r"cuda:0 has 10\.00 GiB for weights but must hold 1\d\.\d\d GiB: the vision"):
        assign(own, {"cuda:0": 10 * GIB, "cuda:1": 400 * GIB})
    with pytest.raises(ValueError, match=r"the model takes 14\d\.\d\d GiB and the devices have 60\.00 GiB"):
        assign(own, {"cuda:0": 40 * GIB, "cuda:1": 20 * GIB})


def test_a_mapping_covers_every_module() -> None:
    model = build(tiny_chat_config(), device="meta")
    places = place(model, {"": "cpu", "language.model.model.layers": "cuda:1", f"{LAYERS}1": "cuda:2"})
    assert (places["vision"], *layers(places)) == ("cpu", "cuda:1", "cuda:2")
    assert device_of(f"{LAYERS}1.mlp.up_proj.weight", places) == "cuda:2"
    assert device_of("language.model.lm_head.weight", places) == "cpu"
    with pytest.raises(ValueError, match="says nothing about connector"):
        place(model, {"vision": "cpu", "language": "cpu"})
    with pytest.raises(ValueError, match="names 'audio', which the model does not have"):
        place(model, {"": "cpu", "audio": "cpu"})
    with pytest.raises(ValueError, match="device map 'balanced'"):
        place(model, "balanced")
    with pytest.raises(ValueError, match="memory limits"):
        budgets({})
    assert budgets({"cpu": 5}) == {"cpu": 5}


class Placed(torch.Tensor):
    """Real numbers that say on which device they are: two devices in one operator is an error, as on real ones."""

    place = "cpu"

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        places = {leaf.place for leaf in tree_leaves((args, named)) if isinstance(leaf, Placed)}
        target = next((word for word in args[1:] if isinstance(word, torch.device)), None)
        if func is torch.Tensor.to and target is not None:
            moved = args[0].clone()
            moved.place = str(target)
            return moved
        if len(places) > 1:
            raise RuntimeError(f"tensors on different devices: {places}")
        out = super().__torch_function__(func, types, args, named)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Placed):
                leaf.place = next(iter(places))
        return out


class Devices(TorchFunctionMode):
    """Tensors without a place get one where they are moved; shapes that moved are noted."""

    def __init__(self) -> None:
        super().__init__()
        self.moved: list[tuple[int, ...]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        target = next((word for word in args[1:] if isinstance(word, torch.device)), None)
        if func is torch.Tensor.to and target is not None and not isinstance(args[0], Placed):
            self.moved.append(tuple(args[0].shape))
            return placed(args[0], str(target))
        return func(*args, **(kwargs or {}))


def placed(tensor: torch.Tensor, place: str) -> Placed:
    out = tensor.detach().clone().as_subclass(Placed)
    out.place = place
    return out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("hooked", [True, False])
def test_tensors_follow_the_modules(family: str, hooked: bool) -> None:
    config = tiny_chat_config(family)
    settings = {**config.language.settings, "num_hidden_layers": 6}
    model = build(replace(config, language=replace(config.language, settings=settings)))
    model.image_token_id = IMAGE_TOKEN_ID
    ids, tiles = tiny_batch(9, 3)
    with torch.no_grad():
        wanted = model(ids, tiles)
    limit = int(0.75 * sum(sizes(model).values()))
    places = assign(sizes(model), {"cpu": limit, "cuda:1": limit, "cuda:2": limit})
    assert len(set(places.values())) == 3
    for name, parameter in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        value = nn.Parameter(placed(parameter, device_of(name, places)), requires_grad=False)
        value.place = device_of(name, places)
        setattr(model.get_submodule(owner), leaf, value)
    with torch.no_grad(), Devices() as devices:
        if not hooked:
            with pytest.raises(RuntimeError, match="different devices"):
                model(placed(ids, "cpu"), placed(tiles, "cpu"))
            return
        dispatch(model, places)
        logits = model(placed(ids, "cpu"), placed(tiles, "cpu"))
        assert torch.equal(logits.as_subclass(torch.Tensor), wanted)
        assert logits.place == "cpu"
        cache, steps = DynamicCache(), []
        for part in ids.split([19, 1, 1], dim=1):
            given = placed(tiles, "cpu") if not steps else None
            steps.append(model(placed(part, "cpu"), given, cache=cache).as_subclass(torch.Tensor))
        torch.testing.assert_close(torch.cat(steps, 1), wanted, atol=2e-5, rtol=1e-4)
        packed = model(placed(ids, "cpu"), placed(tiles, "cpu"), segments=torch.tensor([0, 10, 21]))
        assert packed.place == "cpu"
        assert devices.moved
        assert (3,) not in devices.moved  # the bounds are read on the host


def test_a_cache_has_each_layer_where_the_layer_is() -> None:
    slots = Slots(3, 2, 16, torch.bfloat16, [torch.device(name) for name in ("cpu", "meta", "cpu")])
    slots.reserve(2, 5)
    slots.reserve(3, 9)
    assert [keys.device.type for keys in slots.keys] == ["cpu", "meta", "cpu"]
    assert {(tuple(t.shape), t.dtype) for t in (*slots.keys, *slots.values)} == {((3, 2, 10, 16), torch.bfloat16)}
    model = tiny_model()
    model.language.model.model.layers[1].to("meta")
    decoder = PlainDecoder(model.language)
    assert [values.device.type for values in decoder.slots.values] == ["cpu", "meta"]


def test_one_device_is_left_alone() -> None:
    model = tiny_model()
    dispatch(model, dict.fromkeys(sizes(model), "cpu"))
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, {"": "cpu", "vision": "meta"}])
def test_loading_puts_weights_where_the_map_says(tmp_path: Path, device_map: object) -> None:
    model = tiny_model("internlm2").eval()
    save_checkpoint(model, None, tmp_path)
    limits = {"cpu": GIB} if device_map == "auto" else None
    loaded = load_checkpoint(tmp_path, device_map=device_map, max_bytes=limits).model
    where = {name.split(".")[0]: parameter.device.type for name, parameter in loaded.named_parameters()}
    assert where["language"] == where["connector"] == "cpu"
    if isinstance(device_map, dict) and "vision" in device_map:
        assert where["vision"] == "meta"
        return
    loaded.image_token_id = IMAGE_TOKEN_ID
    ids, tiles = tiny_batch()
    with torch.no_grad():
        assert torch.equal(loaded(ids, tiles), model(ids, tiles))


def test_auto_says_what_does_not_fit(tmp_path: Path) -> None:
    save_checkpoint(tiny_model(), None, tmp_path)
    with pytest.raises(ValueError, match=r"cpu has 0\.00 GiB for weights but must hold 0\.00 GiB"):
        load_checkpoint(tmp_path, device_map="auto", max_bytes={"cpu": 1000})
