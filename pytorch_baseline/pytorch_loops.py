"""training/supervised_loop.py and rollout_loop.py in PyTorch: update, checkpoint, stop, resume."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pytorch_checkpoints import load_checkpoint, save_checkpoint
from pytorch_training import check_memory, rng_state, set_rng_state

from data_utils import PromptRow, columns_of, prompt_batch
from errors import UserError
from rewards.scored_rows import response_text
from rewards.texts import asked, reward_columns
from run_folder.checkpoint_folder import set_aside_after
from run_folder.console import Progress
from run_folder.manifest import Metric, number_old_ones
from run_folder.resuming import (
    check_checkpoint_options,
    check_same_base,
    check_same_data,
    check_whole_updates,
    fingerprint,
)
from run_folder.run import Run
from run_folder.stopping import GracefulStop, StepGivenUp
from training.endings import SCORE, is_best, not_finite, report_skipped, save_or_stop, skipped_steps

NUMBERS = "loss or gradient"


@dataclass
class Schedule:
    """Numbers of updates or PPO steps; 0 means never (checkpoints: at the end alone)."""

    steps: int
    report_every: int
    eval_every: int
    save_every: int
    accumulation: int = 1
    batches: int | None = None  # in all, where the last update gets fewer than `accumulation`
    eval_samples: int = 4
    samples_per_step: int = 2
    keep_checkpoints: int = 2
    patience: int | None = None
    max_bad_steps: int = 5
    memory_limit: float | None = None


@dataclass
class Loop:
    """What both loops share: checkpoints of trainer, data position and run folder."""

    run_folder: Run
    trainer: Any
    schedule: Schedule
    device: torch.device
    base: str | None = None  # fingerprint of the model that is trained
    step: int = 0
    bad_in_a_row: int = 0
    state: dict = field(default_factory=dict)  # plain values that a checkpoint holds as well

    def parts(self) -> dict[str, Any]:
        """Objects with state_dict and load_state_dict that belong into a checkpoint."""
        trainer = self.trainer
        return {"optimizer": trainer.optimizer, "schedule": trainer.scheduler}

    def small_state(self) -> dict[str, Any]:
        """All of a checkpoint that may change before a weight of the step has moved."""
        now = {"state": copy.deepcopy(self.state), "bad_in_a_row": self.bad_in_a_row}
        return now | {"run": self.run_folder.state_dict(), "rng": rng_state(self.device)}

    @contextmanager
    def step_to_give_up(self) -> Iterator[None]:
        """Around what moves no weight: a signal ends it, and the state before it is saved."""
        before, unfinished = self.small_state(), self.evaluation_due()
        try:
            with self.stop.giving_up():
                yield
        except StepGivenUp:
            self.checkpoint(before=before, unfinished=unfinished)
            raise

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made."""
        raise NotImplementedError

    def checkpoint(
        self, metric: Metric | None = None, before: dict | None = None, unfinished: bool = False
    ) -> None:
        """Save; `before`: the `small_state` of a step that was given up."""
        trained = {name: p.detach().cpu() for name, p in self.trainer.parameters.items()}
        saved = {name: part.state_dict() for name, part in self.parts().items()}
        saved |= {"trained": trained, "data": fingerprint(self.rows()), "base": self.base}
        saved |= before or self.small_state()
        self.run_folder.cut_back(saved["run"])  # syncs them
        folder, options = self.run_folder.checkpoints, self.run_folder.own_options
        how = {"keep": self.schedule.keep_checkpoints, "metric": metric, "unfinished": unfinished}
        try:
            save_checkpoint(folder, self.step, saved, options, **how)
        except FloatingPointError as wrong:
            raise not_finite(self.run_folder, str(wrong)) from None

    def rows(self) -> Sequence:
        """The rows that are trained on; a resumed run must have the same."""
        raise NotImplementedError

    def resume(self, path: Path | None, *, force: bool = False) -> None:
        """Go back to a checkpoint (None: the start); `force`: also with other data or base."""
        saved = load_checkpoint(path) if path is not None else None
        if saved is not None:
            check_checkpoint_options(path, self.run_folder, force)
        if saved is not None and not force:
            check_same_data(saved, fingerprint(self.rows()))
            check_same_base(saved, self.base)
            self.check_position(saved)
        if saved is not None:
            self.take(saved)
        # Nothing refuses from here on, and until here the run folder is as it was.
        set_aside_after(path, self.run_folder.checkpoints)
        number_old_ones(self.run_folder.checkpoints, self.run_folder.own_options)
        self.run_folder.load_state_dict({} if saved is None else saved["run"])
        if saved is not None:
            set_rng_state(saved["rng"])
            if force:  # what was allowed to differ is a checkpoint's own from now on
                self.checkpoint()

    def take(self, saved: dict) -> None:
        """The weights of a checkpoint, and where its run stood."""
        self.take_weights(saved)
        for name, part in self.parts().items():
            part.load_state_dict(saved[name])
        self.step, self.bad_in_a_row = saved["step"], saved["bad_in_a_row"]
        self.state.update(saved["state"])

    def check_position(self, saved: dict) -> None:
        """Raise UserError where a longer run would not have come past a checkpoint."""

    def take_weights(self, saved: dict) -> None:
        """The trained weights of a checkpoint, and nothing else of it."""
        there, here = saved["trained"], self.trainer.parameters
        if {n: w.shape for n, w in there.items()} != {n: w.shape for n, w in here.items()}:
            raise UserError("--resume: the checkpoint holds other weights than are trained now")
        with torch.no_grad():
            for name, parameter in self.trainer.parameters.items():
                parameter.copy_(saved["trained"][name])

    def count(self, bad: float, rows: Iterable[dict]) -> None:
        """Count updates in a row without a finite gradient, and set their rows aside."""
        self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
        if bad:
            self.run_folder.log_bad_rows(self.step, "loss or gradient not finite", rows)

    def check_memory(self) -> None:
        check_memory(self.schedule.memory_limit, self.device)


