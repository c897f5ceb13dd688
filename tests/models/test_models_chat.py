"""The chat model against the official code (logits, losses, gradients, greedy tokens), and its laws."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import DynamicCache

from internvl.convert.keys import expand
from internvl.convert.official import official_rules
from internvl.models.build import build, initialise
from internvl.models.chat import ChatModel
from internvl.models.language import padding_mask
from internvl.zoo import CHAT
from reference import golden_tensors, official_model
from tiny import FAMILIES, IMAGE_TOKEN_ID, tiny_batch, tiny_model

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
FILES = ["chat_llama.safetensors", "chat_internlm2.safetensors"]


@pytest.fixture(scope="module", params=FILES, ids=["llama", "internlm2"])
def reference(request):
    return official_model(request.param)


def losses(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every predicted position, zero where ignored."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none").view(
        labels.shape[0], -1
    )


def inputs(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensors[f"in/{name}"] for name in ("input_ids", "pixel_values", "attention_mask", "image_flags")}


def test_logits_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    real = tensors["in/attention_mask"].bool()
    with torch.no_grad():
        logits = model(**inputs(tensors))
        positioned = model(**inputs(tensors), position_ids=tensors["in/position_ids"])
    assert_close(logits[real], tensors["out/logits"][real], **CLOSE)
    assert_close(positioned[real], tensors["out/logits_position_ids"][real], **CLOSE)


def test_losses_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    with torch.no_grad():
        each = losses(model(**inputs(tensors)), tensors["in/labels"])
    learned = tensors["in/labels"][:, 1:] != -100
    counts = (tensors["in/labels"] != -100).sum(1, keepdim=True).float()
    for name, weight in {
        "loss": counts**0,
        "loss_token": counts**0,
        "loss_sample": 1 / counts,
        "loss_square": counts**-0.5,
    }.items():
        weights = learned * weight
        assert_close((each * weights).sum() / weights.sum(), tensors[f"out/{name}"], atol=1e-5, rtol=1e-5)


def test_gradients_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    model.zero_grad()
    each = losses(model(**inputs(tensors)), tensors["in/labels"])
    (each.sum() / (tensors["in/labels"][:, 1:] != -100).sum()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    for entry in expand(official_rules(model.config), model.state_dict()):
        on_disk = entry.to_disk([gradients[key] for key in entry.ours])
        for key, value in zip(entry.disk, on_disk, strict=True):
            wanted = tensors[f"grad/{key}"]
            assert_close(value, wanted, rtol=1e-3, atol=1e-6 + 1e-4 * wanted.abs().max().item(), msg=key)


def test_bfloat16_is_as_near_as_the_official_one(reference) -> None:
    model, tensors, notes = reference
    half = build(model.config, torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.image_token_id = model.image_token_id
    given_inputs = inputs(tensors) | {"pixel_values": tensors["in/pixel_values"].bfloat16()}
    real = tensors["in/attention_mask"].bool()
    with torch.no_grad():
        logits = half(**given_inputs).float()
    assert (logits - tensors["out/logits"])[real].abs().max().item() <= 1.5 * notes["bf16_vs_fp32"]


@pytest.mark.parametrize("cached", [True, False])
def test_greedy_tokens_are_the_official_ones(reference, cached: bool) -> None:
    model, tensors, _ = reference
    ids, tiles = tensors["in/greedy_input_ids"], tensors["in/pixel_values"][:2]
    wanted = tensors["out/greedy_new_tokens"][0].tolist()
    cache = DynamicCache() if cached else None
    with torch.no_grad():
        visual, out = model.encode_tiles(tiles), []
        logits = model(ids, visual=visual, cache=cache)
        embeds = model.embed(ids, visual=visual)
        for _ in wanted:
            out.append(int(logits[0, -1].argmax()))
            new = torch.tensor([[out[-1]]])
            embeds = torch.cat([embeds, model.language.embed(new)], dim=1)
            logits = model(new, cache=cache) if cached else model.language.head(model.language(embeds))
    assert out == wanted


def test_packed_row_is_the_official_one() -> None:
    model, _, _ = official_model("chat_llama.safetensors")
    tensors, _ = golden_tensors("packed_llama.safetensors")
    with torch.no_grad():
        logits = model(
            tensors["in/input_ids"],
            tensors["in/pixel_values"],
            segments=tensors["in/attention_mask"][0],
            position_ids=tensors["in/position_ids"],
            image_flags=tensors["in/image_flags"],
        )
        alone = model(
            tensors["in/input_ids"],
            tensors["in/pixel_values"],
            segments=tensors["in/attention_mask"][0],
            image_flags=tensors["in/image_flags"],
        )
    assert_close(logits, tensors["out/logits"], **CLOSE)
    assert_close(logits, tensors["out/logits_separate"], **CLOSE)
    assert torch.equal(alone, logits)  # positions restart at each segment without being told
    each = losses(logits, tensors["in/labels"])
    for name in ("token", "sample", "square"):
        weights = tensors[f"in/loss_weight_{name}"][:, 1:]
        assert_close((each * weights).sum() / weights.sum(), tensors[f"out/loss_{name}"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=10)
@given(lengths=st.lists(st.integers(2, 12), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_packed_is_unpacked(family: str, lengths: list[int], seed: int) -> None:
    model = cached_model(family)
    samples = [tiny_batch(n, num_tiles=(n + seed) % 3, seed=seed + n) for n in lengths]
    ids = torch.cat([ids for ids, _ in samples], dim=1)
    tiles = torch.cat([tiles for _, tiles in samples])
    bounds = torch.tensor([0, *torch.tensor([s[0].shape[1] for s in samples]).cumsum(0)], dtype=torch.int32)
    with torch.no_grad():
        packed = model(ids, tiles, segments=bounds)
        alone = torch.cat([model(ids, tiles) for ids, tiles in samples], dim=1)
    assert_close(packed, alone, **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_row_does_not_depend_on_its_batch(family: str, side: str) -> None:
    model = cached_model(family)
    samples = [tiny_batch(4, 1), tiny_batch(9, 2, seed=1), tiny_batch(5, 0, seed=2)]
    longest = max(ids.shape[1] for ids, _ in samples)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros(3, longest, dtype=torch.bool)
    for row, (sample, _) in enumerate(samples):
        place = slice(0, sample.shape[1]) if side == "right" else slice(longest - sample.shape[1], longest)
        ids[row, place], mask[row, place] = sample[0], True
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        together = model(ids, torch.cat([t for _, t in samples]), attention_mask=mask, position_ids=positions)
        assert together.isfinite().all()
        for row, (sample, tiles) in enumerate(samples):
            assert_close(together[row, mask[row]][None], model(sample, tiles), **CLOSE)


@pytest.mark.parametrize("family", FAMILIES)
def test_cached_is_uncached(family: str) -> None:
    model = cached_model(family)
    ids, tiles = tiny_batch(10, 1)
    with torch.no_grad():
        whole = model(ids, tiles)
        cache = DynamicCache()
        steps = [model(ids[:, :9], tiles, cache=cache)]  # the tile's places are 5 to 8
        steps += [model(ids[:, 9:12], cache=cache), model(ids[:, 12:13], cache=cache), model(ids[:, 13:], cache=cache)]
    assert_close(torch.cat(steps, dim=1), whole, **CLOSE)


def test_every_query_sees_something() -> None:
    seen = torch.tensor([[False, False, True, True], [True, True, True, False]])
    mask = padding_mask(seen, 4)
    assert mask[0, 0].tolist() == [[True] * 4, [True] * 4, [False, False, True, False], [False, False, True, True]]
    assert mask[1, 0].tolist() == [[True, False, False, False], [True, True, False, False], *[[True] * 3 + [False]] * 2]
    assert padding_mask(torch.ones(2, 4, dtype=torch.bool), 4) is None


def test_a_padding_mask_covers_the_cache() -> None:
    model = cached_model("llama")
    ids, tiles = tiny_batch(6, 1)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], dim=1)
    mask = padded != 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        cache = DynamicCache()
        model(padded[:, :-1], tiles, attention_mask=mask[:, :-1], position_ids=positions[:, :-1], cache=cache)
        last = model(padded[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], cache=cache)
        assert_close(last[:, -1], model(ids, tiles)[:, -1], **CLOSE)


@pytest.mark.parametrize(("num_tiles", "given_tiles"), [(2, 1), (1, 2), (0, 1), (1, 0)])
def test_more_or_fewer_places_than_features_is_an_error_with_both_numbers(num_tiles: int, given_tiles: int) -> None:
    model = cached_model("llama")
    ids, _ = tiny_batch(6, num_tiles)
    tiles = torch.randn(given_tiles, 3, 56, 56) if given_tiles else None
    with pytest.raises(ValueError, match=f"{4 * num_tiles} <IMG_CONTEXT> tokens but {4 * given_tiles} visual tokens"):
        model(ids, tiles)
    with pytest.raises(ValueError, match=f"{4 * num_tiles} <IMG_CONTEXT> tokens but {4 * given_tiles} visual tokens"):
        model(ids, tiles, num_image_tokens=4 * num_tiles)


def test_the_official_count_mismatch_is_an_error() -> None:
    model, tensors, _ = official_model("chat_llama.safetensors")
    with pytest.raises(ValueError, match=r"4 .*tokens but 8|8 .*tokens but 12"):
        model(tensors["in/mismatch_input_ids"], tensors["in/pixel_values"], image_flags=tensors["in/image_flags"])


def test_dummy_tiles_change_nothing() -> None:
    model = cached_model("llama")
    ids, tiles = tiny_batch(6, 2)
    with_dummies = torch.cat([torch.randn(1, 3, 56, 56), tiles[:1], torch.randn(1, 3, 56, 56), tiles[1:]])
    text = torch.randint(10, 160, (1, 5))
    with torch.no_grad():
        assert torch.equal(model(ids, tiles), model(ids, with_dummies, image_flags=torch.tensor([[0], [1], [0], [1]])))
        assert torch.equal(model(text), model(text, tiles, image_flags=torch.tensor([0, 0])))


def test_features_go_to_their_places_in_order() -> None:
    model = cached_model("llama")
    ids, tiles = tiny_batch(6, 2)
    with torch.no_grad():
        embeds, visual = model.embed(ids, tiles), model.encode_tiles(tiles)
        places = ids[0] == IMAGE_TOKEN_ID
        assert torch.equal(embeds[0, places], visual.flatten(0, 1))
        assert torch.equal(embeds[0, ~places], model.language.embed(ids)[0, ~places])
        assert torch.equal(embeds, model.embed(ids, visual=visual, num_image_tokens=8))


def test_pictures_without_an_image_token_id_are_refused() -> None:
    model = tiny_model()
    model.image_token_id = None
    ids, tiles = tiny_batch()
    with pytest.raises(ValueError, match="8 visual tokens but image_token_id"):
        model(ids, tiles)
    assert model(ids[:, :3]).shape == (1, 3, 160)


def test_segments_with_a_mask_or_a_cache_are_refused() -> None:
    model = cached_model("llama")
    ids = torch.randint(10, 160, (1, 6))
    with pytest.raises(ValueError, match="segments"):
        model(ids, segments=torch.tensor([0, 6]), cache=DynamicCache())
    with pytest.raises(ValueError, match="segments"):
        model(ids, segments=torch.tensor([0, 6]), attention_mask=torch.ones(1, 6, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_changes_no_gradient(family: str) -> None:
    model = tiny_model(family).train()
    ids, tiles = tiny_batch()
    gradients = []
    for on in (False, True):
        model.checkpoint(on)
        model.zero_grad()
        model(ids, tiles).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_runs_forward_and_backward(family: str) -> None:
    model = tiny_model(family)
    ids, tiles = tiny_batch()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(ids, tiles)
        packed = model(ids, tiles, segments=torch.tensor([0, 11, ids.shape[1]]))
    (logits.float().square().mean() + packed.float().square().mean()).backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)
    assert_close(logits.float(), model(ids, tiles), atol=0.15, rtol=0.1)


def test_resize_keeps_old_rows_and_updates_the_config() -> None:
    model = tiny_model()
    old_in = model.language.model.get_input_embeddings().weight.clone()
    old_out = model.language.model.get_output_embeddings().weight.clone()
    model.resize(169)
    new_in = model.language.model.get_input_embeddings().weight
    new_out = model.language.model.get_output_embeddings().weight
    assert model.language.vocab_size == model.config.language.vocab_size == 169
    assert torch.equal(new_in[:160], old_in)
    assert torch.equal(new_out[:160], old_out)
    assert_close(new_out[160:], old_out.mean(0, keepdim=True).expand(9, -1))
    assert len(new_in[160:].unique(dim=0)) == 9
    assert model(torch.tensor([[165]])).shape == (1, 1, 169)


def test_random_weights_come_from_the_seed() -> None:
    first, again, other = (
        build(CHAT["tiny-llama"], seed=3),
        build(CHAT["tiny-llama"], seed=3),
        build(CHAT["tiny-llama"]),
    )
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.connector.fc1.weight, other.connector.fc1.weight)
    initialise(other, 3)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    assert all(p.isfinite().all() for p in first.parameters())


def test_tied_heads_share_one_matrix() -> None:
    with torch.device("meta"):
        model = build(CHAT["pocket"], device="meta")
    assert model.language.model.lm_head.weight is model.language.model.get_input_embeddings().weight
    assert model.language.vocab_size == 49161
    assert 150e6 < sum(p.numel() for p in model.parameters()) < 165e6


def cached_model(family: str) -> ChatModel:
    if family not in _MODELS:
        _MODELS[family] = tiny_model(family).eval()
    return _MODELS[family]


_MODELS: dict[str, ChatModel] = {}
