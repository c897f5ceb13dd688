"""Published numbers: each once, with its source, and the averages that the paper prints agree with them."""

from __future__ import annotations

import pytest

from internvl.evaluate.catalog import PUBLISHED, beside_published, published


def values(model: str, task: str, data: tuple[str, ...], metric: str | None = None) -> list[float]:
    return [
        one.value
        for one in PUBLISHED
        if (one.model, one.task) == (model, task) and one.data in data and (metric is None or one.metric == metric)
    ]


def test_every_number_stands_once_with_a_source() -> None:
    keys = [(one.model, one.task, one.data, one.metric) for one in PUBLISHED]
    assert len(set(keys)) == len(keys) > 150
    assert all(one.source.startswith("InternVL paper") and 0 < one.value <= 130 for one in PUBLISHED)


@pytest.mark.parametrize("model", ["InternVL-C", "InternVL-G"])
def test_retrieval_averages(model: str) -> None:
    task = "zero-shot retrieval"
    for data in (("Flickr30K", "COCO"), ("Flickr30K-CN", "COCO-CN")):
        each = values(model, task, data)
        assert len(each) == 12
        assert published(model, task, " and ".join(data), "mean of twelve").value == pytest.approx(
            sum(each) / 12, abs=0.051
        )
    xtd = values(model, task, tuple(f"XTD, {x}" for x in ("en", "es", "fr", "zh", "it", "ko", "ru", "ja")))
    assert published(model, task, "XTD, mean of eight", "image to text R@10").value == pytest.approx(
        sum(xtd) / 8, abs=0.051
    )


def test_classification_averages() -> None:
    task, model = "zero-shot classification", "InternVL-C"
    every = [one for one in PUBLISHED if one.task == task]
    twenty = [one.value for one in every if one.source.endswith("16") and "mean" not in one.data]
    assert len(twenty) == 20
    assert published(model, task, "mean-of-20", "top-1").value == pytest.approx(sum(twenty) / 20, abs=0.051)
    tongues = [one.value for one in every if one.source.endswith("6b") and "mean" not in one.data]
    assert published(model, task, "ImageNet-1K, mean of five", "top-1").value == pytest.approx(
        sum(tongues) / 5, abs=0.051
    )


def test_a_result_beside_the_published_one() -> None:
    assert beside_published("InternVL-G", "zero-shot captioning", "COCO", "CIDEr", 1.292) == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"no published top-1 of InternVL-G.*there are none"):
        published("InternVL-G", "zero-shot classification", "ImageNet-1K", "top-1")
    with pytest.raises(ValueError, match="COCO / CIDEr"):
        published("InternVL-G", "zero-shot captioning", "COCO", "SPICE")