@dataclass
class SupervisedLoop(Loop):
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop.

    The loop over updates is the trainer's; this is called back after each.
    """

    batches: Any = None  # an iterator with state_dict and load_state_dict
    validation: Callable[[], Iterable] | None = None
    after_validation: Callable[[int], None] = lambda step: None

    def __post_init__(self):
        self.state = dict(best=None, since_best=0, validated=None, tokens=0.0, skipped=0.0)

    def parts(self) -> dict[str, Any]:
        trainer = self.trainer
        parts = {"optimizer": trainer.optimizer, "schedule": trainer.lr_scheduler}
        return parts | {"batches": self.batches}

    def rows(self) -> Sequence:
        return self.batches.rows

    def check_position(self, saved: dict) -> None:
        self.batches.load_state_dict(saved["batches"])
        plan, position = self.schedule, self.batches.position
        check_whole_updates(saved["step"], plan.accumulation, position, plan.batches)

    def run(self, stop: GracefulStop, name: str) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan = self.schedule
        all_batches = plan.batches or plan.steps * plan.accumulation
        with suppress(StepGivenUp), Progress(plan.steps, done=self.step, name=name) as progress:
            self.stop, self.progress = stop, progress
            if self.evaluation_due():  # at the start, or where a signal gave it up
                self.end_update()
            if self.step < plan.steps and not (stop.requested or self.stopped_early()):
                left = all_batches - self.step * plan.accumulation
                self.trainer.train_for(plan.steps - self.step, left, self.after_update)
            if not stop.requested:
                report_skipped(self, self.state["skipped"], NUMBERS)
            self.checkpoint()

    def evaluation_due(self) -> bool:
        every = self.schedule.eval_every if self.validation is not None else 0
        due = bool(every) and (self.step == self.schedule.steps or self.step % every == 0)
        return due and self.state["validated"] != self.step

    def after_update(self, metrics: dict[str, float]) -> bool:
        """Log, validate, checkpoint; whether to stop."""
        self.note(metrics)
        self.end_update()
        return self.stop.requested or self.stopped_early()

    def end_update(self) -> None:
        """Validation and checkpoint where they are due."""
        plan, metric = self.schedule, None
        if self.evaluation_due():
            with self.step_to_give_up():
                metric = self.validate(self.progress)
        if self.step:
            best = metric is not None and self.state["since_best"] == 0
            due = plan.save_every and (best or self.step % plan.save_every == 0)
            save_or_stop(self, bool(due), metric if best else None, NUMBERS)

    def stopped_early(self) -> bool:
        patience = self.schedule.patience
        if patience is None or self.state["since_best"] < patience:
            return False
        self.progress.line(f"stopped early: no gain in {patience} validations")
        return True

    def note(self, metrics: dict[str, float]) -> None:
        """Log an update that was made, or skipped."""
        self.step += 1
        self.state["tokens"] += metrics.pop("weight")
        bad = metrics.pop("not_finite")
        self.state["skipped"] += bad
        row = {f"train/{key}": value for key, value in metrics.items()}
        row |= {f"train/{key}_total": self.state[key] for key in ("tokens", "skipped")}
        self.run_folder.log(self.step, row)
        self.progress.advance()
        if self.step % self.schedule.report_every == 0:
            shown = {"loss": metrics["loss"], "lr": metrics["learning_rate"]}
            self.progress.report(self.step, shown)
        self.count(bad, ({"tokens": tokens} for tokens in self.trainer.rows_of_update()))

    def validate(self, progress: Progress) -> Metric:
        """Validate, log, and note whether this is the best so far."""
        metrics, state = self.trainer.evaluate(self.validation()), self.state
        self.run_folder.log(self.step, {f"valid/{key}": v for key, v in metrics.items()})
        shown = {key: metrics[key] for key in ("loss", "perplexity", "accuracy") if key in metrics}
        progress.report(self.step, {f"valid {key}": value for key, value in shown.items()})
        loss = metrics["loss"]
        gained = math.isfinite(loss) and (state["best"] is None or loss < state["best"])
        state["validated"] = self.step
        state["best"] = loss if gained else state["best"]
        state["since_best"] = 0 if gained else state["since_best"] + 1
        self.after_validation(self.step)
        return Metric("valid/loss", loss)


@dataclass
class PPOLoop(Loop):
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop."""

    rewards: Callable = None
    tokenizer: Any = None
    prompts: Sequence[PromptRow] = ()
    validation: Sequence[PromptRow] = ()
    should_stop: Callable[[list[int]], bool] | None = None

    def __post_init__(self):
        self.state = {"evaluations": []}

    def parts(self) -> dict[str, Any]:
        return super().parts() | {"trainer": self.trainer}

    def small_state(self) -> dict[str, Any]:
        return super().small_state() | {"trainer": copy.deepcopy(self.trainer.state_dict())}

    def rows(self) -> Sequence:
        return self.prompts

    def run(self, stop: GracefulStop) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan, self.stop = self.schedule, stop
        self.trainer.before_update = stop.finish_step
        with suppress(StepGivenUp), Progress(plan.steps, done=self.step, name="ppo") as progress:
            # At the start, or where a signal gave it up.
            metric = self.end_step(progress) if self.evaluation_due() else None
            while self.step < plan.steps and not stop.requested:
                with self.step_to_give_up():
                    self.train_step(progress)
                metric = self.end_step(progress)
            if not stop.requested:
                report_skipped(self, skipped_steps(self.run_folder.folder), NUMBERS)
            # Only where every run would have one, stopped or not, may a checkpoint be the best.
            self.checkpoint(metric if self.step == plan.steps else None)

    def evaluation_due(self) -> bool:
        plan, made = self.schedule, self.state["evaluations"]
        if not (plan.eval_every and self.validation) or (made and made[-1]["step"] == self.step):
            return False
        return self.step == plan.steps or self.step % plan.eval_every == 0

    def end_step(self, progress: Progress) -> Metric | None:
        """Evaluation and checkpoint where they are due; what the evaluation judges by."""
        plan, metric = self.schedule, None
        if self.evaluation_due():
            with self.step_to_give_up():
                metric = self.evaluate(progress)
        if self.step:
            best = metric is not None and is_best(self.state["evaluations"])
            last = self.step == plan.steps
            due = plan.save_every and not last and (best or self.step % plan.save_every == 0)
            save_or_stop(self, bool(due), metric, NUMBERS)
        return metric

    def train_step(self, progress: Progress) -> None:
        """Prompts, responses, rewards, update, and a row of metrics."""
        config = self.trainer.config
        chosen = prompt_batch(len(self.prompts), config.batch_size, self.step, config.seed)
        rows = [self.prompts[i] for i in chosen]
        queries = [row.tokens for row in rows]
        responses = self.trainer.generate(queries, should_stop=self.should_stop)
        ended = [self.trainer.has_ended(q, r) for q, r in zip(queries, responses, strict=True)]
        try:
            texts, scores, parts = self.score(rows, responses, ended)
        except UserError:
            self.checkpoint()  # the weights as they were before this step
            raise
        before = self.trainer.state_dict()
        stats = self.trainer.step(queries, responses, scores)
        if stats["ppo/not_finite"]:  # leaves nothing in the KL controller and the running moments
            self.trainer.load_state_dict({**before, "steps_done": before["steps_done"] + 1})
        self.step += 1
        self.trainer.log = self.run_folder.log
        self.trainer.log_stats(stats, parts, scores)
        self.write_samples(rows, texts, scores, stats["objective/kl_dist"])
        progress.advance()
        if self.step % self.schedule.report_every == 0:
            means = {name: float(np.mean(column)) for name, column in parts.items()}
            shown = {"score": float(np.mean(scores)), "kl": stats["objective/kl"], **means}
            progress.report(self.step, shown | {"tokens": stats["tokens/responses_len_mean"]})
        pairs = zip(queries, responses, strict=True)
        self.count(stats["ppo/not_finite"], ({"query": q, "response": r} for q, r in pairs))

    def score(self, rows, responses, ended) -> tuple[list[str], list[float], dict]:
        """(texts of the responses, scores, {reward: its scores})."""
        pairs = list(zip(rows, responses, strict=True))
        texts = [response_text(self.tokenizer, row.tokens, response) for row, response in pairs]
        token_ids = [[*row.tokens, *response] for row, response in pairs]
        columns = reward_columns(
            columns_of(rows),
            token_ids=token_ids,
            ended=ended,
            prompt_text=[row.text for row in rows],
        )
        scores, parts = self.rewards([row.prompt for row in rows], texts, **columns)
        return texts, scores, parts

    def write_samples(self, rows, texts, scores, kls) -> None:
        every = zip(rows, texts, scores, map(float, kls), strict=True)
        samples = [{**asked(r), "response": t, "score": s, "kl": kl} for r, t, s, kl in every]
        self.run_folder.log_samples(self.step, samples[: self.schedule.samples_per_step])

    def evaluate(self, progress: Progress) -> Metric:
        """Score greedy and sampled responses to the validation prompts, and log the means."""
        row = {"step": self.step}
        for kind, greedy, count in (
            ("greedy", True, 1),
            ("sampled", False, self.schedule.eval_samples),
        ):
            rows = [prompt for prompt in self.validation for _ in range(count)]
            responses, ended = self.sample(rows, greedy)
            texts, scores, parts = self.score(rows, responses, ended)
            row[f"eval/{kind}/score"] = float(np.mean(scores))
            for name, column in parts.items():
                row[f"eval/{kind}/{name}"] = float(np.mean(column))
            row[f"eval/{kind}/response_tokens"] = float(np.mean([len(r) for r in responses]))
            sample = {**asked(rows[0]), "response": texts[0], "score": scores[0]}
            self.run_folder.log_samples(self.step, [{"evaluation": kind, **sample}])
        self.run_folder.log(self.step, {k: v for k, v in row.items() if k != "step"})
        shown = {"greedy": row["eval/greedy/score"], "sampled": row["eval/sampled/score"]}
        progress.report(self.step, {f"held-out {name}": value for name, value in shown.items()})
        self.state["evaluations"].append(row)
        return Metric(SCORE, row[SCORE], higher_is_better=True)

    def sample(self, rows: Sequence[PromptRow], greedy: bool) -> tuple[list[list[int]], list[bool]]:
        """(responses, whether each ended), a batch of the training's size at a time."""
        responses, ended = [], []
        for start in range(0, len(rows), self.trainer.config.batch_size):
            part = [row.tokens for row in rows[start : start + self.trainer.config.batch_size]]
            made = self.trainer.sample_for_evaluation(part, greedy, self.should_stop, start)
            responses += made.responses
            ended += made.finished
        return responses, ended
