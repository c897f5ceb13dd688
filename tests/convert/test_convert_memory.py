"""Opening a checkpoint holds its weights once: peak memory of a fresh process."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from internvl.load import save_checkpoint
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
