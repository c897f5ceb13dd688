"""InternVL-C and -G in `convert`, `plan` and `doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dual_folder import make_dual
from internvl import cli
from internvl.convert.files import read_json, write_json
from internvl.load_dual import load_dual, load_original
from internvl.plan import DualPlan, dual_config_of
from internvl.rewrite_dual import probe
from internvl.zoo import DUAL


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_dual(tmp_path_factory.mktemp("model") / "dual")


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


@pytest.mark.parametrize("name", [*DUAL])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_plan_counts_every_parameter(name: str, dtype: str) -> None:
    plan = DualPlan(DUAL[name], dtype)  # type: ignore[arg-type]
    assert sum(plan.parameters.values()) == plan.config.num_parameters
    assert plan.weights == plan.config.num_parameters * (4 if dtype == "fp32" else 2)
    assert (plan.caption_cache > 0) == plan.config.generative


def test_the_plan_command(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("plan", "InternVL-14B-224px", "--memory", 24, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["parameters"], said["parts"]["vision"]) == (13_834_975_747, 5_902_793_600)
    assert said["fits"] is False
    assert said["vision_activation"] == 32 * 2 * (3 * 224**2 + 257 * (3 * 3200 + 2 * 12800))
    assert run("plan", model, "--tiles", 4, "--dtype", "fp32", "--memory", 1) == 0
    assert "4 pictures at once" in (said := capsys.readouterr().out)
    assert "fits into 1 GiB" in said
    assert run("plan", model, "--dtype", "int8") == 1
    assert "dual models have fp32 and bf16" in capsys.readouterr().err
    assert dual_config_of("pocket") is None


def test_a_sound_folder_has_no_conflict(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor", model, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["conflicts"], said["layout"]) == (0, "official, dual")
    assert said["parameters"] == load_dual(model).config.num_parameters
    assert run("doctor", model) == 0
    assert "official layout of InternVL-C and -G, " in " ".join(capsys.readouterr().out.split())


def test_contradictions_are_found(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_dual(tmp_path / "m")
    weights, settings = load_file(folder / "model.safetensors"), read_json(folder / "config.json")

    def findings(**changes: object) -> str:
        write_json(folder / "config.json", {**settings, **changes})
        assert run("doctor", folder, "--json") == 1
        return str([(f["about"], f["says"], f["against"]) for f in json.loads(capsys.readouterr().out)["findings"]])

    assert "query_tokens is (1, 5, 64)" in findings(num_query_token=6, qllama_config={**settings["qllama_config"]})
    small = {**settings["qllama_config"], "vocab_size": 200}
    assert "the tokenizer has" in findings(qllama_config=small)
    assert "bos_token_id" in findings(qllama_config={**settings["qllama_config"], "bos_token_id": 9})
    assert "must be 0: fold the adapters in" in findings(use_qllama_lora=4)
    write_json(folder / "config.json", settings)
    save_file(
        {**{k: v for k, v in weights.items() if k != "itm_head.bias"}, "more": torch.ones(1)},
        folder / "model.safetensors",
    )
    said = findings()
    assert "1 are missing: itm_head.bias" in said
    assert "1 are unknown: more" in said
    (folder / "model.safetensors").write_bytes(b"short")
    assert "weights" in findings()


def test_there_and_back_between_folder_and_original(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_dual(model).config
    assert run("convert", model, tmp_path / "half", "--dtype", "bfloat16", "--json") == 0
    assert json.loads(capsys.readouterr().out)["max_embedding_difference"] == 0
    half = load_dual(tmp_path / "half", dtype=None)
    assert half.model.text_projection.dtype == torch.bfloat16
    assert half.tokenizer("a cat")["input_ids"] == load_dual(model).tokenizer("a cat")["input_ids"]
    assert run("convert", model, tmp_path / "c.pth") == 0
    alone = load_original(tmp_path / "c.pth", config)
    assert torch.equal(probe(alone), probe(load_dual(model).model)[:4])
    assert run("convert", tmp_path / "c.pth", tmp_path / "c", "--like", model) == 0
    back = load_dual(tmp_path / "c")
    assert not back.config.generative
    assert torch.equal(probe(back.model), probe(alone))


def test_what_cannot_be_converted_says_why(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("convert", model, tmp_path / "n", "--layout", "native") == 1
    assert "there is no native layout" in capsys.readouterr().err
    assert run("convert", model, tmp_path / "n", "--like", "tiny-dual") == 1
    assert "says its own sizes" in capsys.readouterr().err
    (tmp_path / "there.pth").write_bytes(b"")
    assert run("convert", model, tmp_path / "there.pth") == 1
    assert "is there already" in capsys.readouterr().err
    assert run("convert", model, tmp_path / "f", "--dtype", "bfloat16", "--tolerance=-1") == 1
    assert "nothing was written" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()
