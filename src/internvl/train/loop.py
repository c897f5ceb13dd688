"""The only loop: accumulate, clip, step, log, save, evaluate. What a batch means is the stage's business.

A step on a GPU waits for nothing: losses and norms stay on the device until a line is logged, the next batch is made
and pinned by a thread meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.train import checkpoint, largest, log, lost, optim, trainable
from internvl.train.feed import Feed, Item
from internvl.train.process import choose_device, stop_on_signal
from internvl.train.run import RunConfig, Stage, to_json

Evaluator = Callable[[torch.device], Mapping[str, float]]
"""Called with the model in evaluation mode, without gradients; names the numbers that it measured."""

BEST = "held_out_loss"
"""The number by which the best checkpoint is chosen: lowest wins."""

CURVE_EVERY_S = 60.0
"""Least time between two drawings of the loss curve, which takes half a second."""


@dataclass(frozen=True)
class Result:
    """How a run ended."""

    step: int
    finished: bool
    """False when time or a signal stopped it before its last step; the same command goes on."""
    metrics: dict[str, float]


def train(
    run: RunConfig,
    stage: Stage,
    *,
    evaluators: Sequence[Evaluator] = (),
    resume: bool | None = None,
    reporter: log.Reporter | None = None,
) -> Result:
    """Run to the end, from the latest checkpoint in `run.out` where there is one.

    `resume` True insists on a checkpoint, False refuses one, None takes what it finds.
    """
    out = Path(run.out)
    found = checkpoint.check_folder(run, resume)
    checkpoint.replace_text(out / "run.json", json.dumps(to_json(run), indent=2) + "\n")
    trainer = Trainer(run, stage, evaluators, reporter)
    if found is not None:
        trainer.resume(found)
    try:
        result = trainer.fit()
    finally:
        trainer.close()
    return result


def export_latest(run: RunConfig, stage: Stage) -> Result:
    """Write the trained model from the latest checkpoint, wherever the run stands."""
    found = checkpoint.check_folder(run, resume=True)
    assert found is not None
    trainer = Trainer(run, stage, (), None)
    trainer.resume(found)
    trainer.export()
    return Result(trainer.step, trainer.step >= trainer.num_steps, {})


class Trainer:
    """One run in memory."""

    def __init__(
        self, run: RunConfig, stage: Stage, evaluators: Sequence[Evaluator], reporter: log.Reporter | None
    ) -> None:
        self.run, self.stage, self.evaluators, self.out = run, stage, evaluators, Path(run.out)
        self.device = choose_device(run.device)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32
        torch.manual_seed(run.seed)
        self.learner = stage.begin(run, self.device)
        self.parameters = list(self.learner.parameters.values())
        self.optimizer = optim.build(trainable.groups(self.learner), run)
        self.num_steps = optim.num_steps(run, stage.batches_per_epoch)
        self.step, self.elapsed_s, self.best = 0, 0.0, dict[str, Any]()
        self.cursor = stage.cursor()
        self.checkpoints = checkpoint.Checkpoints(self.out, run.keep)
        self.frozen = checkpoint.fingerprint(self.learner)
        self.reporter = reporter or log.Reporter(self.num_steps)
        self.metrics: log.Metrics | None = None
        self.lost: lost.Lost | None = None
        self.meter = log.Meter()
        self.recent: list[tuple[int, str, dict[str, Tensor], Tensor]] = []
        self.last: dict[str, float] = {}
        self.drawn_s = time.monotonic()

    def resume(self, path: Path) -> None:
        """Stand where `path` was written."""
        state = checkpoint.restore(path, self.learner, self.optimizer)
        self.step, self.cursor, self.elapsed_s, self.best = state.step, state.cursor, state.elapsed_s, state.best
        self.stage.seek(self.cursor)
        self.reporter.say(f"going on from {path}")

    def fit(self) -> Result:
        """Steps until the end, the time limit or a signal; then save, evaluate, export."""
        self.metrics = log.Metrics(self.out / "metrics.jsonl", self.step)
        self.lost = lost.Lost(self.out, keep=self.step > 0)
        self.reporter.table(trainable.table(self.learner))
        self.reporter.begin(self.step)
        self.learner.train_mode()
        if self.run.data.worst_first and self.step < self.num_steps:
            largest.attempt(self)
        began = time.monotonic() - self.elapsed_s
        deadline = math.inf if self.run.max_minutes is None else 60 * self.run.max_minutes
        # a schedule over time counts all sessions of a run, one over steps only this one
        limit = deadline if self.run.schedule.over == "time" else deadline + self.elapsed_s
        with Feed(self.stage, self.device) as feed, stop_on_signal() as stopped:
            while self.step < self.num_steps and self.elapsed_s < limit and not stopped:
                self._advance(feed, self.elapsed_s / deadline)
                self.elapsed_s = time.monotonic() - began
                self._routine()
        finished = self.step >= self.num_steps or (self.run.schedule.over == "time" and self.elapsed_s >= limit)
        if self.step and not self.checkpoints.path(self.step).exists():
            self._log()
            self._save()
        if "counts" in self.cursor:
            self.reporter.say(lost.sentence(self.cursor["counts"]))
        if finished:
            self._finish()
        return Result(self.step, finished, self.last)

    def close(self) -> None:
        self.reporter.close()
        if self.metrics is not None:
            self.metrics.close()

    def _advance(self, feed: Feed, share_of_time: float) -> None:
        """One optimiser step over a window of micro-batches."""
        began = time.perf_counter()
        window = [feed.take() for _ in range(self.run.accumulate)]
        waited = time.perf_counter() - began
        weights = self._window_weights(window)
        losses = {name: torch.zeros((), device=self.device) for name in weights}
        for item in window:
            self._backward(item, weights, losses)
        clip = self.run.optimiser.clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip)
        factor = optim.lr_factor(self.run, self.step, self.num_steps, share_of_time)
        self.last["lr"] = optim.set_lr(self.optimizer, self.run, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.cursor = window[-1].cursor
        self.recent.append((self.step, "; ".join(item.names for item in window), losses, norm))
        for item in window:
            self.meter.add(item.sizes, 0.0)
        self.meter.add({}, waited)

    def _backward(self, item: Item, weights: Mapping[str, float], losses: dict[str, Tensor]) -> None:
        batch = item.batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            sums = self.stage.losses(batch)
        total = torch.zeros((), device=self.device)
        for name, value in sums.items():
            share = value / weights[name]
            losses[name] += share.detach()
            total = total + self.stage.coefficients[name] * share
        total.backward()

    def _window_weights(self, window: Sequence[Item]) -> dict[str, float]:
        weights = {name: sum(item.weights[name] for item in window) for name in window[0].weights}
        for name, weight in weights.items():
            if weight <= 0:
                raise ValueError(
                    f"step {self.step + 1}: no learned token for loss {name!r} in "
                    f"{'; '.join(item.names for item in window)}; raise data.max_length, or look at their labels"
                )
        return weights

    def _routine(self) -> None:
        """What happens between steps, at its intervals."""
        run, step = self.run, self.step
        self.reporter.step(step)
        if self.device.type == "cpu" or step % run.log_every == 0:
            self._check_finite()
        if step % run.log_every == 0 or step in (1, self.num_steps):
            self._log()
        improved = bool(run.eval_every) and step % run.eval_every == 0 and step < self.num_steps and self._evaluate()
        if improved or (run.save_every and step % run.save_every == 0 and step < self.num_steps):
            self._save()

    def _check_finite(self) -> None:
        """Name the first step since the last look whose loss or gradient is not a number, and its samples."""
        unchecked = [entry for entry in self.recent if entry[0] > self.last.get("checked", 0)]
        if not unchecked:
            return
        # one copy from the device
        found = torch.stack([torch.stack([*losses.values(), norm]) for _, _, losses, norm in unchecked]).tolist()
        for (step, names, losses, _), values in zip(unchecked, found, strict=True):
            pairs = zip([*losses, "gradient norm"], values, strict=True)
            bad = [f"{name} is {value}" for name, value in pairs if not math.isfinite(value)]
            if bad:
                listing = self.out / "not_finite.txt"
                checkpoint.replace_text(listing, names.replace(", ", "\n") + "\n")
                raise ValueError(
                    f"step {step}: {', '.join(bad)}; samples: {textwrap.shorten(names, 300)} (all in {listing}); the "
                    "latest checkpoint is from before: lower optimiser.peak_lr, or look at these samples"
                )
        self.last["checked"] = self.step

    def _log(self) -> None:
        if not self.recent:
            return
        self._check_finite()
        names = self.recent[0][2]
        means = {name: float(torch.stack([entry[2][name] for entry in self.recent]).mean()) for name in names}
        total = sum(self.stage.coefficients[name] * value for name, value in means.items())
        line: dict[str, Any] = {"step": self.step, "loss": total}
        line |= {f"loss_{name}": value for name, value in means.items()} if len(means) > 1 else {}
        line |= {"lr": self.last["lr"], "grad_norm": float(self.recent[-1][3]), "elapsed_s": round(self.elapsed_s, 3)}
        line |= {**self.meter.read(), "memory_mb": log.memory_mb(self.device)}
        assert self.lost is not None
        line |= self.lost.tell(*self.stage.lost(), self.cursor)
        self.recent.clear()
        self.last["loss"] = total
        self._write(line)

    def _evaluate(self) -> bool:
        """Measure; True when this is the best so far."""
        self.learner.model.eval()
        line: dict[str, Any] = {"step": self.step}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16")
        with torch.no_grad(), autocast:
            for evaluator in self.evaluators:
                line |= evaluator(self.device)
        self.learner.train_mode()
        self.meter = log.Meter()  # evaluation is not training time
        if len(line) == 1:
            return False
        self._write(line)
        self.last |= line
        if BEST not in line or (self.best and self.best["value"] <= line[BEST]):
            return False
        self.best = {"step": self.step, "value": line[BEST]}
        return True

    def _save(self) -> None:
        self._check_finite()
        state = checkpoint.State(self.step, self.cursor, self.elapsed_s, self.best, self.frozen)
        self.checkpoints.save(self.learner, self.optimizer, state)
        if time.monotonic() - self.drawn_s > CURVE_EVERY_S:
            self._draw()

    def _finish(self) -> None:
        """Evaluate the last weights, then write the trained model."""
        if self._evaluate():
            self._save()  # so that the checkpoint knows that it is the best
        self._draw()
        if self.run.export != "none":
            self.export()

    def export(self) -> None:
        """Write the trained model and its parts; training cannot go on in this process."""
        if self.run.export == "best" and self.best:
            checkpoint.load_learned(self.checkpoints.path(self.best["step"]), self.learner)
        partial = self.out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.stage.export(self.learner, partial)
        for path in partial.iterdir():
            shutil.rmtree(self.out / path.name, ignore_errors=True)
            path.rename(self.out / path.name)
        partial.rmdir()
        self.reporter.say(f"the trained model is in {self.out / 'model'}")

    def _draw(self) -> None:
        self.drawn_s = time.monotonic()
        if importlib.util.find_spec("matplotlib") is None:
            self.reporter.say("no loss.png, which needs: pip install 'internvl[train]'")
        else:
            log.draw_curve(self.out / "metrics.jsonl", self.out / "loss.png")

    def _write(self, line: Mapping[str, Any]) -> None:
        assert self.metrics is not None
        self.metrics.write(line)
        self.reporter.line(line)
