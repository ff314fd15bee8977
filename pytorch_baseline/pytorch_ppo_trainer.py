"""mlx_ppo_trainer.py in PyTorch: the same steps under the same names, on transformers and peft.

1. generate            a response to each query, keeping log-probabilities and values
2. shape_scores        penalties, running scaling and clipping of the scores
3. score_policy        log-probabilities and values of the responses under the policy
4. score_reference     log-probabilities under the reference, KL per token
5. compute_rewards     per token: -beta * KL, plus the score on the last token
6. compute_advantages  generalised advantage estimation, whitening
7. optimise            epochs of minibatches of the clipped losses
8. statistics; and the controller moves beta

TRL took its PPO out after 1.12, so it is written out here. It equals TRL 0.11.4's numbers, like the
MLX one (tests/baseline/test_baseline_oracles.py).
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from pytorch_actor_critic import (
    ActorCritic,
    Generation,
    Packed,
    Sampling,
    generate,
    pack,
    picked_logits,
    reference_logprobs,
)
from pytorch_losses import masked_mean, masked_whiten, policy_loss, value_loss
from pytorch_models import Tuned
from pytorch_rewards import (
    AdaptiveKLController,
    FixedKLController,
    RunningMoments,
    clip_scores,
    full_kl,
    gae,
    kl_penalty,
    length_penalties,
    per_token_rewards,
    scale_scores,
)
from pytorch_rollouts import Rollout, pad_rows, step_statistics
from torch import Tensor

from errors import UserError
from rl.ppo_config import PPOConfig
from rl.rollout_checks import as_numbers, check_rollout, check_token_ids
from training.clock import StageClock

__all__ = ["PPOConfig", "PPOTrainer"]

SAMPLING, ORDER, LENGTHS, EVALUATION = range(4)  # what a step's random streams are for


class PPOTrainer:
    """PPO on an `ActorCritic`.

    The reference is the model with its adapter off, or `ref_model` (needed for full fine-tuning).
    `optimizer` defaults to Adam at `config.learning_rate`. `log_stats` calls `log(step, row)`.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: ActorCritic,
        ref_model: Tuned | None = None,
        tokenizer=None,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        eos_ids: set[int],
        scheduler=None,
        grad_checkpoint: bool = False,
        log: Callable[[int, dict], None] | None = None,
    ):
        if ref_model is None and model.model.kind == "full":
            raise UserError("full fine-tuning needs a reference model: a frozen copy of the policy")
        if config.compile:
            raise UserError("--compile: the baseline runs PyTorch as it is; leave it out")
        self.config, self.model, self.reference = config, model, ref_model
        self.tokenizer, self.eos_ids, self.log = tokenizer, set(eos_ids), log
        self.parameters = model.trainable()
        self.optimizer = optimizer or torch.optim.Adam(
            self.parameters.values(), lr=config.learning_rate
        )
        self.scheduler = scheduler
        self._learning_rate = self.optimizer.param_groups[0]["lr"]  # of the last update
        self.device = model.model.device
        self.vocabulary = model.model.base.get_input_embeddings().num_embeddings
        target = config.kl_target if config.use_dynamic_kl else config.target
        self.kl_controller = (
            AdaptiveKLController(config.init_kl_coef, target, config.horizon)
            if config.adap_kl_ctrl or config.use_dynamic_kl
            else FixedKLController(config.init_kl_coef)
        )
        self.running = RunningMoments()
        self.steps_done = 0
        self.pad_to_multiple = config.pad_to_multiple or 1
        self.grad_checkpoint = grad_checkpoint
        if grad_checkpoint:
            model.model.checkpoint_blocks()
        model.model.drop_nothing()  # no dropout, in rollouts and in updates
        model.eval()
        self._generated: dict[tuple, tuple[np.ndarray, np.ndarray, bool]] = {}
        self._calls = 0  # of generate() since the last step
        self.before_update: Callable[[], None] = lambda: None
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ 1. generate

    def generate(
        self,
        queries: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int] | None = None,
        should_stop: Callable[[list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """Sample a response (token ids, EOS included) to each query, as the config says.

        Log-probabilities and values are kept for the `step` that follows. A batch may be made in
        several calls; each draws other random numbers.
        """
        config, queries = self.config, token_lists(queries)
        # The first call of a step has the stream of the step itself.
        call = (self._calls,) if self._calls else ()
        if max_tokens is None:
            max_tokens = self.response_limits(len(queries), *call)
        sampling = Sampling(config.temperature, config.top_k, config.top_p, config.min_p)
        made = self._sample(
            queries, max_tokens, sampling, should_stop, (SAMPLING, *call), self.model.value_head
        )
        rows = zip(queries, made.responses, made.logprobs, made.values, made.finished, strict=True)
        self._generated |= {(tuple(q), tuple(r)): (lp, v, end) for q, r, lp, v, end in rows}
        self._calls += 1
        return made.responses

    def sample_for_evaluation(
        self,
        queries: Sequence[Sequence[int]],
        greedy: bool,
        should_stop: Callable[[list[int]], bool] | None = None,
        part: int = 0,
    ) -> Generation:
        """Responses, the most likely ones or sampled; nothing is kept, no random state moves.

        `part` tells the batches of one evaluation apart, so that each draws other numbers.
        """
        temperature = 0.0 if greedy else self.config.temperature
        limit = self.config.max_new_tokens
        purpose = (EVALUATION, part)
        return self._sample(queries, limit, Sampling(temperature), should_stop, purpose)

    def _sample(
        self, queries, max_tokens, sampling, should_stop, purpose: tuple[int, ...], value_head=None
    ) -> Generation:
        check_token_ids("query", queries, self.vocabulary)
        return generate(
            self.model.model,
            queries,
            max_tokens=max_tokens,
            eos_ids=self.eos_ids,
            sampling=sampling,
            seed=int(self._random(*purpose).integers(2**63)),
            value_head=value_head,
            should_stop=should_stop,
        )

    def response_limits(self, count: int, *call: int) -> int | list[int]:
        """The longest response allowed: one number, or one drawn for each response."""
        shortest, longest = self.config.min_response_length, self.config.max_new_tokens
        if shortest is None:
            return longest
        return self._random(LENGTHS, *call).integers(shortest, longest + 1, size=count).tolist()

    def _random(self, *purpose: int) -> np.random.Generator:
        """Random numbers that depend on seed, step and purpose alone, so a resumed run has them."""
        return np.random.default_rng([self.config.seed, self.steps_done, *purpose])

    # ------------------------------------------------------------------ the step

    def step(
        self,
        queries: Sequence[Sequence[int]],
        responses: Sequence[Sequence[int]],
        scores: Sequence[float],
        response_masks: Sequence[Sequence[int]] | None = None,
    ) -> dict:
        """One PPO update from a batch of queries, responses (token ids) and scores.

        `response_masks` has a 0 for each response token that the policy did not choose. Returns
        statistics under TRL's names. Raises UserError, naming the row, for what cannot be learned
        from.
        """
        clock = StageClock()
        rollout = self.prepare(queries, responses, scores, response_masks)
        self.score_policy(rollout)
        self.score_reference(rollout)
        clock.lap("forward_pass")
        self.compute_rewards(rollout)
        clock.lap("compute_rewards")
        self.compute_advantages(rollout)
        clock.lap("compute_advantages")
        self.before_update()
        minibatches = self.optimise(rollout)
        clock.lap("optimize_step")
        stats = self.statistics(rollout, minibatches)
        clock.lap("calc_stats")
        unit = "kl_per_token" if self.config.use_dynamic_kl else "kl"
        self.kl_controller.update(stats[f"objective/{unit}"], self.config.batch_size)
        self.steps_done += 1
        self._generated, self._calls = {}, 0
        return stats | clock.times()

    def prepare(self, queries, responses, scores, response_masks=None) -> Rollout:
        """Checked arguments of `step` as a `Rollout` that holds shaped scores."""
        scores = as_numbers(scores)
        queries, responses = token_lists(queries), token_lists(responses)
        size = self.config.batch_size
        check_rollout(queries, responses, scores, response_masks, size, self.vocabulary)
        if response_masks is None:
            response_masks = [[1] * len(r) for r in responses]
        masks = [np.asarray(m, dtype=bool) for m in response_masks]
        ended = [self.has_ended(q, r) for q, r in zip(queries, responses, strict=True)]
        shaped = torch.tensor(self.shape_scores(scores, responses, ended), device=self.device)
        return Rollout(queries, responses, masks, ended, shaped)

    def has_ended(self, query: list[int], response: list[int]) -> bool:
        """Whether a response ended by itself: with EOS, or at a stop string while sampling."""
        kept = self._generated.get((tuple(query), tuple(response)))
        return response[-1] in self.eos_ids or (kept is not None and kept[2])

    # ------------------------------------------------------------------ 2. scores

    def shape_scores(
        self, scores: Sequence[float], responses: Sequence[Sequence[int]], ended: Sequence[bool]
    ) -> list[float]:
        """Scores (B,) with penalties for length, then scaled by running moments, then clipped."""
        config = self.config
        penalties = length_penalties(
            [len(r) for r in responses],
            ended,
            missing_eos_penalty=config.missing_eos_penalty,
            max_length=config.max_new_tokens,
            overlong_buffer=config.overlong_buffer,
            overlong_penalty=config.overlong_penalty,
        )
        scores = [score + penalty for score, penalty in zip(scores, penalties, strict=True)]
        if config.use_score_scaling:
            scores = scale_scores(scores, self.running, subtract_mean=config.use_score_norm)
        return scores if config.score_clip is None else clip_scores(scores, config.score_clip)

    # ------------------------------------------------------------------ 3. policy

    def score_policy(self, rollout: Rollout) -> None:
        """Fill in mask, logprobs and values: those kept from sampling, or a forward pass."""
        rollout.mask = pad_rows([np.ones(m.sum()) for m in rollout.masks]).to(self.device)
        keys = [
            (tuple(q), tuple(r)) for q, r in zip(rollout.queries, rollout.responses, strict=True)
        ]
        if self.config.rollout_logprobs and all(key in self._generated for key in keys):
            kept = [(*self._generated[k], m) for k, m in zip(keys, rollout.masks, strict=True)]
            rollout.logprobs = pad_rows([lp[m] for lp, _, _, m in kept]).to(self.device)
            rollout.values = pad_rows([v[m] for _, v, _, m in kept]).to(self.device)
            return
        temperature = self.config.temperature
        rollout.logprobs, rollout.values = self._by_rows(
            rollout, lambda p: self.model(p, temperature=temperature)
        )

    @torch.no_grad()
    def _by_rows(self, rollout: Rollout, score: Callable) -> list[Tensor]:
        """`score(packed)` gives (b, r) tensors; the same for all rows, a minibatch at a time."""
        parts = []
        for start in range(0, self.config.batch_size, self.config.mini_batch_size):
            rows = range(start, start + self.config.mini_batch_size)
            parts.append(score(self._pack(rollout, rows)))
        width = rollout.mask.shape[1]
        return [
            torch.cat([fit_columns(part, width) for part in column])
            for column in zip(*parts, strict=True)
        ]

    def _pack(self, rollout: Rollout, rows: Sequence[int]) -> Packed:
        return pack(
            [rollout.queries[i] for i in rows],
            [rollout.responses[i] for i in rows],
            masks=[rollout.masks[i] for i in rows],
            pad_to_multiple=self.pad_to_multiple,
            device=self.device,
        )

    # ------------------------------------------------------------------ 4. reference

    def score_reference(self, rollout: Rollout) -> None:
        """Fill in ref_logprobs and kls, nats per token."""
        config = self.config
        with self._reference() as reference:
            (rollout.ref_logprobs,) = self._by_rows(
                rollout, lambda p: (reference_logprobs(reference, p, config.temperature),)
            )
        if config.kl_penalty == "full":
            rollout.kls = self._full_kl(rollout)
        else:
            rollout.kls = kl_penalty(rollout.logprobs, rollout.ref_logprobs, config.kl_penalty)

    @contextmanager
    def _reference(self) -> Iterator[Tuned]:
        """The reference model, for as long as the context lasts."""
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.model.disabled():
                yield self.model.model

    def _full_kl(self, rollout: Rollout) -> Tensor:
        """KL over the whole vocabulary (B, R); logits of a minibatch are held at a time."""
        temperature = self.config.temperature

        def score(packed: Packed) -> tuple[Tensor]:
            logits = picked_logits(self.model.model, packed, temperature)  # (N, V)
            with self._reference() as reference:
                ref_logits = picked_logits(reference, packed, temperature)  # (N, V)
            return (packed.spread(full_kl(logits, ref_logits)),)

        (kls,) = self._by_rows(rollout, score)
        return kls

    # ------------------------------------------------------------------ 5. and 6.

    def compute_rewards(self, rollout: Rollout) -> None:
        """Fill in rewards: -beta * KL on every token, plus the score on the last one."""
        rollout.rewards, rollout.non_score_rewards = per_token_rewards(
            rollout.scores, rollout.kls, rollout.mask, self.kl_controller.value
        )

    def compute_advantages(self, rollout: Rollout) -> None:
        """Fill in advantages and returns."""
        config, rewards = self.config, rollout.rewards
        if config.whiten_rewards:
            rewards = masked_whiten(rewards, rollout.mask, shift_mean=False)
        rollout.advantages, rollout.returns = gae(
            rewards, rollout.values, rollout.mask, gamma=config.gamma, lam=config.lam
        )
        if config.whiten_advantages:
            rollout.advantages = masked_whiten(rollout.advantages, rollout.mask)

    # ------------------------------------------------------------------ 7. optimise

    def minibatch_order(self, epoch: int) -> np.ndarray:
        """A permutation of the batch (B,), fresh for each epoch of each step."""
        return self._random(ORDER, epoch).permutation(self.config.batch_size)

    def optimise(self, rollout: Rollout) -> list[dict[str, float]]:
        """Epochs of updates; returns the metrics of each minibatch."""
        config, metrics = self.config, []
        for epoch in range(config.ppo_epochs):
            order = self.minibatch_order(epoch)
            for start in range(0, config.batch_size, config.backward_batch_size):
                metrics += self._update(rollout, order[start : start + config.backward_batch_size])
            if config.early_stopping and metrics[-1]["policy/policykl"] > 1.5 * config.target_kl:
                break
        return metrics

    def _update(self, rollout: Rollout, rows: np.ndarray) -> list[dict[str, float]]:
        """One optimizer update, from the minibatches that `rows` fall into."""
        config, total, metrics = self.config, None, []
        for start in range(0, len(rows), config.mini_batch_size):
            gradient, found = self._gradient(rollout, rows[start : start + config.mini_batch_size])
            metrics.append(found)
            if gradient is not None:
                pairs = zip(total, gradient, strict=True) if total is not None else ()
                total = [a + b for a, b in pairs] or gradient
        if total is None:
            return metrics
        for parameter, gradient in zip(self.parameters.values(), total, strict=True):
            parameter.grad = gradient / config.gradient_accumulation_steps
        norm = torch.nn.utils.clip_grad_norm_(
            self.parameters.values(), config.max_grad_norm or float("inf")
        )
        self._learning_rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.scheduler is not None:
            self.scheduler.step()
        metrics[-1]["grad_norm"] = norm.item()
        return metrics

    def _gradient(self, rollout: Rollout, rows: np.ndarray) -> tuple[list | None, dict]:
        """The gradient of one minibatch, None where it must not move the weights; its metrics."""
        packed = self._pack(rollout, rows)
        index, width = torch.from_numpy(rows).to(self.device), packed.mask.shape[1]
        columns = (rollout.logprobs, rollout.values, rollout.advantages, rollout.returns)
        columns = [fit_columns(column[index], width) for column in columns]  # (b, r)
        self.model.train(self.grad_checkpoint)  # transformers recomputes in training mode alone
        loss, metrics = self._loss(packed, columns)
        gradient = torch.autograd.grad(
            loss, list(self.parameters.values()), allow_unused=True, materialize_grads=True
        )
        self.model.eval()
        metrics = {name: value.item() for name, value in metrics.items()}
        finite = all(torch.isfinite(g).all() for g in gradient)
        bad = not (finite and np.isfinite(metrics["loss/total"]))
        runaway = metrics["policy/ratio"] > self.config.ratio_threshold
        if runaway:
            self._warn(
                ratio=f"mean ratio {metrics['policy/ratio']:.2f} is above --ratio-threshold "
                f"{self.config.ratio_threshold:g}: minibatch skipped; a lower learning rate helps"
            )
        metrics |= {"not_finite": float(bad), "skipped": float(bad or runaway)}
        return (None if bad or runaway else gradient), metrics

    def _loss(self, packed: Packed, columns: list[Tensor]) -> tuple[Tensor, dict]:
        """Loss of one minibatch, and its metrics."""
        config = self.config
        old_logprobs, old_values, advantages, returns = columns  # (b, r) each
        logprobs, values, entropy = self.model(
            packed, temperature=config.temperature, with_entropy=True
        )
        policy, metrics = policy_loss(
            logprobs,
            old_logprobs,
            advantages,
            packed.mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            dual_clip=config.dual_clip,
        )
        value, value_metrics = value_loss(
            values, old_values, returns, packed.mask, cliprange_value=config.cliprange_value
        )
        total = policy + config.vf_coef * value
        totals = {"loss/total": total, "policy/entropy": masked_mean(entropy, packed.mask)}
        return total, {**metrics, **value_metrics, **totals}

    # ------------------------------------------------------------------ 8. statistics

    def statistics(self, rollout: Rollout, minibatches: list[dict[str, float]]) -> dict:
        """The step's metrics under TRL's names."""
        stats = step_statistics(rollout, minibatches)
        stats["objective/kl_coef"] = self.kl_controller.value
        if self.config.use_dynamic_kl:
            per_token = masked_mean(rollout.kls, rollout.mask).item()
            stats["objective/kl_per_token"] = per_token
        stats["ppo/learning_rate"] = self._learning_rate
        return stats

    def _warn(self, **messages: str) -> None:
        for name, message in messages.items():
            if name not in self._warned:
                self._warned.add(name)
                warnings.warn(message, stacklevel=3)

    def log_stats(self, stats: dict, batch: dict, scores: Sequence[float]) -> None:
        """Hand a step's scalars to `log`, with env/reward_mean and env/reward_std of the scores.

        `batch` may hold further columns of numbers; each is logged as env/<name>_mean.
        """
        row = {name: value for name, value in stats.items() if np.ndim(value) == 0}
        row["env/reward_mean"] = float(np.mean(scores))
        row["env/reward_std"] = float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0
        for name, column in batch.items():
            if len(column) and isinstance(column[0], (int, float)):
                row[f"env/{name}_mean"] = float(np.mean(column))
        if self.log is not None:
            self.log(self.steps_done, row)

    # ------------------------------------------------------------------ resume

    def state_dict(self) -> dict:
        """What resuming needs besides weights and optimizer state."""
        return {
            "steps_done": self.steps_done,
            "kl_coef": self.kl_controller.value,
            "running": self.running.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        self.steps_done = state["steps_done"]
        self.kl_controller.value = state["kl_coef"]
        self.running.load_state_dict(state["running"])


def token_lists(rows: Sequence) -> list[list[int]]:
    """Rows of token ids, be they lists or tensors, as lists of int."""
    return [row.tolist() if hasattr(row, "tolist") else list(row) for row in rows]


def fit_columns(tensor: Tensor, width: int) -> Tensor:
    """(b, r) cut or padded with 0 on the right to (b, width)."""
    spare = max(width - tensor.shape[1], 0)
    return torch.nn.functional.pad(tensor[:, :width], (0, spare))
