"""Heads: sizes of the paper, shapes, pooling and errors. Built on the meta device where they are large."""

from __future__ import annotations

import pytest
import torch

from internvl.models.heads import (
    AttentionProbe,
    AuxiliarySegmenter,
    FeaturePyramid,
    LinearProbe,
    LinearSegmenter,
    UperNet,
    feature_map,
    probe_feature,
)


def size(module: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())


def test_sizes_are_the_papers() -> None:
    with torch.device("meta"):
        assert size(LinearProbe(6400, 1000)) == 6_413_800  # spec of the official linear probe
        assert size(LinearSegmenter(3200, 150)) == 486_550


def test_probe_features() -> None:
    tokens = torch.arange(24.0).view(1, 4, 6)
    found = probe_feature(tokens)
    assert torch.equal(found[0, :6], tokens[0, 0])
    assert torch.equal(found[0, 6:], tokens[0, 1:].mean(0))


def test_maps_keep_places() -> None:
    tokens = torch.arange(6.0)[None, :, None]
    assert feature_map(tokens, 2, 3)[0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="6 tokens for 2 x 2"):
        feature_map(tokens, 2, 2)


def test_the_attention_probe_ignores_the_order_of_tokens() -> None:
    torch.manual_seed(0)
    head = AttentionProbe(8, 3, num_heads=2).eval()
    tokens = torch.randn(2, 5, 8)
    assert torch.allclose(head(tokens), head(tokens[:, [3, 1, 0, 4, 2]]), atol=1e-6)
    with pytest.raises(ValueError, match="3 heads do not divide"):
        AttentionProbe(8, 3, num_heads=3)


def test_the_attention_probe_equals_plain_attention() -> None:
    torch.manual_seed(0)
    head = AttentionProbe(8, 3, num_heads=2).eval()
    tokens = torch.randn(1, 5, 8)
    x = head.norm_tokens(tokens)[0]
    keys, values = head.key(x), head.value(x)
    parts = []
    for part in (slice(0, 4), slice(4, 8)):
        weights = (keys[:, part] @ head.query[part] / 2).softmax(0)
        parts.append(weights @ values[:, part])
    assert torch.allclose(head(tokens)[0], head.probe(head.out(torch.cat(parts))[None])[0], atol=1e-6)


def test_pyramid_and_upernet_shapes() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 8, 4, 6) for _ in range(4)]
    levels = FeaturePyramid(8)(maps)
    assert [tuple(x.shape[-2:]) for x in levels] == [(16, 24), (8, 12), (4, 6), (2, 3)]
    head = UperNet([8] * 4, 4, 5)
    assert head(levels).shape == (2, 5, 16, 24)
    assert AuxiliarySegmenter(8, 4, 5)(levels).shape == (2, 5, 8, 12)
    with pytest.raises(ValueError, match="3 feature maps"):
        head(levels[:3])
    with pytest.raises(ValueError, match="takes 4"):
        FeaturePyramid(8)(maps[:2])


def test_upernet_learns_from_every_level() -> None:
    torch.manual_seed(0)
    maps = [torch.randn(2, 4, side, side, requires_grad=True) for side in (8, 4, 2, 1)]
    UperNet([4] * 4, 4, 3)(maps).square().mean().backward()
    assert all(x.grad is not None and bool(x.grad.abs().sum() > 0) for x in maps[:3])


def test_a_constant_map_gives_one_answer_everywhere() -> None:
    head = LinearSegmenter(3, 2).eval()
    scores = head([torch.ones(1, 3, 4, 5)])
    assert torch.equal(scores, scores[..., :1, :1].expand_as(scores))
