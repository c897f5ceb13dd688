"""What a run leaves: the trained parts apart, and the whole model with everything merged. Formats are load.py's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from internvl.load import save_checkpoint
from internvl.train.run import PARTS
from internvl.train.trainable import Learner


def export_parts(learner: Learner, out: Path, dtype: torch.dtype) -> None:
    """connector.safetensors, a peft folder for each adapted part, embeddings.safetensors: only what learned.

    Learned values are rounded to `dtype` first, so that the parts and the merged model say the same.
    """
    out.mkdir(parents=True, exist_ok=True)
    run = learner.run
    with torch.no_grad():
        for parameter in learner.parameters.values():
            parameter.copy_(parameter.to(dtype))
    if run.connector.learn == "full":
        state = learner.model.connector.state_dict()
        save_file(
            {name: value.cpu().to(dtype).contiguous() for name, value in state.items()}, out / "connector.safetensors"
        )
    for name in PARTS:
        if run.part(name).learn == "lora":
            _save_adapter(learner, name, out / name)
    if learner.rows is not None:
        rows = {name: p.detach().cpu().to(dtype).contiguous() for name, p in learner.rows.named_parameters()}
        save_file(rows, out / "embeddings.safetensors")


def export_model(learner: Learner, tokenizer: Any, out: Path, dtype: torch.dtype) -> None:
    """The whole model in the official layout; adapters and token rows are merged in fp32. Training is over after it."""
    model = learner.model
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    if any(learner.run.part(name).learn == "lora" for name in PARTS):
        _merge(learner)
    if learner.rows is not None:
        learner.rows.settle()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    save_checkpoint(model.eval(), tokenizer, out, layout="official")


def _save_adapter(learner: Learner, part: str, out: Path) -> None:
    from internvl.models import adapters  # peft, an extra

    adapters.save(learner.model, out, part=part)


def _merge(learner: Learner) -> None:
    from internvl.models import adapters

    adapters.merge(learner.model)
