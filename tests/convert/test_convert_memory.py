"""Opening a checkpoint holds its weights once, converting one a shard or two: peak memory of a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from internvl import rewrite
from internvl.convert.files import Weights, open_weights
from internvl.load import load_checkpoint, save_checkpoint
from internvl.models.build import build
from tiny import tiny_chat_config

PROBE = """
import resource, sys, torch
from internvl.load import load_checkpoint
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
torch.set_num_threads(1)
load_checkpoint(sys.argv[2])                       # what the libraries take is not the checkpoint's
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")                                # forget the peak so far
before = resident()
model = load_checkpoint(sys.argv[1], dtype=getattr(torch, sys.argv[3])).model
sum(float(p.detach().view(-1)[::512].float().sum()) for p in model.parameters())  # mapped pages count once touched
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
size = sum(p.numel() * p.element_size() for p in model.parameters())
print((peak - before) / size)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize(
    ("stored", "opened"), [("bfloat16", "bfloat16"), ("bfloat16", "float32"), ("float32", "bfloat16")]
)
def test_peak_memory_of_loading_is_at_most_1_2_times_the_weights(tmp_path: Path, stored: str, opened: str) -> None:
    small = tiny_chat_config("internlm2")
    settings = {**small.language.settings, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    large = replace(small, language=replace(small.language, settings={**settings, "vocab_size": 4000}))
    save_checkpoint(build(large, getattr(torch, stored)), None, tmp_path / "large")
    save_checkpoint(build(small), None, tmp_path / "small")
    command = [sys.executable, "-c", PROBE, str(tmp_path / "large"), str(tmp_path / "small"), opened]
    ratio = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < ratio <= 1.2


CONVERT = """
import resource, sys, torch
from pathlib import Path
from internvl.rewrite import Wanted, convert
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
torch.set_num_threads(1)
wanted = Wanted(layout="native", image_token_id=9, max_shard_bytes=int(sys.argv[4]))
convert(sys.argv[2], Path(sys.argv[3] + "-small"), wanted, check=False)
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")
before = resident()
convert(sys.argv[1], Path(sys.argv[3]), wanted, check=False)
with open("/proc/self/status") as file:
    peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
print((peak - before) / int(sys.argv[4]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_converting_holds_two_shards_not_the_model(tmp_path: Path) -> None:
    """Twelve shards and more: about one is in memory, whatever the model."""
    small = tiny_chat_config("internlm2")
    settings = {**small.language.settings, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12}
    large = replace(small, language=replace(small.language, settings={**settings, "vocab_size": 4000}))
    shard = 16_000_000
    model = build(large)
    save_checkpoint(model, None, tmp_path / "large")
    save_checkpoint(build(small), None, tmp_path / "small")
    names = [str(tmp_path / name) for name in ("large", "small", "out")]
    command = [sys.executable, "-c", CONVERT, *names, str(shard)]
    freed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}  # what is freed goes back to the system at once
    shards = float(subprocess.run(command, check=True, capture_output=True, text=True, env=freed).stdout)
    written = list((tmp_path / "out").glob("model-*.safetensors"))
    assert len(written) >= 12
    assert max(path.stat().st_size for path in written) < 1.01 * shard
    assert shards <= 2.2
    again = load_checkpoint(tmp_path / "out").model.state_dict()
    assert all(torch.equal(again[key], value) for key, value in model.state_dict().items())


def test_converting_keeps_few_tensors_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was read for a shard is gone when the next one is read, but for the entry that is kept."""
    source = tmp_path / "source"
    save_checkpoint(build(tiny_chat_config("internlm2")), None, source)
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most, right = [0], Weights.get

    def watched(self: Weights, key: str, *arguments: Any) -> torch.Tensor:
        tensor = right(self, key, *arguments)
        alive.add(tensor)
        most[0] = max(most[0], sum(value.nbytes for value in alive))
        return tensor

    monkeypatch.setattr(Weights, "get", watched)
    limit = 100_000
    rewrite.convert(source, tmp_path / "out", rewrite.Wanted(max_shard_bytes=limit), check=False)
    largest = max(torch.Size(shape).numel() * 4 for shape in open_weights(source).shapes.values())
    assert most[0] <= limit + 2 * largest
    assert sum(path.stat().st_size for path in source.glob("*.safetensors")) > 5 * most[0]
