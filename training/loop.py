"""The loop of supervised training: update, report, validate, checkpoint, stop, resume.

It works on a trainer with ``step``, ``evaluate`` and ``optimizer`` (mlx_sft_trainer), and on a
table of array groups that belong into a checkpoint, each with a way to get and to set them.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import mlx.core as mx

from models.adapter_description import CONFIG_KEY
from models.tuning import Tuning
from training.bad_steps import not_finite, report_skipped, save_or_stop
from training.checkpoint_folders import Metric, set_aside_after
from training.checkpoints import Checkpoint, load_checkpoint, save_checkpoint
from training.console import Progress
from training.memory import check_memory
from training.metrics import Run
from training.optimizers import optimizer_arrays, restore_optimizer
from training.resume import (
    check_same_base,
    check_same_data,
    check_whole_updates,
    fingerprint,
)
from training.seeds import rng_state, set_rng_state
from training.signals import GracefulStop

Arrays = dict[str, mx.array]


@dataclass
class Group:
    """Arrays of a checkpoint: `get()` gives them by name, `put(arrays)` takes them back.

    `described()` is what their file says of itself, so that it also serves as an adapter or a head.
    """

    get: Callable[[], Arrays]
    put: Callable[[Arrays], None]
    described: Callable[[], dict[str, Any]] = dict


def adapter_group(tuning: Tuning, described: dict) -> Group:
    """The arrays of `tuning`; `described` is models.adapter_files.describe's."""
    return Group(
        tuning.arrays,
        lambda arrays: tuning.load_arrays(arrays, "checkpoint"),
        lambda: {CONFIG_KEY: described},
    )


@dataclass
class Schedule:
    """Numbers of updates; 0 means never (checkpoints: at the end alone)."""

    steps: int
    report_every: int
    eval_every: int
    save_every: int
    accumulation: int = 1
    batches: int | None = None  # in all, where the last update gets fewer than `accumulation`
    keep_checkpoints: int = 2
    patience: int | None = None
    max_bad_steps: int = 5
    memory_limit: float | None = None


