"""Options of PPO, under TRL's names where TRL has them."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from errors import UserError


def _option(default, help_text: str, *aliases: str):
    return field(default=default, metadata={"help": help_text, "aliases": aliases})


KLPenalty = Literal["kl", "abs", "mse", "full", "k1", "k2", "k3"]
# Infinity is a value of these: of a clip or a threshold it means none. NaN is not.
ABOVE_0 = (
    "cliprange cliprange_value ratio_threshold target kl_target horizon max_grad_norm"
).split()
NOT_BELOW_0 = (
    "init_kl_coef missing_eos_penalty overlong_penalty pad_to_multiple top_k value_head_init_std "
    "vf_coef"
).split()


@dataclass
class PPOConfig:
    """Every option of the algorithm. docs/ppo.md says where a default differs from TRL's.

    Raises UserError for values that cannot work together.
    """

    num_steps: int = _option(60, "PPO steps: rollout of a batch, then its updates", "--steps")
    batch_size: int = _option(64, "responses per step (from 5 million weights on: 16)")
    mini_batch_size: int | None = _option(None, "responses per gradient; none: the batch")
    gradient_accumulation_steps: int = _option(1, "gradients summed up for one update")
    ppo_epochs: int = _option(4, "passes over a batch's responses")
    learning_rate: float = _option(3e-3, "of the optimizer made when none is given")
    max_grad_norm: float | None = _option(1.0, "clip the gradient's norm at every update")
    seed: int = _option(0, "seeds sampling and the order of minibatches")

    max_new_tokens: int = _option(32, "longest response, in tokens (from 5 million weights on: 64)")
    min_response_length: int | None = _option(
        None, "draw each response's limit between this and --max-new-tokens"
    )
    temperature: float = _option(1.0, "of sampling; logits are divided by it in every score too")
    top_k: int = _option(0, "sample among this many tokens; 0: all (filters bias the KL)")
    top_p: float = _option(1.0, "sample among the tokens that make up this probability")
    min_p: float = _option(0.0, "drop tokens below this share of the most likely one")
    rollout_logprobs: bool = _option(
        True, "keep log-probabilities and values from sampling; no: a second forward pass"
    )

    gamma: float = _option(1.0, "discount of later rewards")
    lam: float = _option(0.95, "lambda of generalised advantage estimation")
    whiten_advantages: bool = _option(True, "advantages of a batch to mean 0, standard deviation 1")
    whiten_rewards: bool = _option(False, "per-token rewards to standard deviation 1, mean kept")
    cliprange: float = _option(0.2, "ratio is clipped to 1 +- this")
    cliprange_high: float | None = _option(None, "another upper clip: 1 + this")
    dual_clip: float | None = _option(None, "bound of the loss where the advantage is negative")
    cliprange_value: float = _option(0.2, "values move at most this far from the old ones")
    vf_coef: float = _option(0.1, "weight of the value loss")

    adap_kl_ctrl: bool = _option(False, "adapt the KL coefficient towards --target")
    init_kl_coef: float = _option(0.01, "KL coefficient at the start")
    kl_penalty: KLPenalty = _option("kl", "estimate of the KL per token")
    target: float = _option(6.0, "KL per response that the adaptive coefficient aims at, nats")
    horizon: float = _option(10000.0, "responses over which the coefficient adapts")
    use_dynamic_kl: bool = _option(
        False, "adapt the KL coefficient towards --kl-target, a KL per token"
    )
    kl_target: float = _option(
        0.1,
        "KL per token for --use-dynamic-kl, nats; its --horizon is 2 batches",
    )
    early_stopping: bool = _option(False, "stop a step's epochs at 1.5 times --target-kl")
    target_kl: float = _option(1.0, "policy KL for --early-stopping, nats per token")
    ratio_threshold: float = _option(10.0, "skip a minibatch whose mean ratio is above this")

    use_score_scaling: bool = _option(False, "divide scores by their running standard deviation")
    use_score_norm: bool = _option(False, "subtract their running mean too")
    score_clip: float | None = _option(None, "clip scores to +- this, after scaling")
    missing_eos_penalty: float = _option(0.0, "taken from the score of a response without EOS")
    overlong_buffer: int = _option(0, "tokens before the length limit in which a penalty grows")
    overlong_penalty: float = _option(1.0, "its size at the limit, with --overlong-buffer")

    value_head_init_std: float = _option(0.0, "of the value head's weights; 0: they start at 0")
    pad_to_multiple: int | None = _option(None, "of lengths; none: 1 on the CPU, 16 on a GPU")
    compile: bool | None = _option(None, "mx.compile the update; none: on a GPU only")

    def __post_init__(self):
        if self.mini_batch_size is None:
            self.mini_batch_size = self.batch_size // max(self.gradient_accumulation_steps, 1) or 1
        for name in (
            "num_steps",
            "batch_size",
            "mini_batch_size",
            "gradient_accumulation_steps",
            "ppo_epochs",
            "max_new_tokens",
        ):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')}: must be at least 1")
        self._check_signs()
        if self.batch_size % self.backward_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --mini-batch-size "
                f"{self.mini_batch_size} x --gradient-accumulation-steps "
                f"{self.gradient_accumulation_steps}"
            )
        shortest = self.min_response_length
        if shortest is not None and not 1 <= shortest <= self.max_new_tokens:
            raise UserError("--min-response-length: must be from 1 to --max-new-tokens")
        for name in ("gamma", "lam", "top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')}: must be between 0 and 1")
        if self.temperature <= 0 or not math.isfinite(self.temperature):
            raise UserError("--temperature: must be above 0 while training; greedy text has no KL")
        if self.cliprange_high is not None and self.cliprange_high < self.cliprange:
            raise UserError("--cliprange-high: must not be below --cliprange")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError("--dual-clip: must be above 1")
        adaptive = self.adap_kl_ctrl or self.use_dynamic_kl
        if adaptive and 0.2 * self.batch_size >= self.horizon:
            raise UserError("--horizon: must be above a fifth of --batch-size")
        if self.adap_kl_ctrl and self.use_dynamic_kl:
            raise UserError(
                "--adap-kl-ctrl and --use-dynamic-kl adapt the same coefficient, to a KL per "
                "response and per token; give one of them"
            )
        if self.score_clip is not None and self.score_clip <= 0:
            raise UserError("--score-clip: must be above 0")
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise UserError("--overlong-buffer: must be from 0 to --max-new-tokens")
        if self.use_score_norm and not self.use_score_scaling:
            raise UserError("--use-score-norm needs --use-score-scaling")

    def _check_signs(self):
        """Of single values; NaN is neither above nor below 0, and refused."""
        for name in ABOVE_0:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"--{name.replace('_', '-')}: {value} given, must be above 0")
        for name in NOT_BELOW_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(
                    f"--{name.replace('_', '-')}: {value} given, must be finite and not below 0"
                )
        if self.kl_penalty not in get_args(KLPenalty):
            modes = ", ".join(get_args(KLPenalty))
            raise UserError(f"--kl-penalty: {self.kl_penalty!r} is none of {modes}")

    @property
    def backward_batch_size(self) -> int:
        """Responses that one optimizer update sees."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def updates_per_step(self) -> int:
        return self.ppo_epochs * (self.batch_size // self.backward_batch_size)
