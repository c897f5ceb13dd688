"""Checkpoints that a run goes on from, bit for bit: written whole or not at all, pruned. Trained models: export.py.

A checkpoint is a folder `step-00000100` of safetensors (`tensors.py`) and JSON: what learns, the optimiser's state,
the generators of every rank, the data cursor. `latest` names the newest whole one. A kill at any moment leaves the one
before in place. One process or many write it, and any number goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from internvl.parallel import collectives
from internvl.train import generators, tensors
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


@dataclass(frozen=True)
class _Open:
    """A checkpoint that is being written."""

    partial: Path
    path: Path
    state: State
    written: Future[Any]


class Checkpoints:
    """The `checkpoints/` folder of one run; on several ranks every method is called by all of them."""

    def __init__(self, out: Path, keep: int) -> None:
        self.folder, self.keep = out / "checkpoints", keep
        self._writer = tensors.Writer()
        self._open: _Open | None = None

    def path(self, step: int) -> Path:
        return self.folder / folder_name(step)

    def save(
        self,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        state: State,
        ema: Mapping[str, Tensor] | None = None,
        behind: bool = False,
    ) -> Path:
        """Write everything under a temporary name, make it durable, rename, then move the pointer.

        `behind`: tensors are copied now and written beside what follows; `settle` gives the name.
        """
        self.settle()
        path = self.path(state.step)
        partial = path.with_name(f".{path.name}.partial")
        if collectives.is_lead():
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        collectives.barrier()
        kinds: dict[str, Mapping[str, Tensor]] = {
            "learned": learner.parameters,
            "optimizer": _optimizer_tensors(optimizer),
        }
        kinds |= {"ema": ema} if ema else {}
        held, plain = generators.state()
        save_file(held, partial / f"generators{_of_rank()}.safetensors")
        if collectives.is_lead():
            _write_json(partial / "state.json", {"format": FORMAT, **vars(state), "generators": plain})
        else:
            _write_json(partial / f"generators{_of_rank()}.json", plain)
        self._open = _Open(partial, path, state, self._writer.write(partial, kinds, behind))
        if not behind:
            self.settle()
        return path

    def poll(self) -> None:
        """Give what was written behind its name, once every rank has written its share."""
        if self._open is None:
            return
        unfinished = collectives.total_on_host([float(not self._open.written.done())])[0]
        if not unfinished:
            self.settle()

    def settle(self) -> None:
        """Wait for what is being written, then give it its name."""
        if self._open is None:
            return
        saved, self._open = self._open, None
        saved.written.result()
        collectives.barrier()
        if collectives.is_lead():
            self._name(saved)
        collectives.barrier()

    def close(self) -> None:
        self._writer.close()

    def _name(self, saved: _Open) -> None:
        for file in saved.partial.rglob("*"):
            _sync(file)
        _sync(saved.partial)
        if saved.path.exists():
            shutil.rmtree(saved.path)
        saved.partial.rename(saved.path)
        _sync(self.folder)
        replace_text(self.folder / "latest", saved.path.name + "\n")
        self._prune(saved.state)

    def _prune(self, state: State) -> None:
        for leftover in self.folder.glob(".step-*.partial"):
            shutil.rmtree(leftover)
        steps = sorted(self.folder.glob("step-*"))
        kept = {*steps[-self.keep :], self.path(int(state.best.get("step", -1)))}
        for path in steps:
            if path not in kept:
                shutil.rmtree(path)


def folder_name(step: int) -> str:
    return f"step-{step:08d}"


def latest(out: Path) -> Path | None:
    """The newest whole checkpoint of the run in `out`."""
    pointer = out / "checkpoints" / "latest"
    if not pointer.is_file():
        return None
    path = pointer.parent / pointer.read_text(encoding="utf-8").strip()
    if not (path / "state.json").is_file():
        raise ValueError(f"{pointer} names {path.name}, which is not there; write the name of another step into it")
    return path


def check_folder(run: RunConfig, resume: bool | None = None) -> Path | None:
    """The checkpoint that this run goes on from; ValueError where the folder holds another run."""
    out = Path(run.out)
    found = latest(out)
    if found is None:
        if resume:
            raise ValueError(f"{out} holds no checkpoint; leave --resume out to begin there")
        return None
    if resume is False:
        raise ValueError(f"{out} already holds {found.name}; give another --out, or leave --no-resume out to go on")
    if changed := differences(read_run(out), run):
        raise ValueError(f"{out} holds a run with other settings ({'; '.join(changed)}); give another --out")
    return found


def read_state(path: Path, frozen: str) -> tuple[State, dict[str, Any]]:
    """Where a checkpoint stands, and its generators; `frozen` is the fingerprint of what does not learn here."""
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if saved.pop("format") != FORMAT:
        raise ValueError(f"{path} was written in another format; resume it with the version that wrote it")
    plain = saved.pop("generators")
    state = State(**saved)
    if state.frozen != frozen:
        raise ValueError(
            f"the frozen weights differ from those {path} was trained on; give the same --model, or another --out"
        )
    return state, plain


def restore(
    path: Path, learner: Learner, optimizer: torch.optim.Optimizer, frozen: str, ema: Mapping[str, Tensor]
) -> State:
    """Put a checkpoint of any number of ranks back into the learner, the optimiser, the average and every generator.

    A rank that the checkpoint knows nothing of keeps its seed.
    """
    state, plain = read_state(path, frozen)
    load_learned(path, learner)
    if ema:
        tensors.read(path, "ema", ema)
    _restore_optimizer(optimizer, path)
    held = path / f"generators{_of_rank()}.safetensors"
    if held.is_file():
        own = held.with_suffix(".json")
        generators.restore(load_file(held), json.loads(own.read_text(encoding="utf-8")) if own.is_file() else plain)
    return state


def load_learned(path: Path, learner: Learner, kind: Literal["learned", "ema"] = "learned") -> None:
    """Only what learns, or its moving average, from a checkpoint; every name must be on both sides."""
    if unlike := tensors.names(path, kind) ^ set(learner.parameters):
        raise ValueError(
            f"{path} and this run learn different parameters, such as {min(unlike)}; use the same run.json"
        )
    with torch.no_grad():
        tensors.read(path, kind, learner.parameters)


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


def _of_rank() -> str:
    """What the files of a rank are called: the first rank's as those of a single process."""
    return "" if collectives.is_lead() else f"-{collectives.rank()}"


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = [name for group in optimizer.param_groups for name in group["names"]]
    state = optimizer.state_dict()["state"]
    return {f"{name}/{key}": value for index, name in enumerate(names) for key, value in state.get(index, {}).items()}


def _restore_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    """Moments are shaped and sharded as the parameter they belong to; `step` is a number."""
    index: dict[str, int] = {}
    parameters: dict[str, Tensor] = {}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            index[name], parameters[name] = len(index), parameter.detach()
    found: dict[str, Tensor] = {}
    for key in tensors.names(path, "optimizer"):
        name, field = key.rsplit("/", 1)
        found[key] = torch.zeros(()) if field == "step" else torch.zeros_like(parameters[name])
    tensors.read(path, "optimizer", found)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in found.items():
        name, field = key.rsplit("/", 1)
        state.setdefault(index[name], {})[field] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
