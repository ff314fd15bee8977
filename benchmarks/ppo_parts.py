"""Where the time of a PPO step goes, and how much of it the model's bare passes need.

    python benchmarks/ppo_parts.py            about a minute

The model and sizes of ppo_step.py. Bare passes are what no PPO step can do without, written with
mlx-lm's model and nothing else: decoding with a KV cache, one forward pass for the reference, and a
forward and backward pass of cross-entropy for each epoch, logits for response tokens alone. "Main
thread" is Python and the building of graphs; MLX computes in a thread of its own.
"""

import sys

if "--worker" in sys.argv:
    import fast_blas  # noqa: F401

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from side_by_side import Samples, Worker, interleave, ratio, spread, summary
from tables import machine, save, shown, table
from tiny_llama import make_model

SIZES = {"8x16": (8, 16), "16x24": (16, 24)}
STAGES = ("rollout", "reward", "policy", "reference", "advantages", "update", "statistics")
BARE = ("decode", "forward", "backward")
WORK = BARE[:2] + BARE[2:] * 4  # what one step needs: a backward pass for each epoch


# ---- the worker's side -------------------------------------------------------------------------


def whole_step(trainer, batch_size: int) -> dict[str, float]:
    """`generate` and `update` in stages; processor seconds of each, and of the main thread."""
    import mlx.core as mx
    from mlx_worker import random_queries, score

    seconds = dict.fromkeys(STAGES, 0.0)

    def timed(stage: str, function: Callable, *arguments):
        start = time.process_time()
        result = function(*arguments)
        seconds[stage] += time.process_time() - start
        return result

    def reference(rollout) -> None:
        trainer.score_reference(rollout)
        mx.eval(rollout.ref_logprobs, rollout.kls)

    thread = time.thread_time()
    queries = random_queries(np.random.default_rng(trainer.steps_done), batch_size)
    rollout = timed("rollout", trainer.generate, queries)
    scores = timed("reward", lambda: [score(response) for response in rollout.responses])
    timed("policy", trainer.prepare, rollout, scores)
    timed("policy", trainer.score_policy, rollout)
    timed("reference", reference, rollout)
    timed("advantages", trainer.compute_rewards, rollout)
    timed("advantages", trainer.compute_advantages, rollout)
    minibatches = timed("update", trainer.optimise, rollout)
    stats = timed("statistics", trainer.statistics, rollout, minibatches)
    timed("statistics", trainer.finish, stats)
    return seconds | {"main_thread": time.thread_time() - thread}


def bare_passes(folder: str, batch_size: int, tokens: int) -> dict[str, Callable]:
    """The passes of BARE as functions, on a model of their own with the same adapter."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import load
    from mlx_worker import PROMPT_TOKENS, random_queries

    plain, _ = load(folder)
    policy, _ = load(folder)
    policy.freeze()
    keys = ["self_attn.q_proj", "self_attn.v_proj"]
    linear_to_lora_layers(policy, 4, {"rank": 8, "scale": 4.0, "dropout": 0.0, "keys": keys})
    prompts = mx.array(random_queries(np.random.default_rng(0), batch_size))
    texts = mx.random.randint(3, 512, (batch_size, PROMPT_TOKENS + tokens))

    def decode() -> None:
        cache, inputs = make_prompt_cache(policy), prompts
        for _ in range(tokens):
            inputs = mx.random.categorical(policy(inputs, cache=cache)[:, -1])[:, None]
            mx.eval(inputs)

    def cross_entropy(model) -> mx.array:
        hidden = model.model(texts[:, :-1])[:, PROMPT_TOKENS - 1 :]  # (B, R, D)
        logits = model.lm_head(hidden)
        return nn.losses.cross_entropy(logits, texts[:, PROMPT_TOKENS:], reduction="mean")

    gradient = nn.value_and_grad(policy, cross_entropy)
    return {
        "decode": decode,
        "forward": lambda: mx.eval(cross_entropy(plain)),
        "backward": lambda: mx.eval(gradient(policy)),
    }


def worker(folder: str) -> None:
    from mlx_worker import make_trainer
    from side_by_side import serve

    warnings.filterwarnings("ignore")  # responses reach their limit on purpose
    calls = {}
    for size, (batch_size, tokens) in SIZES.items():
        trainer = make_trainer(folder, batch_size, tokens)
        calls[f"{size} whole"] = partial(whole_step, trainer, batch_size)
        for name, function in bare_passes(folder, batch_size, tokens).items():
            calls[f"{size} {name}"] = function
    serve(calls)


# ---- the parent's side -------------------------------------------------------------------------


def add_up(samples: Samples) -> list[dict]:
    """The bare passes of one step, turn by turn, as samples of one more call."""
    turns = range(len(samples["whole"]))
    keys = ("cpu", "wall")
    return [{key: sum(samples[part][i][key] for part in WORK) for key in keys} for i in turns]


def measure(folder: Path, repeats: int) -> list[dict]:
    """A row for each size."""
    rows = []
    with Worker(sys.executable, "ppo_parts.py", "--worker", folder) as running:
        for size in SIZES:
            calls = {name: (running, f"{size} {name}") for name in ("whole", *BARE)}
            samples = interleave(calls, repeats)
            samples["bare"] = add_up(samples)
            shares = {
                part: spread([turn[part] / turn["cpu"] for turn in samples["whole"]])
                for part in (*STAGES, "main_thread")
            }
            times = {key: ratio(samples, "whole", "bare", key) for key in ("cpu", "wall")}
            rows.append(
                {"size": size, **summary(samples), "shares": shares, "times_the_bare": times}
            )
    return rows


def report(rows: list[dict]) -> str:
    header = [
        "responses x tokens",
        *(f"{stage}, %" for stage in STAGES),
        "main thread, %",
        "whole step, CPU s",
        "bare passes, CPU s",
        "whole / bare, CPU",
    ]
    return table(
        header,
        [
            [
                row["size"],
                *(
                    f"{100 * row['shares'][part]['median']:.1f}"
                    for part in (*STAGES, "main_thread")
                ),
                shown(row["whole"]["cpu"]),
                shown(row["bare"]["cpu"]),
                shown(row["times_the_bare"]["cpu"], 2),
            ]
            for row in rows
        ],
    )


def headline(result: dict) -> list[list[str]]:
    """Rows of the table of all benchmarks."""
    return [
        [
            f"PPO step, {row['size'].replace('x', ' responses of ')} tokens: "
            "the model's bare passes",
            shown(row["whole"]["cpu"], unit=" s"),
            shown(row["bare"]["cpu"], unit=" s"),
            shown(row["times_the_bare"]["cpu"], 2, unit=" x the time"),
        ]
        for row in result["rows"]
    ]


def main() -> None:
    if "--worker" in sys.argv:
        worker(sys.argv[-1])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(make_model(Path(folder)), repeats)
    save("ppo_parts", {"machine": machine(), "rows": rows}, report(rows))


if __name__ == "__main__":
    main()
