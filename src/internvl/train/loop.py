"""The only loop: accumulate, clip, step, log, save, evaluate. What a batch means is the stage's business.

A step on a GPU waits for nothing: losses and norms stay on the device until a line is logged, the next batch is made
and pinned by a thread meanwhile.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from internvl.parallel import collectives, shard
from internvl.train import checkpoint, export, guard, largest, log, lost, optim, spread, trainable
from internvl.train.ema import Ema
from internvl.train.feed import Feed, Item
from internvl.train.process import choose_device, stop_on_signal
from internvl.train.run import RunConfig, to_json
from internvl.train.stage import Stage
from internvl.train.track import open_trackers
from internvl.train.watchdog import Watchdog

Evaluator = Callable[[torch.device], Mapping[str, Any]]
"""Called with the model in evaluation mode, without gradients; names the numbers that it measured, and `samples`."""

BEST = "held_out_loss"
"""The number by which the best checkpoint is chosen: lowest wins."""


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
    collectives.barrier()  # every rank has looked
    if collectives.is_lead():
        checkpoint.replace_text(out / "run.json", json.dumps(to_json(run), indent=2) + "\n")
    trainer = Trainer(run, stage, evaluators, reporter)
    if found is not None:
        trainer.resume(found)
    try:
        result = trainer.fit()
    finally:
        trainer.close()
    return result


def export_latest(run: RunConfig, stage: Stage, average: int = 1) -> Result:
    """Write the trained model of the latest checkpoint, or the mean of the latest `average`."""
    checkpoint.check_folder(run, resume=True)
    trainer = Trainer(run, stage, (), None)
    state = trainer.export(average)
    trainer.close()
    return Result(state.step, state.step >= trainer.num_steps, {})


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
        several = collectives.num_ranks() > 1
        self.num_micro = spread.micro_batches(run, stage)
        self.learner = stage.begin(run, torch.device("cpu") if several else self.device)
        self.frozen = checkpoint.fingerprint(self.learner)
        self.call: Callable[..., Any] = spread.plainly
        if several:
            self.learner, self.call = spread.spread(self.learner, self.device)
            torch.manual_seed(run.seed + collectives.rank())  # dropout differs, as between the rows of one batch
        self.parameters = list(self.learner.parameters.values())
        self.optimizer = optim.build(trainable.groups(self.learner), run)
        self.ema = Ema(self.learner.parameters, run.watch.ema)
        self.num_steps = optim.num_steps(run, stage.batches_per_epoch)
        self.step, self.elapsed_s, self.best = 0, 0.0, dict[str, Any]()
        self.cursor = stage.cursor()
        self.checkpoints = checkpoint.Checkpoints(self.out, run.keep)
        self.reporter = reporter or log.Reporter(self.num_steps, None if collectives.is_lead() else log.silent())
        self.metrics: log.Metrics | None = None
        self.lost: lost.Lost | None = None
        self.meter = log.Meter()
        self.guard = guard.Guard(self.out)
        self.watchdog = Watchdog(self.out, run.watch.step_limit_s)
        self.last: dict[str, float] = {}
        self.curve = log.Curve(self.out, self.reporter)

    def resume(self, path: Path) -> None:
        """Stand where `path` was written."""
        at = checkpoint.restore(path, self.learner, self.optimizer, self.frozen, self.ema.average)
        self.step, self.cursor, self.elapsed_s, self.best = at.step, at.cursor, at.elapsed_s, at.best
        self.stage.seek(self.cursor)
        self.reporter.say(f"going on from {path}")

    def fit(self) -> Result:
        """Steps until the end, the time limit or a signal; then save, evaluate, export."""
        if collectives.is_lead():
            self.metrics = log.Metrics(self.out / "metrics.jsonl", self.step, open_trackers(self.run, self.step))
            self.lost = lost.Lost(self.out, keep=self.step > 0)
        self.reporter.table(trainable.table(self.learner))
        if remark := optim.endless_warmup(self.run, self.num_steps):
            self.reporter.say(remark)
        self.reporter.begin(self.step)
        self.learner.train_mode()
        if self.run.data.worst_first and self.step < self.num_steps:
            largest.attempt(self)
        began = time.monotonic() - self.elapsed_s
        deadline = math.inf if self.run.max_minutes is None else 60 * self.run.max_minutes
        # a schedule over time counts all sessions of a run, one over steps only this one
        limit = deadline if self.run.schedule.over == "time" else deadline + self.elapsed_s
        stopped = False
        with Feed(self.stage, self.device) as feed, stop_on_signal() as asked, self.watchdog:
            while self.step < self.num_steps and self.elapsed_s < limit and not stopped:
                self._advance(feed, self.elapsed_s / deadline)
                stopped, self.elapsed_s = spread.agree(asked, time.monotonic() - began)
                with self.watchdog.resting():
                    self._routine()
        finished = self.step >= self.num_steps or (self.run.schedule.over == "time" and self.elapsed_s >= limit)
        self.checkpoints.settle()
        if self.step and not self.checkpoints.path(self.step).exists():
            self._log()
            self._save(behind=False)
        if "counts" in self.cursor:
            self.reporter.say(lost.sentence(self.cursor["counts"]))
        if finished:
            self._finish()
        return Result(self.step, finished, self.last)

    def close(self) -> None:
        self.reporter.close()
        self.checkpoints.close()
        if self.metrics is not None:
            self.metrics.close()

    def _advance(self, feed: Feed, share_of_time: float) -> None:
        """One optimiser step over a window of micro-batches."""
        began = time.perf_counter()
        self.watchdog.begin(self.step + 1)
        weights: dict[str, float] = {}
        while not weights:  # ranks go past steps of which every record was left out together
            window = [feed.take() for _ in range(self.num_micro)]
            names = "; ".join(item.names for item in window)
            self.watchdog.note(names)
            waited = time.perf_counter() - began
            weights, num_tiles = spread.window_weights(window, self.step + 1)
        losses = {name: torch.zeros((), device=self.device) for name in weights}
        for item in window:
            self._backward(item, weights, losses)
        spread.settle(self.learner, num_tiles)
        norm = shard.clip_gradients(self.parameters, self.run.optimiser.clip or math.inf)
        self.guard.add(guard.Step(self.step + 1, losses, norm, names, tuple(window)))
        if self.device.type == "cpu":  # nothing to wait for there, so before the weights are touched
            self._check_finite()
        factor = optim.lr_factor(self.run, self.step, self.num_steps, share_of_time)
        self.last["lr"] = optim.set_lr(self.optimizer, self.run, factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update()
        self.step += 1
        self.cursor = window[-1].cursor
        for item in window:
            self.meter.add(item.sizes, waited / len(window))

    def _backward(self, item: Item, weights: Mapping[str, float], losses: dict[str, Tensor]) -> None:
        batch = item.batch.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16"):
            sums = self.call(self.stage.losses, batch)
        total = torch.zeros((), device=self.device)
        for name, value in sums.items():
            part = value / weights[name]
            losses[name] += part.detach()
            total = total + self.stage.coefficients[name] * part
        # sharding means gradients over ranks, but weights are those of all ranks, so their sum is meant
        (total * collectives.num_ranks() if collectives.num_ranks() > 1 else total).backward()

    def _routine(self) -> None:
        """What happens between steps, at its intervals."""
        run, step = self.run, self.step
        self.reporter.step(step)
        if step % run.log_every == 0 or step in (1, self.num_steps):
            self._log()
        improved = bool(run.eval_every) and step % run.eval_every == 0 and step < self.num_steps and self._evaluate()
        if improved or (run.save_every and step % run.save_every == 0 and step < self.num_steps):
            self._save(behind=run.watch.save_behind)
        else:
            self.checkpoints.poll()

    def _check_finite(self) -> None:
        self.guard.check(self._locate)

    def _locate(self, window: Sequence[Item]) -> list[str]:
        """Where numbers end in these micro-batches; on a GPU the weights are those of the latest checkpoint."""
        found = checkpoint.latest(self.out)
        if self.device.type != "cpu" and found is not None:
            checkpoint.load_learned(found, self.learner)
        weights = dict.fromkeys(window[0].weights, 1.0) if window else {}
        losses = {name: torch.zeros((), device=self.device) for name in weights}
        return guard.locate(self.learner.model, window, lambda item: self._backward(item, weights, losses))

    def _log(self) -> None:
        if not len(self.guard):
            return
        self._check_finite()
        means, norm = self.guard.take()
        total = sum(self.stage.coefficients[name] * value for name, value in means.items())
        line: dict[str, Any] = {"step": self.step, "loss": total}
        line |= {f"loss_{name}": value for name, value in means.items()} if len(means) > 1 else {}
        line |= {"lr": self.last["lr"], "grad_norm": norm, "elapsed_s": round(self.elapsed_s, 3)}
        line |= {**self.meter.read(), "memory_mb": log.memory_mb(self.device)}
        line |= {} if self.lost is None else self.lost.tell(*self.stage.lost(), self.cursor)
        self.last["loss"] = total
        self._write(line)

    def _evaluate(self) -> bool:
        """Measure; True when this is the best so far."""
        self.learner.model.eval()
        line: dict[str, Any] = {"step": self.step}
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.run.precision == "bf16")
        with torch.no_grad(), autocast:
            for evaluator in self.evaluators:
                line |= self.call(evaluator, self.device)
        spread.rest(self.call)
        self.learner.train_mode()
        self.meter = log.Meter()  # evaluation is not training time
        samples = line.pop("samples", ())
        if len(line) == 1 and not samples:
            return False
        self._write(line, samples)
        self.last |= line
        if BEST not in line or (self.best and self.best["value"] <= line[BEST]):
            return False
        self.best = {"step": self.step, "value": line[BEST]}
        return True

    def _save(self, behind: bool) -> None:
        self._check_finite()
        state = checkpoint.State(self.step, self.cursor, self.elapsed_s, self.best, self.frozen)
        self.checkpoints.save(self.learner, self.optimizer, state, self.ema.average, behind)
        self.curve.draw_if_due()

    def _finish(self) -> None:
        """Evaluate the last weights, then write the trained model."""
        if self._evaluate():
            self._save(behind=False)  # so that the checkpoint knows that it is the best
        self.curve.draw()
        if self.run.export != "none" and collectives.num_ranks() == 1:  # the whole model: one process's work, later
            self.export()

    def export(self, average: int = 1) -> checkpoint.State:
        """Write the trained model and its parts; training cannot go on in this process."""
        state = export.load_wanted(self.run, self.learner, self.frozen, average)
        partial = self.out / ".model.partial"
        shutil.rmtree(partial, ignore_errors=True)
        self.stage.export(self.learner, partial)
        export.move_folders(partial, self.out)
        self.reporter.say(f"the trained model is in {self.out / 'model'}")
        return state

    def _write(self, line: Mapping[str, Any], samples: Sequence[Mapping[str, Any]] = ()) -> None:
        if self.metrics is None:
            return
        if len(line) > 1:
            self.metrics.write(line)
            self.reporter.line(line)
        self.metrics.write_samples(self.step, samples)
