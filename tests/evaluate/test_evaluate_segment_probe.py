"""Mean IoU, sliding windows and probes: by hand and as laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from internvl.evaluate.probe import (
    ProbeSettings,
    attention_probe,
    hold_back,
    linear_probe,
    logistic_probe,
    schedule,
)
from internvl.evaluate.segment import Confusion, slide, windows
from tiny import unchecked

seeds = st.integers(0, 10_000)


def masks(seed: int, classes: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    truth = torch.randint(classes, (3, 5, 7), generator=draw)
    truth[torch.rand(truth.shape, generator=draw) < 0.2] = 255
    return torch.randint(classes, truth.shape, generator=draw), truth


@given(seeds)
def test_a_perfect_prediction_scores_one(seed: int) -> None:
    _, truth = masks(seed)
    found = Confusion(4)
    found.add(truth, truth)
    assert found.score().mean_iou == found.score().mean_accuracy == found.score().pixel_accuracy == 1.0


@given(seeds)
def test_pictures_one_by_one_equal_all_at_once(seed: int) -> None:
    said, truth = masks(seed)
    whole, parts, other = Confusion(4), Confusion(4), Confusion(4)
    whole.add(said, truth)
    parts.add(said[0], truth[0])
    other.add(said[1:], truth[1:])
    parts.merge(other)
    assert parts.score() == whole.score()


def test_blocks_of_pixels_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said, truth = masks(0)
    whole, parts = Confusion(4), Confusion(4)
    whole.add(said, truth)
    monkeypatch.setattr("internvl.evaluate.segment.PIXELS_AT_ONCE", 8)
    parts.add(said, truth)
    assert torch.equal(parts.counts, whole.counts)
    assert parts.num_ignored == whole.num_ignored > 0


def test_iou_by_hand() -> None:
    found = Confusion(4)
    found.add(torch.tensor([0, 0, 1, 1, 3]), torch.tensor([0, 1, 1, 255, 1]))
    score = found.score()
    # class 0: 1 of 2; class 1: 1 of 3; class 3: predicted once, never true; class 2: nowhere, left out
    assert score.per_class == (0.5, pytest.approx(1 / 3), None, 0.0)
    assert score.mean_iou == pytest.approx((1 / 2 + 1 / 3 + 0) / 3)
    assert score.mean_accuracy == pytest.approx((1 + 1 / 3) / 2)
    assert score.pixel_accuracy == 0.5
    assert (score.num_pixels, score.num_ignored) == (4, 1)


@pytest.mark.parametrize(
    ("said", "truth", "message"),
    [([4], [0], "prediction holds class 4"), ([0], [7], "truth holds class 7"), ([0, 1], [0], "resize the scores")],
)
def test_masks_are_checked(said: list[int], truth: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unchecked(Confusion(4).add)(torch.tensor(said), torch.tensor(truth))


def test_nothing_to_score() -> None:
    with pytest.raises(ValueError, match="no pixel"):
        Confusion(2).score()


@given(st.integers(1, 60), st.integers(1, 20), st.data())
def test_windows_cover_every_pixel(length: int, crop: int, data: st.DataObject) -> None:
    starts = windows(length, crop, data.draw(st.integers(1, crop)))
    assert {pixel for start in starts for pixel in range(start, min(length, start + crop))} == set(range(length))
    assert all(start + crop <= max(length, crop) for start in starts)
    assert len(set(starts)) == len(starts)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(2, 6), st.data())
def test_sliding_equals_one_pass_of_a_local_model(height: int, width: int, crop: int, data: st.DataObject) -> None:
    """A model that looks at each pixel alone gives the same whatever the window."""
    pictures = torch.rand(2, 3, height, width)
    local = lambda x: torch.stack((x[:, 0], x[:, 1] * 2, -x[:, 2]), 1)  # noqa: E731
    found = slide(local, pictures, crop=crop, stride=data.draw(st.integers(1, crop)), multiple=2)
    assert torch.allclose(found, local(pictures), atol=1e-6)


def test_stride_beyond_the_window() -> None:
    with pytest.raises(ValueError, match="stride 5"):
        windows(10, 4, 5)


def separable(num: int = 90, classes: int = 3, dim: int = 6) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.arange(num) % classes
    return 3 * torch.eye(classes, dim)[labels] + torch.randn(num, dim, generator=draw) * 0.5, labels


FAST = ProbeSettings(learning_rates=(0.1, 3.0), epochs=8, batch=30)


def test_probes_learn_what_is_separable_and_repeat_themselves() -> None:
    features, labels = separable()
    for train in (
        lambda: linear_probe(features, labels, 3, FAST),
        lambda: attention_probe(features[:, None].repeat(1, 4, 1), labels, 3, FAST, num_heads=2),
        lambda: logistic_probe(features, labels, 3, strengths=(1e-4, 1e-2)),
    ):
        one, other = train(), train()
        shown = features[:, None].repeat(1, 4, 1) if hasattr(one.head, "query") else features
        assert one.score(shown, labels).top1 >= 0.97
        assert len(one.tried) == 2
        assert one.chosen in one.tried
        for a, b in zip(one.head.state_dict().values(), other.head.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_probes_leave_the_callers_random_numbers_alone() -> None:
    features, labels = separable()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    linear_probe(features, labels, 3, ProbeSettings(learning_rates=(0.1,), epochs=1, batch=30))
    assert torch.equal(torch.rand(3), expected)


def test_logistic_regression_is_at_its_optimum() -> None:
    """Gradient of the objective is zero, and scaling features changes no answer."""
    features, labels = separable()
    one = logistic_probe(features, labels, 3, strengths=(1e-2,))
    scaled = logistic_probe(features * 100 + 7, labels, 3, strengths=(1e-2,))
    logits = one.head(features.double())
    assert torch.allclose(logits, scaled.head(features.double() * 100 + 7), atol=1e-3)
    # at the optimum the predicted shares of each class equal the true ones (gradient of the bias)
    assert torch.allclose(logits.softmax(1).mean(0), torch.full((3,), 1 / 3).double(), atol=1e-4)


def test_held_back_pictures_are_of_every_class() -> None:
    labels = torch.arange(40) % 4
    kept, held = hold_back(labels, 0.2, 0)
    assert torch.bincount(labels[held]).tolist() == [2, 2, 2, 2]
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(40))


def test_schedule() -> None:
    assert schedule(0, 10, 0.0) == 1.0
    assert schedule(10, 10, 0.0) == pytest.approx(0.0)
    assert schedule(0, 10, 2.0) < schedule(1, 10, 2.0) < schedule(2, 10, 2.0) == 1.0


@pytest.mark.parametrize(
    ("features", "labels", "said"),
    [
        (torch.ones(5, 2), torch.zeros(4, dtype=torch.long), "5 features and 4 labels"),
        (torch.ones(4, 2), torch.tensor([0, 1, 2, 3]), "0 to 3 but there are 3"),
        (torch.full((4, 2), torch.nan), torch.tensor([0, 1, 2, 0]), "not finite"),
    ],
)
def test_features_are_checked(features: Tensor, labels: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        unchecked(linear_probe)(features, labels, 3)
