"""Whole runs of GRPO and RLOO against TRL 1.16.0's own trainers; tests/oracles/README.md.

Tolerance: 1e-5 of each array's largest number (of 0.1 for losses and metrics, which are sums that
nearly cancel), float32. Adam divides by the root of the squared gradient, so a gradient near 0 can
flip the sign of a whole learning rate (1e-3): weights may differ by 1e-5 of the largest, and by at
most 3e-3 of a learning rate's step on top.
"""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_group_trainer import GroupConfig, GroupTrainer
from models.interop import load_peft_adapter
from models.load import load_model
from models.policy import Policy
from models.tuning import FullTuning
from training.optimizers import build_optimizer

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
DATA = np.load(ORACLES / "group_step.npz", allow_pickle=False)
CASES = json.loads(str(DATA["meta"]))["cases"]
# TRL's names -> ours.
RENAMED = {"num_iterations": "ppo_epochs", "max_completion_length": "max_new_tokens"}


def config_of(case: dict) -> tuple[GroupConfig, list[float] | None]:
    """Our config of one of TRL's, and the weights of its rewards."""
    given = {RENAMED.get(name, name): value for name, value in case["config"].items()}
    weights = given.pop("reward_weights", None)
    accumulation = given.get("gradient_accumulation_steps", 1)
    rows = given.pop("per_device_train_batch_size")
    size = rows * given.pop("steps_per_generation", accumulation)
    estimator = "rloo" if case["trainer"] == "rloo" else "grpo"
    given = {"rollout_logprobs": False, "advantage_estimator": estimator} | given
    if isinstance(given.get("reward_clip_range"), list):
        given["reward_clip_range"] = [float(x) for x in given["reward_clip_range"]]
    return GroupConfig(**given, batch_size=size, mini_batch_size=rows), weights


def make_trainer(case: dict, config: GroupConfig) -> GroupTrainer:
    model = load_model(ORACLES / "ppo_step_model").model
    reference = None
    if case["lora"]:
        tuning = load_peft_adapter(model, ORACLES / "ppo_step_lora")
    else:
        tuning = FullTuning(model)
        if case["reference"]:
            reference = load_model(ORACLES / "ppo_step_model").model
            reference.load_weights(str(ORACLES / case["reference"] / "model.safetensors"))
    optimizer = build_optimizer("adamw", config.learning_rate, eps=1e-5, weight_decay=0.0, steps=9)
    return GroupTrainer(config, Policy(model, tuning), reference, optimizer=optimizer, eos_ids={2})


def our_name(name: str) -> str:
    name = name.removeprefix("base_model.model.").replace(".default.weight", "")
    name = name.replace("lora_A.weight", "lora_a").replace("lora_B.weight", "lora_b")
    return "model." + name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def close(ours, theirs, what: str, floor: float = 1e-2, absolute: float = 0.0) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    assert ours.shape == theirs.shape, what
    allowed = 1e-5 * max(np.abs(theirs).max(initial=0), floor) + absolute
    assert np.abs(ours - theirs).max(initial=0) <= allowed, (what, np.abs(ours - theirs).max())


def rows_of(name: str) -> list[list[int]]:
    return [[int(t) for t in row if t >= 0] for row in DATA[name]]


class Recorder:
    """Replaces the order of rows by TRL's, and keeps the first gradient and all passes' metrics."""

    def __init__(self, trainer: GroupTrainer, root: str):
        self.trainer, self.first, self.passes = trainer, None, []
        self.rows, self.generation = DATA[f"{root}/micro/rows"], DATA[f"{root}/micro/generation"]
        update, optimise = trainer.optimizer.update, trainer.optimise

        def updating(model, gradient):
            if self.first is None:
                self.first = {k: np.array(v) for k, v in tree_flatten(gradient)}
            update(model, gradient)

        def optimising(rollout):
            self.rollout = rollout
            found = optimise(rollout)
            self.passes += found
            return found

        trainer.optimizer.update, trainer.optimise = updating, optimising

    def use(self, generation: int) -> None:
        rows = self.rows[self.generation == generation]
        epochs = rows.reshape(self.trainer.config.ppo_epochs, -1)
        self.trainer.minibatch_order = lambda epoch: epochs[epoch]


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda i: CASES[i]["name"])
def test_run_equals_trl(number):
    case, root = CASES[number], f"s{number}"
    config, weights = config_of(case)
    trainer = make_trainer(case, config)
    recorder = Recorder(trainer, root)
    stats = []
    for generation in sorted(set(DATA[f"{root}/micro/generation"].tolist())):
        place = f"{root}/gen{generation}"
        recorder.use(generation)
        stats.append(
            trainer.update(
                rollout_of(trainer, place), DATA[f"{place}/in/rewards_per_func"], weights=weights
            )
        )
        check_rollout(recorder.rollout, place)
    check_losses(case, config, recorder, root)
    check_first_gradient(recorder, root)
    check_logs(case, config, recorder, stats, root)
    check_weights(trainer, root)


