"""Options of the group methods, under TRL's names where TRL has them."""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from errors import UserError

ScaleRewards = Literal["group", "batch", "none"]
Aggregation = Literal["sum_then_normalize", "normalize_then_sum"]
AdvantageEstimator = Literal["grpo", "rloo", "reinforce", "reinforce_baseline"]
LossType = Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"]
DPOLoss = Literal["sigmoid", "ipo"]
Level = Literal["token", "sequence"]

# Infinity is a value of some of these, and means none; NaN is not.
ABOVE_0 = (
    "epsilon epsilon_high delta max_grad_norm sapo_temperature_pos sapo_temperature_neg "
    "vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg temperature"
).split()
NOT_BELOW_0 = (
    "beta entropy_coef entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target "
    "missing_eos_penalty overlong_penalty pad_to_multiple top_k"
).split()
AT_LEAST_1 = (
    "num_steps batch_size mini_batch_size gradient_accumulation_steps ppo_epochs max_new_tokens "
    "ref_model_sync_steps max_resample"
).split()
# The KL coefficients that TRL starts from.
BETAS = {"rloo": 0.05, "online_dpo": 0.1}


def _option(default, help_text: str, *aliases: str):
    return field(default=default, metadata={"help": help_text, "aliases": aliases})


@dataclass
class GroupConfig:
    """Every option of the algorithms. docs/group.md says where a default differs from TRL's.

    Raises UserError for values that cannot work together.
    """

    num_steps: int = _option(
        60, "steps: responses to a batch of prompts, then their updates", "--steps"
    )
    batch_size: int = _option(
        64, "responses per step, a multiple of --num-generations (from 5 million weights on: 16)"
    )
    num_generations: int | None = _option(None, "responses per prompt (default: 8; online DPO 2)")
    mini_batch_size: int | None = _option(None, "responses per gradient; none: the batch")
    gradient_accumulation_steps: int = _option(1, "gradients summed up for one update")
    ppo_epochs: int = _option(1, "passes over a batch's responses; also --num-iterations")
    learning_rate: float = _option(1e-6, "of the optimizer made when none is given")
    max_grad_norm: float | None = _option(1.0, "clip the gradient's norm at every update")
    seed: int = _option(0, "seeds sampling and the order of minibatches")

    max_new_tokens: int = _option(32, "longest response, in tokens (from 5 million weights on: 64)")
    temperature: float = _option(1.0, "of sampling; logits are divided by it in every score too")
    top_k: int = _option(0, "sample among this many tokens; 0: all (filters bias the ratio)")
    top_p: float = _option(1.0, "sample among the tokens that make up this probability")
    min_p: float = _option(0.0, "drop tokens below this share of the most likely one")
    rollout_logprobs: bool = _option(
        True, "keep log-probabilities from sampling; no: a second forward pass"
    )

    advantage_estimator: AdvantageEstimator = _option("grpo", "what a response is compared with")
    scale_rewards: ScaleRewards = _option("group", "grpo: deviation that advantages are over")
    multi_objective_aggregation: Aggregation = _option(
        "sum_then_normalize", "grpo: how several rewards become one advantage"
    )
    reward_clip_range: list[float] | None = _option(None, "rloo: least and largest reward")
    normalize_advantages: bool = _option(False, "rloo: advantages to mean 0, deviation 1")
    beta: float | None = _option(
        None, "KL coefficient (default: 0; rloo 0.05; online DPO 0.1); at 0 no reference is run"
    )
    kl_in_reward: bool = _option(False, "grpo: KL comes off the reward, as in rloo, not the loss")
    use_bias_correction_kl: bool = _option(True, "the loss's KL times the ratio")

    loss_type: LossType = _option("dapo", "loss, of all estimators but rloo")
    importance_sampling_level: Level = _option("token", "ratio of each token, or one of a response")
    epsilon: float = _option(0.2, "ratio is clipped at 1 - this")
    epsilon_high: float | None = _option(
        None, "and at 1 + this (default: --epsilon); in cispo the bound itself (default: 5)"
    )
    delta: float | None = _option(None, "bound of the ratio where the advantage is negative")
    sapo_temperature_pos: float = _option(1.0, "sapo: of the gate for advantages above 0")
    sapo_temperature_neg: float = _option(1.05, "sapo: and of the others")
    vespo_k_pos: float = _option(2.0, "vespo: power of the weight for advantages from 0 on")
    vespo_lambda_pos: float = _option(3.0, "vespo: its decay")
    vespo_k_neg: float = _option(3.0, "vespo: power of the weight for advantages below 0")
    vespo_lambda_neg: float = _option(2.0, "vespo: its decay")
    top_entropy_quantile: float = _option(1.0, "train on this share of tokens, the most uncertain")
    entropy_coef: float = _option(0.0, "weight of the mean entropy, which is to grow")
    use_adaptive_entropy: bool = _option(False, "move --entropy-coef towards --entropy-target")
    entropy_target: float = _option(0.2, "entropy above which the coefficient rests, nats a token")
    entropy_coef_delta: float = _option(0.005, "its move after an update")
    entropy_coef_min: float = _option(0.0, "its least value")
    entropy_coef_max: float = _option(1.0, "its largest value")
    off_policy_mask_threshold: float | None = _option(
        None, "leave out responses with A < 0 whose mean of old - new is above this"
    )
    mask_truncated_completions: bool = _option(False, "do not train on responses without an end")

    sync_ref_model: bool = _option(False, "blend the policy into the reference from time to time")
    ref_model_mixup_alpha: float = _option(0.6, "the policy's share in the blend")
    ref_model_sync_steps: int = _option(512, "updates between blends")
    dynamic_sampling: bool = _option(False, "other prompts in place of groups of equal rewards")
    max_resample: int = _option(3, "at most so often a step")
    online_dpo: bool = _option(False, "two responses a prompt, the better one is chosen: DPO")
    dpo_loss: DPOLoss = _option("sigmoid", "loss of --online-dpo")

    missing_eos_penalty: float = _option(0.0, "taken from the reward of a response without EOS")
    overlong_buffer: int = _option(0, "tokens before the length limit in which a penalty grows")
    overlong_penalty: float = _option(1.0, "its size at the limit, with --overlong-buffer")
    pad_to_multiple: int | None = _option(None, "of lengths; none: 1 on the CPU, 16 on a GPU")
    compile: bool | None = _option(None, "mx.compile the update; none: on a GPU only")

    def __post_init__(self):
        if self.num_generations is None:
            self.num_generations = 2 if self.online_dpo else 8
        if self.mini_batch_size is None:
            self.mini_batch_size = self.batch_size // max(self.gradient_accumulation_steps, 1) or 1
        if self.beta is None:
            self.beta = BETAS.get("online_dpo" if self.online_dpo else self.advantage_estimator, 0)
        self._check_values()
        self._check_sizes()
        self._check_together()

    def _check_values(self):
        for name in AT_LEAST_1:
            if getattr(self, name) < 1:
                raise UserError(f"{_flag(name)}: must be at least 1")
        for name in ABOVE_0:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{_flag(name)}: {value} given, must be above 0")
        for name in NOT_BELOW_0:
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{_flag(name)}: {value} given, must be finite and not below 0")
        for name in ("top_p", "min_p", "ref_model_mixup_alpha"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{_flag(name)}: must be between 0 and 1")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise UserError(f"{_flag(name)}: {getattr(self, name)!r} is none of {known}")
        if not 0 < self.top_entropy_quantile <= 1:
            raise UserError("--top-entropy-quantile: a share above 0, up to 1")
        if not math.isfinite(self.temperature):
            raise UserError("--temperature: must be a number")
        limits = self.reward_clip_range
        if limits is not None and not (len(limits) == 2 and limits[0] < limits[1]):
            raise UserError("--reward-clip-range: the least reward and then the largest are needed")
        if self.entropy_coef_max < self.entropy_coef_min:
            raise UserError("--entropy-coef-max: must not be below --entropy-coef-min")
        if not 0 <= self.overlong_buffer <= self.max_new_tokens:
            raise UserError("--overlong-buffer: must be from 0 to --max-new-tokens")

    def _check_sizes(self):
        if self.num_generations < 2:
            raise UserError(
                f"--num-generations {self.num_generations}: a response is compared with the others "
                "to its prompt, so at least 2 are needed"
            )
        if self.batch_size % self.num_generations:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --num-generations "
                f"{self.num_generations}"
            )
        if self.batch_size % self.backward_batch_size:
            raise UserError(
                f"--batch-size {self.batch_size} is not a multiple of --mini-batch-size "
                f"{self.mini_batch_size} x --gradient-accumulation-steps "
                f"{self.gradient_accumulation_steps}"
            )

    def _check_together(self):
        if self.online_dpo and self.num_generations != 2:
            raise UserError("--online-dpo compares two responses a prompt: --num-generations 2")
        if self.online_dpo and self.mini_batch_size % 2:
            raise UserError("--online-dpo: --mini-batch-size must be even, as pairs stay together")
        if self.online_dpo and not self.beta:
            raise UserError("--online-dpo needs --beta above 0, the strength of its reference")
        if self.sync_ref_model and not self.beta:
            raise UserError("--sync-ref-model has no effect at --beta 0, where no reference is run")
        if self.kl_in_reward and self.multi_objective_aggregation == "normalize_then_sum":
            raise UserError("--kl-in-reward needs --multi-objective-aggregation sum_then_normalize")

    @property
    def loss_beta(self) -> float:
        """The coefficient of the KL in the loss."""
        return self.beta if self.advantage_estimator == "grpo" and not self.kl_in_reward else 0.0

    @property
    def reward_beta(self) -> float:
        """The coefficient of the KL that comes off the reward."""
        return 0.0 if self.online_dpo else self.beta - self.loss_beta

    @property
    def backward_batch_size(self) -> int:
        """Responses that one optimizer update sees."""
        return self.mini_batch_size * self.gradient_accumulation_steps

    @property
    def updates_per_step(self) -> int:
        return self.ppo_epochs * (self.batch_size // self.backward_batch_size)

    @property
    def prompts_per_step(self) -> int:
        return self.batch_size // self.num_generations


CHOICES = {
    "advantage_estimator": AdvantageEstimator,
    "scale_rewards": ScaleRewards,
    "multi_objective_aggregation": Aggregation,
    "loss_type": LossType,
    "importance_sampling_level": Level,
    "dpo_loss": DPOLoss,
}


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
