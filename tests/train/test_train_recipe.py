"""A recipe from records on disk to a model that loads: files, workers, kill -9, export, command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from broken import break_off
from PIL import Image
from safetensors.torch import load_file

from internvl.commands.train import main
from internvl.data.collate import collate_nothing
from internvl.data.images import normalise
from internvl.data.packing import Packing
from internvl.load import load_checkpoint
from internvl.pocket import merge
from internvl.train.chat_records import open_loader
from internvl.train.loop import train
from internvl.train.recipes import find_recipe, tiny
from internvl.train.run import RunConfig, differences, to_json
from internvl.train.settings import Part, Schedule, Tokens
from internvl.train.stages import open_stage
from internvl.train.stages.sft import Sft


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model and records of `tiny_sft`, made once."""
    folder = tmp_path_factory.mktemp("inputs")
    run = tiny_run(folder, folder)
    tiny.prepare(run, own=run)
    return folder


def tiny_run(inputs: Path, out: Path, **changes: Any) -> RunConfig:
    run = tiny.tiny_sft()
    data = replace(
        run.data, meta=str(inputs / "records.jsonl"), held_out=str(inputs / "held_out.jsonl"), batch_samples=4
    )
    settings: dict[str, Any] = {"schedule": Schedule(steps=6), "save_every": 2, "eval_every": 0, "log_every": 2}
    return replace(run, **{**settings, "out": str(out), "model": str(inputs / "model"), "data": data, **changes})


def learned(out: Path, step: int = 6) -> dict[str, torch.Tensor]:
    return load_file(out / "checkpoints" / f"step-{step:08d}" / "learned.safetensors")


def run_here(run: RunConfig) -> Any:
    stage = open_stage(run)
    result = train(run, stage, evaluators=[stage.evaluate])
    return stage, result


def test_packed_rows_train_are_measured_and_resume_to_the_bit(inputs: Path, tmp_path: Path) -> None:
    def run(name: str, **changes: Any) -> RunConfig:
        made = tiny_run(inputs, tmp_path / name, log_every=1, **changes)
        packing = Packing(buffer=2, window=4, hand=2)
        data = replace(made.data, batch_samples=None, batch_tokens=300, packed=True, packing=packing)
        return replace(made, data=data)

    run_here(run("whole"))
    stopped = run("stopped", max_minutes=1e-9)  # a step each time
    steps = [run_here(stopped)[1].step for _ in range(3)]
    assert steps == [1, 2, 3]
    run_here(replace(stopped, max_minutes=None))
    pairs = zip(learned(tmp_path / "whole").values(), learned(tmp_path / "stopped").values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "fill" in line]
    assert len(measured) == 6
    assert all(0.5 < line["fill"] <= 1 and line["samples_per_row"] >= 1 for line in measured)
    assert all(line["idle_tokens"] == line["idle_tiles"] == 0 for line in measured)  # one rank waits for nobody


def test_workers_and_resume_change_nothing(inputs: Path, tmp_path: Path) -> None:
    """Three records of an epoch of 36 are left when the run is cut: its next batches span two epochs."""
    changes = {"schedule": Schedule(steps=12), "save_every": 5}
    whole = tiny_run(inputs, tmp_path / "whole", **changes)
    run_here(whole)
    for workers, cut in ((0, 7), (2, 9)):
        out = tmp_path / f"workers{workers}"
        run = tiny_run(inputs, out, **changes)
        run = replace(run, data=replace(run.data, workers=workers))
        break_off(run, cut)
        run_here(run)
        for name, value in learned(tmp_path / "whole", 12).items():
            assert torch.equal(value, learned(out, 12)[name]), name


