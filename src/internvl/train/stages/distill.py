"""From a large vision encoder to that of a chat model or InternVL-C/-G: cosine of states (paper Mini-InternVL, 3.1).

The paper gives neither its K layers nor how 3,200 channels meet 1,024: both are settings here, with a learned
projection that is thrown away (docs/distillation.md). Teachers are teachers.py's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from internvl.data.crop import random_crop
from internvl.data.images import open_image
from internvl.data.mixture import read_sets
from internvl.train import features, trainable
from internvl.train.losses import cosine_sum, relation_sum
from internvl.train.run import RunConfig
from internvl.train.settings import Distill
from internvl.train.stages.pictures import PictureStage
from internvl.train.students import Student, open_student
from internvl.train.teachers import Teacher, last_states, open_teacher, pool_grid

LOSS, RELATION = "cosine", "relation"
WHOLE = (1.0, 1.0)
RIDGE = 0.01
"""Of the fitted projection, in mean squares of the student's channels."""


@dataclass(frozen=True)
class Tiles:
    """Tiles of some pictures."""

    tiles: UInt8[Tensor, "tiles 3 side side"]
    sources: tuple[str, ...]
    digests: tuple[bytes, ...] = ()
    """Content of each tile, where the teacher's states are kept."""

    def pin_memory(self) -> Tiles:
        return replace(self, tiles=self.tiles.pin_memory())

    def to(self, device: torch.device, non_blocking: bool = False) -> Tiles:
        return replace(self, tiles=self.tiles.to(device, non_blocking=non_blocking))


def projection(student: int, teacher: int, kind: str) -> nn.Module:
    """From the student's width to the teacher's: LayerNorm, then a matrix with bias, or two of them around a GELU."""
    if kind == "linear":
        return nn.Sequential(nn.LayerNorm(student), nn.Linear(student, teacher))
    return nn.Sequential(nn.LayerNorm(student), nn.Linear(student, teacher), nn.GELU(), nn.Linear(teacher, teacher))


def pictures_of(path: str, limit: int | None = None) -> list[str]:
    """Every picture that the records of a meta JSON or JSONL name, once, in their order."""
    if not path:
        raise ValueError("data.meta is not given; set --data.meta to a meta JSON or a JSONL file")
    found: dict[str, None] = {}
    for data in read_sets(path):
        for position in range(len(data.lines)):
            named = json.loads(data.lines.read(position)).get("image") or ()
            for name in [named] if isinstance(named, str) else named:
                found[str(Path(data.root) / name)] = None
        if limit is not None and len(found) >= limit:
            break
    if not found:
        raise ValueError(f"{path}: no record has a picture, and distillation learns from nothing else")
    return list(found)[:limit]


def _ridge(linear: nn.Linear, x: Float[Tensor, "rows dim"], y: Float[Tensor, "rows width"]) -> None:
    """Weight and bias that predict y from x best, in float64, large weights punished."""
    x, y = x.double(), y.double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    centred = x - mean_x
    gram = centred.T @ centred
    gram += RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(gram, centred.T @ (y - mean_y))
    linear.weight.copy_(weight.T)
    linear.bias.copy_(mean_y - mean_x @ weight)


