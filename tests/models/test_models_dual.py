"""InternVL-C and -G against the official code, and the laws of queries, masks, texts and caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from internvl.models.contrastive import DualModel, last_real, text_mask, unit
from internvl.models.qllama import Cache, causal_text, visible
from reference import official_dual
from tiny import tiny_dual, tiny_pictures, tiny_texts, unchecked

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TASKS = ("itm", "itc", "itg")


@pytest.fixture(scope="module")
def reference() -> tuple[DualModel, dict[str, torch.Tensor], dict[str, Any]]:
    return official_dual("g_stage2.safetensors")


@pytest.fixture(scope="module")
def model() -> DualModel:
    return tiny_dual()


# the official numbers


@torch.no_grad()
def test_embeddings_and_logits_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    pixels = tensors["in/pixel_values"]
    texts = model.encode_text(tensors["in/text_ids"], tensors["in/text_mask"])
    assert_close(model.vision(pixels), tensors["out/backbone_hidden"], **CLOSE)
    for head in ("c", "g"):
        name = head.upper()
        images = model.encode_image(pixels, head)
        assert_close(images, unit(tensors[f"out/{name}_image_embeds"]), **CLOSE)
        assert_close(texts, unit(tensors[f"out/{name}_text_embeds"]), **CLOSE)
        logits = model.similarity(images, texts)
        assert_close(logits, tensors[f"out/{name}_logits_per_image"], **CLOSE)
        assert_close(logits.T, tensors[f"out/{name}_logits_per_text"], **CLOSE)


@torch.no_grad()
def test_query_states_are_the_official_ones(reference) -> None:
    model, tensors, _ = reference
    assert_close(model.qllama.look(model.vision(tensors["in/pixel_values"])), tensors["out/query_hidden"], **CLOSE)


def test_masks_are_the_official_ones(reference) -> None:
    _, tensors, notes = reference
    text = tensors["in/mask_text_attention"].bool()
    found = torch.cat([visible(task, text, notes["num_query_token"]) for task in TASKS])
    assert torch.equal(found, tensors["out/visible_itm_itc_itg"].bool())


# masks


@given(length=st.integers(1, 6), queries=st.integers(1, 4), data=st.data())
def test_masks_say_who_sees_whom(length: int, queries: int, data: st.DataObject) -> None:
    real = [data.draw(st.integers(1, length)) for _ in range(2)]
    text = torch.arange(length) < torch.tensor(real)[:, None]
    for task in TASKS:
        mask = visible(task, text, queries)[:, 0]
        for row, num_real in enumerate(real):
            for a in range(queries + length):
                for b in range(queries + length):
                    is_text, sees_text = a >= queries, b >= queries
                    if not is_text and not sees_text:
                        expected = True
                    elif not is_text:
                        expected = task == "itm"
                    elif not sees_text:
                        expected = task != "itc"
                    else:
                        expected = task == "itm" or b <= a
                    if sees_text:
                        expected = expected and b - queries < num_real
                    assert bool(mask[row, a, b]) == expected, (task, row, a, b)


def test_unknown_task_is_an_error() -> None:
    with pytest.raises(ValueError, match="task 'xyz'; it is 'itm', 'itc' or 'itg'"):
        unchecked(visible)("xyz", torch.ones(1, 2, dtype=torch.bool), 2)


def test_padding_on_the_left_is_blind_to_nothing() -> None:
    text = torch.tensor([[False, True, True]])
    assert visible("itc", text, 2)[0, 0].any(-1).all()
    assert causal_text(text)[0, 0].any(-1).all()
    assert not visible("itc", text, 2)[0, 0, 3:, 2].any()


# laws


@torch.no_grad()
@given(padding=st.integers(0, 5), company=st.integers(0, 3), left=st.booleans(), seed=st.integers(0, 3))
def test_text_embedding_is_independent_of_batch_and_padding(padding: int, company: int, left: bool, seed: int) -> None:
    model, ids = tiny_dual(), tiny_texts(1, 6, seed)
    alone = model.encode_text(ids)
    filler = torch.zeros(1, padding, dtype=torch.long)
    padded = torch.cat([filler, ids] if left else [ids, filler], dim=1)
    batch = torch.cat([padded, tiny_texts(company, 6 + padding, seed + 9)])
    assert_close(model.encode_text(batch)[:1], alone, **CLOSE)
    assert_close(model.encode_text(batch, (batch > 0).long())[:1], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("task", ["itc", "itg"])
def test_queries_are_unaffected_by_text_but_not_in_matching(model: DualModel, task: str) -> None:
    features = model.vision(tiny_pictures(2))
    mask = torch.ones(2, 7, dtype=torch.bool)
    one, other = tiny_texts(2, 7, 1), tiny_texts(2, 7, 2)
    queries = model.config.num_queries
    first = model.qllama.both(features, one, mask, task)[:, :queries]
    assert torch.equal(first, model.qllama.both(features, other, mask, task)[:, :queries])
    assert_close(first, model.qllama.look(features), **CLOSE)
    matched = model.qllama.both(features, one, mask, "itm")[:, :queries]
    assert (matched - model.qllama.both(features, other, mask, "itm")[:, :queries]).abs().max() > 1e-2


@torch.no_grad()
def test_text_of_contrast_is_unaffected_by_picture_and_queries(model: DualModel) -> None:
    ids, mask = tiny_texts(2, 7), torch.ones(2, 7, dtype=torch.bool)
    queries = model.config.num_queries
    joint = model.qllama.both(model.vision(tiny_pictures(2)), ids, mask, "itc")[:, queries:]
    assert_close(joint, model.qllama.read(ids), **CLOSE)  # though its positions begin elsewhere


@torch.no_grad()
@given(place=st.integers(1, 7))
def test_captions_and_contrast_are_causal_and_matching_is_not(place: int) -> None:
    model, ids, mask = tiny_dual(), tiny_texts(2, 8), torch.ones(2, 8, dtype=torch.bool)
    changed = ids.clone()
    changed[:, place:] = 77
    features, queries = model.vision(tiny_pictures(2)), model.config.num_queries
    for task in TASKS:
        a, b = (model.qllama.both(features, x, mask, task)[:, queries : queries + place] for x in (ids, changed))
        if task == "itm":
            assert (a - b).abs().max() > 1e-3
        else:
            assert_close(a, b, **CLOSE)


@torch.no_grad()
def test_captions_see_the_picture_and_contrast_does_not(model: DualModel) -> None:
    ids, mask, queries = tiny_texts(2, 6), torch.ones(2, 6, dtype=torch.bool), model.config.num_queries
    one, other = (model.vision(tiny_pictures(2, seed=seed)) for seed in (1, 2))
    for task, sees in (("itg", True), ("itc", False)):
        parts = [model.qllama.both(features, ids, mask, task)[:, queries:] for features in (one, other)]
        assert ((parts[0] - parts[1]).abs().max() > 1e-2) == sees


@torch.no_grad()
def test_cached_captions_equal_uncached(model: DualModel) -> None:
    """One pass of queries and text, against queries first, then the text at once, then token by token."""
    features, ids = model.vision(tiny_pictures(3)), tiny_texts(3, 6)
    whole = model.qllama.both(features, ids, torch.ones(3, 6, dtype=torch.bool), "itg")[:, model.config.num_queries :]
    seen = Cache()
    model.qllama.look(features, seen)
    assert seen.length == model.config.num_queries
    assert_close(model.caption_states(seen, ids), whole, **CLOSE)
    assert seen.length == model.config.num_queries, "states of a caption must leave the queries as they were"
    steps = [model.qllama.read(ids[:, n : n + 1], cache=seen) for n in range(6)]
    assert_close(torch.cat(steps, dim=1), whole, **CLOSE)
    picked = seen.pick(torch.tensor([2, 2]))
    assert torch.equal(picked.pairs[0][0][1], seen.pairs[0][0][2])


@torch.no_grad()
def test_padded_captions_equal_unpadded(model: DualModel) -> None:
    seen = Cache()
    model.qllama.look(model.vision(tiny_pictures(1)), seen)
    ids = tiny_texts(1, 5)
    padded = torch.nn.functional.pad(ids, (0, 3))
    assert_close(model.caption_states(seen, padded)[:, :5], model.caption_states(seen, ids), **CLOSE)


@torch.no_grad()
def test_rows_look_at_the_picture_they_name(model: DualModel) -> None:
    features, ids = model.vision(tiny_pictures(3)), tiny_texts(4, 6)
    index = torch.tensor([2, 0, 2, 1])
    assert_close(
        model.match_logits(features, ids, image_of_row=index), model.match_logits(features[index], ids), **CLOSE
    )


def test_gradients_are_the_same_with_recomputation() -> None:
    model, found = tiny_dual(), []
    pixels, ids = tiny_pictures(2), tiny_texts(2, 5)
    for recompute in (False, True):
        model.checkpoint(recompute)
        seen = Cache()
        states = model.qllama.look(model.vision(pixels), seen)
        (model.pool_queries(states).sum() + model.caption_states(seen, ids).square().mean()).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


# embeddings


@torch.no_grad()
def test_g_is_the_sum_of_two_unit_vectors(model: DualModel) -> None:
    pixels = tiny_pictures(2)
    queries = model.pool_queries(model.qllama.look(model.vision(pixels)))
    both = model.encode_image(pixels, "c") + queries
    assert_close(model.encode_image(pixels, "g", raw=True), both, **CLOSE)
    assert_close(model.encode_image(pixels, "g"), unit(both), **CLOSE)
    assert_close(unit(model.encode_image(pixels, "c", raw=True)), model.encode_image(pixels, "c"), **CLOSE)
    assert_close(model.encode_image(pixels, "g").norm(dim=1), torch.ones(2))


@torch.no_grad()
def test_other_picture_sizes_and_tied_heads(model: DualModel) -> None:
    assert model.encode_image(tiny_pictures(1, side=84), "g").shape == (1, 24)
    language = model.config.language
    tied = tiny_dual(language=type(language)("llama", {**language.settings, "tie_word_embeddings": True}))
    assert tied.qllama.head.weight is tied.qllama.embed_tokens.weight
    assert tied.config.num_parameters == sum(p.numel() for p in tied.parameters())


def test_last_real_token() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]).bool()
    assert last_real(mask).tolist() == [1, 3, 3]


def test_bad_input_says_what_to_do(model: DualModel) -> None:
    alone = tiny_dual_c()
    with pytest.raises(ValueError, match=r"InternVL-C alone has no queries; use head 'c'"):
        alone.encode_image(tiny_pictures(1), "g")
    with pytest.raises(ValueError, match=r"head 'x'; it is 'c'"):
        unchecked(model.encode_image)(tiny_pictures(1), "x")
    with pytest.raises(ValueError, match=r"texts \[1\] have no token"):
        model.encode_text(torch.tensor([[1, 2], [0, 0]]))
    with pytest.raises(ValueError, match=r"attention_mask \(1, 3\) for ids \(1, 2\)"):
        text_mask(torch.tensor([[1, 2]]), torch.ones(1, 3))


def tiny_dual_c() -> DualModel:
    from dataclasses import replace

    from internvl.models.build import build_dual
    from internvl.zoo import DUAL

    return build_dual(replace(DUAL["tiny-dual"], generative=False))