def test_kill_9_then_the_same_command_ends_the_same(inputs: Path, tmp_path: Path) -> None:
    whole = tiny_run(inputs, tmp_path / "whole", schedule=Schedule(steps=20), save_every=1, eval_every=3)
    killed = replace(whole, out=str(tmp_path / "killed"))
    (tmp_path / "run.json").write_text(json.dumps(to_json(killed)))
    words = [sys.executable, "-m", "internvl.cli", "train", "--run", str(tmp_path / "run.json"), "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    wanted = tmp_path / "killed" / "checkpoints" / "step-00000007"
    while process.poll() is None and not wanted.exists():
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed" / "model").exists()
    done = subprocess.run([*words, "--resume"], env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["finished"]
    run_here(whole)
    for name, value in learned(tmp_path / "whole", 20).items():
        assert torch.equal(value, learned(tmp_path / "killed", 20)[name]), name


def test_sigterm_saves_and_says_how_to_go_on(inputs: Path, tmp_path: Path) -> None:
    run = tiny_run(inputs, tmp_path / "out", schedule=Schedule(steps=5000), save_every=0, log_every=1)
    (tmp_path / "run.json").write_text(json.dumps(to_json(run)))
    process = subprocess.Popen(
        [sys.executable, "-m", "internvl.cli", "train", "--run", str(tmp_path / "run.json")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = tmp_path / "out" / "metrics.jsonl"
    while process.poll() is None and not (metrics.exists() and metrics.stat().st_size):
        time.sleep(0.01)
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert "go on with: internvl train --run" in errors
    assert (tmp_path / "out" / "checkpoints" / "latest").is_file()


LEARNING: dict[str, dict[str, Any]] = {
    "full": {},
    "connector_and_rows": {"vision": Part(), "language": Part(), "tokens": Tokens(learn=True)},
    "lora": {
        "vision": Part("lora", rank=2),
        "language": Part("lora", rank=3),
        "tokens": Tokens(learn=True),
    },
}


def logits_of(stage: Any) -> torch.Tensor:
    """Logits of one held-out batch, in evaluation mode."""
    batch = next(stage.held_out.once())
    stage.model.eval()
    with torch.no_grad():
        return stage.model(
            batch.input_ids, normalise(batch.tiles, stage.model.config.normalize), attention_mask=batch.attention_mask
        )


@pytest.mark.parametrize("kind", LEARNING)
def test_the_exported_model_gives_the_trained_logits(inputs: Path, tmp_path: Path, kind: str) -> None:
    run = tiny_run(inputs, tmp_path, export="none", **LEARNING[kind])
    stage, _ = run_here(run)
    trained = logits_of(stage)
    stage, _ = run_here(replace(run, export="last"))  # nothing left to do but to export
    torch.testing.assert_close(logits_of(stage), trained, rtol=1e-4, atol=2e-5)
    loaded = load_checkpoint(tmp_path / "model")
    assert loaded.layout == "official"
    stage.model = loaded.model
    torch.testing.assert_close(logits_of(stage), trained, rtol=1e-4, atol=2e-5)


def test_parts_hold_what_learned(inputs: Path, tmp_path: Path) -> None:
    run = tiny_run(inputs, tmp_path, **LEARNING["lora"])
    run_here(run)
    parts = tmp_path / "parts"
    found = sorted(str(path.relative_to(parts)) for path in parts.rglob("*.safetensors"))
    assert found == [
        "connector.safetensors",
        "embeddings.safetensors",
        "language/adapter_model.safetensors",
        "vision/adapter_model.safetensors",
    ]
    before, after = (load_file(folder / "model" / "model.safetensors") for folder in (inputs, tmp_path))
    moved = {name for name, value in after.items() if not torch.equal(before[name], value)}
    assert any(".encoder.layers.2.mlp.fc1" in name for name in moved)
    assert not any("norm" in name or "layernorm" in name for name in moved)


def test_base_and_parts_make_the_trained_model(inputs: Path, tmp_path: Path) -> None:
    """As `pocket` is assembled: connector, rows, then the adapters in fp32."""
    run = tiny_run(inputs, tmp_path, **LEARNING["lora"])
    run_here(run)
    parts = tmp_path / "parts"
    state = load_file(inputs / "model" / "model.safetensors")
    names = {"norm": "mlp1.0", "fc1": "mlp1.1", "fc2": "mlp1.3"}
    for name, value in load_file(parts / "connector.safetensors").items():
        module, leaf = name.split(".")
        state[f"{names[module]}.{leaf}"] = value
    rows = load_file(parts / "embeddings.safetensors")
    state["language_model.model.embed_tokens.weight"][-9:] = rows["input"]
    state["language_model.lm_head.weight"][-9:] = rows["output"]
    merge(state, parts / "language", "language_model.")
    merge(state, parts / "vision", "vision_model.")
    trained = load_file(tmp_path / "model" / "model.safetensors")
    assert state.keys() == trained.keys()
    for name, value in trained.items():
        torch.testing.assert_close(state[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_pictures_are_learned(inputs: Path, tmp_path: Path) -> None:
    """The loss with the right picture falls far below that of guessing one of six colours."""
    run = tiny_run(inputs, tmp_path, schedule=Schedule(steps=60), save_every=0)
    run = replace(run, data=replace(run.data, batch_samples=8))
    _, result = run_here(run)
    assert result.metrics["held_out_loss"] < 0.3


def test_the_command_takes_overrides_and_prints_json(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["tiny_sft", "--out", str(tmp_path / "out"), "--model", str(inputs / "model")]
    words += ["--data.meta", str(inputs / "records.jsonl"), "--data.held-out", str(inputs / "held_out.jsonl")]
    words += ["--schedule.steps", "2", "--language.learn", "frozen", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["step"] == 2
    assert result["finished"]
    saved = json.loads((tmp_path / "out" / "run.json").read_text())
    assert saved["language"]["learn"] == "frozen"
    assert not any(name.startswith("language") for name in learned(tmp_path / "out", 2))
    with pytest.raises(ValueError, match=r"schedule\.steps: 2 -> 3"):
        main([*words, "--schedule.steps", "3"])
    assert main(["--run", str(tmp_path / "out")]) == 0


def test_frames_of_a_video_are_those_of_the_run(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "video").mkdir()
    for number in range(9):
        Image.new("RGB", (56, 56), (number * 20,) * 3).save(tmp_path / "video" / f"frame_{number}.png")
    turns = [{"from": "human", "value": "<video>\nWhat?"}, {"from": "gpt", "value": "grey"}]
    (tmp_path / "set.jsonl").write_text(json.dumps({"video": "video", "conversations": turns}) + "\n")
    loaded = load_checkpoint(inputs / "model")
    run = tiny_run(inputs, tmp_path)
    states = []
    for least, most in ((3, 3), (1, 5)):
        data = replace(run.data, min_frames=least, max_frames=most)
        run = replace(run, data=data)
        loader = open_loader(run, loaded.tokenizer, loaded.config, str(tmp_path / "set.jsonl"), learning=True)
        tiles = {batch.num_tiles for batch in islice(loader, 20)}
        assert tiles == set(range(least, most + 1))
        states.append(loader.state_dict())
    with pytest.raises(ValueError, match="other data or settings"):
        loader.load_state_dict(states[0])


def test_a_step_of_which_every_record_was_left_out_is_passed_over(inputs: Path, tmp_path: Path) -> None:
    """On several ranks: each gets an empty batch in the place of a rejected one, to stay in step."""
    run = tiny_run(inputs, tmp_path / "a", schedule=Schedule(steps=3))
    stage = open_stage(run)
    assert isinstance(stage, Sft)
    batches = stage.batches

    def with_empty_ones() -> Any:
        for number, batch in enumerate(batches()):
            yield from [collate_nothing(0, 56, packed=False)] * (number % 3)
            yield batch

    stage.batches = with_empty_ones  # type: ignore[method-assign]
    train(run, stage)
    other = tiny_run(inputs, tmp_path / "b", schedule=Schedule(steps=3))
    train(other, open_stage(other))
    first, second = learned(tmp_path / "a", 3), learned(tmp_path / "b", 3)
    assert all(torch.equal(first[name], second[name]) for name in second)


def test_ranks_set_records_aside_in_files_of_their_own(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file would lose what a rank wrote when another one begins it."""
    lines = (inputs / "records.jsonl").read_text().splitlines()[:6]
    (tmp_path / "set.jsonl").write_text("\n".join([lines[0], "{broken", lines[1], "[broken", *lines[2:]]) + "\n")
    loaded = load_checkpoint(inputs / "model")
    run = tiny_run(inputs, tmp_path / "out")
    run = replace(run, data=replace(run.data, on_error="quarantine", max_rejected=0.5, batch_samples=1))
    loaders = []
    for rank in range(2):
        monkeypatch.setattr("internvl.parallel.collectives.rank", lambda rank=rank: rank)
        loaders.append(open_loader(run, loaded.tokenizer, loaded.config, str(tmp_path / "set.jsonl"), learning=True))
    met = [list(islice(loader.dealt(rank, 2), 8)) and loader.skipped for rank, loader in enumerate(loaders)]
    assert {**met[0], **met[1]}.keys() == {f"{tmp_path / 'set.jsonl'}:{line}" for line in (2, 4)}
    for name, skipped in zip(("quarantine.jsonl", "quarantine-1.jsonl"), met, strict=True):
        file = tmp_path / "out" / name
        written = file.read_text().splitlines() if file.is_file() else []
        assert {f"{entry['file']}:{entry['line']}" for entry in map(json.loads, written)} == skipped.keys()


def test_nothing_is_made_at_a_path_that_somebody_gave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt path is an error, not a run on made-up colours and random weights."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mine\.jsonl: no such file"):
        main(["tiny_sft", "--data.meta", "mine.jsonl", "--data.held-out", "", "--device", "cpu"])
    assert not Path("mine.jsonl").exists()
    assert Path("runs/tiny-inputs/model/config.json").is_file()  # its own inputs are made
    with pytest.raises((ValueError, OSError), match="nowhere"):
        main(["tiny_sft", "--model", "nowhere", "--device", "cpu"])
    assert not Path("nowhere").exists()


def test_a_run_that_stopped_early_can_be_exported(inputs: Path, tmp_path: Path, capsys: Any) -> None:
    run = tiny_run(inputs, tmp_path, max_minutes=1e-6)
    assert not run_here(run)[1].finished
    assert not (tmp_path / "model").exists()
    assert main(["--run", str(tmp_path), "--export", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 1
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert torch.equal(exported["mlp1.3.bias"], learned(tmp_path, 1)["connector.fc2.bias"])
    with pytest.raises(ValueError, match="no checkpoint"):
        main(["--run", str(tmp_path), "--out", str(tmp_path / "nothing"), "--export"])


def test_the_list_names_every_recipe(capsys: Any) -> None:
    assert main(["--list"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("tiny_sft", "pocket_connector", "pocket_sft"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no_such"], "no recipe 'no_such'; it is one of tiny_sft"),
        (["--run"], "needs the run.json"),
        (["--out", "x"], "comes before the recipe"),
        (["tiny_sft", "--resume", "--no-resume"], "exclude each other"),
    ],
)
def test_wrong_usage_is_explained(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        main(words)


def test_a_model_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no tokenizer"):
        open_stage(replace(tiny.tiny_sft(), model="tiny-llama", out=str(tmp_path)))


def test_a_stage_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="no stage 'rl'; it is one of sft"):
        open_stage(replace(tiny.tiny_sft(), stage="rl"))


def test_bfloat16_runs_leave_bfloat16_and_parts_that_agree(inputs: Path, tmp_path: Path) -> None:
    run = tiny_run(inputs, tmp_path, precision="bf16", **LEARNING["lora"])
    run_here(run)
    for path in (tmp_path / "parts").rglob("*.safetensors"):
        assert {value.dtype for value in load_file(path).values()} == {torch.bfloat16}, path
    trained = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in trained.values()} == {torch.bfloat16}
    connector = load_file(tmp_path / "parts" / "connector.safetensors")
    assert torch.equal(connector["fc1.weight"], trained["mlp1.1.weight"])


def test_records_left_out_are_counted_and_named(inputs: Path, tmp_path: Path) -> None:
    lines = (inputs / "records.jsonl").read_text().splitlines(keepends=True)
    lines[4] = lines[4].replace(".png", "-gone.png")
    (tmp_path / "records.jsonl").write_text("".join(lines))
    run = tiny_run(inputs, tmp_path / "out", schedule=Schedule(epochs=1.0))
    run = replace(run, data=replace(run.data, meta=str(tmp_path / "records.jsonl")))
    with pytest.raises(ValueError, match=r"records\.jsonl:5: .*-gone\.png"):
        run_here(run)
    run = replace(run, out=str(tmp_path / "skips"), data=replace(run.data, on_error="skip"))
    with pytest.raises(ValueError, match=r"1 of \d+ records rejected \(1 missing\): .*limit is 1.00%.*max_rejected"):
        run_here(run)
    run = replace(run, data=replace(run.data, max_rejected=0.1))
    run_here(run)
    last = json.loads((tmp_path / "skips" / "metrics.jsonl").read_text().splitlines()[-2])
    assert last["skipped"] == 1
    assert (tmp_path / "skips" / "skipped.txt").read_text().startswith(f"{tmp_path / 'records.jsonl'}:5\t")


def damaged(inputs: Path, tmp_path: Path) -> Path:
    """The records of `tiny_sft`, one of them without its picture and one broken."""
    lines = (inputs / "records.jsonl").read_text().splitlines(keepends=True)
    lines[4], lines[9] = lines[4].replace(".png", "-gone.png"), "{broken\n"
    path = tmp_path / "records.jsonl"
    path.write_text("".join(lines))
    return path


def quick_run(inputs: Path, out: Path, records: Path, steps: int, **changes: Any) -> RunConfig:
    """Six batches of an epoch, one tile a picture, nothing measured or written at the end."""
    run = tiny_run(inputs, out, schedule=Schedule(steps=steps), export="none", **changes)
    return replace(run, data=replace(run.data, meta=str(records), held_out="", batch_samples=6, max_tiles=1))


def test_counts_and_quarantine_of_a_resumed_run_are_those_of_a_whole_one(inputs: Path, tmp_path: Path) -> None:
    path = damaged(inputs, tmp_path)
    for name, workers, cut in (("whole", 0, None), ("parts", 2, 4)):
        run = quick_run(inputs, tmp_path / name, path, steps=7, save_every=3)
        data = replace(run.data, on_error="quarantine", max_rejected=0.2, workers=workers)
        run = replace(run, data=data)
        if cut is not None:
            break_off(run, cut)
        run_here(run)
    for name in ("records.json", "skipped.txt"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()
    (counts,) = json.loads((tmp_path / "whole" / "records.json").read_text()).values()
    assert counts["given"] == counts["accepted"] + sum(counts["rejected"].values())
    assert counts["rejected"].keys() == {"json", "missing"}
    for name in ("parts", "whole"):
        lines = (tmp_path / name / "quarantine.jsonl").read_text().splitlines()
        entries = {entry["line"]: entry for entry in map(json.loads, lines)}
        assert len(lines) == len(entries) == 2
        assert (entries[5]["reason"], entries[10]["reason"]) == ("missing", "json")
        assert entries[5]["record"] == json.loads(path.read_text().splitlines()[4])
        assert entries[5]["file"] == str(path)


def test_the_remedy_for_a_bad_record_may_be_given_when_a_run_goes_on() -> None:
    """A run that a bad record ended goes on from its checkpoint with the record left out."""
    run = tiny.tiny_sft()
    kinder = replace(run, data=replace(run.data, on_error="skip", max_rejected=0.2))
    assert differences(run, kinder) == []


def test_a_share_outside_0_to_1_is_refused() -> None:
    run = tiny.tiny_sft()
    with pytest.raises(ValueError, match=r"data.max_rejected is 2; it is a share"):
        replace(run, data=replace(run.data, max_rejected=2))


def test_a_recipe_names_the_one_that_it_goes_on_from(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = find_recipe("pocket_align")
    with pytest.raises(ValueError, match=r"internvl train pocket_align_connector"):
        recipe.prepare(recipe.make())
