"""The loop of PPO: prompts, rollout, rewards, update, log, evaluate, checkpoint, stop, resume.

It works on a trainer with ``generate``, ``sample``, ``step`` and ``state_dict`` (mlx_ppo_trainer)
and on a reward set (rewards/reward_set.py).
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_utils import PromptRow, columns_of, prompt_batch
from errors import UserError
from rewards.scored_rows import response_text
from rewards.user_function import quote_row
from run_folder.console import Progress
from run_folder.manifest import Metric
from run_folder.run import Run
from run_folder.stopping import GracefulStop
from training.checkpointed import Group, Resumable
from training.endings import report_skipped, save_or_stop
from training.ppo_steps import SCORE, is_best, skipped_steps

NUMBERS = "score, loss or gradient"
LARGEST = float(np.finfo(np.float32).max)  # scores become float32


@dataclass
class PPOSchedule:
    """Numbers of steps; 0 means never (checkpoints: at the end alone)."""

    steps: int
    report_every: int
    eval_every: int
    save_every: int
    eval_samples: int = 4
    samples_per_step: int = 2
    keep_checkpoints: int = 2
    max_bad_steps: int = 5
    memory_limit: float | None = None


class ScoreFilter:
    """Takes scores that are NaN, infinite or beyond float32 out of what reward functions return.

    A reward set would refuse them and end the run; so they cost their step alone. `rows` holds the
    numbers of the rows that had one since it was last cleared.
    """

    def __init__(self) -> None:
        self.rows: set[int] = set()

    def put_around(self, rewards: Any) -> None:
        """Filter what every function of a reward set returns."""
        for reward in rewards.rewards:
            reward.function = self.wrap(reward.function)

    def wrap(self, function: Callable) -> Callable:
        """`function` with 0 in place of such scores; anything else that is wrong stays."""

        @functools.wraps(function)
        def filtered(prompts, responses, **columns):
            scores = function(prompts, responses, **columns)
            scores = scores.tolist() if hasattr(scores, "tolist") else scores
            if not isinstance(scores, list | tuple):
                return scores
            bad = {row for row, score in enumerate(scores) if beyond_float32(score)}
            self.rows |= bad
            return [0.0 if row in bad else score for row, score in enumerate(scores)]

        return filtered


def beyond_float32(score: object) -> bool:
    """Whether this is a number, and one that float32 has no finite value for."""
    try:
        number = float(score) if hasattr(type(score), "__float__") else 0.0
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return False
    return not abs(number) <= LARGEST


@dataclass
class PPOLoop(Resumable):
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop."""

    run_folder: Run
    trainer: Any
    rewards: Callable
    tokenizer: Any
    prompts: Sequence[PromptRow]
    validation: Sequence[PromptRow]
    groups: Mapping[str, Group]
    schedule: PPOSchedule
    should_stop: Callable[[list[int]], bool] | None = None
    score_filter: ScoreFilter = field(default_factory=ScoreFilter)  # the one around the rewards
    base: str | None = None  # fingerprint of the model that is trained
    step: int = 0
    bad_in_a_row: int = 0
    last_bad: str = ""  # names the row of the last score that was not finite, for an error
    evaluations: list[dict] = field(default_factory=list)  # metrics of each, with its step

    def rows(self) -> Sequence[PromptRow]:
        return self.prompts

    def trained(self) -> dict:
        return self.trainer.model.trainable_parameters()

    def state(self) -> dict[str, Any]:
        return {"evaluations": self.evaluations, "trainer": self.trainer.state_dict()}

    def take_state(self, state: Mapping[str, Any]) -> None:
        self.evaluations = state["evaluations"]
        self.trainer.load_state_dict(state["trainer"])

    def run(self, stop: GracefulStop) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan = self.schedule
        with (
            self.stopped_by(stop),
            Progress(plan.steps, done=self.step, name="ppo") as progress,
        ):
            # At the start, or where a signal gave it up.
            metric = self.end_step(progress) if self.evaluation_due() else None
            while self.step < plan.steps and not stop.requested:
                with self.step_to_give_up():
                    self.train_step(progress)
                metric = self.end_step(progress)
            if not stop.requested:
                report_skipped(self, skipped_steps(self.run_folder.folder), NUMBERS, self.last_bad)
            # Only where every run would have one, stopped or not, may a checkpoint be the best.
            self.checkpoint(metric if self.step == plan.steps else None)

    def evaluation_due(self) -> bool:
        """Whether this step ends with an evaluation that has not been made."""
        plan = self.schedule
        if not (plan.eval_every and self.validation):
            return False
        done = self.evaluations and self.evaluations[-1]["step"] == self.step
        return not done and (self.step == plan.steps or self.step % plan.eval_every == 0)

    def end_step(self, progress: Progress) -> Metric | None:
        """Evaluation and checkpoint where they are due; what the evaluation judges by."""
        plan, metric = self.schedule, None
        if self.evaluation_due():
            with self.step_to_give_up():
                metric = self.evaluate(progress)
        if self.step:
            best = metric is not None and is_best(self.evaluations)
            last = self.step == plan.steps
            due = plan.save_every and not last and (best or self.step % plan.save_every == 0)
            save_or_stop(self, bool(due), metric, NUMBERS, self.last_bad)
        return metric

    # ------------------------------------------------------------------ a step

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
        stats = self.take_step(queries, responses, scores)
        self.step += 1
        self.trainer.log = self.run_folder.log
        self.trainer.log_stats(stats, parts, scores)
        progress.advance()
        if "objective/kl" in stats:
            self.write_samples(rows, texts, scores, stats["objective/kl_dist"])
            if self.step % self.schedule.report_every == 0:
                self.report(progress, stats, scores, parts)
        self.bad_in_a_row = self.bad_in_a_row + 1 if stats["ppo/not_finite"] else 0
        if self.bad_in_a_row:
            self.set_aside(rows, responses, texts, scores)

    def take_step(self, queries, responses, scores) -> dict:
        """The trainer's step, or none where a score is not finite; its statistics.

        What a bad step would leave in the KL controller and the running moments is taken back.
        """
        before = self.trainer.state_dict()
        stats: dict = {"ppo/not_finite": 1.0}
        if np.isfinite(scores).all():
            stats = self.trainer.step(queries, responses, scores)
        if stats["ppo/not_finite"]:
            self.trainer.load_state_dict({**before, "steps_done": before["steps_done"] + 1})
            # As `step` leaves it, or the next step would draw other numbers than a resumed run.
            self.trainer._generated, self.trainer._calls = {}, 0
        return stats

    def report(self, progress: Progress, stats: dict, scores: list[float], parts: dict) -> None:
        means = {name: float(np.mean(column)) for name, column in parts.items()}
        shown = {"score": float(np.mean(scores)), "kl": stats["objective/kl"], **means}
        progress.report(self.step, shown | {"tokens": stats["tokens/responses_len_mean"]})

    def score(self, rows, responses, ended) -> tuple[list[str], list[float], dict]:
        """(texts of the responses, scores, {reward: its scores})."""
        texts = [
            response_text(self.tokenizer, row.tokens, response)
            for row, response in zip(rows, responses, strict=True)
        ]
        token_ids = [[*row.tokens, *r] for row, r in zip(rows, responses, strict=True)]
        columns = {**columns_of(rows), "token_ids": token_ids, "ended": ended}
        self.score_filter.rows.clear()
        scores, parts = self.rewards([row.text for row in rows], texts, **columns)
        bad = self.score_filter.rows
        scores = [
            math.nan if row in bad or beyond_float32(score) else score
            for row, score in enumerate(scores)
        ]
        return texts, scores, parts

    def write_samples(self, rows, texts, scores, kls) -> None:
        samples = [
            {"prompt": row.text, "response": text, "score": score, "kl": float(kl)}
            for row, text, score, kl in zip(rows, texts, scores, kls, strict=True)
        ]
        self.run_folder.log_samples(self.step, samples[: self.schedule.samples_per_step])

    def set_aside(self, rows, responses, texts, scores) -> None:
        """Keep the rows of a step whose update was skipped, in part or whole."""
        bad = np.flatnonzero(~np.isfinite(scores))
        reason = "score not finite" if len(bad) else "loss or gradient not finite"
        self.last_bad = ""
        if len(bad):
            self.last_bad = "; the last: " + quote_row([row.text for row in rows], texts, bad[-1])
        entries = [
            {"prompt": row.text, "response": text, "score": score, "query_tokens": row.tokens,
             "response_tokens": response}
            for row, response, text, score in zip(rows, responses, texts, scores, strict=True)
        ]  # fmt: skip
        self.run_folder.log_bad_rows(self.step, reason, entries)

    # ------------------------------------------------------------------ evaluation

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
            sample = {"prompt": rows[0].text, "response": texts[0], "score": scores[0]}
            self.run_folder.log_samples(self.step, [{"evaluation": kind, **sample}])
        self.run_folder.log(self.step, {k: v for k, v in row.items() if k != "step"})
        shown = {"greedy": row["eval/greedy/score"], "sampled": row["eval/sampled/score"]}
        progress.report(self.step, {f"held-out {name}": value for name, value in shown.items()})
        self.evaluations.append(row)
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
