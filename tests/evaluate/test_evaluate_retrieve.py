"""Ranks, retrieval and zero-shot classification: by hand, against the full matrix, laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from internvl.evaluate.classify import any_label_top1, class_vectors, classify, fill
from internvl.evaluate.ranking import Ranks, Side, rank, top_k, unit
from internvl.evaluate.retrieve import mean_of_frames, retrieve, retrieve_reranked
from tiny import unchecked


def pair(seed: int, images: int = 7, captions: int = 3, dim: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, texts near their picture, and whose text each is; every picture has at least one."""
    draw = torch.Generator().manual_seed(seed)
    owners = torch.cat((torch.arange(images), torch.randint(images, (images * (captions - 1),), generator=draw)))
    pictures = torch.randn(images, dim, generator=draw)
    return pictures, pictures[owners] + 1.5 * torch.randn(len(owners), dim, generator=draw), owners


def full_recall(scores: Tensor, own: Tensor, k: int) -> float:
    """From the whole matrix, as the official script does it."""
    return float(own.gather(1, scores.topk(k, 1).indices).any(1).double().mean())


seeds = st.integers(0, 10_000)


@given(seeds, st.integers(1, 30))
def test_blocks_equal_the_full_matrix(seed: int, block: int) -> None:
    images, texts, owners = pair(seed)
    found = retrieve(images, texts, owners, block=block, at=(1, 3, 5))
    scores, own = unit(images) @ unit(texts).T, torch.arange(len(images))[:, None] == owners
    for k in (1, 3, 5):
        assert found.image_to_text.at[k] == pytest.approx(full_recall(scores, own, k))
        assert found.text_to_image.at[k] == pytest.approx(full_recall(scores.T, own.T, k))


@given(seeds)
def test_recall_grows_with_k_and_ignores_order(seed: int) -> None:
    images, texts, owners = pair(seed)
    found = retrieve(images, texts, owners, at=range(1, 8))
    values = list(found.image_to_text.at.values())
    assert values == sorted(values)
    assert found.text_to_image.at[7] == 1.0
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed))
    moved = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed + 1))
    again = retrieve(images[moved], texts[order], moved.argsort()[owners[order]], at=range(1, 8))
    assert again.image_to_text == found.image_to_text
    assert again.text_to_image == found.text_to_image


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_constant_model_scores_chance(images: int, k: int) -> None:
    same = torch.ones(images, 3)
    found = retrieve(same, same, torch.arange(images), at=(k,))
    assert found.text_to_image.at[k] == pytest.approx(min(1.0, k / images))
    assert found.text_to_image.num_tied == (images if images > 1 else 0)


def test_ties_by_hand() -> None:
    # one wrong before, two wrong beside two right: the first 2 hold one of four, two of which are right
    ranks = Ranks(torch.tensor([1]), torch.tensor([2]), torch.tensor([2]))
    assert ranks.hits(1).item() == 0.0
    assert ranks.hits(2).item() == pytest.approx(0.5)
    assert ranks.hits(3).item() == pytest.approx(1 - 1 / 6)
    assert ranks.hits(4).item() == 1.0
    assert ranks.expected.item() == pytest.approx(1 + 1 + 2 / 3)


def test_retrieval_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[1.0, 0.1], [0.1, 1.0], [0.9, 0.2]])
    found = retrieve(images, texts, torch.tensor([0, 0, 1]), at=(1, 2, 3))
    # picture 0: text 0 first; picture 1: text 1 is wrong, text 2 second
    assert found.image_to_text.at == {1: 0.5, 2: 1.0, 3: 1.0}
    # text 0 finds picture 0; text 1 and text 2 point at the other one
    assert found.text_to_image.at == {1: pytest.approx(1 / 3), 2: 1.0, 3: 1.0}
    assert found.mean == pytest.approx((0.5 + 1 + 1 + 1 / 3 + 1 + 1) / 6)


@given(seeds, st.integers(1, 9), st.integers(1, 30))
def test_top_k_in_blocks_equals_sorting(seed: int, block: int, k: int) -> None:
    images, texts, _ = pair(seed)
    texts = torch.cat((texts, texts[:4]))  # equal scores
    values, places = top_k(images, texts, k, block=block)
    whole = (unit(images) @ unit(texts).T).round(decimals=9).sort(dim=1, descending=True, stable=True)
    assert torch.equal(places, whole.indices[:, :k])
    assert torch.equal(values, whole.values[:, :k])


@given(seeds, st.integers(1, 21))
def test_reranking_by_the_same_score_changes_nothing(seed: int, best: int) -> None:
    images, texts, owners = pair(seed)
    cosine = lambda i, t: (unit(images)[i] * unit(texts)[t]).sum(1).round(decimals=9)  # noqa: E731
    plain = retrieve(images, texts, owners)
    again = retrieve_reranked(images, texts, owners, cosine, best=best, pairs=5)
    assert again.image_to_text.at == pytest.approx(plain.image_to_text.at)
    assert again.text_to_image.at == pytest.approx(plain.text_to_image.at)


