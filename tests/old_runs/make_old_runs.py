"""Make what this folder holds, with the scripts of an older commit that is checked out elsewhere.

    PYTHONPATH=. python tests/old_runs/make_old_runs.py OLD_CHECKOUT

Each run is made twice: stopped half-way by SIGINT (its folder is kept), and to its end (its weights
are kept in end/). `machine.json` says what computed them: another processor rounds otherwise.
"""

import fast_blas  # isort: skip

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
ADAPTERS = {
    "lora.npz": "--iters 2",
    "lora.safetensors": "--iters 2",
    "lora_folder": "--iters 2",
    "dora.npz": "--iters 2 --fine-tune-type dora",
    "prompt.npz": "--iters 2 --prompt-tuning --num-prompt-tokens 3",
    "reward.npz": "--iters 2 --reward-model --data-base reward_function_increasing_mult_2_",
}
TINY = "--lora-rank 2 --lora-layers 1"
SFT = (
    f"--train {TINY} --iters 6 --save-every 2 --keep-checkpoints 1 --batch-size 4 "
    "--learning-rate 3e-3 --steps-per-eval 3 --val-batches 1 --gradient-accumulation-steps 2 "
    "--lora-dropout 0.2"
)
RUNS = {
    "sft": ("sft.py", f"{SFT} --lr-schedule cosine --warmup-steps 2"),
    "reward_model": (
        "sft.py",
        f"{SFT} --reward-model --data-base reward_function_increasing_mult_2_",
    ),
    "preference_reward_model": (
        "sft.py",
        f"{SFT} --reward-model --data-base preference_increasing_mult_2_",
    ),
    "ppo": (
        "ppo_training.py",
        f"--reward_model reward.npz --true-score {TINY} --num-steps 4 --save-every 1 "
        "--keep-checkpoints 1 --batch-size 8 --mini-batch-size 4 --gradient-accumulation-steps 2 "
        "--ppo-epochs 2 --max-new-tokens 10 --min-response-length 4 --adap-kl-ctrl --horizon 50 "
        "--init-kl-coef 0.2 --use-score-scaling --use-score-norm --value-head-init-std 0.1 "
        "--eval-every 2 --eval-prompts 4 --eval-samples 1 --missing-eos-penalty 0.5",
    ),
}
# Run in the old checkout: one update more than the half, then the signal that Ctrl-C sends.
STOPPED = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import mlx_ppo_trainer, mlx_sft_trainer
def stopping(owner, inner):
    calls = []
    def step(self, *words, **options):
        calls.append(1)
        if len(calls) == {after}:
            os.kill(os.getpid(), signal.SIGINT)
        return inner(self, *words, **options)
    owner.step = step
for owner in (mlx_ppo_trainer.PPOTrainer, mlx_sft_trainer.SupervisedTrainer):
    stopping(owner, owner.step)
sys.argv = {argv!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""
AFTER = {"sft": 3, "reward_model": 3, "preference_reward_model": 3, "ppo": 2}


def machine() -> dict[str, str]:
    """What the rounding of matrix products depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = dict(re.split(r"\s*:\s*", line, maxsplit=1) for line in lines if ":" in line)
    flags = " ".join(sorted(facts.get("flags", "").split()))
    return {
        "processor": facts.get("model name", platform.processor()),
        "flags": hashlib.sha256(flags.encode()).hexdigest()[:16],
        "blas": fast_blas.NAME or "",
        "mlx": importlib.metadata.version("mlx"),
    }


def run(work: Path, words: list[str], status: int = 0) -> None:
    done = subprocess.run([sys.executable, *words], cwd=work, capture_output=True, text=True)
    assert done.returncode == status, (words, done.stdout, done.stderr)


def main() -> None:
    old = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "data").symlink_to(old / "data")  # --data is "data" where it is left out
        for name, words in ADAPTERS.items():
            adapter = "" if "prompt" in words else TINY
            line = f"--train {adapter} {words} --learning-rate 1e-2 --output-dir scratch"
            line += f" --steps-per-eval 0 --overwrite --save-file {name}"
            run(work, [str(old / "sft.py"), *line.split()])
        run(work, [str(old / "fuse.py"), "--adapter-file", "lora.npz", "--save-path", "fused"])
        shutil.rmtree(work / "scratch")
        for name, (script, line) in RUNS.items():
            words = [*line.split(), "--output-dir", name, "--save-file", f"{name}.npz"]
            run(work, [str(old / script), *words])
            (work / "end").mkdir(exist_ok=True)
            shutil.rmtree(work / name)
            for file in [*work.glob(f"{name}.npz"), *work.glob(f"{name}.*_head.safetensors")]:
                file.rename(work / "end" / file.name)
            code = STOPPED.format(
                root=str(old), after=AFTER[name], argv=[str(old / script), *words]
            )
            run(work, ["-c", code], 128 + signal.SIGINT)
        (work / "data").unlink()
        for path in work.iterdir():
            if path.is_dir():
                (path / ".lock").unlink(missing_ok=True)
            target = HERE / path.name
            if target.is_dir():
                shutil.rmtree(target)
            (shutil.copytree if path.is_dir() else shutil.copy)(path, target)
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=old, capture_output=True, text=True, check=True
    ).stdout.strip()
    about = {"commit": commit, "machine": machine()}
    (HERE / "machine.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