class DistillStage(PictureStage[Tiles]):
    """The student follows the teacher on every tile."""

    def __init__(self, run: RunConfig, student: Student, teacher: Teacher) -> None:
        super().__init__(run)
        self.student, self.model = student, student.model
        self.coefficients: Mapping[str, float] = self.factors(run)
        self.teacher = teacher
        self.settings: Distill = run.distill
        self.pictures = pictures_of(run.data.meta)
        self.side = min(student.grid, teacher.grid)
        """Of the grid on which both are compared: the coarser one."""
        self.store: features.MemoryStore | None = None
        self.projections: list[nn.Module] = []
        self.mean: Tensor | None = None

    @staticmethod
    def factors(run: RunConfig) -> dict[str, float]:
        """Of the losses that a run has."""
        relation = run.distill.relation
        return {LOSS: 1.0} | ({RELATION: relation} if relation else {})

    @cached_property
    def held_out(self) -> list[str]:
        data = self.run.data
        return pictures_of(data.held_out, data.held_out_samples) if data.held_out else []

    def begin(self, run: RunConfig, device: torch.device) -> trainable.Learner:
        if run.vision.learn == "frozen" or run.connector.learn != "frozen" or run.language.learn != "frozen":
            raise ValueError(
                f"the distill stage teaches the vision part alone; vision.learn is {run.vision.learn!r}, connector's "
                f"{run.connector.learn!r}, language's {run.language.learn!r}: set full or lora, frozen, frozen"
            )
        self.model.to(device)
        self.teacher.module.to(device)
        learner = self.student.choose(run)
        if run.grad_checkpoint:
            self.student.vision.checkpointing = True
        if run.compile:
            for block in self.student.vision.layers:
                block.compile()
        kind = self.settings.projection
        self.projections = [
            projection(self.student.width, self.teacher.width, kind) for _ in range(self.settings.layers)
        ]
        behind = nn.ModuleList(self.projections).to(device)
        named = {f"{trainable.PROJECTIONS}.{name}": p for name, p in behind.named_parameters()}
        self.store = self._open_store(device)
        if self.settings.fit:
            self._fit(device)
        return replace(learner, parameters={**learner.parameters, **named})

    def num_pictures(self) -> int:
        return len(self.pictures)

    def made(self, chosen: Sequence[int], drawn: np.random.Generator) -> Tiles:
        return self._tiles([self.pictures[number] for number in chosen], drawn)

    def prepare(self, batch: Tiles) -> Tiles:
        return batch if self.store is None else replace(batch, digests=tuple(features.digests(batch.tiles)))

    def weights(self, batch: Tiles) -> dict[str, float]:
        return dict.fromkeys(self.coefficients, float(len(batch.tiles)))

    def losses(self, prepared: Tiles) -> dict[str, Float[Tensor, ""]]:
        """Sum over tiles of the distance between projected states and the teacher's."""
        target = self._target(prepared)
        target = target if self.mean is None else target - self.mean
        states = self._student(prepared.tiles)
        said = torch.stack([behind(x) for behind, x in zip(self.projections, states.unbind(1), strict=True)], dim=1)
        found = {LOSS: cosine_sum(said, target, self.settings.class_weight)}
        if RELATION in self.coefficients:
            found[RELATION] = relation_sum(states, target[:, -1, 0])
        return found

    def sizes(self, batch: Tiles) -> dict[str, int]:
        tiles = len(batch.tiles)
        tokens = tiles * (self.side**2 + 1)
        return {"samples": len(batch.sources), "tokens": tokens, "learned": tokens, "tiles": tiles}

    def evaluate(self, device: torch.device) -> dict[str, float]:
        """Mean distance on pictures that are never trained on, not mirrored."""
        if not self.held_out:
            return {}
        total, count = 0.0, 0
        for first in range(0, len(self.held_out), self.size):
            batch = self._tiles(self.held_out[first : first + self.size], None)
            total += float(self.losses(self.prepare(batch).to(device))[LOSS])
            count += len(batch.tiles)
        return {"held_out_loss": total / count}

    def _target(self, batch: Tiles) -> Float[Tensor, "tiles states positions width"]:
        """What the teacher says, kept or computed now, in float32."""
        if self.store is None:
            return self._taught(batch.tiles).float()
        return self.store.gather(batch.tiles, batch.digests, self._taught).float()

    def _student(self, tiles: Tensor) -> Float[Tensor, "tiles states positions width"]:
        """Its last states on the grid of the comparison."""
        student = self.student
        states = last_states(student.vision, self._pixels(tiles), student.tap, self.settings.layers)
        return torch.stack([pool_grid(state, self.side) for state in states], dim=1)

    def _pixels(self, tiles: Tensor) -> Float[Tensor, "tiles 3 side side"]:
        return self.student.pixels(tiles)

    @torch.no_grad()
    def _fit(self, device: torch.device) -> None:
        """Mean states of the teacher, and the projections that fit best, over the first pictures: always the same."""
        if self.settings.projection != "linear":
            raise ValueError(f"distill.fit is {self.settings.fit} but the projection is not linear; set one of them")
        self.model.eval()
        seen, taught = [], []
        for first in range(0, self.settings.fit, self.size):
            chosen = self.pictures[: self.settings.fit][first : first + self.size]
            if not chosen:
                break
            batch = self.prepare(self._tiles(chosen, None)).to(device)
            taught.append(self._target(batch))
            with torch.autocast(device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
                seen.append(self._student(batch.tiles).float())
        x, y = torch.cat(seen), torch.cat(taught)
        mean = y.mean(0)
        patches = mean[:, 1:].mean(1, keepdim=True).expand(-1, mean.shape[1] - 1, -1)
        self.mean = torch.cat([mean[:, :1], patches], dim=1)
        for number, behind in enumerate(self.projections):
            norm, linear = behind.children()
            assert isinstance(linear, nn.Linear)
            _ridge(linear, norm(x[:, number]).flatten(0, 1), (y - self.mean)[:, number].flatten(0, 1))

    def _taught(self, tiles: Tensor) -> Float[Tensor, "tiles states positions width"]:
        return self.teacher.states(tiles, self.settings.layers, self.side)

    def _open_store(self, device: torch.device) -> features.MemoryStore | None:
        settings = self.settings
        if settings.features == "none":
            return None
        if self.run.data.augment == "on":
            raise ValueError("data.augment is 'on', so tiles change: set --distill.features none, or augment off")
        if settings.features == "memory":
            return features.MemoryStore()
        name = features.key(
            self.teacher.module, **self.teacher.settings(), layers=settings.layers, grid=self.side, device=device.type
        )
        folder = Path(settings.features_folder or f"{self.run.out}/features") / name
        shape = (settings.layers, self.side**2 + 1, self.teacher.width)
        return features.DiskStore(folder, shape, torch.bfloat16)

    def _tiles(self, pictures: Sequence[str], rng: np.random.Generator | None) -> Tiles:
        """As the student cuts them; with `rng`, random parts and mirrored ones where the run says so."""
        found, area = [], self.settings.area
        for path in pictures:
            image = open_image(path)
            if rng is not None and area != WHOLE:
                tiles = random_crop(image, self.student.side, area, rng)[None]
            else:
                tiles = self.student.tiles(image, self.run.data.max_tiles)
            mirrored = self.settings.flip and rng is not None and rng.random() < 0.5
            found.append(tiles.flip(-1) if mirrored else tiles)
        return Tiles(torch.cat(found), tuple(pictures))

    def export(self, learner: Learner[Any], out: Path) -> None:
        self.student.export(learner, out)


def check(run: RunConfig) -> None:
    """ValueError for settings that have no meaning for this stage."""
    settings, data = run.distill, run.data
    if settings.layers < 1:
        raise ValueError(f"distill.layers is {settings.layers}; at least one state is compared")
    least, most = settings.area
    if not 0 < least <= most <= 1:
        raise ValueError(f"distill.area is {settings.area}; it must be two shares with 0 < least <= greatest <= 1")
    if settings.area == WHOLE:
        return
    if settings.features != "none":
        raise ValueError(
            f"distill.area is {settings.area}, so no tile comes twice; set --distill.features none, or "
            "--distill.area 1 1"
        )
    if data.max_tiles != 1:
        raise ValueError(
            f"distill.area is {settings.area} but data.max_tiles {data.max_tiles}; a random part of a picture is one "
            "tile: set --data.max_tiles 1, or --distill.area 1 1"
        )


def open_distill(run: RunConfig) -> DistillStage:
    """Student, teacher and pictures of a run."""
    check(run)
    dtype = torch.bfloat16 if run.precision == "bf16" else torch.float32
    return DistillStage(run, open_student(run.model), open_teacher(run.distill.teacher, dtype))