def rollout_of(trainer: GroupTrainer, place: str):
    from rl.rollouts import Rollout

    responses = rows_of(f"{place}/in/responses")
    return Rollout(rows_of(f"{place}/in/queries"), responses, [row[-1] == 2 for row in responses])


def check_rollout(rollout, place: str) -> None:
    close(np.array(rollout.advantages)[:, 0], DATA[f"{place}/out/advantages"], "advantages")
    mask = DATA[f"{place}/out/completion_mask"].astype(bool)
    counted = np.array(rollout.mask) > 0
    assert counted.sum() == mask.sum()
    for ours, theirs in (("logprobs", "old_per_token"), ("ref_logprobs", "ref_per_token")):
        if f"{place}/out/{theirs}_logps" in DATA.files:
            found = np.array(getattr(rollout, ours))[counted]
            close(found, DATA[f"{place}/out/{theirs}_logps"][mask], ours)


def check_losses(case, config, recorder: Recorder, root: str) -> None:
    divided = 1 if case["trainer"] == "rloo" else config.gradient_accumulation_steps
    ours = np.array([found["loss"] for found in recorder.passes]) / divided
    close(ours, DATA[f"{root}/micro/loss"], "loss", floor=0.1)


def check_first_gradient(recorder: Recorder, root: str) -> None:
    prefix = f"{root}/grad_first_optstep/"
    for name in (name for name in DATA.files if name.startswith(prefix)):
        theirs = DATA[name].T if "lora_" in name else DATA[name]
        # A gradient is a sum of terms of the largest gradient's size.
        close(recorder.first[our_name(name[len(prefix) :])], theirs, name, absolute=1e-6)


# Of the step here, of an update there; or a number of the schedule and of TRL's bookkeeping.
OF_A_STEP = {"num_tokens", "learning_rate", "step_time", "train_loss", "loss", "entropy_coef"}


def check_logs(case, config, recorder: Recorder, stats: list[dict], root: str) -> None:
    logs = json.loads(str(DATA[f"{root}/logs"]))[: case["optimizer_steps"]]
    a_step = len(logs) // len(stats)
    for place, row in enumerate(logs):
        passes = recorder.passes[place * config.gradient_accumulation_steps :]
        passes = passes[: config.gradient_accumulation_steps]
        step = stats[place // a_step]
        for name, theirs in row.items():
            if name in OF_A_STEP:
                continue
            if name == "grad_norm":
                ours = passes[-1]["grad_norm"]
            elif name in passes[0] and name not in ("kl",) or name == "kl" and config.loss_beta:
                ours = np.mean([found[name] for found in passes])
            else:
                ours = step[name]
            close(ours, theirs, (name, place), floor=0.1)
    found = [s["num_tokens"] for s in stats]
    assert found == [row["num_tokens"] for row in logs if "num_tokens" in row][: len(found)]


def check_weights(trainer: GroupTrainer, root: str) -> None:
    prefix = f"{root}/final/"
    ours = dict(tree_flatten(trainer.model.trainable_parameters()))
    names = [name for name in DATA.files if name.startswith(prefix)]
    assert len(names) == len(ours)
    for name in names:
        theirs = DATA[name].T if "lora_" in name else DATA[name]
        close(ours[our_name(name[len(prefix) :])], theirs, name, absolute=3e-6)
    assert all(mx.isfinite(array).all().item() for array in ours.values())
