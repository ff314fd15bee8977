"""The loop of ReST (Gulcehre et al. 2023): grow, improve, improve..., grow again.

One run of supervised updates, `iters` for each improve step; between two of them the rows change.
What a step trains on follows from its number and the files of the grow steps, so that a run goes on
from any checkpoint.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_utils import BatchIterator, BatchPlan, Conditioning, TextRow
from errors import UserError
from rl.scores import constant
from run_folder.console import Progress, Wait
from run_folder.manifest import Metric
from run_folder.run import remove
from training.backend import Checkpoint
from training.grow import (
    EVALUATION,
    GROW,
    Grower,
    grow_file,
    grown_rows,
    read_rows,
    text_rows,
    write_rows,
)
from training.supervised_loop import Loop

SCORE = "eval/sampled/score"
SAMPLES = 2  # of an evaluation, in samples.jsonl


@dataclass
class Improve:
    """How rows are chosen and trained on."""

    grows: int
    iters: int  # updates of an improve step
    batch_size: int
    seed: int
    pad_to_multiple: int
    thresholds: Sequence[float] | None = None  # one for each improve step of a grow; or
    quantiles: Sequence[float] | None = None  # of the grow's rewards; or
    template: str | None = None  # every row, behind its own score
    target: float | None = None  # the score to ask for; None: the best of the grow
    from_base: bool = False
    mixed: Sequence[TextRow] = ()  # rows with rewards that are trained on too
    eval_prompts: int = 0
    eval_samples: int = 1

    @property
    def steps(self) -> int:
        """Improve steps of a grow."""
        return len(self.thresholds or self.quantiles or [None])

    @property
    def updates(self) -> int:
        """Of the whole run."""
        return self.grows * self.steps * self.iters

    def threshold(self, step: int, rewards: Sequence[float]) -> float | None:
        """The reward from which rows are kept; None: all are."""
        if self.thresholds:
            return self.thresholds[step]
        return float(np.quantile(rewards, self.quantiles[step])) if self.quantiles else None


@dataclass
class RestLoop(Loop):
    """`batches` are made anew for each improve step; `stage` is what is logged of it."""

    grower: Grower = field(kw_only=True)
    improve: Improve = field(kw_only=True)
    make_optimizer: Callable[[], Any] = field(kw_only=True)
    initial: Mapping[str, Any] = field(kw_only=True)  # what is trained, before any update
    stage: dict[str, float] = field(default_factory=dict)
    position: dict[str, int] | None = None  # among the batches of the checkpoint's step
    grown: tuple[int, list[dict]] | None = None  # the last grow that was read or made
    emptied: bool = False  # an improve step has nothing to train on

    def rows(self) -> Sequence:
        return [*self.grower.prompts["train"][1].rows, *self.improve.mixed]

    def state(self) -> dict[str, Any]:
        batches = self.position if self.batches is None else self.batches.state_dict()
        own = {name: getattr(self, name) for name in ("validated", "best", "since_best", "totals")}
        return {**own, "batches": batches, "stage": self.stage}

    def check_position(self, saved: Checkpoint) -> None:
        """Every checkpoint lies on the way of a longer run."""

    def take_state(self, state: Mapping[str, Any]) -> None:
        for name in ("validated", "best", "since_best", "totals", "stage"):
            setattr(self, name, state[name])
        self.position = state["batches"]

    def resume(self, path, *, force: bool = False) -> None:
        super().resume(path, force=force)
        each = self.improve.steps * self.improve.iters
        for number in range(1, self.improve.grows + 1):
            if (number - 1) * each > self.step:  # of a later policy than the one gone back to
                remove(grow_file(self.run_folder.folder, number))

    # ------------------------------------------------------------------ steps

    def make_updates(self, progress: Progress) -> None:
        """Updates until the last one, a stop, or an improve step without rows."""
        while not self.ended(progress):
            if self.batches is None or self.step % self.improve.iters == 0:
                with self.step_to_give_up():
                    self.begin_stage(progress)
            if self.emptied:
                return
            with self.step_to_give_up():
                self.update(progress)
            self.end_step(progress)

    def begin_stage(self, progress: Progress) -> None:
        """The rows of the improve step that this update belongs to; at its start also weights."""
        how, begun = self.improve, self.step % self.improve.iters
        grow, step = divmod(self.step // how.iters, how.steps)
        every = self.rows_of(grow + 1, progress)
        rows = [row for row in every if row["reward"] is not None]
        if not rows:
            raise UserError(f"grow {grow + 1}: the rewards gave no response a score")
        if not begun:
            if how.from_base:
                self.groups["adapters"].put(dict(self.initial))
            self.trainer.begin(self.make_optimizer())
        rewards = [row["reward"] for row in rows]
        if not step and (same := constant(rewards)) is not None:
            progress.line(
                f"warning: grow {grow + 1}: every response has the score {same:g}, so none is "
                "better than another: score.py shows what the reward does"
            )
        threshold = how.threshold(step, rewards)
        kept = [row for row in rows if threshold is None or row["reward"] >= threshold]
        made = self.to_train(kept, rows, grow_file(self.run_folder.folder, grow + 1).name)
        made += [row for row in how.mixed if threshold is None or row.reward >= threshold]
        where = f"grow {grow + 1}, improve {step + 1}"
        if not made:
            self.stop_without_rows(progress, where, threshold, max(rewards))
            return
        plan = BatchPlan(
            [len(row.tokens) for row in made],
            how.batch_size,
            seed=how.seed + self.step // how.iters,
            pad_to_multiple=how.pad_to_multiple,
        )
        self.batches = BatchIterator(made, plan)
        if begun:
            self.batches.load_state_dict(self.position)
        self.stage = {
            "grow": grow + 1,
            "improve": step + 1,
            "kept": len(kept),
            "rows": len(made),
            "score_all": float(np.mean(rewards)),
        }
        if kept:
            self.stage["score_kept"] = float(np.mean([row["reward"] for row in kept]))
        self.stage |= {} if threshold is None else {"threshold": threshold}
        unscored = len(every) - len(rows)
        note = f"; {unscored} without a score are left out" if unscored else ""
        progress.line(f"{where}: {self.said(rows, kept, made, threshold)}{note}")

    def said(self, rows, kept, made, threshold) -> str:
        """The line of an improve step."""
        if threshold is None:
            return f"all {len(rows)} rows, {len(made)} of them different, behind their scores"
        scores = f"mean score {self.stage['score_all']:.3f}"
        if kept:
            scores += f" -> {self.stage['score_kept']:.3f}"
        return (
            f"{len(kept)} of {len(rows)} rows reach {threshold:.4g} ({scores}), {len(made)} "
            "different ones are trained on"
        )

    def stop_without_rows(self, progress, where: str, threshold: float, highest: float) -> None:
        """Say that nothing is left to train on; before any update that is an error."""
        problem = f"{where}: no row reaches {threshold:g}, the highest reward is {highest:g}"
        if not self.step:
            raise UserError(f"{problem}; lower --thresholds, or give --quantiles")
        progress.line(f"{problem}; stopped here")
        self.emptied = True

    def to_train(self, kept: Sequence[dict], rows: Sequence[dict], name: str) -> list[TextRow]:
        """Rows of a grow as tokens: `kept`, or all behind their scores."""
        conditioning = self.conditioning(rows)
        if conditioning is None:
            return text_rows(kept, name)
        return text_rows(
            rows,
            name,
            lambda row: self.grower.conditioned(row["prompt"], conditioning.prefix(row["reward"])),
        )

    def conditioning(self, rows: Sequence[dict]) -> Conditioning | None:
        """How scores are said, and the one to ask for after training on `rows`."""
        if self.improve.template is None:
            return None
        target = self.improve.target
        best = max(row["reward"] for row in rows) if target is None else target
        return Conditioning(self.improve.template, best)

    # ------------------------------------------------------------------ grow

    def rows_of(self, number: int, progress: Progress) -> list[dict]:
        """The rows of a grow step: kept, from its file, or sampled now."""
        if self.grown is None or self.grown[0] != number:
            path = grow_file(self.run_folder.folder, number)
            if not path.exists():
                asked = self.asked(number - 1)
                write_rows(path, grown_rows(self.sample(number, asked), number))
            self.grown = number, read_rows(path)
        return self.grown[1]

    def asked(self, before: int) -> Conditioning | None:
        """What the policy is asked for that was trained on grow number `before`."""
        if not before or self.improve.template is None:
            return None
        rows = read_rows(grow_file(self.run_folder.folder, before))
        return self.conditioning([row for row in rows if row["reward"] is not None])

    def sample(self, number: int, asked: Conditioning | None) -> list:
        count = len(self.grower.prompts["train"][1])
        with Wait(f"grow {number}", count * self.grower.samples) as wait:
            return self.grower.sample(
                "train",
                count,
                (GROW, number),
                samples=self.grower.samples,
                asked=asked,
                advance=wait.advance,
            )

    # ------------------------------------------------------------------ evaluation

    def evaluation_due(self) -> bool:
        """After every improve step, and before the first one where there are prompts for it."""
        at_end = self.step % self.improve.iters == 0 and (self.step or self.improve.eval_prompts)
        return bool(at_end) and self.validated != self.step

    def checkpoint_due(self, best: bool) -> bool:
        at_end = self.step % self.improve.iters == 0
        return bool(self.schedule.save_every) and (at_end or super().checkpoint_due(best))

    def validate(self, progress: Progress) -> Metric | None:
        """The mean reward of sampled responses to held-out prompts, logged with the stage."""
        row = {f"rest/{name}": value for name, value in self.stage.items()}
        score = None
        if self.improve.eval_prompts:
            pairs = self.evaluated_pairs()
            known = [pair.score for pair in pairs if np.isfinite(pair.score)]
            score = float(np.mean(known)) if known else float("nan")
            row[SCORE] = score
            for name in pairs[0].parts:
                values = [pair.parts[name] for pair in pairs if np.isfinite(pair.parts[name])]
                row[f"eval/sampled/{name}"] = float(np.mean(values)) if values else float("nan")
            lengths = [len(pair.tokens) - pair.start for pair in pairs]
            row["eval/sampled/response_tokens"] = float(np.mean(lengths))
            self.run_folder.log_samples(
                self.step,
                [
                    {"prompt": p.prompt, "response": p.response, "score": p.score}
                    for p in pairs[:SAMPLES]
                ],
            )
            progress.report(self.step, {"held-out score": score}, timed=False)
        self.run_folder.log(self.step, row)
        self.validated = self.step
        if score is None:
            return None
        gained = np.isfinite(score) and (self.best is None or score > self.best)
        self.best = score if gained else self.best
        self.since_best = 0 if gained else self.since_best + 1
        return Metric(SCORE, score, higher_is_better=True)

    def evaluated_pairs(self) -> list:
        """Scored responses to the held-out prompts, always by the same random numbers."""
        how, asked = self.improve, None
        if self.step:
            asked = self.asked(-(-self.step // (how.steps * how.iters)))
        with Wait("evaluation", how.eval_prompts * how.eval_samples) as wait:
            return self.grower.sample(
                "valid",
                how.eval_prompts,
                (EVALUATION, 0),
                samples=how.eval_samples,
                asked=asked,
                advance=wait.advance,
            )
