"""The digits pipeline as the commands that a user would type, for the demo and the benchmark."""

import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Stage:
    """One command. `run` names its run folder, where it has one."""

    name: str
    command: str  # as a user types it in the project's root, "python" in front
    run: str | None = None


def base_stages(folder: str, seed: int = 0) -> list[Stage]:
    """Data, SFT, reward model, both fused. Noisy rows leave PPO something to improve."""
    return [
        Stage(
            "data",
            "python data/generate_digit_data.py --increasing --multiple-of 2 --num-samples 4000 "
            f"--noise 0.4 --kind text reward prompts --output-dir {folder}/data --seed {seed}",
        ),
        Stage(
            "SFT",
            f"python sft.py --train --data {folder}/data --iters 100 --batch-size 32 "
            f"--learning-rate 3e-3 --save-file {folder}/sft_lora.npz --output-dir {folder}/sft "
            f"--seed {seed}",
            f"{folder}/sft",
        ),
        Stage(
            "reward model",
            f"python sft.py --reward-model --train --test --data {folder}/data "
            "--data-base reward_function_increasing_mult_2_ --epochs 8 --batch-size 32 "
            "--learning-rate 5e-3 --warmup-steps 30 --lr-schedule linear --steps-per-report 100 "
            f"--steps-per-eval 500 --save-file {folder}/reward_lora.npz "
            f"--output-dir {folder}/reward --seed {seed}",
            f"{folder}/reward",
        ),
        fuse("fuse", f"{folder}/sft_lora.npz", f"{folder}/sft_model"),
        fuse("fuse reward model", f"{folder}/reward_lora.npz", f"{folder}/reward_model"),
    ]


def fuse(name: str, adapter: str, target: str, model: str | None = None) -> Stage:
    base = f"--model {model} " if model else ""
    return Stage(name, f"python fuse.py {base}--adapter-file {adapter} --save-path {target}")


def ppo_stage(name: str, folder: str, flags: str, seed: int = 0) -> Stage:
    """PPO from the fused SFT model; `name` is also the name of what it writes."""
    return Stage(
        name,
        f"python ppo_training.py --model {folder}/sft_model {flags} --data {folder}/data "
        f"--data-base prompts_increasing_mult_2_ --save-file {folder}/{name}.npz "
        f"--output-dir {folder}/{name} --seed {seed}",
        f"{folder}/{name}",
    )


GROUND_TRUTH = "--ground_truth_reward"


def learned(folder: str) -> str:
    return f"--reward_model {folder}/reward_model --true-score"


def run(stage: Stage, log: Path | None = None, stdin: str | None = None) -> float:
    """Run a stage in the project's root; seconds. Output goes to the terminal, or to `log`.

    Raises SystemExit with the stage's own status when it fails.
    """
    words = shlex.split(stage.command)
    assert words[0] == "python"
    start = time.monotonic()
    options = {"cwd": ROOT, "input": stdin, "text": True}
    command = [sys.executable, *words[1:]]
    if log is None:
        done = subprocess.run(command, **options)
    else:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"$ {stage.command}\n")
            file.flush()
            done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, **options)
    if done.returncode:
        where = f"; see {log}" if log else ""
        print(f"error: stage {stage.name!r} ended with {done.returncode}{where}", file=sys.stderr)
        raise SystemExit(done.returncode)
    return time.monotonic() - start


def summary(run_folder: str | Path) -> dict:
    return json.loads((ROOT / run_folder / "summary.json").read_text(encoding="utf-8"))


def true_score(evaluation: dict) -> tuple[float, float]:
    """(true score, count of numbers) of sampled texts, of one evaluation on held-out prompts."""
    return evaluation["eval/sampled/ground_truth"], evaluation["eval/sampled/numbers"]
