"""What came out before still comes out: values made by tests/golden/make.py, for machines without other recordings."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import pytest
import torch

from golden import make


@lru_cache
def recorded() -> dict[str, Any]:
    return json.loads(make.FILE.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", make.MODELS)
def test_models_give_the_recorded_numbers(name: str) -> None:
    found, expected = make.of_model(name), recorded()["models"][name]
    assert found.pop("greedy") == expected["greedy"]
    for key, value in found.items():
        torch.testing.assert_close(torch.tensor(value), torch.tensor(expected[key]), atol=2e-5, rtol=1e-4)


def test_dual_gives_the_recorded_numbers() -> None:
    found, expected = make.of_dual(), recorded()["dual"]
    assert found.pop("caption") == expected["caption"]
    for key, value in found.items():
        pairs = (
            zip(value.values(), expected[key].values(), strict=True)
            if isinstance(value, dict)
            else [(value, expected[key])]
        )
        for ours, theirs in pairs:
            torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), atol=2e-5, rtol=1e-4)


def test_prompts_grids_and_orders_are_the_recorded_ones() -> None:
    found, expected = make.values_without_models(), recorded()
    for key, value in found.items():
        assert value == expected[key], key
