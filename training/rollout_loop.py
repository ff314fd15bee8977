"""The loop on rollouts: prompts, rollout, rewards, update, log, evaluate, checkpoint, stop, resume.

It works on a trainer with `generate`, `sample_for_evaluation`, `update`, `skip` and `state_dict`
(mlx_ppo_trainer.py), and on a reward set (rewards/reward_set.py) that may leave rows unscored. An
algorithm that makes its batches otherwise has a subclass with a `choose` or `learn` of its own.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from data_utils import Curriculum, PromptRow, chosen_prompts, columns_of
from errors import UserError
from rewards.texts import asked, response_text, reward_columns
from rewards.user_function import quote_row
from rl.ppo_statistics import logged_row, part_means
from rl.rollouts import join_rollouts
from rl.scores import constant
from run_folder.console import Progress, Wait, say_gb
from run_folder.manifest import Metric
from run_folder.run import Run
from run_folder.stopping import GracefulStop
from training.backend import Backend
from training.checkpointed import Resumable
from training.endings import SCORE, is_best, report_skipped, save_or_stop, skipped_steps
from training.groups import Group
from training.together import by_worker_0, worker_metrics

SAME_SCORES = 3  # steps in a row after which that is worth a warning
NUMBERS = "score, loss or gradient"
STEP_SCORE = "train/score"  # what --compare-steps judges by


@dataclass
class RolloutSchedule:
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
    compare_steps: int = 0
    reference_samples: int = 0


@dataclass
class Experience:
    """What one step is made from: rows of data, what was written to them, and its scores."""

    rows: list[PromptRow]
    rollout: Any
    texts: list[str]
    scores: list[float]  # NaN where a reward left the row without one
    parts: dict[str, list[float]]  # of each reward
    reference: list[tuple[str, float]] = field(default_factory=list)  # (response, score) of some

    @property
    def trained_on(self):
        """The rollout whose tokens the update reads."""
        return self.rollout


@dataclass
class RolloutLoop(Resumable):
    """`run()` trains from where it stands to `schedule.steps`, or until it is told to stop."""

    run_folder: Run
    trainer: Any
    rewards: Callable
    tokenizer: Any
    prompts: Sequence[PromptRow]
    validation: Sequence[PromptRow]
    groups: Mapping[str, Group]
    schedule: RolloutSchedule
    should_stop: Callable[[list[int]], bool] | None = None
    base: str | None = None  # fingerprint of the model that is trained
    backend: Backend = field(kw_only=True)
    curriculum: Curriculum | None = None
    step: int = 0
    bad_in_a_row: int = 0
    last_bad: str = ""  # names the row of the last score that was not finite, for an error
    evaluations: list[dict] = field(default_factory=list)  # metrics of each, with its step
    notes: dict[str, float] = field(default_factory=dict)  # on the prompts of this step
    best_reward: float | None = None  # mean score of a step, where --compare-steps asks for it
    compared: Metric | None = None  # of this step, where it is a new best
    not_finite = "ppo/not_finite"  # the metric that says that a step was skipped
    progress: Progress | None = None  # while `run` runs
    seconds: dict[str, float] = field(default_factory=dict)  # of the parts of this step
    sampled: int = 0  # tokens of this step's responses, also of those not trained on
    same_scores: int = 0  # steps in a row whose scores are all one number

    def rows(self) -> Sequence[PromptRow]:
        return self.prompts

    def trained(self) -> dict:
        return self.trainer.model.trainable_parameters()

    def state(self) -> dict[str, Any]:
        own = {} if self.best_reward is None else {"best_reward": self.best_reward}
        return {"evaluations": self.evaluations, "trainer": self.trainer.state_dict()} | own

    def take_state(self, state: Mapping[str, Any]) -> None:
        self.evaluations = state["evaluations"]
        self.best_reward = state.get("best_reward")
        self.trainer.load_state_dict(state["trainer"])

    def run(self, stop: GracefulStop, name: str = "ppo") -> None:
        """Train. Ends with a checkpoint, also when `stop` was requested."""
        plan = self.schedule
        with (
            self.stopped_by(stop),
            Progress(plan.steps, done=self.step, name=name) as progress,
        ):
            self.progress = progress
            # At the start, or where a signal gave it up.
            metric = self.end_step(progress) if self.evaluation_due() else None
            progress.begin()
            while self.step < plan.steps and not stop.requested:
                with self.step_to_give_up():
                    self.train_step(progress)
                metric = self.end_step(progress)
            if not stop.requested:
                folder = self.run_folder.folder
                skipped = by_worker_0(lambda: skipped_steps(folder, self.not_finite))
                report_skipped(self, skipped, NUMBERS, self.last_bad)
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
            if plan.compare_steps:
                metric, best = self.compared, self.compared is not None
            last = self.step == plan.steps
            due = plan.save_every and not last and (best or self.step % plan.save_every == 0)
            save_or_stop(self, bool(due), metric, NUMBERS, self.last_bad)
        return metric

    # ------------------------------------------------------------------ a step

    def train_step(self, progress: Progress) -> None:
        """Prompts, responses, rewards, update, and a row of metrics."""
        self.seconds, self.sampled = {}, 0
        try:
            made = self.collect()
            self.ask_reference(made)
        except UserError:
            self.checkpoint()  # the weights as they were before this step
            raise
        with self.part("update"):
            stats = self.learn(made)
        self.step += 1
        self.compared = self.compare(made)
        row = self.logged(stats, made) | reference_means(made) | self.notes
        row |= self.times(stats, made) | worker_metrics()
        self.run_folder.log(self.step, row)
        self.run_folder.log_values(self.step, "scores", made.scores)
        progress.advance()
        if len(stats) > 1:  # a skipped step says that alone
            self.write_samples(made, stats.get("objective/kl_dist"))
            if self.step % self.schedule.report_every == 0:
                self.report(progress, stats, made)
        self.watch_scores(progress, made.scores)
        self.bad_in_a_row = self.bad_in_a_row + 1 if stats[self.not_finite] else 0
        if self.bad_in_a_row:
            self.set_aside(made)

    def watch_scores(self, progress: Progress, scores: Sequence[float]) -> None:
        """Say so, once, where a reward tells no response from another."""
        same = constant(scores)
        self.same_scores = 0 if same is None else self.same_scores + 1
        if self.same_scores == SAME_SCORES:
            progress.line(
                f"warning: every response of the last {SAME_SCORES} steps has the score "
                f"{same:g}, so there is nothing to learn: score.py shows what the reward does"
            )

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Around a part of a step: its seconds are noted, and the bar says what is being done."""
        if self.progress is not None:
            self.progress.doing(name)
        start = perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def times(self, stats: Mapping[str, Any], made: Experience) -> dict[str, float]:
        """Where the time of the step went, and its pace: tokens sampled, and trained on."""
        row = {f"time/ppo/{name}": seconds for name, seconds in self.seconds.items()}
        rollout = made.trained_on
        texts = sum(map(len, [*rollout.responses, *rollout.queries]))
        trained = texts * self.trainer.config.ppo_epochs
        for name, tokens in (("rollout", self.sampled), ("update", trained)):
            seconds = self.seconds.get(name)
            if name == "update":
                seconds = stats.get("time/ppo/optimize_step", seconds)
            if seconds:
                row[f"time/{name}_tokens_per_second"] = tokens / seconds
        return row | {"memory/peak_gb": self.backend.peak_memory()}

    def choose(self) -> list[PromptRow]:
        """The rows of this step, one for each response."""
        return [self.prompts[i] for i in self.numbers(self.trainer.config.batch_size)]

    def numbers(self, count: int) -> list[int]:
        """Which prompts this step takes, `count` of them."""
        seed = self.trainer.config.seed
        chosen = chosen_prompts(self.curriculum, len(self.prompts), count, self.step, seed)
        self.notes = self.curriculum.notes(self.step, chosen) if self.curriculum else {}
        return chosen

    def collect(self) -> Experience:
        """Responses to the rows of this step, with their scores."""
        rows = self.choose()
        rollout = self.draw([row.query for row in rows])
        return Experience(rows, rollout, *self.timed_score(rows, rollout))

    def draw(self, queries: Sequence[Sequence[int]], part: int = 0):
        """Responses to `queries`; `part` tells several calls in one step apart."""
        with self.part("rollout"):
            rollout = self.trainer.generate(queries, should_stop=self.should_stop, part=part)
        self.sampled += sum(map(len, rollout.responses))
        return rollout

    def timed_score(self, rows: Sequence[PromptRow], rollout) -> tuple:
        """`score`, as a part of the step."""
        with self.part("reward"):
            return self.score(rows, rollout)

    def learn(self, made: Experience) -> dict:
        """The trainer's step, or none where a score is not finite; its statistics."""
        if np.isfinite(made.scores).all():
            return self.trainer.update(made.rollout, made.scores)
        return self.trainer.skip()

    def ask_reference(self, made: Experience) -> None:
        """Responses of the reference to the first prompts, as many as are asked for, scored."""
        if count := self.schedule.reference_samples:
            rows = made.rows[:count]
            rollout = self.trainer.sample_reference([r.query for r in rows], self.should_stop)
            texts, scores, _ = self.score(rows, rollout)
            made.reference = list(zip(texts, map(float, scores), strict=True))

    def compare(self, made: Experience) -> Metric | None:
        """The mean score of this step where it is compared and better than every one before."""
        every = self.schedule.compare_steps
        if not every or self.step % every or not np.isfinite(made.scores).all():
            return None
        found = Metric(STEP_SCORE, float(np.mean(made.scores)), higher_is_better=True)
        if not found.beats(self.best_reward):
            return None
        self.best_reward = found.value
        return found

    def logged(self, stats: dict, made: Experience) -> dict:
        """The step's row of metrics."""
        return logged_row(stats, made.parts, made.scores) | self.rewards.metrics(made.parts)

    def report(self, progress: Progress, stats: dict, made: Experience) -> None:
        shown = {"score": float(np.nanmean(made.scores))}
        if "objective/kl" in stats:
            shown["kl"] = stats["objective/kl"]
        shown |= part_means(made.parts) | {"tokens": stats["tokens/responses_len_mean"]}
        progress.report(self.step, shown | self.paces())

    def paces(self) -> dict[str, Any]:
        """What every line ends with: tokens sampled a second in this step, and the peak so far."""
        pace = self.sampled / self.seconds["rollout"]
        return {"sampled/s": round(pace), "peak": say_gb(self.backend.peak_memory())}

    def score(self, rows: Sequence[PromptRow], rollout) -> tuple[list[str], list[float], dict]:
        """(texts of the responses, scores, {reward: its scores})."""
        texts = [
            response_text(self.tokenizer, row.tokens, response)
            for row, response in zip(rows, rollout.responses, strict=True)
        ]
        columns = self.columns(rows, rollout)
        scores, parts = self.rewards([row.prompt for row in rows], texts, **columns)
        return texts, scores, parts

    def columns(self, rows: Sequence[PromptRow], rollout) -> dict[str, Sequence]:
        """What rewards may ask for beside the texts."""
        token_ids = [[*row.tokens, *r] for row, r in zip(rows, rollout.responses, strict=True)]
        return reward_columns(
            columns_of(rows),
            token_ids=token_ids,
            ended=rollout.ended,
            prompt_text=[row.text for row in rows],
            response_start=[len(row.tokens) for row in rows],
        )

    def write_samples(self, made: Experience, kls: Sequence[float] | None) -> None:
        samples = []
        for place in range(min(len(made.rows), self.schedule.samples_per_step)):
            kl = {} if kls is None else {"kl": float(kls[place])}
            response, score = made.texts[place], made.scores[place]
            other = made.reference[place] if place < len(made.reference) else ()
            told = dict(zip(("reference_response", "reference_score"), other, strict=False))
            samples.append(
                {**asked(made.rows[place]), "response": response, "score": score} | kl | told
            )
        self.run_folder.log_samples(self.step, samples)

    def set_aside(self, made: Experience) -> None:
        """Keep the rows of a step whose update was skipped, in part or whole."""
        bad = np.flatnonzero(~np.isfinite(made.scores))
        reason = "score not finite" if len(bad) else "loss or gradient not finite"
        self.last_bad = ""
        if len(bad):
            prompts = [row.prompt for row in made.rows]
            self.last_bad = "; the last: " + quote_row(prompts, made.texts, bad[-1])
        columns = zip(made.rows, made.rollout.responses, made.texts, made.scores, strict=True)
        entries = [
            {
                **asked(row),
                "response": text,
                "score": score,
                "query_tokens": row.tokens,
                "response_tokens": response,
            }
            for row, response, text, score in columns
        ]
        self.run_folder.log_bad_rows(self.step, reason, entries)

    # ------------------------------------------------------------------ evaluation

    def evaluate(self, progress: Progress) -> Metric:
        """Score greedy and sampled responses to the validation prompts, and log the means."""
        row, start = {"step": self.step}, perf_counter()
        kinds = (("greedy", True, 1), ("sampled", False, self.schedule.eval_samples))
        total = len(self.validation) * sum(count for _, _, count in kinds)
        with Wait("evaluation", total) as wait:
            for kind, greedy, count in kinds:
                rows = [prompt for prompt in self.validation for _ in range(count)]
                rollout = self.sample(rows, greedy, wait.advance)
                texts, scores, parts = self.score(rows, rollout)
                means = part_means({"score": scores} | parts)
                row |= {f"eval/{kind}/{name}": value for name, value in means.items()}
                lengths = [len(response) for response in rollout.responses]
                row[f"eval/{kind}/response_tokens"] = float(np.mean(lengths))
                sample = {**asked(rows[0]), "response": texts[0], "score": scores[0]}
                self.run_folder.log_samples(self.step, [{"evaluation": kind, **sample}])
        logged = {k: v for k, v in row.items() if k != "step"}
        self.run_folder.log(self.step, logged | {"time/ppo/evaluation": perf_counter() - start})
        shown = {"greedy": row["eval/greedy/score"], "sampled": row["eval/sampled/score"]}
        named = {f"held-out {name}": value for name, value in shown.items()}
        progress.report(self.step, named, timed=False)
        self.evaluations.append(row)
        return Metric(SCORE, row[SCORE], higher_is_better=True)

    def sample(
        self,
        rows: Sequence[PromptRow],
        greedy: bool,
        advance: Callable[[int], None] = lambda count: None,
    ):
        """The rollout of an evaluation, a batch of the training's size at a time."""
        parts, size = [], self.trainer.config.batch_size
        for start in range(0, len(rows), size):
            queries = [row.query for row in rows[start : start + size]]
            parts.append(
                self.trainer.sample_for_evaluation(queries, greedy, self.should_stop, start)
            )
            advance(len(queries))
        return join_rollouts(parts)


def reference_means(made: Experience) -> dict[str, float]:
    """The mean score of the reference's responses, for the step's row."""
    return part_means({"reference/score": [score for _, score in made.reference]})
