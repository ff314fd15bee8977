"""What a Mac does with this: run once, and send the file that it writes.

    python benchmarks/apple.py        a few minutes; needs 4 GB

A random Llama of the shape of SmolLM2-135M (30 layers, hidden 576, vocabulary 49,152), in float32
and in bfloat16: sampling with and without running ahead of Python, an update of SFT and a PPO step
with and without compiled code, at three batches; memory expected and measured. Nothing is
downloaded. The file holds the figures, the names of the processor and the system, and versions: no
user, no host, no folder. It runs on any device that MLX has, and says which.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402

import argparse  # noqa: E402
import importlib.metadata  # noqa: E402
import json  # noqa: E402
import platform  # noqa: E402
import statistics  # noqa: E402
import time  # noqa: E402
import warnings  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any  # noqa: E402

import memory_estimate  # noqa: E402
import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from command_line.memory_fit import usable_memory  # noqa: E402
from models.decoding import generate  # noqa: E402
from models.memory_estimate import (  # noqa: E402
    rollout_memory,
    shape_of,
    supervised_memory,
    trained_of,
)
from training.memory import set_memory_limit  # noqa: E402

SHAPE = memory_estimate.SHAPES["SmolLM2-135M"]
SMALL = (64, 128, 2, 2, 2, 512)  # for a look at whether it runs
PROMPT, RESPONSE = 64, 64  # tokens
BATCHES = (4, 16, 64)
REPEATS = 3
FILE = "apple.json"


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=FILE, help=f"the file to write ({FILE})")
    parser.add_argument("--small", action="store_true", help="a tiny model: does it run at all?")
    args = parser.parse_args(words)
    warnings.simplefilter("ignore")  # no response ends
    set_memory_limit(None)
    found: dict[str, Any] = {"machine": machine(), "cases": []}
    for dtype in ("float32", "bfloat16"):
        for batch in (2, 4) if args.small else BATCHES:
            for name, run in CASES.items():
                case = {"case": name, "dtype": dtype, "batch": batch}
                case |= attempt(run, dtype, batch, SMALL if args.small else SHAPE)
                found["cases"].append(case)
                print(line(case), flush=True)
    text = json.dumps(found, indent=2) + "\n"
    Path(args.output).write_text(text, encoding="utf-8")
    print(f"wrote {args.output}: please send it with an issue on the project's page")
    return 0


def machine() -> dict[str, Any]:
    """Device, processor, system and versions."""
    info = mx.device_info()
    kept = ("device_name", "architecture", "memory_size", "max_recommended_working_set_size")
    return {
        "device": str(mx.default_device()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "blas": fast_blas.told(),
        **{name: info[name] for name in kept if name in info},
        **{name: importlib.metadata.version(name) for name in ("mlx", "mlx-lm")},
    }


def line(case: dict[str, Any]) -> str:
    head = f"{case['dtype']:<9} {case['batch']:>3} x {PROMPT} + {RESPONSE}  {case['case']:<28}"
    if "error" in case:
        return f"{head} {case['error']}"
    return (
        f"{head} {case['tokens_per_second']:>9,.0f} tokens/s  {case['seconds']:.3g} s  "
        f"peak {case['peak_gb']:.2f} GB, expected {case['expected_gb']:.2f}"
    )


# ------------------------------------------------------------------------------ cases


def attempt(run: Callable, dtype: str, batch: int, shape: tuple[int, ...]) -> dict[str, Any]:
    """Seconds (the median of REPEATS after one to warm up), tokens a second, memory; or an error.

    `run` gives what is repeated, the tokens it goes through, and the memory expected.
    """
    try:
        mx.clear_cache()
        mx.reset_peak_memory()
        step, tokens, expected = run(dtype, batch, shape)
        if expected.total > usable_memory(None):
            return {"error": f"left out: {expected.total / 1e9:.2f} GB expected"}
        start = time.perf_counter()
        step()
        first, times = time.perf_counter() - start, []
        for _ in range(REPEATS):
            start = time.perf_counter()
            step()
            times.append(time.perf_counter() - start)
    except Exception as wrong:  # a machine that lacks something tells of the rest all the same
        return {"error": f"{type(wrong).__name__}: {str(wrong)[:200]}"}
    seconds = statistics.median(times)
    return {
        "seconds": seconds,
        "first_seconds": first,
        "tokens_per_second": tokens / seconds,
        "peak_gb": mx.get_peak_memory() / 1e9,
        "expected_gb": expected.total / 1e9,
    }


def prepared(dtype: str, shape: tuple[int, ...]):
    """(model with LoRA on q and v, its tuning, sizes, what is trained)."""
    model, config = memory_estimate.llama(shape)
    model.set_dtype(getattr(mx, dtype))
    mx.eval(model.parameters())
    tuning = memory_estimate.lora(model, ("q_proj", "v_proj"), -1)
    return model, tuning, shape_of(model, config, tuning), trained_of(model, tuning, "adam")


def prompts(batch: int, vocabulary: int, length: int = PROMPT) -> list[list[int]]:
    return memory_estimate.draw(np.random.default_rng(0), batch, length, vocabulary)


def sampling(ahead: bool) -> Callable:
    def run(dtype: str, batch: int, shape: tuple[int, ...]):
        model, _, sizes, trained = prepared(dtype, shape)

        def step() -> None:
            options = {"max_tokens": RESPONSE, "eos_ids": set(), "ahead": ahead}
            generate(model, prompts(batch, shape[-1]), **options)

        expected = rollout_memory(sizes, trained, batch, 1, PROMPT, RESPONSE, compared=False)
        return step, batch * RESPONSE, expected

    return run


def fine_tuning(dtype: str, batch: int, shape: tuple[int, ...]):
    model, tuning, sizes, trained = prepared(dtype, shape)
    update = memory_estimate.fine_tuner(model, tuning)
    length, batch = PROMPT + RESPONSE, min(batch, 16)
    rows = prompts(batch, shape[-1], length)
    expected = supervised_memory(sizes, trained, batch, length)
    return lambda: update(rows), batch * length, expected


def ppo(compile: bool) -> Callable:
    def run(dtype: str, batch: int, shape: tuple[int, ...]):
        model, tuning, sizes, trained = prepared(dtype, shape)
        rows = min(batch, 8)
        step = memory_estimate.improver(
            model,
            tuning,
            shape[-1],
            batch_size=batch,
            mini_batch_size=rows,
            max_new_tokens=RESPONSE,
            compile=compile,
        )
        expected = rollout_memory(sizes, trained, batch, rows, PROMPT, RESPONSE)
        asked = prompts(batch, shape[-1])
        return lambda: step(asked), batch * (PROMPT + RESPONSE), expected

    return run


CASES = {
    "sampling, ahead": sampling(True),
    "sampling, waiting": sampling(False),
    "SFT update": fine_tuning,
    "PPO step": ppo(False),
    "PPO step, compiled": ppo(True),
}


if __name__ == "__main__":
    sys.exit(main())
