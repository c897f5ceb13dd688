"""RunConfig: there and back through JSON, and errors that name the field."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internvl.data.packing import Packing
from internvl.train import optim
from internvl.train.recipes import RECIPES
from internvl.train.run import RunConfig, differences, from_json, read_run, to_json
from internvl.train.settings import Data, Optimiser, Part, Schedule

RUN = RunConfig(schedule=Schedule(steps=10), connector=Part("full"))


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_survives_json(name: str) -> None:
    run = RECIPES[name].make()
    assert from_json(json.loads(json.dumps(to_json(run)))) == run
    assert RECIPES[name].summary.endswith(".")


@given(
    st.builds(
        RunConfig,
        connector=st.builds(Part, learn=st.sampled_from(["frozen", "full"]), lr_scale=st.floats(0, 10)),
        language=st.builds(
            Part, learn=st.sampled_from(["frozen", "full", "lora"]), alpha=st.none() | st.integers(1, 9)
        ),
        optimiser=st.builds(Optimiser, betas=st.tuples(st.floats(0, 0.9), st.floats(0, 0.9))),
        schedule=st.builds(Schedule, steps=st.integers(1, 99)),
        data=st.builds(Data, batch_tokens=st.none() | st.integers(1, 9)),
    )
)
def test_json_is_the_identity(run: RunConfig) -> None:
    assert from_json(json.loads(json.dumps(to_json(run)))) == run


def test_differences_name_nested_fields_and_leave_out_what_may_change() -> None:
    other = replace(RUN, out="elsewhere", seed=3, data=replace(RUN.data, workers=4, max_length=77))
    assert differences(RUN, other) == ["data.max_length: 8192 -> 77", "seed: 0 -> 3"]


def test_an_unknown_field_is_named() -> None:
    text = to_json(RUN)
    text["data"]["bath_samples"] = 3
    with pytest.raises(ValueError, match=r"data\.bath_samples is no field of Data; it has .*batch_samples"):
        from_json(text)


def test_read_run_takes_file_or_folder(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps(to_json(RUN)))
    assert read_run(tmp_path) == read_run(tmp_path / "run.json") == RUN
    with pytest.raises(ValueError, match="does not exist"):
        read_run(tmp_path / "other.json")
    (tmp_path / "run.json").write_text('{"seed": 1,\n"x"}')
    with pytest.raises(ValueError, match=r"run\.json:2: not JSON"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": Schedule()}, "exactly one"),
        ({"schedule": Schedule(steps=1, epochs=1.0)}, "exactly one"),
        ({"schedule": Schedule(over="time")}, "max_minutes"),
        ({"schedule": Schedule(over="time", warmup_steps=3), "max_minutes": 1.0}, "warmup_share"),
        ({"schedule": Schedule(steps=0)}, r"schedule\.steps is 0"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"connector": Part("lora")}, "full or frozen"),
        ({"vision": Part("lora", layers_from=-4)}, r"vision\.layers_from is -4"),
        ({"optimiser": Optimiser(clip=-1.0)}, r"optimiser\.clip is -1\.0; it must be at least 0"),
        ({"optimiser": Optimiser(peak_lr=float("nan"))}, r"optimiser\.peak_lr is nan; it must be above 0"),
        ({"optimiser": Optimiser(weight_decay=-0.1)}, r"optimiser\.weight_decay is -0\.1"),
        ({"optimiser": Optimiser(betas=(0.9, 1.0))}, r"each lies in \[0, 1\)"),
        ({"schedule": Schedule(steps=9, warmup_steps=-1)}, r"schedule\.warmup_steps is -1"),
        ({"schedule": Schedule(steps=9, warmup_share=2.0)}, r"schedule\.warmup_share is 2\.0"),
        (
            {"connector": Part("full", lr_scale=-1.0)},
            r"connector\.lr_scale is -1\.0; it must be at least 0",
        ),
        ({"language": Part("lora", rank=0)}, r"language\.rank is 0"),
        ({"language": Part("lora", dropout=2.0)}, r"language\.dropout is 2\.0"),
        ({"vision": Part("full", drop_path=1.0)}, r"vision\.drop_path is 1\.0"),
        ({"save_every": -1}, "save_every is -1"),
        ({"data": Data(max_tiles=0)}, r"data\.max_tiles is 0"),
        ({"data": Data(min_frames=0)}, r"data\.min_frames is 0"),
        ({"data": Data(min_frames=9, max_frames=4)}, r"data\.min_frames is 9 and data\.max_frames 4"),
        ({"data": Data(max_length=0)}, r"data\.max_length is 0"),
        ({"data": Data(workers=-1)}, r"data\.workers is -1"),
        ({"data": Data(packing=Packing(overflow="split"))}, "only with --data.packed and --data.batch-tokens"),
        ({"data": Data(packed=True, packing=Packing(hand=4))}, "only with --data.packed and --data.batch-tokens"),
    ],
)
def test_bad_values_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(RUN, **changes)  # type: ignore[arg-type]


def test_rate_warms_up_then_falls_to_zero() -> None:
    run = replace(RUN, schedule=Schedule(steps=100, warmup_steps=10))
    factors = [optim.lr_factor(run, step, 100) for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == 1.0
    assert factors[55] == pytest.approx(0.5)
    assert 0 < factors[99] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_a_share_of_warm_up_is_rounded_up() -> None:
    assert optim.num_warmup(replace(RUN, schedule=Schedule(steps=10, warmup_share=0.03)), 10) == 1


def test_rate_over_time_ends_at_zero() -> None:
    run = replace(RUN, schedule=Schedule(over="time", warmup_share=0.1), max_minutes=1.0)
    assert optim.lr_factor(run, 0, 2**31, 0.05) == pytest.approx(0.5)
    assert optim.lr_factor(run, 5, 2**31, 0.1) == pytest.approx(1.0)
    assert optim.lr_factor(run, 5, 2**31, 1.2) == pytest.approx(0.0)
