"""mlx-lm-lora's DPO and GRPO loops; a worker of preference_speed.py and group_step.py.

Arguments: ``dpo MODEL PAIRS`` or ``grpo MODEL``. Runs in the environment of
requirements-mlx-lm-lora.txt. Its own loops run; its report, once a call, is where a call ends. What
its command would set is set: LoRA of rank 8, Adam; for DPO the base is loaded a second time as the
reference. It has no gradient clipping. DPO takes a random batch at every step; here each batch once
a call, so that all sides see the same tokens.
"""

import fast_blas  # noqa: F401  the BLAS of our side

import json
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx_lm.tuner.callbacks import TrainingCallback
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load
from mlx_lm_lora.trainer import dpo_trainer, grpo_trainer
from side_by_side import Answers

BATCH, RATE = 4, 1e-4
PROMPTS, SAMPLES, TOKENS, PROMPT_TOKENS, FIRST_WORD = 4, 8, 24, 16, 3


class Turns(TrainingCallback):
    """A call whenever the parent asks for one; `numbers` go along."""

    def __init__(self, answers: Answers, numbers: dict):
        self.answers, self.numbers = answers, numbers
        answers.wait()

    def on_train_loss_report(self, info: dict) -> None:
        self.answers.done(self.numbers | {"loss": info["train_loss"]})
        self.answers.wait()


def load_lora(model: str, keys: list[str] | None):
    """(model with fresh adapters, tokenizer)."""
    network, tokenizer = load(model)
    network.freeze()
    settings = {"rank": 8, "scale": 4.0, "dropout": 0.0} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(network, len(network.layers), settings)
    return network, tokenizer


def options(kind: type, steps: int, **own):
    """Training arguments that report every `steps` and save nothing."""
    return kind(
        batch_size=BATCH,
        iters=10**9,
        steps_per_report=steps,
        steps_per_save=10**9,
        adapter_file=str(Path(tempfile.mkdtemp()) / "adapters.safetensors"),
        **own,
    )


def dpo(model: str, pairs: str) -> None:
    answers = Answers()
    network, tokenizer = load_lora(model, None)
    reference = load(model)[0]
    reference.freeze()
    rows = [json.loads(line) for line in Path(pairs).read_text(encoding="utf-8").splitlines()]
    data = []
    for row in rows:
        sides = {n: tokenizer.encode(row["prompt"] + row[n]) for n in ("chosen", "rejected")}
        start = len(tokenizer.encode(row["prompt"]))
        lengths = {f"{name}_prompt_length": start for name in sides}
        ends = {name: ids + [tokenizer.eos_token_id] for name, ids in sides.items()}
        data.append(ends | lengths)
    batches = dpo_trainer.iterate_dpo_batches(data, BATCH, 1024, train=True)
    dpo_trainer.iterate_dpo_batches = lambda **_: batches
    if mx.default_device().type == mx.DeviceType.cpu:  # it asks for a GPU's limit
        mx.set_wired_limit, mx.device_info = print, lambda: {"max_recommended_working_set_size": 0}
    tokens = sum(len(row["chosen"]) + len(row["rejected"]) for row in data)
    dpo_trainer.train_dpo(
        network,
        reference,
        optim.Adam(learning_rate=RATE),
        data,
        args=options(dpo_trainer.DPOTrainingArgs, len(data) // BATCH),
        training_callback=Turns(answers, {"tokens": tokens}),
    )


def even(prompts, completions, answer, types) -> list[float]:
    """The share of even words."""
    rows = [[int(word[1:]) for word in text.split() if word[1:].isdigit()] for text in completions]
    return [sum(i % 2 == 0 for i in row) / max(len(row), 1) for row in rows]


def grpo(model: str) -> None:
    answers = Answers()
    network, tokenizer = load_lora(model, ["self_attn.q_proj", "self_attn.v_proj"])
    random = np.random.default_rng(0)
    ids = random.integers(FIRST_WORD, 512, (400, PROMPT_TOKENS)).tolist()
    grpo_trainer.train_grpo(
        network,
        None,
        tokenizer,
        optim.Adam(learning_rate=RATE),
        [(row, [1], " ".join(f"w{i}" for i in row), "") for row in ids],
        reward_funcs=[even],
        args=options(
            grpo_trainer.GRPOTrainingArgs,
            1,
            group_size=SAMPLES,
            beta=0.0,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
            max_completion_length=TOKENS,
        ),
        end_answer_token="",
        training_callback=Turns(answers, {"tokens": PROMPTS * SAMPLES * TOKENS}),
    )


if __name__ == "__main__":
    {"dpo": dpo, "grpo": grpo}[sys.argv[1]](*sys.argv[2:])
