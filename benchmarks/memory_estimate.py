"""Memory expected before the first step (models/memory_estimate.py) against MLX's own peak.

    python benchmarks/memory_estimate.py      about four minutes on a core; needs 3 GB

Two shapes, SmolLM2-135M's and a narrow one, each with two batches, in fine-tuning and in PPO: LoRA
on q and v, two steps on random weights and tokens, where no response ends early. The peak is
mx.get_peak_memory less what was held before the model. Writes results/memory_estimate.md, and exits
1 where one is off by more than 20%.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402, F401

import gc  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable, Mapping  # noqa: E402
from typing import Any  # noqa: E402

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
import numpy as np  # noqa: E402

from data_utils import TextRow, make_batch  # noqa: E402
from mlx_ppo_trainer import PPOConfig, PPOTrainer  # noqa: E402
from mlx_sft_trainer import LanguageModelTask, SupervisedTrainer  # noqa: E402
from models.actor_critic import ActorCritic, ValueHead  # noqa: E402
from models.lora import LoraConfig, add_lora  # noqa: E402
from models.memory_estimate import (  # noqa: E402
    Memory,
    rollout_memory,
    shape_of,
    supervised_memory,
    trained_of,
)
from models.trunk import frozen_below, hidden_size  # noqa: E402
from models.tuning import FullTuning, Tuning  # noqa: E402
from training.optimizers import build_optimizer  # noqa: E402

RESULTS = Path(__file__).resolve().parent / "results"
SHAPES = {  # D, I, blocks, heads, key heads, V
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49_152),
    "narrow, 12 blocks": (256, 1024, 12, 4, 4, 8_192),
}
CASES = {
    "SFT": ({"rows": 2, "length": 129}, {"rows": 8, "length": 65}),
    "PPO": (
        {"batch": 8, "rows": 4, "prompt": 32, "response": 32},
        {"batch": 16, "rows": 2, "prompt": 96, "response": 32},
    ),
}
ALLOWED = 0.2


def llama(shape: tuple[int, ...]) -> tuple[nn.Module, dict[str, Any]]:
    """(a random Llama, its config)."""
    from mlx_lm.models.llama import Model, ModelArgs

    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads "
    names += "num_key_value_heads vocab_size"
    config = {"model_type": "llama", "rms_norm_eps": 1e-5, "tie_word_embeddings": True}
    config |= dict(zip(names.split(), shape, strict=True))
    model = Model(ModelArgs.from_dict(config))
    model.freeze()
    model.eval()
    mx.eval(model.parameters())
    fast_blas.use_in(model)
    return model, config


def measure(
    method: str,
    shape: tuple[int, ...],
    case: Mapping[str, int],
    *,
    full: bool = False,
    keys: tuple[str, ...] = ("q_proj", "v_proj"),
    blocks: int = -1,
    checkpointed: bool = False,
) -> tuple[Memory, int]:
    """(what is expected, MLX's peak in bytes) of two steps; `full`: every weight, SFT alone."""
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model, config = llama(shape)
    tuning = FullTuning(model) if full else lora(model, keys, blocks)
    sizes, rng, vocabulary = shape_of(model, config, tuning), np.random.default_rng(0), shape[-1]
    trained = trained_of(model, tuning, "adam", checkpointed=checkpointed)
    mx.reset_peak_memory()
    if method == "SFT":
        expected = supervised_memory(sizes, trained, **case)
        step, count, length = fine_tuner(model, tuning, checkpointed), case["rows"], case["length"]
    else:
        kept = frozen_below(model) > 0
        expected = rollout_memory(sizes, trained, kept=kept, **case)
        count, length = case["batch"], case["prompt"]
        step = improver(
            model,
            tuning,
            vocabulary,
            checkpointed=checkpointed,
            batch_size=count,
            mini_batch_size=case["rows"],
            max_new_tokens=case["response"],
        )
    for _ in range(2):
        step(draw(rng, count, length, vocabulary))
    return expected, mx.get_peak_memory() - before


def lora(model: nn.Module, keys: tuple[str, ...], blocks: int) -> Tuning:
    return add_lora(model, LoraConfig(rank=8, keys=list(keys), num_layers=blocks))


def draw(rng: np.random.Generator, count: int, length: int, vocabulary: int) -> list[list[int]]:
    """Rows of tokens."""
    return rng.integers(2, vocabulary, (count, length)).tolist()


def fine_tuner(model, tuning: Tuning, checkpointed: bool = False) -> Callable[[list], Any]:
    """A function that makes an update on rows of tokens, every one of which counts."""
    task = LanguageModelTask(model, tuning)
    optimizer = build_optimizer("adam", 1e-5)
    trainer = SupervisedTrainer(task, optimizer, max_grad_norm=1.0, grad_checkpoint=checkpointed)

    def update(rows: list[list[int]]) -> None:
        trainer.step([make_batch([TextRow(row, [1] * len(row)) for row in rows])])

    return update


def improver(
    model, tuning: Tuning, vocabulary: int, *, checkpointed: bool = False, **config: Any
) -> Callable[[list], Any]:
    """A function that makes a PPO step of one epoch on prompts; `config` is PPOConfig's."""
    policy = ActorCritic(model, ValueHead(hidden_size(model)), tuning)
    never = {vocabulary}  # an id that is not drawn
    trainer = PPOTrainer(
        PPOConfig(ppo_epochs=1, **config),
        policy,
        None,
        None,
        build_optimizer("adam", 1e-5),
        eos_ids=never,
        grad_checkpoint=checkpointed,
    )

    def step(prompts: list[list[int]]) -> None:
        trainer.update(trainer.generate(prompts), [float(n) for n in range(len(prompts))])

    return step


def main() -> int:
    warnings.simplefilter("ignore")  # no response ends
    lines = ["| | batch | expected, MB | peak, MB | ratio | of it |", "|---|---|---|---|---|---|"]
    worst = 0.0
    for method, cases in CASES.items():
        for name, shape in SHAPES.items():
            for case in cases:
                expected, peak = measure(method, shape, case)
                ratio = expected.total / peak
                worst = max(worst, abs(ratio - 1))
                said = ", ".join(f"{key} {value}" for key, value in case.items())
                parts = ", ".join(f"{k} {v / 1e6:.1f}" for k, v in expected.terms.items() if v)
                lines.append(
                    f"| {method}, {name} | {said} | {expected.total / 1e6:.0f} | {peak / 1e6:.0f} "
                    f"| {ratio:.2f} | {expected.moment}: {parts} |"
                )
                print(lines[-1], flush=True)
    text = "\n".join(lines) + f"\n\nfloat32 on the CPU backend, mlx {mx.__version__}.\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "memory_estimate.md").write_text(text, encoding="utf-8")
    print(f"off by at most {worst:.0%}; {ALLOWED:.0%} is allowed")
    return worst > ALLOWED


if __name__ == "__main__":
    sys.exit(main())
