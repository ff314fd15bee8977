"""Whole DPO, KTO, ORPO and CPO runs against numbers from TRL 1.16.0; tests/oracles/README.md.

Two optimizer steps each, with a frozen copy as reference, with the adapter off, and without one.
Tolerance: 1e-5 of each array's largest number, float32. Adam divides by the root of the squared
gradient, so weights may differ by 3e-3 of a learning rate on top. Rewards and KTO's kl are small
differences of large sums: within 1e-6 times the larger of 1 and 10 beta.
"""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tiny import flat

from data_utils import PreferenceRow, UnpairedBatch, make_batch
from mlx_preference_tasks import PairTask, UnpairedTask
from mlx_sft_trainer import SupervisedTrainer
from models.interop import load_peft_adapter
from models.load import load_model
from models.reference import adapter_off, frozen_copy
from models.tuning import FullTuning
from padding import pad_rows
from rl.preference_losses import dpo_loss
from rl.reference_free_losses import cpo_loss, orpo_loss
from training.optimizers import build_optimizer

ORACLES = Path(__file__).resolve().parents[1] / "oracles"
DATA = np.load(ORACLES / "preference_step.npz", allow_pickle=False)
META = json.loads(str(DATA["meta"]))
CASES = {case["name"]: (f"s{i}", case) for i, case in enumerate(META["cases"])}
# TRL's CPO and ORPO average logits over prompts and padding, whose logits depend on the pad token.
OTHER_MEANS = {
    "cpo": ("logits/chosen", "logits/rejected"),
    "orpo": ("logits/chosen", "logits/rejected"),
}
# Of several passes TRL logs the mean of their means; here every token counts alike.
OF_TOKENS = ("entropy", "logits/chosen", "logits/rejected", "mean_token_accuracy")
# Small differences of large sums, which round otherwise where rows go through the model otherwise.
DIFFERENCES = ("rewards/", "kl", "log_odds_chosen")
TRAINER_ONLY = (
    "per_device_train_batch_size",
    "learning_rate",
    "max_grad_norm",
    "gradient_accumulation_steps",
)


def close(ours, theirs, what: str, relative: float = 1e-5, absolute: float = 0.0) -> None:
    ours, theirs = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    allowed = relative * max(np.abs(theirs).max(), 1e-2) + absolute
    assert np.abs(ours - theirs).max() <= allowed, (what, np.abs(ours - theirs).max(), allowed)


def our_name(name: str) -> str:
    name = name.replace("base_model.model.", "").replace(".default.weight", "")
    return name.replace("lora_A", "lora_a").replace("lora_B", "lora_b")


def make_task(case: dict):
    model = load_model(ORACLES / "ppo_step_model").model
    reference = None
    if case["lora"]:
        tuning = load_peft_adapter(model, ORACLES / "ppo_step_lora")
        reference = adapter_off(model, tuning)
    else:
        tuning = FullTuning(model)
        if case["reference"]:
            other = load_model(ORACLES / "ppo_step_model").model
            other.load_weights(str(ORACLES / "ppo_step_reference" / "model.safetensors"))
            reference = frozen_copy(other)
    options = {k: v for k, v in case["config"].items() if k not in TRAINER_ONLY}
    if case["trainer"] == "kto":
        kind = options.pop("loss_type", "kto")
        return UnpairedTask(
            model, tuning, loss_type=kind, loss_options=options, reference=reference
        )
    if case["trainer"] == "dpo":
        loss = partial(dpo_loss, **options)
    else:
        loss = partial({"cpo": cpo_loss, "orpo": orpo_loss}[case["trainer"]], **options)
    return PairTask(
        model, tuning, loss, reference=reference, nll_of_prompt=case["trainer"] == "orpo"
    )


def rows_of(micro: str, name: str) -> list[list[int]]:
    return [[int(t) for t in row if t >= 0] for row in DATA[f"{micro}/in/{name}"]]


def masks_of(micro: str, rows: list[list[int]], name: str = "prompt_length") -> list[list[int]]:
    starts = DATA[f"{micro}/in/{name}"].tolist()
    return [[0] * n + [1] * (len(row) - n) for row, n in zip(rows, starts, strict=True)]


