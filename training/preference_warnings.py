"""What goes wrong in preference training, seen in the metrics of updates while they come."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

WINDOW = 20  # updates that are compared with the first ones
STUCK = 50  # updates at log 2
SURE = 3.0  # standard errors that a change must be away from none


class PreferenceWatch:
    """``watch(metrics)`` gives warnings, each once a start of the program.

    `log_2`: whether the loss of a policy that is its reference is log 2. `reference`: whether
    rewards are measured from one, so that those of the chosen answers start at 0.
    """

    def __init__(self, *, log_2: bool, reference: bool):
        self.log_2, self.chosen = log_2, "rewards/chosen" if reference else "logps/chosen"
        self.losses: list[float] = []
        self.rows: list[tuple[float, float]] = []  # (of chosen answers, margin)
        self.said: set[str] = set()

    def __call__(self, metrics: Mapping[str, float]) -> Iterator[str]:
        self.losses.append(metrics["loss"])
        if self.chosen in metrics and "rewards/margins" in metrics:
            self.rows.append((metrics[self.chosen], metrics["rewards/margins"]))
        for name, check in (("stuck", self.stuck), ("falling", self.falling)):
            if name not in self.said and (text := check()):
                self.said.add(name)
                yield text

    def stuck(self) -> str | None:
        """The loss has not left log 2."""
        recent = np.array(self.losses[-STUCK:])
        if not self.log_2 or len(recent) < STUCK:
            return None
        if np.abs(recent - math.log(2)).max() > 1e-3:
            return None
        return (
            f"the loss has been log 2 for {STUCK} updates: the policy has not left its "
            "reference; raise --learning-rate or --beta"
        )

    def falling(self) -> str | None:
        """Chosen answers become less likely while margins grow (likelihood displacement)."""
        if len(self.rows) < 2 * WINDOW:
            return None
        first, last = np.array(self.rows[:WINDOW]), np.array(self.rows[-WINDOW:])
        change = last.mean(axis=0) - first.mean(axis=0)
        error = np.sqrt((first.var(axis=0, ddof=1) + last.var(axis=0, ddof=1)) / WINDOW)
        chosen, margin = change / np.maximum(error, 1e-12)
        if chosen > -SURE or margin < SURE:
            return None
        return (
            "the log-probability of chosen answers falls while margins grow: the policy "
            "unlearns both (likelihood displacement); add sft to --loss-type, or lower "
            "--learning-rate"
        )
