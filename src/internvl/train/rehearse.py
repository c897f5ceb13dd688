"""A training step rehearsed with tensors that have shapes and no memory: how many bytes are alive at its peak.

Of the sft stage here, of the others in rehearse_others.py. The stage's own code runs, so freezing, adapters, packing,
autocast and checkpointing count as they are. Kernels' scratch, the allocator's slack, CUDA's context and communication
buffers are not known here.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
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
from internvl.tokens import SPECIAL_TOKENS, token_id
from internvl.train import trainable
from internvl.train.run import RunConfig
from internvl.train.stages.sft import Prepared, Sft
from internvl.train.weightless import weightless


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


def alive(
    run: RunConfig,
    learned: Sequence[nn.Parameter],
    held: Iterable[Tensor],
    losses: Callable[[], Mapping[str, Tensor]],
    *,
    given: Iterable[Tensor] = (),
    vocab_size: int = 0,
    largest_unit: int = 0,
    device: str = "cuda",
) -> Memory:
    """Memory of a step over the micro-batch behind `losses`, twice over it where gradients accumulate.

    `held`: weights and whatever else lies on the device throughout, beside what learns and its moments. `given`: what
    is there for the step, such as pixels.
    """
    moments = [torch.zeros_like(p) for p in learned for _ in range(2)]
    live = LiveBytes(vocab_size)
    for tensor in [*held, *learned, *moments]:
        live.hold(tensor)
    fixed = live.now
    for tensor in given:
        live.hold(tensor)
    _count_gradients(learned, live)
    with live, sdpa_only() if device == "cuda" else nullcontext():
        for _ in range(min(2, run.accumulate)):
            _backward(run, losses)
    moment_bytes = sum(m.nbytes for m in moments)
    gradients = sum(p.nbytes for p in learned)
    # at the end of a step every gradient is there, and no activation
    floor = fixed + gradients
    peak, (peak_gradients, logits) = max((live.peak, live.at_peak), (floor, (gradients, 0)))
    count = sum(p.numel() for p in learned)
    return Memory(fixed - moment_bytes, moment_bytes, gradients, peak, peak_gradients, logits, count, largest_unit)


def rehearse(run: RunConfig, config: ChatConfig, tokenizer: Any, batch: ChatBatch, device: str = "cuda") -> Memory:
    """Memory of a step of the sft stage over `batch`, on one device; twice over it where gradients accumulate.

    `device` "cpu" runs the attention that a CPU would, which may hold scores.
    """
    prepared = Sft(run, _Config(config), tokenizer, None, None).prepare(batch)  # type: ignore[arg-type]
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
        return alive(
            run,
            list(learned.values()),
            [*model.parameters(), *model.buffers()],
            lambda: stage.losses(mine),
            vocab_size=config.language.vocab_size,
            largest_unit=largest(model, model.language.model.get_input_embeddings()),
            device=device,
        )


def learned_of(model: nn.Module, rows: nn.Module | None = None) -> dict[str, nn.Parameter]:
    found = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return found | ({} if rows is None else {f"{trainable.ROWS}.{name}": p for name, p in rows.named_parameters()})


def _backward(run: RunConfig, losses: Callable[[], Mapping[str, Tensor]]) -> None:
    """As the loop does it."""
    cast = torch.autocast("cpu", torch.bfloat16) if run.precision == "bf16" else nullcontext()
    with cast:
        sums = losses()
    torch.stack([value / 2.0 for value in sums.values()]).sum().backward()


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
