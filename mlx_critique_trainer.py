"""PPO on an answer, a critique of it and the answer revised by it, in one update.

Of a prompt x come three rows: y ~ pi(x), c ~ pi(a prompt that holds x and y), y' ~ pi(a prompt that
holds x, y and c). The scores are R(x, y), the gain R(x, y') - R(x, y) for c, and R(x, y'). The loss
is (1 - w) L(y) + w/2 (L(c) + L(y')), advantages are whitened per kind.

Legend: B prompts, so 3 B rows, kind after kind; m prompts in a minibatch; R longest response.
"""

from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_ppo_trainer import PPOTrainer
from models.packing import Packed
from rl.advantages import gae
from rl.losses import masked_whiten
from rl.ppo_config import PPOConfig
from rl.rollouts import Rollout, minibatch_order

KINDS = ("answer", "critique", "revision")


def with_critiques(config: PPOConfig) -> PPOConfig:
    """The options of a run of `batch_size` prompts as those of its rows, three to a prompt."""
    return replace(
        config,
        batch_size=len(KINDS) * config.batch_size,
        mini_batch_size=len(KINDS) * config.mini_batch_size,
    )


class CritiqueTrainer(PPOTrainer):
    """`PPOTrainer` on rollouts whose rows are answers, critiques, revisions, a third each.

    `config` is one of `with_critiques`; `weight` is w, from 0 to 1.
    """

    def __init__(self, config: PPOConfig, *arguments, weight: float, **options):
        self.shares = (1 - weight, weight / 2, weight / 2)
        super().__init__(config, *arguments, **options)

    def minibatch_order(self, epoch: int) -> np.ndarray:
        """Row numbers (3 B,), minibatch after minibatch: its answers, critiques, revisions."""
        config = self.config
        count, size = config.batch_size // 3, config.mini_batch_size // 3
        order = minibatch_order(count, config.seed, self.steps_done, epoch)
        parts = [order[start : start + size] for start in range(0, count, size)]
        return np.concatenate([part + count * kind for part in parts for kind in range(3)])

    def compute_advantages(self, rollout: Rollout) -> None:
        """Fill in advantages, whitened among rows of one kind, and returns."""
        config, rewards = self.config, rollout.rewards
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
        advantages, rollout.returns = gae(
            rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            kinds = zip(thirds(advantages), thirds(rollout.mask), strict=True)
            advantages = mx.concatenate([masked_whiten(*kind) for kind in kinds])
        rollout.advantages = advantages
        mx.eval(rollout.advantages, rollout.returns)

    def _loss(self, packed: list[mx.array], columns: list[mx.array]) -> tuple[mx.array, dict]:
        """Loss of one minibatch (3 m rows), and the metrics of all its rows together."""
        packed = Packed(*packed)
        found = self.model(
            packed, temperature=self.config.temperature, with_entropy=True, gradient=True
        )
        _, metrics = self.losses(found, columns, packed.mask)
        split = [list(map(thirds, group)) for group in (found, columns)]
        total = mx.zeros(())
        for kind, share in enumerate(self.shares):
            own = [[column[kind] for column in group] for group in split]
            loss, _ = self.losses(*own, thirds(packed.mask)[kind])
            total = total + share * loss
        return total, metrics | {"loss/total": total}


def thirds(rows: mx.array) -> list[mx.array]:
    """(3 n, ...) -> the rows of each kind, (n, ...)."""
    return mx.split(rows, len(KINDS))
