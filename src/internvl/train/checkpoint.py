"""Checkpoints that a run goes on from, bit for bit: written whole or not at all, pruned. Trained models: export.py.

A checkpoint is a folder `step-00000100` of safetensors and JSON: what learns, the optimiser's state, every generator,
the data cursor. `latest` names the newest whole one. A kill at any moment leaves the one before in place.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.train.run import RunConfig, differences, read_run
from internvl.train.trainable import Learner

FORMAT = 1


@dataclass(frozen=True)
class State:
    """Where a run stands, beside its tensors."""

    step: int
    cursor: dict[str, Any]
    elapsed_s: float
    best: dict[str, Any]
    """Step and value of the best evaluation so far; empty before the first."""
    frozen: str
    """Fingerprint of what does not learn, so that a changed base model is noticed."""


class Checkpoints:
    """The `checkpoints/` folder of one run."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / "checkpoints", keep

    def latest(self) -> Path | None:
        pointer = self.folder / "latest"
        if not pointer.is_file():
            return None
        path = self.folder / pointer.read_text(encoding="utf-8").strip()
        if not (path / "state.json").is_file():
            raise ValueError(f"{pointer} names {path.name}, which is not there; write the name of another step into it")
        return path

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def save(self, learner: Learner, optimizer: torch.optim.Optimizer, state: State) -> Path:
        """Write everything under a temporary name, make it durable, rename, then move the pointer."""
        path = self.path(state.step)
        partial = path.with_name(f".{path.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(_learned(learner), partial / "learned.safetensors")
        save_file(_optimizer_tensors(optimizer), partial / "optimizer.safetensors")
        tensors, generators = _generators()
        save_file(tensors, partial / "generators.safetensors")
        _write_json(partial / "state.json", {"format": FORMAT, **vars(state), "generators": generators})
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        if path.exists():
            shutil.rmtree(path)
        partial.rename(path)
        _sync(self.folder)
        replace_text(self.folder / "latest", path.name + "\n")
        self._prune(state)
        return path

    def _prune(self, state: State) -> None:
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        steps = sorted(self.folder.glob("step-*"))
        kept = {*steps[-self.keep :], self.path(int(state.best.get("step", -1)))}
        for path in steps:
            if path not in kept:
                shutil.rmtree(path)


def check_folder(run: RunConfig, resume: bool | None = None) -> Path | None:
    """The checkpoint that this run goes on from; ValueError where the folder holds another run."""
    out = Path(run.out)
    found = Checkpoints(out, run.keep).latest()
    if found is None:
        if resume:
            raise ValueError(f"{out} holds no checkpoint; leave --resume out to begin there")
        return None
    if resume is False:
        raise ValueError(f"{out} already holds {found.name}; give another --out, or leave --no-resume out to go on")
    if changed := differences(read_run(out), run):
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}); give another --out")
    return found


def restore(path: Path, learner: Learner, optimizer: torch.optim.Optimizer) -> State:
    """Put a checkpoint back into the learner, the optimiser and every generator."""
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if saved.pop("format") != FORMAT:
        raise ValueError(f"{path} was written in another format; resume it with the version that wrote it")
    generators = saved.pop("generators")
    state = State(**saved)
    if state.frozen != fingerprint(learner):
        raise ValueError(
            f"the frozen weights differ from those {path} was trained on; give the same --model, or another --out"
        )
    load_learned(path, learner)
    _restore_optimizer(optimizer, load_file(path / "optimizer.safetensors"))
    _restore_generators(load_file(path / "generators.safetensors"), generators)
    return state


def load_learned(path: Path, learner: Learner) -> None:
    """Only what learns, from a checkpoint; every name must be on both sides."""
    tensors = load_file(path / "learned.safetensors")
    if unlike := set(tensors) ^ set(learner.parameters):
        raise ValueError(
            f"{path} and this run learn different parameters, such as {min(unlike)}; use the same run.json"
        )
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            parameter.copy_(tensors[name])


def fingerprint(learner: Learner) -> str:
    """A short hash of the frozen parameters: names, shapes and the first values of each."""
    digest = hashlib.blake2b(digest_size=8)
    for name, parameter in learner.frozen():
        head = parameter.detach().flatten()[:256].float().cpu().numpy()
        digest.update(f"{name}{tuple(parameter.shape)}".encode())
        digest.update(head.tobytes())
    return digest.hexdigest()


def replace_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_text(text, encoding="utf-8")
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _learned(learner: Learner) -> dict[str, Tensor]:
    return {name: p.detach().cpu().contiguous() for name, p in learner.parameters.items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state = optimizer.state_dict()["state"]
    return {
        f"{name}/{key}": value.detach().cpu().contiguous()
        for index, name in enumerate(names)
        for key, value in state.get(index, {}).items()
    }


def _restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    names = [name for group in optimizer.param_groups for name in group["names"]]
    index = {name: i for i, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, field = key.rsplit("/", 1)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _generators() -> tuple[dict[str, Tensor], dict[str, Any]]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64))}
    if torch.cuda.is_initialized():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    plain = {"python": [version, list(words), gauss], "numpy": [kind, position, has_gauss, cached]}
    return tensors, plain


def _restore_generators(tensors: dict[str, Tensor], plain: dict[str, Any]) -> None:
    version, words, gauss = plain["python"]
    random.setstate((version, tuple(words), gauss))
    kind, position, has_gauss, cached = plain["numpy"]
    np.random.set_state((kind, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(tensors["torch"])
    devices = [tensors[key] for key in sorted(tensors) if key.startswith("cuda")]
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices[: torch.cuda.device_count()])
