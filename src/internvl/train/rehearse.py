"""A training step rehearsed with tensors that have shapes and no memory: how many bytes are alive at its peak.

Of the sft stage here, of the others in rehearse_others.py. The stage's own code runs, so freezing, adapters, packing,
autocast and checkpointing count as they are; of a deep model only as many blocks as say what the others do (depths.py).
Kernels' scratch, the allocator's slack, CUDA's context and communication buffers are not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from internvl.batch import ChatBatch
from internvl.config import ChatConfig, DualConfig
from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import trainable
from internvl.train.alive import Memory, Trace, trace
from internvl.train.depths import Stack, deepen, named_blocks, shallow
from internvl.train.run import RunConfig
from internvl.train.stages.sft import Prepared, Sft
from internvl.train.weightless import weightless


def rehearse(
    run: RunConfig, config: ChatConfig, tokenizer: Any, batch: ChatBatch, device: str = "cuda", whole: bool = False
) -> Memory:
    """Memory of a step of the sft stage over `batch`, on one device; twice over it where gradients accumulate.

    `device` "cpu" runs the attention that a CPU would, which may hold scores. `whole` rehearses every block.
    """
    prepared = Sft(run, _Config(config), tokenizer, None, None).prepare(batch)  # type: ignore[arg-type]
    stacks = [] if whole else chat_stacks(run, config)
    return deepen(
        stacks, lambda depths: _rehearsed(run, shallow(config, depths), tokenizer, prepared, device, stacks)
    ).memory


def chat_stacks(run: RunConfig, config: ChatConfig) -> list[Stack]:
    """Of a chat model: blocks behind the tapped one do not run."""
    behind = -1 - config.feature_layer if config.feature_layer < 0 else None
    return stacks_of(run, config, behind)


def stacks_of(run: RunConfig, config: ChatConfig | DualConfig, behind: int | None = 0, period: int = 1) -> list[Stack]:
    """Vision and language blocks, where they are alike: the last `behind` of the vision are not, nor those that learn
    alone; None where that is not known. `period`: that of the language blocks."""
    found = []
    for name, depth, every, apart in (
        ("vision", config.vision.depth, 1, behind),
        ("language", config.language.depth, period, 0),
    ):
        first = run.part(name).layers_from
        if apart is not None and first <= 0:
            found.append(Stack(name, depth, every, max(apart, -first)))
    kinds = set(config.language.settings.get("layer_types") or [])
    return [stack for stack in found if stack.name == "vision" or len(kinds) < 2]


def _rehearsed(
    run: RunConfig, config: ChatConfig, tokenizer: Any, prepared: Prepared, device: str, stacks: Sequence[Stack]
) -> Trace:
    model = build(plain(config), device="meta")
    model.image_token_id = token_id(tokenizer, SPECIAL_TOKENS[2])
    rows = [token_id(tokenizer, token) for token in SPECIAL_TOKENS] if run.tokens.learn else []
    learner = trainable.choose(model, run, rows)
    if run.grad_checkpoint:
        model.checkpoint()
    with weightless(model, learner.rows) as fake:
        learned = learned_of(model, learner.rows)
        replace(learner, parameters=learned).train_mode()
        stage = _Rehearsal(run, model, tokenizer, None, None)  # type: ignore[arg-type]
        if run.data.features != "none":
            stage.store = Kept(model)  # type: ignore[assignment]
        mine = _fake(fake, prepared)
        return trace(
            run,
            list(learned.values()),
            [*model.parameters(), *model.buffers()],
            lambda: stage.losses(mine),
            vocab_size=config.language.vocab_size,
            largest_unit=largest(model, model.language.model.get_input_embeddings()),
            device=device,
            blocks=named_blocks(stacks, chat_layers(model)),
        )


def chat_layers(model: ChatModel) -> dict[str, nn.ModuleList]:
    return {"vision": model.vision.layers, "language": model.language.model.model.layers}


def learned_of(model: nn.Module, rows: nn.Module | None = None) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return found | ({} if rows is None else {f"{trainable.ROWS}.{name}": p for name, p in rows.named_parameters()})


def _fake(fake: FakeTensorMode, prepared: Prepared) -> Prepared:
    """Its tensors without memory; bounds of segments stay real, since the host reads them."""

    def moved(some: Any) -> Any:
        kept = {"segments"}
        values = {f.name: getattr(some, f.name) for f in fields(some) if f.name not in kept}
        return replace(some, **{k: fake.from_tensor(v) for k, v in values.items() if isinstance(v, Tensor)})

    whole: Prepared = replace(moved(prepared), batch=moved(prepared.batch))
    return whole


def plain(config: ChatConfig) -> ChatConfig:
    """Without what chooses by the value of positions or lengths (scaled rotary angles, windows): memory is the same."""
    settings = {k: v for k, v in config.language.settings.items() if k not in ("rope_scaling", "sliding_window")}
    parameters = settings.get("rope_parameters")
    if parameters:
        settings = {**settings, "rope_parameters": {**parameters, "rope_type": "default"}}
    return replace(config, language=replace(config.language, settings=settings))


def largest(model: nn.Module, *others: nn.Module) -> int:
    """Bytes of the largest block, or of another module that full sharding gathers by itself, such as a token table."""
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    return max(sum(p.nbytes for p in unit.parameters()) for unit in [*blocks, *others])


class Blank:
    """What a stage sees of tiles, but for their pixels: normalising on a CPU goes through numpy, in real memory."""

    model: ChatModel

    def _features(self, tiles: Tensor) -> Tensor:
        return self.model.look(torch.zeros(tiles.shape, device=tiles.device))


class _Rehearsal(Blank, Sft):
    """The stage without pixels."""


class _Config:
    """What preparing a batch asks of a model."""

    def __init__(self, config: ChatConfig) -> None:
        self.config = config


class Kept:
    """Features that are there already: after the first epoch, the vision part does not run."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    def gather(self, tiles: Tensor, *_: Any) -> Tensor:
        return torch.stack([self.get(b"") for _ in range(len(tiles))])

    def get(self, name: bytes) -> Tensor:
        config = self.model.config
        positions = config.num_queries + (config.tile_size // config.vision.patch_size) ** 2
        width = max(config.vision.width, 0 if config.queries is None else config.queries.language.width)
        first = next(self.model.vision.parameters())
        return torch.zeros(positions, width, dtype=first.dtype, device=first.device)
