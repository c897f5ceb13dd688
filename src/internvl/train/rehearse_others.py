"""Steps of stages of dual models, of distillation and of alignment, rehearsed: what stays, what passes, at the peak.

As rehearse.py does it for chat rows: the stage's own code on tensors without memory. Whole numbers stay real. The
stages without data that stand here also run for real, for their time (trials.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from internvl.batch import PairBatch, TextBatch
from internvl.config import ChatConfig, DualConfig
from internvl.models.build import build, build_dual
from internvl.models.contrastive import DualModel
from internvl.models.internvit import InternViT
from internvl.train import trainable
from internvl.train.alive import Memory, Trace, trace
from internvl.train.cells import NUM_SIGNALS, Cells
from internvl.train.depths import Stack, deepen, named_blocks, shallow
from internvl.train.rehearse import Blank, Kept, chat_layers, chat_stacks, largest, learned_of, plain, stacks_of
from internvl.train.run import RunConfig
from internvl.train.stages.align import Align
from internvl.train.stages.contrastive import Contrastive
from internvl.train.stages.distill import DistillStage, Tiles, projection
from internvl.train.stages.generative import Generative, Retrieval
from internvl.train.stages.pairs import PairStage
from internvl.train.stages.text import TextStage, factors
from internvl.train.students import Student
from internvl.train.teachers import Teacher, last_states, pool_grid
from internvl.train.weightless import Numbers, weightless


def rehearse_pairs(
    run: RunConfig, config: DualConfig, batch: PairBatch, side: int, device: str = "cuda", whole: bool = False
) -> Memory:
    """Memory of a step over one rank's part of a batch; `batch` needs no pixels, they are `side` px wide."""
    stacks = [] if whole else dual_stacks(run, config)
    return deepen(stacks, lambda depths: _pairs(run, shallow(config, depths), batch, side, device, stacks)).memory


def dual_stacks(run: RunConfig, config: DualConfig) -> list[Stack]:
    """Of a dual model; some of QLLaMA's blocks look at the picture."""
    return stacks_of(run, config, period=config.cross_every if config.generative else 1)


def _layers(model: DualModel) -> dict[str, nn.ModuleList]:
    return {"vision": model.vision.layers, "language": model.qllama.layers}


def _pairs(
    run: RunConfig, config: DualConfig, batch: PairBatch, side: int, device: str, stacks: Sequence[Stack]
) -> Trace:
    model = build_dual(config, device="meta")
    stage = unread(run, model)
    learner = stage.begin(replace(run, compile=False), torch.device("meta"))
    with weightless(model):
        learned = learned_of(model)
        replace(learner, parameters=learned).train_mode()
        whole = replace(batch, pixels=torch.empty(batch.num_pairs, 3, side, side, dtype=torch.uint8))
        with Numbers():
            return trace(
                run,
                list(learned.values()),
                [*model.parameters(), *model.buffers()],
                lambda: stage.losses(whole),
                given=[whole.pixels],
                vocab_size=config.language.vocab_size,
                largest_unit=largest(model, model.qllama.embed_tokens),
                device=device,
                blocks=named_blocks(stacks, _layers(model)),
            )


def unread(run: RunConfig, model: DualModel) -> PairStage:
    """The stage of a run on pairs, without pairs."""
    if run.stage == "contrastive":
        return _Images(run, model)
    return _Both(run, model) if run.pairs.losses == "retrieval" else _Queries(run, model)


class _Unread(PairStage):
    """A stage on pairs without pairs, and without pixels."""

    def __init__(self, run: RunConfig, model: DualModel) -> None:
        self.run, self.model, self.store = run, model, None

    def features(self, batch: PairBatch) -> Float[Tensor, "pairs positions dim"]:
        if self.run.data.features == "none":
            return super().features(batch)
        shape = (batch.num_pairs, self.model.vision.config.num_positions, self.model.vision.config.width)
        dtype = torch.bfloat16 if self.run.precision == "bf16" else torch.float32
        return torch.zeros(shape, dtype=dtype, device=batch.valid.device)

    def _look(self, pixels: Tensor, kept: Tensor | None = None) -> Float[Tensor, "pairs positions dim"]:
        out: Tensor = self.model.vision(torch.zeros(pixels.shape, device=pixels.device), kept=kept)
        return out


class _Images(_Unread, Contrastive):
    """Stage 1."""


class _Queries(_Unread, Generative):
    """Stage 2."""


class _Both(_Unread, Retrieval):
    """Fine-tuning for retrieval."""


def rehearse_text(
    run: RunConfig, config: DualConfig, batch: TextBatch, num_english: int, device: str = "cuda", whole: bool = False
) -> Memory:
    """Memory of a step of stage text over one rank's part of a batch, beside what is known of so many English texts.

    The teacher spoke before, and lies on the host.
    """
    stacks = [] if whole else dual_stacks(run, config)
    return deepen(stacks, lambda depths: _text(run, shallow(config, depths), batch, num_english, device, stacks)).memory