def test_a_perfect_scorer_finds_what_stands_among_the_best() -> None:
    images, texts, owners = pair(3)
    truth = lambda i, t: (owners[t] == i).float()  # noqa: E731
    plain = retrieve(images, texts, owners, at=(1, 4))
    found = retrieve_reranked(images, texts, owners, truth, best=4, at=(1, 4))
    assert found.text_to_image.at[1] == pytest.approx(plain.text_to_image.at[4])
    assert found.text_to_image.at[1] > plain.text_to_image.at[1]
    assert found.settings["best"] == 4


def test_dual_softmax_equals_the_full_matrix() -> None:
    images, texts, _ = pair(5, captions=1)
    scores = unit(images) @ unit(texts).T
    found = retrieve(images, texts, torch.arange(7), dual_softmax=1.0, block=3)
    own = torch.eye(7, dtype=torch.bool)
    assert found.image_to_text.at[1] == pytest.approx(full_recall(scores * scores.softmax(0), own, 1))
    assert found.text_to_image.at[1] == pytest.approx(full_recall(scores.T * scores.T.softmax(0), own, 1))


@pytest.mark.parametrize(
    ("images", "texts", "owners", "said"),
    [
        (torch.ones(2, 2), torch.ones(2, 2), [0, 0], "nothing to find"),
        (torch.ones(2, 2), torch.ones(2, 2), [0, 2], "0 to 2 but there are 2"),
        (torch.zeros(2, 2), torch.ones(2, 2), [0, 1], "zero or not finite"),
    ],
)
def test_retrieval_refuses(images: Tensor, texts: Tensor, owners: list[int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        retrieve(images, texts, torch.tensor(owners))
    with pytest.raises(ValueError, match="one group a row"):
        unchecked(Side.__init__)(object.__new__(Side), torch.ones(3, 2), torch.tensor([0, 1]))


def test_mean_of_frames() -> None:
    frames = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    found = mean_of_frames(frames, [2, 1])
    assert torch.allclose(found, unit(torch.tensor([[1.5, 0.5], [0.0, 1.0]])))
    assert torch.allclose(
        mean_of_frames(frames, [2, 1], unit_frames=True)[0], torch.tensor([0.5, 0.5]).double() * 2**0.5
    )
    with pytest.raises(ValueError, match="3 frames for videos of 2"):
        mean_of_frames(frames, [2])


def letters(texts: list[str]) -> Tensor:
    """Counts of letters: an embedding that can be checked by hand."""
    return torch.tensor([[text.count(letter) for letter in "abc"] for text in texts], dtype=torch.float32)


def test_class_vectors_by_hand() -> None:
    found = class_vectors(letters, ["a", "b"], ["{}", "c {c}"], texts=1)
    one = (torch.tensor([1.0, 0, 0]) + torch.tensor([0.5**0.5, 0, 0.5**0.5])) / 2
    assert torch.allclose(found[0].float(), one / one.norm())
    assert torch.allclose(found.norm(dim=1).float(), torch.ones(2))
    with pytest.raises(ValueError, match="no place for the name"):
        fill("a photo", "cat")
    with pytest.raises(ValueError, match="0 class names"):
        class_vectors(letters, [], ["{}"])


def test_classification_by_hand() -> None:
    classes = torch.eye(3)
    images = torch.tensor([[2.0, 1, 0], [1, 2, 0], [0, 1, 2], [0, 2, 1]])
    found = classify(images, classes, torch.tensor([0, 0, 2, 2]))
    assert found.top1 == 0.5
    assert found.top5 == 1.0
    assert found.per_class == (0.5, None, 0.5)
    assert found.mean_per_class == 0.5
    assert found.mean_top1_top5 == 0.75
    # class 1 may not be answered: the second and fourth picture become right
    assert classify(images, classes, torch.tensor([0, 0, 2, 2]), among=[0, 2]).top1 == 1.0
    with pytest.raises(ValueError, match="1 of 4 labels"):
        unchecked(classify)(images, classes, torch.tensor([0, 0, 2, 3]))


def test_two_classes_of_one_name_share_their_pictures() -> None:
    classes = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    found = classify(torch.tensor([[1.0, 0], [1, 0]]), classes, torch.tensor([0, 1]))
    assert found.top1 == 0.5
    assert found.num_tied == 2


@given(seeds)
def test_mean_per_class_equals_top1_where_classes_are_equally_many(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    found = classify(torch.randn(12, 3, generator=draw), torch.randn(4, 3, generator=draw), torch.arange(12) % 4)
    assert found.mean_per_class == pytest.approx(found.top1)
    assert found.top1 <= found.top5 == 1.0


def test_real_labels() -> None:
    assert any_label_top1([1, 2, 3], [[1, 5], [4], []]) == (0.5, 1)
    with pytest.raises(ValueError, match="none of 1"):
        any_label_top1([1], [[]])


def test_ranks_on_their_own() -> None:
    side = Side(torch.eye(3), torch.arange(3))
    assert rank(side, side).greater.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="k must be at least 1"):
        rank(side, side).hits(0)
