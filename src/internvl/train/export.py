"""What a run leaves: the trained parts apart, and the whole model with everything merged. Formats are load.py's.

Which weights those are: the latest, the best, a moving average, or the mean of several checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import nn

from internvl.load import save_checkpoint
from internvl.parallel.shard import local
from internvl.train import checkpoint
from internvl.train.run import RunConfig
from internvl.train.settings import PARTS
from internvl.train.start import CONNECTOR, EMBEDDINGS
from internvl.train.trainable import Learner

if TYPE_CHECKING:
    from internvl.models.adapters import Adaptable


def export_chat(learner: Learner, tokenizer: Any, out: Path) -> None:
    """What a run on a chat model leaves: `parts`, then `model`, in the run's precision. Training is over after it."""
    dtype = torch.bfloat16 if learner.run.precision == "bf16" else torch.float32
    export_parts(learner, out / "parts", dtype)
    export_model(learner, tokenizer, out / "model", dtype)


def export_parts(learner: Learner, out: Path, dtype: torch.dtype) -> None:
    """connector.safetensors, a peft folder for each adapted part, embeddings.safetensors: only what learned.

    Learned values are rounded to `dtype` for good, so that the parts and the merged model say the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    model, learned = learner.model, list(learner.parameters.values())
    cast(learned, dtype)
    if learner.run.connector.learn == "full":
        _write(model.connector.named_parameters(), out / CONNECTOR)
    if learner.rows is not None:
        _write(learner.rows.named_parameters(), out / EMBEDDINGS)
    for name in _adapted(learner):
        from internvl.models import adapters  # needs peft, an extra

        adapters.save(model, out / name, name)
    cast(learned, torch.float32)


def export_model(learner: Learner, tokenizer: Any, out: Path, dtype: torch.dtype) -> None:
    """The whole model in the official layout; adapters and token rows are merged in fp32. Training is over after it."""
    model = learner.model
    cast(model.parameters(), torch.float32)
    if _adapted(learner):
        merge_exactly(model)
    if learner.rows is not None:
        learner.rows.settle()
    cast(model.parameters(), dtype)
    save_checkpoint(model.eval(), tokenizer, out, layout="official")


def merge_exactly(model: Adaptable) -> None:
    """Fold all adapters in; the model is in fp32."""
    from internvl.models import adapters  # needs peft, an extra

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # merging compares outputs, which TF32 would blur
    adapters.merge(model)
    torch.set_float32_matmul_precision(precision)


def move_folders(source: Path, target: Path) -> None:
    """Every folder below `source` takes the place of its namesake in `target`."""
    for path in source.iterdir():
        shutil.rmtree(target / path.name, ignore_errors=True)
        path.rename(target / path.name)
    source.rmdir()


def newest(out: Path, count: int) -> list[Path]:
    """The latest `count` whole checkpoints, oldest first."""
    found = sorted((out / "checkpoints").glob("step-*"))
    if len(found) < count:
        raise ValueError(
            f"{out} holds {len(found)} checkpoints, {count} are to be averaged; give a smaller --average, or train "
            f"with --keep {count}"
        )
    return found[-count:]


def load_wanted(run: RunConfig, learner: Learner, frozen: str, average: int = 1) -> checkpoint.State:
    """The weights that `run.export` asks for, or the mean of the latest `average` checkpoints."""
    out = Path(run.out)
    found = checkpoint.latest(out)
    assert found is not None
    state, _ = checkpoint.read_state(found, frozen)
    if average > 1:
        load_mean(newest(out, average), learner)
    elif run.export == "best" and state.best:
        checkpoint.load_learned(found.with_name(checkpoint.folder_name(int(state.best["step"]))), learner)
    else:
        checkpoint.load_learned(found, learner, "ema" if run.export == "ema" else "learned")
    return state


def load_mean(paths: Sequence[Path], learner: Learner) -> None:
    """The mean of what learned in several checkpoints, in float64 (weight averaging along a run)."""
    sums = {name: torch.zeros_like(local(p), dtype=torch.float64) for name, p in learner.parameters.items()}
    for path in paths:
        checkpoint.load_learned(path, learner)
        for name, parameter in learner.parameters.items():
            sums[name] += local(parameter.detach())
    with torch.no_grad():
        for name, parameter in learner.parameters.items():
            local(parameter).copy_(sums[name] / len(paths))


def _adapted(learner: Learner) -> list[str]:
    return [name for name in PARTS if learner.run.part(name).learn == "lora"]


def cast(parameters: Iterable[nn.Parameter], dtype: torch.dtype) -> None:
    """Other number type, in place."""
    for parameter in parameters:
        parameter.data = parameter.data.to(dtype)


def _write(parameters: Iterable[tuple[str, nn.Parameter]], path: Path) -> None:
    save_file({name: parameter.detach().cpu().contiguous() for name, parameter in parameters}, path)
