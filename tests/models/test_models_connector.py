"""Pixel shuffle and connector against the official code."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from internvl.convert.official import from_official, official_rules
from internvl.models.build import build
from internvl.models.connector import Connector, pixel_shuffle
from reference import golden_tensors, part


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_shuffle_is_the_official_one(version: str) -> None:
    tensors, _ = golden_tensors("extract.safetensors")
    cases = [key.removeprefix("in/shuffle_") for key in tensors if key.startswith("in/shuffle_")]
    assert len(cases) == 4
    for case in cases:
        ratio = float(case.split("_")[1])
        out = pixel_shuffle(tensors[f"in/shuffle_{case}"], ratio, version)
        assert torch.equal(out, tensors[f"out/shuffle_{version}_{case}"])


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("feature_layer", [-1, -2])
def test_features_are_the_official_ones(version: str, feature_layer: int) -> None:
    from internvl.convert.keys import expand

    tensors, notes = golden_tensors("extract.safetensors")
    settings = {**notes["config"], "ps_version": version, "select_layer": feature_layer}
    config = from_official({"model_type": "internvl_chat", **settings})
    model = build(config)
    weights = part(tensors, "w/")
    state = model.state_dict()
    for entry in expand(official_rules(config), state):
        if entry.disk[0] in weights:
            (state[entry.ours[0]],) = entry.to_ours([weights.pop(entry.disk[0])])
    assert not [key for key in weights if not key.startswith("language_model")]
    model.load_state_dict(state)
    with torch.no_grad():
        out = model.encode_tiles(tensors["in/pixel_values"])
    assert_close(out, tensors[f"out/vit_embeds_{version}_select{feature_layer}"], atol=2e-5, rtol=1e-4)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_channels_are_four_neighbours_and_tokens_run_by_rows_or_columns(rows: int, columns: int, dim: int) -> None:
    x = torch.arange(2 * rows * 2 * columns * dim).view(1, 2 * rows, 2 * columns, dim).float()
    v2 = pixel_shuffle(x, 0.5, "v2")
    v1 = pixel_shuffle(x, 0.5, "v1")
    assert torch.equal(v1, v2.transpose(1, 2))
    for r in range(rows):
        for c in range(columns):
            near = x[0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
            assert torch.equal(v2[0, r, c], torch.cat([near[0, 0], near[0, 1], near[1, 0], near[1, 1]]))


def test_grids_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"3 x 4 .* 2"):
        pixel_shuffle(torch.zeros(1, 3, 4, 1), 0.5, "v2")
    with pytest.raises(ValueError, match="v3"):
        pixel_shuffle(torch.zeros(1, 4, 4, 1), 0.5, "v3")
    with pytest.raises(ValueError, match="12 patches"):
        Connector(4, 8, 0.5, "v2")(torch.zeros(1, 12, 4))


@pytest.mark.parametrize(
    ("vision", "language", "count"), [(3200, 5120, 91_786_240), (1024, 4096, 33_570_816), (3200, 6144, 116_429_824)]
)
def test_parameter_counts_of_released_connectors(vision: int, language: int, count: int) -> None:
    with torch.device("meta"):
        connector = Connector(vision, language, 0.5, "v2")
    assert sum(p.numel() for p in connector.parameters()) == count