def _text(
    run: RunConfig, config: DualConfig, batch: TextBatch, num_english: int, device: str, stacks: Sequence[Stack]
) -> Trace:
    model = build_dual(config, device="meta")
    stage = Unheard(run, model)
    learner = stage.begin(replace(run, compile=False), torch.device("meta"))
    with weightless(model):
        learned = learned_of(model)
        replace(learner, parameters=learned).train_mode()
        stage.targets = torch.zeros(num_english, config.embed_width, dtype=torch.float16)
        with Numbers():
            return trace(
                run,
                list(learned.values()),
                [*model.parameters(), *model.buffers(), stage.targets],
                lambda: stage.losses(batch),
                given=[batch.texts.ids, batch.texts.mask],
                vocab_size=config.language.vocab_size,
                largest_unit=largest(model, model.qllama.embed_tokens),
                device=device,
                blocks=named_blocks(stacks, _layers(model)),
            )


class Unheard(TextStage):
    """The stage without texts, and without a teacher."""

    def __init__(self, run: RunConfig, model: DualModel) -> None:
        self.run, self.model, self.coefficients = run, model, factors(run)

    def _listen(self, device: torch.device) -> None:
        """Whoever makes it gives it targets."""


def rehearse_align(
    run: RunConfig, config: ChatConfig, batch: Cells, num_words: int, device: str = "cuda", whole: bool = False
) -> Memory:
    """Memory of a step of the align stage; the language model lies beside it and does not run."""
    stacks = [] if whole else chat_stacks(run, config)
    return deepen(stacks, lambda depths: _align(run, shallow(config, depths), batch, num_words, device, stacks)).memory


def _align(
    run: RunConfig, config: ChatConfig, batch: Cells, num_words: int, device: str, stacks: Sequence[Stack]
) -> Trace:
    model = build(plain(config), device="meta")
    learner = trainable.choose(model, run)
    with weightless(model):
        learned = learned_of(model)
        replace(learner, parameters=learned).train_mode()
        stage = Placing(run, model, num_words)
        with Numbers():
            return trace(
                run,
                list(learned.values()),
                [*model.parameters(), *model.buffers(), stage.table, stage.directions],
                lambda: stage.losses(batch),
                largest_unit=largest(model),
                device=device,
                blocks=named_blocks(stacks, chat_layers(model)),
            )


class Placing(Blank, Align):
    """The stage without records."""

    def __init__(self, run: RunConfig, model: Any, num_words: int) -> None:
        self.run, self.model = run, model
        self.store = Kept(model) if run.data.features != "none" else None  # type: ignore[assignment]
        width = model.config.language.width
        self.table = torch.zeros(num_words, width)
        self.directions = torch.ones(NUM_SIGNALS, width)


def rehearse_distill(
    run: RunConfig, config: ChatConfig | DualConfig, teacher: Teacher, num_tiles: int, device: str = "cuda"
) -> Memory:
    """Memory of a step of distillation over so many tiles: student, its projections, the teacher beside."""
    student, learner, behind = follower(run, config, teacher, torch.device("meta"))
    model = student.model
    with weightless(model, behind, teacher.module):
        learned = learned_of(model)
        replace(learner, parameters=learned).train_mode()
        stage = Following(run, student, teacher, list(behind))
        tiles = torch.empty(num_tiles, 3, student.side, student.side, dtype=torch.uint8)
        batch = Tiles(tiles, ())
        with Numbers():
            return trace(
                run,
                [*learned.values(), *behind.parameters()],
                [*model.parameters(), *model.buffers(), *teacher.module.parameters()],
                lambda: stage.losses(batch),
                given=[tiles],
                largest_unit=largest(model),
                device=device,
            ).memory


def follower(
    run: RunConfig, config: ChatConfig | DualConfig, teacher: Teacher, device: torch.device
) -> tuple[Student, trainable.Learner, nn.ModuleList]:
    """The student, with what learns of it chosen, and its projections."""
    if isinstance(config, ChatConfig):
        student = Student(build(plain(config), device=device))
    else:
        student = Student(build_dual(config, device=device))
    learner = student.choose(run)
    student.vision.checkpointing = run.grad_checkpoint
    with device:
        behind = nn.ModuleList(
            projection(student.width, teacher.width, run.distill.projection) for _ in range(run.distill.layers)
        )
    return student, learner, behind


class Following(DistillStage):
    """The stage without pictures."""

    def __init__(self, run: RunConfig, student: Student, teacher: Teacher, behind: list[nn.Module]) -> None:
        self.run, self.student, self.teacher, self.settings = run, student, teacher, run.distill
        self.coefficients = self.factors(run)
        self.side = min(student.grid, teacher.grid)
        self.projections, self.mean = behind, None

    def _target(self, batch: Tiles) -> Float[Tensor, "tiles states positions width"]:
        if self.settings.features == "none":
            return self._taught(batch.tiles).float()
        shape = (len(batch.tiles), self.settings.layers, self.side**2 + 1, self.teacher.width)
        return torch.zeros(shape, dtype=torch.bfloat16, device=batch.tiles.device).float()

    def _pixels(self, tiles: Tensor) -> Float[Tensor, "tiles 3 side side"]:
        return torch.zeros(tiles.shape, device=tiles.device)

    @torch.no_grad()
    def _taught(self, tiles: Tensor) -> Float[Tensor, "tiles states positions width"]:
        teacher = self.teacher
        if not isinstance(teacher.module, InternViT):
            return super()._taught(tiles)
        shape, first = (len(tiles), 3, teacher.side, teacher.side), next(teacher.module.parameters())
        pixels = torch.zeros(shape, dtype=first.dtype, device=first.device)
        found = last_states(teacher.module, pixels, teacher.tap, self.settings.layers)
        return pool_grid(torch.stack(found, dim=1), self.side).to(torch.bfloat16)
