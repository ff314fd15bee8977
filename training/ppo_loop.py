"""The loop of PPO: prompts, rollout, rewards, update, log, evaluate, checkpoint, stop, resume.

It works on a trainer with ``generate``, ``sample``, ``step`` and ``state_dict`` (mlx_ppo_trainer)
and on a reward set (rl/reward_set.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_utils import PromptRow, columns_of, prompt_batch
from errors import UserError
from training.checkpoints import Metric, load_checkpoint, save_checkpoint
from training.console import Progress
from training.loop import Group
from training.memory import check_memory
from training.metrics import Run
from training.optimizers import optimizer_arrays, restore_optimizer
from training.seeds import rng_state, set_rng_state
from training.signals import GracefulStop


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


@dataclass
class PPOLoop:
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
    step: int = 0
    bad_in_a_row: int = 0
    evaluations: list[dict] = field(default_factory=list)  # metrics of each, with its step

    def resume(self, path) -> None:
        """Go back to a checkpoint (None: to the start)."""
        if path is None:
            self.run_folder.load_state_dict({})
            return
        saved = load_checkpoint(path)
        for name, group in self.groups.items():
            group.put(saved.arrays[name])
        trained = self.trainer.model.trainable_parameters()
        restore_optimizer(self.trainer.optimizer, saved.arrays["optimizer"], trained)
        self.step, self.evaluations = saved.step, saved.state["evaluations"]
        self.bad_in_a_row = saved.state["bad_in_a_row"]
        self.trainer.load_state_dict(saved.state["trainer"])
        self.run_folder.load_state_dict(saved.state["run"])
        set_rng_state(saved.state["rng"])

    def run(self, stop: GracefulStop) -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan = self.schedule
        with Progress(plan.steps, done=self.step, name="ppo") as progress:
            if not self.evaluations:
                self.evaluate(progress)
            while self.step < plan.steps and not stop.requested:
                self.train_step(progress)
                metric = None
                last = self.step == plan.steps
                if plan.eval_every and (last or self.step % plan.eval_every == 0):
                    metric = self.evaluate(progress)
                if plan.save_every and self.step % plan.save_every == 0 and not last:
                    self.checkpoint(metric)
            self.checkpoint()

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
        stats = self.trainer.step(queries, responses, scores)
        self.step += 1
        self.trainer.log = self.run_folder.log
        self.trainer.log_stats(stats, parts, scores)
        self.write_samples(rows, texts, scores, stats["objective/kl_dist"])
        progress.advance()
        if self.step % self.schedule.report_every == 0:
            means = {name: float(np.mean(column)) for name, column in parts.items()}
            shown = {"score": float(np.mean(scores)), "kl": stats["objective/kl"], **means}
            shown["tokens"] = stats["tokens/responses_len_mean"]
            progress.report(self.step, shown)
        check_memory(self.schedule.memory_limit)
        self.watch(stats, queries, responses)

    def score(self, rows, responses, ended) -> tuple[list[str], list[float], dict]:
        """(texts of the responses, scores, {reward: its scores})."""
        texts = [
            response_text(self.tokenizer, row.tokens, response)
            for row, response in zip(rows, responses, strict=True)
        ]
        token_ids = [[*row.tokens, *r] for row, r in zip(rows, responses, strict=True)]
        columns = {**columns_of(rows), "token_ids": token_ids, "ended": ended}
        scores, parts = self.rewards([row.text for row in rows], texts, **columns)
        return texts, scores, parts

    def write_samples(self, rows, texts, scores, kls) -> None:
        samples = [
            {"prompt": row.text, "response": text, "score": score, "kl": float(kl)}
            for row, text, score, kl in zip(rows, texts, scores, kls, strict=True)
        ]
        self.run_folder.log_samples(self.step, samples[: self.schedule.samples_per_step])

    def watch(self, stats: dict, queries, responses) -> None:
        """Count steps without a finite gradient; set their rows aside, and stop after too many."""
        if not stats["ppo/not_finite"]:
            self.bad_in_a_row = 0
            return
        self.bad_in_a_row += 1
        rows = zip(queries, responses, strict=True)
        rows = [{"query": query, "response": response} for query, response in rows]
        self.run_folder.log_bad_rows(self.step, "loss or gradient not finite", rows)
        if self.bad_in_a_row >= self.schedule.max_bad_steps:
            raise UserError(
                f"{self.run_folder.folder}: loss or gradient was NaN or infinite in "
                f"{self.bad_in_a_row} steps in a row; the rows are in bad_rows.jsonl, and "
                "--resume goes on from the last checkpoint; try a lower --learning-rate"
            )

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, progress: Progress) -> Metric | None:
        """Score greedy and sampled responses to the validation prompts, and log the means."""
        if not self.validation or not self.schedule.eval_every:
            return None
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
        return Metric("eval/sampled/score", row["eval/sampled/score"], higher_is_better=True)

    def sample(self, rows: Sequence[PromptRow], greedy: bool) -> tuple[list[list[int]], list[bool]]:
        """(responses, whether each ended), a batch of the training's size at a time."""
        responses, ended = [], []
        for start in range(0, len(rows), self.trainer.config.batch_size):
            part = [row.tokens for row in rows[start : start + self.trainer.config.batch_size]]
            made = self.trainer.sample_for_evaluation(part, greedy, self.should_stop, start)
            responses += made.responses
            ended += made.finished
        return responses, ended

    # ------------------------------------------------------------------ checkpoint

    def checkpoint(self, metric: Metric | None = None) -> None:
        state = {
            "evaluations": self.evaluations,
            "bad_in_a_row": self.bad_in_a_row,
            "trainer": self.trainer.state_dict(),
            "run": self.run_folder.state_dict(),
            "rng": rng_state(),
        }
        arrays = {name: group.get() for name, group in self.groups.items()}
        save_checkpoint(
            self.run_folder.checkpoints,
            self.step,
            arrays | {"optimizer": optimizer_arrays(self.trainer.optimizer)},
            state,
            keep=self.schedule.keep_checkpoints,
            metric=metric,
        )


def response_text(tokenizer, query: Sequence[int], response: Sequence[int]) -> str:
    """The text that `response` adds to `query`, so that prompt + response is the whole text.

    Some decoders drop the blank in front of a text, so the two are decoded together.
    """
    start = tokenizer.decode(list(query), skip_special_tokens=True)
    whole = tokenizer.decode([*query, *response], skip_special_tokens=True)
    if whole.startswith(start):
        return whole[len(start) :]
    return tokenizer.decode(list(response), skip_special_tokens=True)