def batch_of(micro: str, kind: str):
    if kind != "kto":
        sides = [rows_of(micro, side) for side in ("chosen", "rejected")]
        masks = [masks_of(micro, rows) for rows in sides]
        return make_batch(
            [
                PreferenceRow(responses, [0, 1], masks=[a, b])
                for *responses, a, b in zip(*sides, *masks, strict=True)
            ]
        )
    rows = rows_of(micro, "sequence")
    masks = masks_of(micro, rows)
    if f"{micro}/in/kl_sequence" in DATA:
        others = rows_of(micro, "kl_sequence")
        masks = masks + masks_of(micro, others, "kl_prompt_length")
        rows = rows + others
    tokens, lengths = pad_rows(rows)
    mask, _ = pad_rows(masks, 0, 1, np.float32)
    return UnpairedBatch(tokens, mask, lengths, DATA[f"{micro}/in/label"].astype(np.float32))


@pytest.mark.parametrize("name", CASES)
def test_whole_run(name):
    s, case = CASES[name]
    task = make_task(case)
    rate, beta = case["config"]["learning_rate"], case["config"].get("beta", 0.1)
    optimizer = build_optimizer(
        name="adamw", learning_rate=rate, steps=2, weight_decay=0.0, eps=META["adam_epsilon"]
    )
    trainer = SupervisedTrainer(task, optimizer, max_grad_norm=case["config"]["max_grad_norm"])
    gradients = recorded(trainer)
    each = case["micro"] // case["optimizer_steps"]
    logs, tokens = json.loads(str(DATA[f"{s}/logs"])), 0
    for step in range(case["optimizer_steps"]):
        names = [f"{s}/micro{step * each + i}" for i in range(each)]
        batches = [batch_of(micro, case["trainer"]) for micro in names]
        if step == 0:  # later, KTO's baseline needs the policy of that step
            check_forward_passes(task, case, names, batches)
        metrics = trainer.step(batches)
        tokens += metrics["num_tokens"]
        wanted = logs[step] | {"num_tokens": tokens}
        assert wanted["num_tokens"] == logs[step].get("num_tokens", tokens)
        for key, number in wanted.items():
            if key in ("learning_rate", "num_tokens", *OTHER_MEANS.get(case["trainer"], ())):
                continue
            if each > 1 and key in OF_TOKENS:
                continue
            if key == "nll_loss" and not number:
                assert key not in metrics  # of weight 0
                continue
            spare = 1e-6 * max(1, beta * 10) if key.startswith(DIFFERENCES) else 0
            close(metrics[key], number, f"step {step} {key}", absolute=spare)
    for key in (k for k in DATA.files if k.startswith(f"{s}/grad_first_optstep/")):
        close(gradients[0][our_name(key.split("/", 2)[2])], DATA[key], key)
    weights = flat(task.model.parameters())
    finals = [k for k in DATA.files if k.startswith(f"{s}/final/")]
    assert finals
    for key in finals:
        theirs = DATA[key]
        found = weights[our_name(key.split("/", 2)[2])]
        close(found.T if "lora_" in key else found, theirs, key, absolute=3e-3 * rate)


def recorded(trainer: SupervisedTrainer) -> list[dict]:
    """Gradients after clipping, as the optimizer gets them."""
    found, update = [], trainer.optimizer.update

    def recording(model, gradient):
        found.append({k: np.array(v.T if "lora_" in k else v) for k, v in flat(gradient).items()})
        update(model, gradient)

    trainer.optimizer.update = recording
    return found


def check_forward_passes(task, case: dict, names: list[str], batches: list) -> None:
    """Reference log-probabilities and the loss of each pass, before the weights move."""
    steps = case["config"].get("gradient_accumulation_steps", 1)
    for micro, batch in zip(names, batches, strict=True):
        if task.reference is not None:
            sums = task.reference_logprobs(batch).sum(axis=1)
            if case["trainer"] == "kto":
                close(sums, DATA[f"{micro}/out/ref_logps"], f"{micro} reference")
            else:
                close(sums[::2], DATA[f"{micro}/out/ref_chosen_logps"], f"{micro} reference")
                close(sums[1::2], DATA[f"{micro}/out/ref_rejected_logps"], f"{micro} reference")
        total, found = task.loss(task.arrays(batch))
        loss = (total / found["weight"]).item()
        theirs = DATA[f"{micro}/loss"]
        assert min(abs(loss - theirs), abs(loss / steps - theirs)) <= 1e-5 * max(abs(theirs), 1)


def test_every_algorithm_is_here():
    assert {case["trainer"] for _, case in CASES.values()} == {"dpo", "kto", "orpo", "cpo"}
