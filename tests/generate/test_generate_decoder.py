"""Cached equals uncached: every decoder against the language model's own forward over the whole sequence."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from internvl.config import LanguageConfig
from internvl.models.attention import attend
from internvl.models.choose import choose_decoder, why_not_fused
from internvl.models.decoder import Decoder, PlainDecoder
from internvl.models.four_bit import GROUP, FourBitProduct, low_rank, quantise, unpack
from internvl.models.fused import FusedDecoder, attend_causally
from internvl.models.language import LanguageModel
from internvl.models.products import (
    FIXED_ROWS,
    BlockedProduct,
    PlainProduct,
    blocked_is_available,
)
from internvl.zoo import CHAT
from tiny import FAMILIES, tiny_model

LENGTHS = (7, 19, 12)
MAKERS: dict[str, Callable[[LanguageModel], Decoder]] = {
    "transformers": PlainDecoder,
    "fused, plain": lambda language: FusedDecoder(language, "plain"),
    "fused, blocked": lambda language: FusedDecoder(language, "blocked"),
}


def _worst(language: LanguageModel, decoder: Decoder, steps: int = 6) -> float:
    """Largest distance between the decoder's logits and those of one pass over everything."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(10, 160, (len(LENGTHS), max(LENGTHS) + steps), generator=generator)
    with torch.inference_mode():
        embeds = language.embed(ids)
        whole = language.head(language(embeds))
        decoder.reserve(len(LENGTHS), max(LENGTHS) + steps)
        rows = range(len(LENGTHS))
        got = [decoder.read([embeds[row, :length] for row, length in zip(rows, LENGTHS, strict=True)], list(rows))]
        for step in range(steps):
            now = [length + step for length in LENGTHS]
            got.append(decoder.step(ids[rows, now], now))
        want = [whole[rows, [length - 1 + step for length in LENGTHS]] for step in range(steps + 1)]
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_equals_uncached(family: str, maker: str) -> None:
    language = tiny_model(family).language
    if maker != "transformers" and why_not_fused(language):
        pytest.skip(f"{family}: {why_not_fused(language)}")
    assert _worst(language, MAKERS[maker](language)) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_bfloat16_is_as_close_to_float32_as_transformers_is(family: str) -> None:
    exact = tiny_model(family).language
    half = tiny_model(family, dtype=torch.bfloat16).language
    ids = torch.randint(10, 160, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        truth = exact.head(exact(exact.embed(ids)))[0, -1]
        theirs = half.head(half(half.embed(ids)))[0, -1]
        decoder = choose_decoder(half)
        decoder.reserve(1, 32)
        decoder.read([half.embed(ids)[0, :-1]], [0])
        ours = decoder.step(ids[0, -1:], [23])[0]
    assert (ours - truth).abs().max() < 2 * (theirs - truth).abs().max()


@pytest.mark.parametrize("maker", MAKERS)
def test_growing_and_moving_keep_what_is_there(maker: str) -> None:
    language = tiny_model().language
    decoder = MAKERS[maker](language)
    ids = torch.randint(10, 160, (1, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        embeds = language.embed(ids)[0]
        whole = language.head(language(embeds[None]))[0]
        decoder.reserve(2, 16)
        decoder.read([embeds[:5], embeds[:8]], [0, 1])
        decoder.reserve(5, 200)
        decoder.move(1, 0, 8)
        torch.testing.assert_close(decoder.step(ids[0, 8:9], [8])[0], whole[8], rtol=1e-4, atol=1e-5)


def test_positions_up_to_the_last_one_of_a_rope_that_depends_on_the_length() -> None:
    language = tiny_model("internlm2", max_tiles=1).language
    limit = language.model.config.max_position_embeddings
    ids = torch.randint(10, 160, (1, limit), generator=torch.Generator().manual_seed(0))
    decoder = FusedDecoder(language, "plain")
    with torch.inference_mode():
        embeds = language.embed(ids)[0]
        whole = language.head(language(embeds[None]))[0]
        decoder.reserve(1, limit - 3)
        decoder.read([embeds[: limit - 2]], [0])
        decoder.reserve(1, limit)
        for at in (limit - 2, limit - 1):
            torch.testing.assert_close(decoder.step(ids[0, at : at + 1], [at])[0], whole[at], rtol=1e-4, atol=1e-5)


def test_the_fastest_fitting_decoder_is_chosen() -> None:
    assert isinstance(choose_decoder(tiny_model("qwen2").language), FusedDecoder)
    assert isinstance(choose_decoder(tiny_model("phi3").language), PlainDecoder)
    with pytest.raises(ValueError, match="phi3"):
        choose_decoder(tiny_model("phi3", dtype=torch.bfloat16).language, int4=True)


@pytest.mark.parametrize("int4", [False, True])
def test_a_row_has_the_bits_that_it_has_alone(int4: bool) -> None:
    """At the widths of `pocket`, where the kernels of wide batches sum in another order."""
    settings = {**CHAT["pocket"].language.settings, "num_hidden_layers": 2, "vocab_size": 640}
    language = LanguageModel(LanguageConfig("llama", settings), torch.bfloat16)
    decoder = choose_decoder(language, int4=int4)
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 90, 40, 64, 7, 130, 63, 20, 65]
    with torch.inference_mode():
        prompts = [language.embed(torch.randint(0, 640, (n,), generator=generator)[None])[0] for n in lengths]
        tokens = torch.randint(0, 640, (len(lengths),), generator=generator)
        decoder.reserve(len(lengths), 140)
        decoder.read(prompts, range(len(lengths)))
        together = decoder.step(tokens, lengths)
        for row, prompt in enumerate(prompts):
            decoder.read([prompt], [0])
            assert torch.equal(decoder.step(tokens[row : row + 1], lengths[row : row + 1])[0], together[row])


def test_prompts_are_read_whole_where_steps_go_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt is read alone: groups of rows would only cost, 28 products a layer instead of one."""
    monkeypatch.setattr("internvl.models.fused.keeps_bits", lambda product, width: False)
    rows: list[int] = []
    taken = PlainProduct.__call__

    def counted(self: PlainProduct, x: torch.Tensor) -> torch.Tensor:
        rows.append(len(x))
        return taken(self, x)

    monkeypatch.setattr(PlainProduct, "__call__", counted)
    language = tiny_model("llama", dtype=torch.bfloat16).language
    decoder, bare = (FusedDecoder(language, "plain", exact=exact) for exact in (True, False))
    prompt = language.embed(torch.arange(10, 31)[None])[0]
    for one in (decoder, bare):
        one.reserve(6, 32)
    read = decoder.read([prompt], [0])
    assert rows.count(len(prompt)) == 5, "a layer, and qkv of the last one"
    assert rows.count(FIXED_ROWS) == 1, "the head's"
    torch.testing.assert_close(read, bare.read([prompt], [0]), rtol=0.05, atol=0.05)
    rows.clear()
    decoder.step(torch.arange(6), [3] * 6)
    assert set(rows) == {FIXED_ROWS}


def test_a_second_copy_of_the_weights_is_made_only_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internvl.models.choose.free_memory", lambda: 1e5)
    assert isinstance(choose_decoder(tiny_model().language), PlainDecoder)
    decoder = choose_decoder(tiny_model(dtype=torch.bfloat16).language, int4=True)
    assert isinstance(decoder, FusedDecoder)
    assert {type(layer.qkv) for layer in decoder.reading} == {PlainProduct}
    assert {type(layer.qkv) for layer in decoder.layers} == {FourBitProduct}


def test_unmerged_adapters_are_not_skipped() -> None:
    language = tiny_model().language
    projection = language.model.model.layers[1].self_attn.q_proj

    class Adapted(torch.nn.Linear):
        pass

    adapted = Adapted(projection.in_features, projection.out_features, bias=False)
    language.model.model.layers[1].self_attn.q_proj = adapted
    assert isinstance(choose_decoder(language), PlainDecoder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@given(queries=st.integers(1, 300), before=st.integers(0, 40), heads=st.sampled_from([(1, 1), (4, 2), (9, 3)]))
def test_attention_by_blocks_is_attention(
    dtype: torch.dtype, queries: int, before: int, heads: tuple[int, int]
) -> None:
    q = torch.randn(heads[0], queries, 16).to(dtype)
    k, v = (torch.randn(heads[1], before + queries, 16).to(dtype) for _ in range(2))
    with torch.no_grad():
        ours = attend_causally(q, k, v, 0.3)
        wanted = attend(q[None].float(), k[None].float(), v[None].float(), causal=True, scale=0.3)[0]
    tolerance = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(ours.float(), wanted.transpose(0, 1).flatten(1), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_agree(dtype: torch.dtype, bias: bool) -> None:
    if not blocked_is_available(dtype):
        pytest.skip("oneDNN is not built in")
    x, weight, other = (
        torch.randn(3, 64, dtype=dtype),
        torch.randn(96, 64, dtype=dtype),
        torch.randn(3, 96, dtype=dtype),
    )
    offset = torch.randn(96, dtype=dtype) if bias else None
    plain, blocked = PlainProduct(weight, offset), BlockedProduct(weight, offset)
    close = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 0.25}
    torch.testing.assert_close(blocked(x), plain(x), **close)
    torch.testing.assert_close(blocked.silu(x), plain.silu(x), **close)
    torch.testing.assert_close(blocked.times(x, other), plain.times(x, other), **close)
    torch.testing.assert_close(blocked.plus(x, other), plain.plus(x, other), **close)


@pytest.mark.parametrize("rows", [64, 100])
def test_four_bit_product_is_the_product_with_the_rounded_weights(rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, 128, generator=generator) * 0.1
    x = torch.randn(4, 128, generator=generator).bfloat16()
    levels, scale_and_zero = quantise(weight)
    rounded = unpack(levels, scale_and_zero)
    product = FourBitProduct(weight)
    torch.testing.assert_close(product(x).float(), x.float() @ rounded.t(), rtol=2e-2, atol=2e-2)
    assert (rounded - weight).abs().max() <= 0.52 * scale_and_zero[..., 0].max()  # half a level, and bfloat16 scales


def test_four_bit_blocks_are_fitted() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    fitted = unpack(*quantise(weight)).view(64, -1, GROUP)
    groups = weight.view(64, -1, GROUP)
    low, high = groups.aminmax(dim=-1, keepdim=True)
    step = (high - low) / 15
    plain = ((groups - low) / step).round() * step + low
    assert (fitted - groups).square().mean() < 0.9 * (plain - groups).square().mean()


def test_a_merged_adapter_survives_four_bits() -> None:
    """A change of low rank, below half a level everywhere, on weights that were 4-bit blocks."""
    generator = torch.Generator().manual_seed(0)
    base = unpack(*quantise(torch.randn(256, 320, generator=generator)))
    change = torch.randn(256, 8, generator=generator) @ torch.randn(8, 320, generator=generator) * 0.01
    weight, x = base + change, torch.randn(5, 320, generator=generator).bfloat16()
    assert low_rank(weight - base)[0].shape == (256, GROUP)
    product = FourBitProduct(weight)
    kept = product(torch.eye(320, dtype=torch.bfloat16)).float().t()  # the weights, without the rounding of sums
    assert (kept - weight).square().mean() < 0.05 * change.square().mean()  # 1 without
    assert torch.equal(product.plus(x, product(x)), 2 * product(x))


def test_rounding_noise_has_no_low_rank() -> None:
    weight = torch.randn(256, 320, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    assert low_rank(weight - unpack(*quantise(weight))) is None
    assert torch.equal(torch.get_rng_state(), state)  # loading a model draws nothing from the user's generator


def test_four_bit_blocks_that_are_already_on_the_grid_stay() -> None:
    levels = torch.randint(0, 16, (64, 2, 32), generator=torch.Generator().manual_seed(0))
    levels[..., 0], levels[..., 1] = 0, 15
    weight = (levels * 0.125 - 1.0).view(64, 64)
    again, scale_and_zero = quantise(weight)
    assert torch.equal(again.view(64, 2, 32), levels.int())
    assert torch.equal(scale_and_zero[..., 0], torch.full((2, 64), 0.125, dtype=torch.bfloat16))


def test_four_bit_steps_stay_near_the_weights() -> None:
    language = tiny_model(dtype=torch.bfloat16).language
    ids = torch.randint(10, 160, (1, 24), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        want = language.head(language(language.embed(ids)))[0, -1].float().log_softmax(-1)
        decoder = choose_decoder(language, int4=True)
        decoder.reserve(1, 32)
        decoder.read([language.embed(ids)[0, :-1]], [0])
        got = decoder.step(ids[0, -1:], [23])[0].float().log_softmax(-1)
    assert float((want.exp() * (want - got)).sum()) < 0.05  # nats
