"""Small runs of the scripts of the PyTorch baseline."""

import shutil
from pathlib import Path

from baseline_setup import DIGITS, ROOT, torch
from files import without_times
from pytorch_models import load_model as load_torch
from pytorch_ppo_training import main as ppo_main
from pytorch_sft import main as sft_main

from run_folder.run import read_rows

MODEL = str(DIGITS.relative_to(ROOT))


SMALL = ["--iters", "4", "--batch-size", "8", "--val-batches", "2", "--steps-per-eval", "2"]


PPO = [
    "--num-steps",
    "4",
    "--batch-size",
    "8",
    "--max-new-tokens",
    "10",
    "--eval-samples",
    "1",
    "--ground-truth-reward",
]


def sft(folder, *words: str) -> Path:
    """A small training of its own in `folder`; its run folder."""
    sft_main(["--train", "--output-dir", str(folder), *SMALL, *words])
    return Path(folder)


def ppo(folder, *words: str) -> Path:
    ppo_main(["--output-dir", str(folder), *PPO, *words])
    return Path(folder)


def losses(folder) -> list[dict]:
    """The rows of metrics, without times."""
    return [without_times(row) for row in read_rows(folder)]


def other_base(folder: Path, factor: float = 1.1) -> Path:
    """The embedded model with one matrix multiplied, as transformers writes it."""
    model = load_torch(str(DIGITS)).model
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight.mul_(factor)
    model.save_pretrained(folder)
    for file in (*DIGITS.glob("*token*"), DIGITS / "config.json"):
        shutil.copyfile(file, folder / file.name)
    return folder
