"""External rewards and internal ones as one reward set (formula: rl/adlf.py)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from distributed.membership import member
from rewards.internal import Signals
from rewards.reward_set import Reward, RewardSet
from rl.adlf import compute_adlf_rewards, normalised, pareto_share, to_unit_range

EXTERNAL = "external"


class CompositeRewards(RewardSet):
    """(1 - alpha) * external + alpha * internal.

    Args:
        external: the rewards that were asked for.
        signals: measures the components.
        alpha: share of the internal reward.
        weights: of the components and, as the objective "external", of the external score; only
            ratios count.
        score_range: external scores (weighted sums) are mapped from here to [0, 1], clipped. The
            mapped sum is then one more part, and the rewards it is made from are only logged.
        objectives: log the share of responses that no other beats in all components and externally.

    `names`, `weights` and the parts of a call fit together as in `RewardSet`: the total is the
    weighted sum of the parts.
    """

    def __init__(
        self,
        external: RewardSet,
        signals: Signals,
        alpha: float,
        weights: Mapping[str, float],
        *,
        score_range: Sequence[float] | None = None,
        objectives: bool = False,
    ):
        self.external, self.signals, self.alpha = external, signals, alpha
        self.score_range, self.objectives = score_range, objectives
        self.components = dict(weights)
        shares = normalised(weights)
        outer = (1 - alpha) + alpha * shares.get(EXTERNAL, 0.0)
        self._outer = outer
        scale = outer if score_range is None else 0.0
        rewards = [replace(r, weight=r.weight * scale) for r in external.rewards]
        if score_range is not None:
            rewards.append(Reward(EXTERNAL, _made_of_parts, outer))
        inner = {name: alpha * shares.get(name, 0.0) for name in signals.names}
        super().__init__([*rewards, *signals.rewards(inner)], unscored=external.unscored)
        own = len(external.names)
        last = self.names[len(self.names) - len(inner) :]
        self._inner = dict(zip(signals.names, last, strict=True))
        self._mapped = self.names[own] if score_range is not None else None
        self._beside: tuple = ()  # (parts, what explains them) of the last calls

    def __call__(
        self, prompts: Sequence[str], responses: Sequence[str], /, **columns: Sequence
    ) -> tuple[list[float], dict[str, list[float]]]:
        """(rewards, {name: unweighted scores}); a row without an external score has none at all."""
        outer, parts = self.external(prompts, responses, **columns)
        if self.score_range is not None:
            outer = to_unit_range(outer, *self.score_range).tolist()
            parts[self._mapped] = outer
        inner = RewardSet(self.signals.rewards(dict.fromkeys(self.signals.names, 1.0)))
        found = inner(prompts, responses, **columns)[1]
        # Signals alone are no reward, unless they were asked for alone (alpha 1).
        for name in self.signals.names if self._outer else ():
            column = zip(found[name], outer, strict=True)
            found[name] = [math.nan if math.isnan(known) else value for value, known in column]
        parts |= {self._inner[name]: found[name] for name in self.signals.names}
        self._beside = (*self._beside[-1:], (parts, described_by_all(self.signals, len(responses))))
        weights = {EXTERNAL: 0.0} | dict.fromkeys(found, 0.0) | self.components
        totals, _ = compute_adlf_rewards(outer, found, self.alpha, weights)
        # As in RewardSet: a signal that a row has no score of does not count there.
        alone = [self._total(row) for row in zip(*parts.values(), strict=True)]
        return [
            own if math.isnan(total) else float(total)
            for total, own in zip(totals, alone, strict=True)
        ], parts

    def metrics(self, parts: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Means and deviations of what is inside, for a step's row of metrics."""
        found = {}
        columns = {name: parts[written] for name, written in self._inner.items()}
        if self._mapped is not None:
            columns[EXTERNAL] = parts[self._mapped]
        for name, column in columns.items():
            there = np.array([value for value in column if not math.isnan(value)])
            if len(there):
                found[f"adlf/{name}_mean"] = float(there.mean())
                found[f"adlf/{name}_std"] = float(there.std())
        # Responses of the reference may have been scored since.
        known = [beside for own, beside in self._beside if own is parts]
        for name, column in (known[-1] if known else self.signals.described()).items():
            if column:
                found[name] = float(np.mean(column))
        if self.objectives:
            values = [parts[self._inner[n]] for n in self.signals.names] + [parts[self._mapped]]
            found["objectives/pareto"] = pareto_share(np.nan_to_num(values))
        return found


def described_by_all(signals: Signals, count: int) -> dict[str, list[float]]:
    """What explains the scores of `count` responses, of those that other workers measured too."""
    own = signals.described()
    if member() is None:
        return own
    from distributed.group import here

    found: dict[str, list[float]] = {}
    for said in here().gather(own if here().rank < count else {}, "the rewards"):
        for name, column in said.items():
            found.setdefault(name, []).extend(column)
    return found


def _made_of_parts(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    raise NotImplementedError("the external score is made from the rewards before it")
