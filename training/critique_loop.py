"""The loop of PPO on answers, critiques and revisions (mlx_critique_trainer.py).

Of training/rollout_loop.py it changes how a batch is made, and what is logged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from data_utils import PromptRow
from errors import UserError
from rewards.texts import plain, response_text
from rl.rollouts import join_rollouts
from training.rollout_loop import Experience, RolloutLoop

Encode = Callable[[str], list[int]]  # a prompt as the model reads it


@dataclass
class Critiqued(Experience):
    """`Experience` of the answers, with their critiques and revisions."""

    whole: object = None  # rollout of the rows of all kinds
    every_score: list[float] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)  # R(x, y') - R(x, y)

    @property
    def trained_on(self):
        return self.whole


@dataclass
class CritiqueLoop(RolloutLoop):
    """`run()` trains a CritiqueTrainer; `encode`, the templates and `longest` must be set."""

    encode: Encode | None = None
    critique_template: str = ""
    revision_template: str = ""
    longest: int | None = None  # tokens that the model has positions for, less those of a response

    def choose(self) -> list[PromptRow]:
        """The prompts of this step, a third of its rows."""
        return [self.prompts[i] for i in self.numbers(self.trainer.config.batch_size // 3)]

    def collect(self) -> Critiqued:
        """Answers, critiques of them, and revisions that read both."""
        rows = self.choose()
        answers = self.draw([row.query for row in rows], 0)
        texts, scores, parts = self.timed_score(rows, answers)
        asked = [plain(row.prompt).strip() for row in rows]
        given = [
            self.critique_template.format(prompt=prompt, response=text.strip())
            for prompt, text in zip(asked, texts, strict=True)
        ]
        critiques = self.draw(self.encoded(given), 1)
        said = [
            response_text(self.tokenizer, query, response).strip()
            for query, response in zip(critiques.queries, critiques.responses, strict=True)
        ]
        given = [
            self.revision_template.format(prompt=prompt, response=text.strip(), critique=critique)
            for prompt, text, critique in zip(asked, texts, said, strict=True)
        ]
        revisions = self.draw(self.encoded(given), 2)
        _, revised, _ = self.timed_score(rows, revisions)
        gains = (np.array(revised) - np.array(scores)).tolist()
        whole = join_rollouts([answers, critiques, revisions])
        every = [*scores, *gains, *revised]
        return Critiqued(
            rows, answers, texts, scores, parts, whole=whole, every_score=every, gains=gains
        )

    def encoded(self, prompts: Sequence[str]) -> list[list[int]]:
        """Tokens of prompts; UserError for one that the model has no positions for."""
        found = [self.encode(prompt) for prompt in prompts]
        most = max(map(len, found))
        if self.longest is not None and most > self.longest:
            raise UserError(
                f"--use-self-critique: a prompt of {most} tokens, and the model takes "
                f"{self.longest} before a response; shorten --critique-template, "
                "--revision-template or --max-new-tokens"
            )
        return found

    def learn(self, made: Critiqued) -> dict:
        """The trainer's step, or none where a score is not finite; its statistics."""
        if np.isfinite(made.every_score).all():
            return self.trainer.update(made.whole, made.every_score)
        return self.trainer.skip()

    def logged(self, stats: dict, made: Critiqued) -> dict:
        gains = np.array(made.gains)
        return super().logged(stats, made) | {
            "critique/gain": float(gains.mean()),
            "critique/improved_share": float((gains > 0).mean()),
            "critique/revised_score": float(np.mean(made.scores) + gains.mean()),
        }
