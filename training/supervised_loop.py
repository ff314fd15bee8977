"""The loop of supervised training: update, report, validate, checkpoint, stop, resume.

It works on a trainer with ``step``, ``evaluate``, ``parameters`` and ``learning_rate`` of either
backend, and on a table of array groups that belong into a checkpoint, each with a way to get and
to set them.
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_utils import TextBatch
from run_folder.checkpoint_folder import best_checkpoint
from run_folder.console import Progress, say_gb
from run_folder.manifest import Metric
from run_folder.resuming import check_same_reference, check_whole_updates
from run_folder.rows import read_rows
from run_folder.run import Run
from run_folder.stopping import GracefulStop
from training.backend import Backend, Checkpoint
from training.checkpointed import Resumable
from training.endings import report_skipped, save_or_stop
from training.groups import Group
from training.together import worker_metrics

SHOWN = ("loss", "rewards/accuracies", "rewards/margins")  # of what there is, in every report


class SinceLastLine:
    """Means over the updates since the last line, weighted by tokens, and tokens per second."""

    def __init__(self, peak_memory: Callable[[], float]) -> None:
        """`peak_memory`: in GB."""
        self.peak_memory = peak_memory
        self.begin()

    def begin(self) -> None:
        self.sums: dict[str, tuple[float, float]] = {}
        self.tokens, self.started = 0.0, time.monotonic()

    def add(self, metrics: Mapping[str, float], weight: float, tokens: float) -> None:
        self.tokens += tokens
        for name in SHOWN:
            if math.isfinite(metrics.get(name, math.nan)):
                total, over = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = (total + weight * metrics[name], over + weight)

    def take(self) -> dict[str, Any]:
        """What is shown; the next line begins anew."""
        means = {name: total / over for name, (total, over) in self.sums.items() if over}
        seconds = max(time.monotonic() - self.started, 1e-9)
        shown = means | {"tokens/s": round(self.tokens / seconds)}
        shown["peak"] = say_gb(self.peak_memory())
        self.begin()
        return shown


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


def tokens_of(batches: Sequence, weight: float) -> float:
    """Tokens that batches trained on: targets of a language model (their `weight`), or all."""
    if any(isinstance(batch, TextBatch) for batch in batches):
        return weight
    return float(sum(int(batch.lengths.sum()) for batch in batches))


@dataclass
class Loop(Resumable):
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop."""

    run_folder: Run
    trainer: Any
    groups: Mapping[str, Group]
    batches: Any  # an iterator with state_dict and load_state_dict
    schedule: Schedule
    validation: Callable[[], Iterable] | None = None
    after_validation: Callable[[int], None] = lambda step: None
    watch: Callable[[Mapping[str, float]], Iterable[str]] = lambda metrics: ()  # warnings
    base: str | None = None  # fingerprint of the model that is trained
    reference: str | None = None  # and of what it is compared with, if no checkpoint holds that
    backend: Backend = field(kw_only=True)
    step: int = 0
    validated: int | None = None  # the step of the last validation
    best: float | None = None
    since_best: int = 0
    bad_in_a_row: int = 0
    taken: int | None = None  # the step whose weights `take_best` went back to
    totals: dict[str, float] = field(default_factory=lambda: {"tokens": 0.0, "skipped": 0.0})

    def rows(self) -> Sequence:
        return self.batches.rows

    def trained(self) -> dict:
        return self.trainer.parameters

    def state(self) -> dict[str, Any]:
        return {
            "validated": self.validated,
            "reference": self.reference,
            "best": self.best,
            "since_best": self.since_best,
            "totals": self.totals,
            "batches": self.batches.state_dict(),
        }

    def check_position(self, saved: Checkpoint) -> None:
        check_same_reference(saved.state, self.reference)
        self.batches.load_state_dict(saved.state["batches"])
        plan, position = self.schedule, self.batches.position
        check_whole_updates(saved.step, plan.accumulation, position, plan.batches)

    def take_state(self, state: Mapping[str, Any]) -> None:
        for name in ("validated", "best", "since_best", "totals"):
            setattr(self, name, state[name])
        self.batches.load_state_dict(state["batches"])

    def run(self, stop: GracefulStop, name: str) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        self.since = SinceLastLine(self.backend.peak_memory)
        with self.stopped_by(stop):
            with Progress(self.schedule.steps, done=self.step, name=name) as progress:
                if self.evaluation_due():  # at the start, or a signal gave it up
                    self.end_step(progress)
                    progress.begin()
                self.make_updates(progress)
            if not stop.requested:
                report_skipped(self, self.totals["skipped"], "loss or gradient")
            self.checkpoint()

    def make_updates(self, progress: Progress) -> None:
        """Updates until the last one, or a stop."""
        while not self.ended(progress):
            with self.step_to_give_up():
                self.update(progress)
            self.end_step(progress)

    def ended(self, progress: Progress) -> bool:
        done = self.step >= self.schedule.steps or self.stop.requested
        return done or self.stopped_early(progress)

    def evaluation_due(self) -> bool:
        """Whether this step ends with a validation that has not been made."""
        plan = self.schedule
        return bool(
            plan.eval_every
            and self.validation is not None
            and (self.step == plan.steps or self.step % plan.eval_every == 0)
            and self.validated != self.step
        )

    def end_step(self, progress: Progress) -> None:
        """Validation and checkpoint where they are due."""
        metric = None
        if self.evaluation_due():
            with self.step_to_give_up():
                metric = self.validate(progress)
        if self.step:
            best = metric is not None and self.since_best == 0
            due = self.checkpoint_due(best)
            save_or_stop(self, due, metric if best else None, "loss or gradient")

    def checkpoint_due(self, best: bool) -> bool:
        """Whether this step ends with a checkpoint; `best`: after the best validation so far."""
        every = self.schedule.save_every
        return bool(every and (best or self.step % every == 0))

    def take_best(self) -> None:
        """Go back to the weights of the best validation."""
        best = best_checkpoint(self.run_folder.checkpoints)
        if best is None:
            what = "no validation was better than the one before training"
            print(f"note: {what}; the last weights stay")
            return
        saved = self.backend.load_checkpoint(best)
        for name, group in self.groups.items():
            group.put(saved.arrays[name])
        self.taken = saved.step
        print(f"the best weights are those of step {saved.step}")

    def validation_of(self) -> dict[str, float]:
        """The metrics of the weights in memory: those that were logged, or found and logged now."""
        start, step = "valid/", self.step if self.taken is None else self.taken
        for row in reversed(read_rows(self.run_folder.folder)):
            if row["step"] == step and row.get("valid/loss") is not None:
                found = {k.removeprefix(start): v for k, v in row.items() if k.startswith(start)}
                return {k: v for k, v in found.items() if v is not None}
        metrics = self.evaluated()
        self.run_folder.log(step, {f"{start}{key}": value for key, value in metrics.items()})
        return metrics

    def evaluated(self) -> dict[str, float]:
        return self.trainer.evaluate(self.validation())

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
        batches, taken = [], []
        for _ in range(count):
            batches.append(next(self.batches))
            taken.extend(self.batches.taken)
        metrics = self.trainer.step(batches)
        metrics["learning_rate"] = self.trainer.learning_rate
        self.note(metrics, batches, progress, self.batches.plan.notes(self.step, taken))

    def note(
        self,
        metrics: dict[str, float],
        batches: Sequence,
        progress: Progress,
        notes: Mapping[str, float],
    ) -> None:
        """An update of `batches` was made, or skipped: count it, log it; `notes` is of its rows."""
        self.step += 1
        weight = metrics.pop("weight")
        tokens = metrics.get("num_tokens", tokens_of(batches, weight))
        self.totals["tokens"] += tokens
        if "num_tokens" in metrics:  # TRL's name for all tokens so far
            metrics["num_tokens"] = self.totals["tokens"]
        bad = metrics.pop("not_finite")
        self.totals["skipped"] += bad
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        row = {f"train/{key}": value for key, value in metrics.items()}
        self.run_folder.log(self.step, row | self.totals_row() | dict(notes) | worker_metrics())
        progress.advance()
        self.since.add(metrics, weight, tokens)
        if self.step % self.schedule.report_every == 0:
            shown = self.since.take()
            first = {key: shown.pop(key) for key in SHOWN if key in shown}
            progress.report(self.step, {**first, "lr": metrics["learning_rate"], **shown})
        for warning in self.watch(metrics):
            progress.line(f"warning: {warning}")
        if bad:
            self.set_aside(batches)

    def totals_row(self) -> dict[str, float]:
        return {f"train/{key}_total": value for key, value in self.totals.items()}

    def set_aside(self, batches: Sequence) -> None:
        """Keep the token ids of rows that gave no finite gradient."""
        rows = [
            {"tokens": tokens[:length].tolist()}
            for batch in batches
            for tokens, length in zip(batch.tokens, batch.lengths, strict=True)
        ]
        self.run_folder.log_bad_rows(self.step, "loss or gradient not finite", rows)

    def validate(self, progress: Progress) -> Metric:
        """Validate, log, and note whether this is the best so far."""
        metrics = self.evaluated()
        self.run_folder.log(self.step, {f"valid/{key}": v for key, v in metrics.items()})
        shown = {key: metrics[key] for key in (*SHOWN, "perplexity", "accuracy") if key in metrics}
        named = {f"valid {key}": value for key, value in shown.items()}
        progress.report(self.step, named, timed=False)
        gained = math.isfinite(metrics["loss"])
        gained = gained and (self.best is None or metrics["loss"] < self.best)
        self.validated = self.step
        if gained:
            self.best = metrics["loss"]
        self.since_best = 0 if gained else self.since_best + 1
        self.after_validation(self.step)
        return Metric("valid/loss", metrics["loss"])