@dataclass
class Loop:
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop."""

    run_folder: Run
    trainer: Any
    groups: Mapping[str, Group]
    batches: Any  # an iterator with state_dict and load_state_dict
    schedule: Schedule
    validation: Callable[[], Iterable] | None = None
    after_validation: Callable[[int], None] = lambda step: None
    base: str | None = None  # fingerprint of the model that is trained
    step: int = 0
    validated: int | None = None  # the step of the last validation
    best: float | None = None
    since_best: int = 0
    bad_in_a_row: int = 0
    totals: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "skipped": 0.0})

    def resume(self, path, *, force: bool = False) -> None:
        """Go back to a checkpoint (None: to the start); `force`: also with other data or base."""
        saved = load_checkpoint(path) if path is not None else None
        if saved is not None and not force:
            check_same_data(saved.state, self.data)
            check_same_base(saved.state, self.base)
            self.batches.load_state_dict(saved.state["batches"])
            plan, position = self.schedule, self.batches.position
            check_whole_updates(saved.step, plan.accumulation, position, plan.batches)
        if saved is not None:
            self.take(saved)
        # Nothing refuses from here on, and until here the run folder is as it was.
        set_aside_after(path, self.run_folder.checkpoints)
        self.run_folder.load_state_dict({} if saved is None else saved.state["run"])
        if saved is not None:
            set_rng_state(saved.state["rng"])

    def take(self, saved: Checkpoint) -> None:
        """The weights of a checkpoint, and where its run stood."""
        for name, group in self.groups.items():
            group.put(saved.arrays[name])
        trained = self.trainer.task.trained.trainable_parameters()
        restore_optimizer(self.trainer.optimizer, saved.arrays["optimizer"], trained)
        self.step, self.best = saved.step, saved.state["best"]
        self.validated = saved.state["validated"]
        self.since_best, self.totals = saved.state["since_best"], saved.state["totals"]
        self.bad_in_a_row = saved.state["bad_in_a_row"]
        self.batches.load_state_dict(saved.state["batches"])

    @cached_property
    def data(self) -> str:
        return fingerprint(self.batches.rows)

    def run(self, stop: GracefulStop, name: str) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan = self.schedule
        with Progress(plan.steps, done=self.step, name=name) as progress:
            validates = plan.eval_every and self.validation is not None
            if validates and self.step == 0 and self.validated is None:
                self.validate(progress)
            while self.step < plan.steps and not (stop.requested or self.stopped_early(progress)):
                self.update(progress)
                metric = None
                if validates and self.step % plan.eval_every == 0:
                    metric = self.validate(progress)
                best = metric is not None and self.since_best == 0
                due = plan.save_every and (best or self.step % plan.save_every == 0)
                save_or_stop(self, bool(due), metric if best else None, "loss or gradient")
        if not stop.requested:
            report_skipped(self, self.totals["skipped"], "loss or gradient")
        self.checkpoint()

    def stopped_early(self, progress: Progress) -> bool:
        patience = self.schedule.patience
        if patience is None or self.since_best < patience:
            return False
        progress.line(f"stopped early: no gain in {patience} validations")
        return True

    def update(self, progress: Progress) -> None:
        """One update of the weights, logged."""
        plan, count = self.schedule, self.schedule.accumulation
        if plan.batches is not None:
            count = max(1, min(count, plan.batches - self.step * count))
        batches = [next(self.batches) for _ in range(count)]
        metrics = self.trainer.step(batches)
        self.step += 1
        self.totals["tokens"] += metrics.pop("weight")
        bad = metrics.pop("not_finite")
        self.totals["skipped"] += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        rate = float(self.trainer.optimizer.learning_rate)
        row = {f"train/{key}": value for key, value in metrics.items()}
        self.run_folder.log(self.step, row | {"train/learning_rate": rate, **self.totals_row()})
        progress.advance()
        if self.step % self.schedule.report_every == 0:
            progress.report(self.step, {"loss": metrics["loss"], "lr": rate})
        if bad:
            self.set_aside(batches)

    def totals_row(self) -> dict[str, float]:
        return {f"train/{key}_total": value for key, value in self.totals.items()}

    def set_aside(self, batches: list) -> None:
        """Keep the token ids of rows that gave no finite gradient."""
        rows = [
            {"tokens": tokens[:length].tolist()}
            for batch in batches
            for tokens, length in zip(batch.tokens, batch.lengths, strict=True)
        ]
        self.run_folder.log_bad_rows(self.step, "loss or gradient not finite", rows)

    def validate(self, progress: Progress) -> Metric:
        """Validate, log, and note whether this is the best so far."""
        metrics = self.trainer.evaluate(self.validation())
        self.run_folder.log(self.step, {f"valid/{key}": v for key, v in metrics.items()})
        shown = {key: metrics[key] for key in ("loss", "perplexity", "accuracy") if key in metrics}
        progress.report(self.step, {f"valid {key}": value for key, value in shown.items()})
        gained = math.isfinite(metrics["loss"])
        gained = gained and (self.best is None or metrics["loss"] < self.best)
        self.validated = self.step
        if gained:
            self.best = metrics["loss"]
        self.since_best = 0 if gained else self.since_best + 1
        self.after_validation(self.step)
        return Metric("valid/loss", metrics["loss"])

    def check_memory(self) -> None:
        check_memory(self.schedule.memory_limit)

    def checkpoint(self, metric: Metric | None = None) -> None:
        arrays = {name: group.get() for name, group in self.groups.items()}
        described = {name: group.described() for name, group in self.groups.items()}
        state = {
            "validated": self.validated,
            "best": self.best,
            "since_best": self.since_best,
            "bad_in_a_row": self.bad_in_a_row,
            "totals": self.totals,
            "batches": self.batches.state_dict(),
            "data": self.data,
            "base": self.base,
            "run": self.run_folder.state_dict(),
            "rng": rng_state(),
        }
        try:
            save_checkpoint(
                self.run_folder.checkpoints,
                self.step,
                arrays | {"optimizer": optimizer_arrays(self.trainer.optimizer)},
                state,
                described=described,
                keep=self.schedule.keep_checkpoints,
                metric=metric,
            )
        except FloatingPointError as wrong:
            raise not_finite(self.run_folder, str(wrong)) from None
