"""What learns of InternVL-C and -G, what a run opens and what it leaves. To the loop it is a learner as any other."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internvl.convert.files import open_weights, save_tensors
from internvl.load_dual import LoadedDual, carry_over, load_dual, save_dual
from internvl.models.build import build_dual
from internvl.models.contrastive import DualModel
from internvl.train.export import cast, merge_exactly
from internvl.train.run import RunConfig
from internvl.train.trainable import PROJECTIONS, Learner, adapt, set_dtypes

_BLOCK = re.compile(r"(?:vision|qllama)\.layers\.(\d+)\.")


def part_of(name: str) -> str:
    """vision: the encoder; language: the LLaMA inside QLLaMA; connector: poolings, projections, queries, their
    cross-attention, the matching head, the logit scale."""
    if name.startswith("vision."):
        return "vision"
    if name.startswith("qllama.") and ".cross." not in name and name != "qllama.queries":
        return "language"
    return "connector"


def is_generative(name: str) -> bool:
    """Parameters that InternVL-G has and C has not, but for the output head."""
    return ".cross." in name or name.startswith(("qllama.queries", "query_pool.", "match_head."))


class DualLearner(Learner[DualModel]):
    """A dual model and the parameters of it that learn."""

    def part_of(self, name: str) -> str:
        return PROJECTIONS if name.startswith(f"{PROJECTIONS}.") else part_of(name)

    def train_mode(self) -> None:
        """Drop path and the dropout of adapters where something learns."""
        self.model.eval()
        self.model.vision.train(self.run.vision.learn != "frozen")
        self.model.qllama.train(self.run.language.learn != "frozen")


def choose(model: DualModel, run: RunConfig, wanted: Callable[[str], bool]) -> DualLearner:
    """Freeze and thaw: what the stage wants, where the run's part is full. `wanted` decides by name."""
    for name in ("vision", "language"):
        if run.part(name).learn == "lora":
            adapt(model, name, run.part(name), run.precision)
    depths = {"vision": len(model.vision.layers), "language": len(model.qllama.layers)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name) and _thawed(name, run, depths))
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("nothing learns: every part is frozen; set --connector.learn full, or another part")
    set_dtypes(model, parameters, run)
    return DualLearner(model, run, parameters, None)


def _thawed(name: str, run: RunConfig, depths: dict[str, int]) -> bool:
    part = run.part(part_of(name))
    if part.learn == "lora":
        return ".lora_" in name
    if part.learn == "frozen" or not part.layers_from:
        return part.learn == "full"
    depth = depths[part_of(name)]
    if not -depth <= part.layers_from < depth:
        raise ValueError(f"layers_from is {part.layers_from} but the part has {depth} blocks; give a smaller number")
    block = _BLOCK.match(name)
    return block is not None and int(block[1]) >= part.layers_from % depth


def open_generative(run: RunConfig) -> LoadedDual:
    """InternVL-G: as the folder holds it; or InternVL-C with new parts from the run's seed (paper 1.0, section 3.3)."""
    loaded = load_dual(run.model)
    if loaded.config.generative:
        return loaded
    config = replace(loaded.config, generative=True)
    model = build_dual(config, seed=run.seed)
    carry_over(loaded.model, model)
    if not config.language.tied:
        _take_head(model.qllama.head, run)
    return replace(loaded, model=model, config=config)


@torch.no_grad()
def _take_head(head: nn.Linear, run: RunConfig) -> None:
    if not run.pairs.output_head:
        raise ValueError(
            f"{run.model} is InternVL-C, which has no output head for captions; set pairs.output_head to the folder of "
            "the LLaMA that it began as"
        )
    weights = open_weights(Path(run.pairs.output_head))
    shape = weights.shapes.get("lm_head.weight")
    if shape != tuple(head.weight.shape):
        raise ValueError(
            f"{run.pairs.output_head}: lm_head.weight is {shape}, the model's {tuple(head.weight.shape)}; give the "
            "folder of the LLaMA that it began as"
        )
    head.weight.copy_(weights.get("lm_head.weight", torch.float32, "cpu"))


def export(learner: Learner[DualModel], tokenizer: Any, out: Path) -> None:
    """`model`: all of it in the official layout; `parts`: what learned, by our names. Training is over after it."""
    run, model = learner.run, learner.model
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    cast(learner.parameters.values(), dtype)
    (out / "parts").mkdir(parents=True, exist_ok=True)
    save_tensors(out / "parts" / "learned.safetensors", learner.parameters)
    if "lora" in (run.vision.learn, run.language.learn):
        cast(model.parameters(), torch.float32)
        merge_exactly(model)
    cast(model.parameters(), dtype)
    save_dual(model.eval(), tokenizer, out / "model")
