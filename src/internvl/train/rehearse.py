"""A training step rehearsed with tensors that have shapes and no memory: how many bytes are alive at its peak.

The stage's own code runs, so freezing, adapters, packing, autocast and checkpointing count as they are. Kernels'
scratch, the allocator's slack, CUDA's context and communication buffers are not known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from internvl.batch import ChatBatch
from internvl.config import ChatConfig
from internvl.models.attention import sdpa_only
from internvl.models.build import build
from internvl.models.chat import ChatModel
from internvl.models.layers import resize_positions
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import trainable
from internvl.train.run import RunConfig
from internvl.train.stages.sft import LOSS, Prepared, Sft


@dataclass(frozen=True)
class Memory:
    """Bytes alive at the peak of a step, and what the step holds in all."""

    parameters: int
    """Weights as they are kept: what learns in fp32, what is frozen in the run's precision."""
    optimiser: int
    """Two moments a learned number, in fp32."""
    gradients: int
    """Of all that learns; between the micro-batches of a step they stay."""
    peak: int
    """Everything, at the worst moment."""
    peak_gradients: int
    """Gradients that are there at that moment: few at the end of a forward pass, all at the end of a step."""
    peak_logits: int
    """Tensors over the vocabulary at that moment."""
    learned: int
    """Numbers that learn."""
    largest_unit: int
    """Weights of the largest block: what full sharding gathers at a time."""

    @property
    def activations(self) -> int:
        """What else is alive at the peak, logits included: kept for the backward pass, or passing."""
        return self.peak - self.parameters - self.optimiser - self.peak_gradients

    @property
    def floor(self) -> int:
        """What a step holds at its end, whatever passed through it."""
        return self.parameters + self.optimiser + self.gradients

    def on_gpus(self, number: int) -> int:
        """Bytes on each of several devices that share weights, gradients and moments evenly (full sharding).

        Two units are whole at a time: the one that runs and the one that is fetched ahead.
        """
        if number == 1:
            return self.peak
        held = self.parameters + self.optimiser + self.peak_gradients
        return -(-held // number) + 2 * self.largest_unit + self.activations


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations made and somebody still holds; tensors over the vocabulary apart."""

    def __init__(self, vocab_size: int = 0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.now = self.logits = self.gradients = 0
        self.peak, self.at_peak = 0, (0, 0)
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor)
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, (self.gradients, self.logits)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count its storage until nobody has it; views of a counted one add nothing."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        wide = size if tensor.ndim and tensor.shape[-1] == self.vocab_size else 0
        self.now, self.logits = self.now + size, self.logits + wide

        def gone() -> None:
            self._seen.discard(key)
            self.now, self.logits = self.now - size, self.logits - wide

        weakref.finalize(storage, gone)


def rehearse(run: RunConfig, config: ChatConfig, tokenizer: Any, batch: ChatBatch, device: str = "cuda") -> Memory:
    """Memory of a step of the sft stage over `batch`, on one device; twice over it where gradients accumulate.

    `device` "cpu" runs the attention that a CPU would, which may hold scores.
    """
    prepared = Sft(run, _Config(config), tokenizer, None, None).prepare(batch)  # type: ignore[arg-type]
    model = build(_plain(config), device="meta")
    model.image_token_id = token_id(tokenizer, SPECIAL_TOKENS[2])
    learner = trainable.choose(model, run, [token_id(tokenizer, token) for token in SPECIAL_TOKENS])
    if run.grad_checkpoint:
        model.checkpoint()
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        _place(model, learner.rows)
        embeddings = model.vision.embeddings  # its memory of resized positions goes by address, which these have not
        embeddings.positions = partial(resize_positions, embeddings.position_embedding)  # type: ignore[method-assign]
        learner = replace(learner, parameters=_learned(model, learner.rows))
        learner.train_mode()
        stage = _Rehearsal(run, model, tokenizer, None, None)  # type: ignore[arg-type]
        if run.data.features != "none":
            stage.store = _Kept(model)  # type: ignore[assignment]
        learned = list(learner.parameters.values())
        moments = [torch.zeros_like(p) for p in learned for _ in range(2)]
        mine = _fake(fake, prepared)
        live = LiveBytes(config.language.vocab_size)
        every = [*model.parameters(), *model.buffers(), *learned, *moments]
        for tensor in every:
            live.hold(tensor)
        fixed = live.now
        _count_gradients(learned, live)
        with live, sdpa_only() if device == "cuda" else nullcontext():
            for _ in range(min(2, run.accumulate)):
                _backward(run, stage, mine)
    moment_bytes = sum(m.nbytes for m in moments)
    gradients = sum(p.nbytes for p in learned)
    # at the end of a step every gradient is there, and no activation
    floor = fixed + gradients
    peak, (peak_gradients, logits) = max((live.peak, live.at_peak), (floor, (gradients, 0)))
    count = sum(p.numel() for p in learned)
    unit = _largest(model)
    return Memory(fixed - moment_bytes, moment_bytes, gradients, peak, peak_gradients, logits, count, unit)


def _place(*modules: nn.Module | None) -> None:
    """Parameters and buffers of the meta device, as tensors of a CPU without memory: autocast knows those."""
    known: dict[int, nn.Parameter] = {}
    for module in (m for some in modules if some is not None for m in some.modules()):
        for name, old in module._parameters.items():
            if old is not None:
                fresh = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                module._parameters[name] = known.setdefault(id(old), nn.Parameter(fresh, old.requires_grad))
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _learned(model: ChatModel, rows: nn.Module | None) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return found | ({} if rows is None else {f"{trainable.ROWS}.{name}": p for name, p in rows.named_parameters()})


def _backward(run: RunConfig, stage: Sft, prepared: Prepared) -> None:
    """As the loop does it."""
    cast = torch.autocast("cpu", torch.bfloat16) if run.precision == "bf16" else nullcontext()
    with cast:
        loss = stage.losses(prepared)[LOSS]
    (loss / 2.0).backward()


def _count_gradients(learned: Sequence[Tensor], live: LiveBytes) -> None:
    counted: set[int] = set()

    def count(parameter: Tensor) -> None:
        if id(parameter) not in counted:
            counted.add(id(parameter))
            live.gradients += parameter.nbytes

    for parameter in learned:
        parameter.register_post_accumulate_grad_hook(count)


def _fake(fake: FakeTensorMode, prepared: Prepared) -> Prepared:
    """Its tensors without memory; bounds of segments stay real, since the host reads them."""

    def moved(some: Any) -> Any:
        kept = {"segments"}
        values = {f.name: getattr(some, f.name) for f in fields(some) if f.name not in kept}
        return replace(some, **{k: fake.from_tensor(v) for k, v in values.items() if isinstance(v, Tensor)})

    whole: Prepared = replace(moved(prepared), batch=moved(prepared.batch))
    return whole


def _plain(config: ChatConfig) -> ChatConfig:
    """Without what chooses by the value of positions or lengths (scaled rotary angles, windows): memory is the same."""
    settings = {k: v for k, v in config.language.settings.items() if k not in ("rope_scaling", "sliding_window")}
    parameters = settings.get("rope_parameters")
    if parameters:
        settings = {**settings, "rope_parameters": {**parameters, "rope_type": "default"}}
    return replace(config, language=replace(config.language, settings=settings))


def _largest(model: ChatModel) -> int:
    """Bytes of the largest block, or of the token table, which is a unit of its own."""
    blocks = [block for m in model.modules() if isinstance(m, nn.ModuleList) for block in m]
    units = [sum(p.nbytes for p in block.parameters()) for block in blocks]
    table: Tensor = model.language.model.get_input_embeddings().weight
    return max([*units, table.nbytes])


class _Rehearsal(Sft):
    """The stage, but for the pixels: normalising them on a CPU goes through numpy, which has real memory only."""

    def _features(self, tiles: Tensor) -> Tensor:
        states: Tensor = self.model.vision(torch.zeros(tiles.shape), self.model.config.feature_layer)
        return states[:, 1:]


class _Config:
    """What preparing a batch asks of a model."""

    def __init__(self, config: ChatConfig) -> None:
        self.config = config


class _Kept:
    """Features that are there already: after the first epoch, the vision part does not run."""

    def __init__(self, model: ChatModel) -> None:
        self.model = model

    def gather(self, tiles: Tensor, *_: Any) -> Tensor:
        config = self.model.config
        patches = (config.tile_size // config.vision.patch_size) ** 2
        dtype = next(self.model.vision.parameters()).dtype
        return torch.zeros(len(tiles), patches, config.vision.width, dtype=dtype)
