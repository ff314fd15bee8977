"""One table of the scripts that train or write models, for the tests of kills and faults, and for
whatever else has to hold for each of them. A training script that is not here fails a test.

``RUNS`` are runs of a second or two that use much of a script; ``SHORT`` touch few files, so that
every touch can be made to fail. Each writes below the folder that it is started in.
"""

import contextlib
import importlib
import io
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "data"


def words(text: str) -> list[str]:
    """A command line without quotes as words; DATA stands for the folder of sample data."""
    return [word.replace("DATA", str(DATA)) for word in text.split()]


@dataclass(frozen=True)
class Short:
    """A short run; `saved`: the file or folder that it writes its result to."""

    script: str
    line: list[str]
    saved: str = "out.npz"
    needs: str | None = None  # name of the SHORT run whose result lies there at the start


COMMON = "--output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 --save-every 2"
RUNS = {
    "sft": (
        "sft.py",
        words(
            f"--train --data DATA {COMMON} --iters 8 --batch-size 4 --lora-dropout 0.2 "
            "--gradient-accumulation-steps 2 --learning-rate 3e-3 --lr-schedule cosine "
            "--warmup-steps 2 --steps-per-eval 3 --val-batches 1 --save-best --sample-prompts 0 8 "
            "--use-curriculum"
        ),
    ),
    "reward": (
        "sft.py",
        words(
            f"--train --reward-model --data DATA --data-base reward_function_increasing_mult_2_ "
            f"{COMMON} --iters 6 --batch-size 8 --lora-dropout 0.2 --learning-rate 3e-3 "
            "--steps-per-eval 4 --val-batches 1 --normalize-samples 8"
        ),
    ),
    "preference": (
        "preference_training.py",
        words(
            f"--train --data DATA {COMMON} --iters 8 --batch-size 4 --loss-type sigmoid sft "
            "--gradient-accumulation-steps 2 --loss-weights 1 0.5 --learning-rate 3e-3 "
            "--lr-schedule cosine --warmup-steps 2 --steps-per-eval 3 --val-batches 1 --save-best "
            "--sample-prompts 0 8 --precompute-ref-log-probs"
        ),
    ),
    "group": (
        "group_training.py",
        words(
            f"--ground_truth_reward --data DATA {COMMON} --num-steps 6 --batch-size 8 "
            "--num-generations 4 --mini-batch-size 4 --ppo-epochs 2 --max-new-tokens 6 --beta 0.05 "
            "--dynamic-sampling --sync-ref-model --ref-model-sync-steps 3 --use-adaptive-entropy "
            "--entropy-target 5 --eval-every 3 --eval-prompts 4 --eval-samples 1"
        ),
    ),
    "rest": (
        "rest.py",
        words(
            f"--ground_truth_reward --data DATA {COMMON} --grow-steps 2 --samples-per-prompt 2 "
            "--quantiles 0.3 0.6 --iters 3 --batch-size 8 --gradient-accumulation-steps 2 "
            "--max-rows 12 --max-new-tokens 6 --lora-dropout 0.2 --learning-rate 3e-3 "
            "--lr-schedule cosine --warmup-steps 1 --start-from base --mix-data --eval-prompts 3 "
            "--eval-samples 1"
        ),
    ),
    "ppo": (
        "ppo_training.py",
        words(
            f"--ground_truth_reward --data DATA {COMMON} --num-steps 6 --batch-size 4 "
            "--mini-batch-size 2 --ppo-epochs 2 --max-new-tokens 8 --min-response-length 4 "
            "--adap-kl-ctrl --horizon 50 --init-kl-coef 0.2 --use-score-scaling --use-score-norm "
            "--value-head-init-std 0.1 --eval-every 3 --eval-prompts 4 --eval-samples 1 "
            "--use-curriculum --curriculum-by loss --adlf-alpha 0.3 --score-range 0 1 "
            "--use-coherence-reward --use-fluency-reward --use-faithfulness-reward"
        ),
    ),
}

FEW = (
    "--data DATA --output-dir run --save-file out.npz --lora-rank 1 --lora-layers 1 "
    "--lora-keys self_attn.q_proj --save-every 1 --keep-checkpoints 1 --batch-size 2"
)
LOOP = "--train --max-rows 8 --iters 2 --steps-per-eval 2 --val-batches 1"
SHORT = {
    "sft": Short("sft.py", words(f"{LOOP} {FEW}")),
    "reward": Short(
        "sft.py",
        words(f"--reward-model --data-base reward_function_increasing_mult_2_ {LOOP} {FEW}"),
    ),
    "ppo": Short(
        "ppo_training.py",
        words(
            f"--ground_truth_reward --num-steps 2 --max-new-tokens 4 --ppo-epochs 1 "
            f"--eval-every 2 --eval-prompts 2 --eval-samples 1 {FEW}"
        ),
    ),
    "preference": Short("preference_training.py", words(f"{LOOP} {FEW}")),
    "rest": Short(
        "rest.py",
        words(
            f"--ground_truth_reward --grow-steps 1 --samples-per-prompt 2 --quantiles 0.5 "
            f"--iters 2 --max-rows 4 --max-new-tokens 4 --eval-prompts 2 --eval-samples 1 {FEW}"
        ),
    ),
    "group": Short(
        "group_training.py",
        words(
            f"--ground_truth_reward --num-steps 2 --num-generations 2 --max-new-tokens 4 "
            f"--eval-every 2 --eval-prompts 2 --eval-samples 1 {FEW}"
        ),
    ),
    "sft resumed": Short("sft.py", words("--resume run --iters 3"), "out.npz", "sft"),
    "fuse": Short(
        "fuse.py", words("--adapter-file out.npz --save-path fused --run run"), "fused", "sft"
    ),
    "fuse again": Short(
        "fuse.py", words("--adapter-file out.npz --save-path fused --force"), "fused", "fuse"
    ),
}

TRAINED = [name for name, short in SHORT.items() if short.saved == "out.npz" and not short.needs]


def training_scripts() -> list[str]:
    """The scripts at the top that make a run folder: those with --resume."""
    return [file.name for file in sorted(ROOT.glob("*.py")) if "--resume " in help_of(file)]


def help_of(file: Path) -> str:
    """What a script says to --help; nothing for what is no script."""
    if "run_main(main" not in file.read_text(encoding="utf-8"):
        return ""
    script = importlib.import_module(file.stem)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        script.main(["--help"])
    return said.getvalue()
