"""What techniques.py runs for each seed: commands as a user would type them, and their figures.

Here rewards, the KL and the order of rows; techniques_models.py has what is read off the models.

Every function takes (folder of this seed, seed) and returns figures that JSON can hold. Rows are
those of the digits task with a noise of 0.4; the model is the embedded one. Curves are means over
`SMOOTHED` steps around each.
"""

import json
import random
import sys
from pathlib import Path

from digits_stages import ROOT, Stage, run

sys.path.insert(0, str(ROOT))
import fast_blas  # noqa: E402, F401  before MLX

import numpy as np  # noqa: E402

from reports.plot_style import running_mean, series  # noqa: E402
from run_folder.run import read_rows  # noqa: E402

STEPS, SMOOTHED, LAST = 30, 10, 10
TEXT, REWARD, PROMPTS = (f"{k}increasing_mult_2_" for k in ("", "reward_function_", "prompts_"))


# ------------------------------------------------------------------------------ commands


def make_data(place: Path, seed: int) -> None:
    if not (place / "data" / f"{PROMPTS}train.jsonl").exists():
        command(
            place,
            "python data/generate_digit_data.py --increasing --multiple-of 2 --num-samples 1000 "
            f"--noise 0.4 --kind text reward prompts --output-dir {place}/data --seed {seed}",
        )


def command(place: Path, line: str) -> None:
    place.mkdir(parents=True, exist_ok=True)
    run(Stage(line.split()[1], line), place / "log.txt")


def trained(place: Path, seed: int, name: str, line: str) -> list[dict]:
    """Metrics of a run, which is made unless it has ended before; its adapter is NAME.npz."""
    folder = place / name
    if not (folder / "summary.json").exists():
        data = "" if "--data " in line or "--train-file" in line else f"--data {place}/data "
        command(
            place,
            f"python {line} {data}--save-every 0 --save-file {place}/{name}.npz "
            f"--output-dir {folder} --overwrite --seed {seed}",
        )
    return read_rows(folder)


def ppo(
    place: Path, seed: int, name: str, flags: str, steps: int = STEPS, batch: int = 32
) -> list[dict]:
    base = "" if "--data-base" in flags else f"--data-base {PROMPTS} "
    return trained(
        place,
        seed,
        name,
        f"ppo_training.py --ground_truth_reward {base}--batch-size {batch} --num-steps {steps} "
        f"--eval-every 0 {flags}",
    )


def sft(place: Path, seed: int, name: str, flags: str) -> list[dict]:
    return trained(place, seed, name, f"sft.py --train --learning-rate 3e-3 {flags}")


def curve(rows: list[dict], metric: str) -> list[float]:
    return [round(float(v), 4) for v in running_mean(series(rows, metric)[1], SMOOTHED)]


def end(rows: list[dict], metric: str) -> float:
    """Mean over the last steps."""
    return float(np.mean(series(rows, metric)[1][-LAST:]))


# ------------------------------------------------------------------------------ rewards


def composite(place: Path, seed: int) -> dict:
    """Length of responses and true score, by the share of a reward for length; all four at .3."""
    kinds = {
        f"alpha {alpha}": f"--adlf-alpha {alpha} --score-range 0 1 --use-length-penalty "
        "--length-target 30"
        for alpha in (0.3, 0.7)
    }
    kinds["all four, alpha 0.3"] = (
        f"{kinds['alpha 0.3']} --use-coherence-reward --use-fluency-reward "
        "--use-faithfulness-reward"
    )
    found = {}
    for name, flags in {"alpha 0": "", **kinds}.items():
        rows = ppo(place, seed, f"composite_{name.replace(' ', '_').replace(',', '')}", flags, 40)
        found[name] = {
            "tokens": end(rows, "tokens/responses_len_mean"),
            "score": end(rows, "env/ground_truth_mean"),
            "kl": end(rows, "objective/kl"),
            "curve": curve(rows, "tokens/responses_len_mean"),
        }
    return found


def objectives(place: Path, seed: int) -> dict:
    """What each weight of --use-multi-objective buys, at alpha 1."""
    found = {}
    for weights in ("1 0 0", "0 1 0", "0 0 1", ".3 .3 .4"):
        fluency, faithfulness, quality = weights.split()
        rows = ppo(
            place,
            seed,
            f"objectives_{weights.replace(' ', '_')}",
            "--adlf-alpha 1 --score-range 0 1 --use-multi-objective "
            f"--fluency-weight {fluency} --faithfulness-weight {faithfulness} "
            f"--quality-weight {quality}",
        )
        names = {"quality": "external", "fluency": "fluency", "faithfulness": "faithfulness"}
        found[weights] = {
            **{name: end(rows, f"adlf/{metric}_mean") for name, metric in names.items()},
            "pareto": end(rows, "objectives/pareto"),
            "before": {n: series(rows, f"adlf/{m}_mean")[1][0] for n, m in names.items()},
        }
    return found


# ------------------------------------------------------------------------------ the KL


TARGETS = (0.08, 0.32)
KL_LAST, FIXED = 20, "fixed"


def dynamic_kl(place: Path, seed: int) -> dict:
    """KL per token at two targets four times apart, and with the coefficient as it begins."""
    found = {}
    for name in (*map(str, TARGETS), FIXED):
        if name == FIXED:
            rows = ppo(place, seed, "composite_alpha_0", "", 40)
        else:
            rows = ppo(place, seed, f"kl_{name}", f"--use-dynamic-kl --kl-target {name}", 120)
        _, values = series(rows, "objective/kl_per_token")
        if name == FIXED:  # not logged without the flag
            lengths = series(rows, "tokens/responses_len_mean")[1]
            values = series(rows, "objective/kl")[1] / lengths
        found[name] = {
            "kl": float(np.mean(values[-KL_LAST:])),
            "score": end(rows, "env/ground_truth_mean"),
            "coefficient": end(rows, "objective/kl_coef"),
            "curve": [round(float(v), 4) for v in running_mean(values, SMOOTHED)],
        }
    return found


# ------------------------------------------------------------------------------ curriculum


ORDERS = {  # name -> (flags, the column that stands for how easy a row is)
    "ordinary order": ("", None),
    "easy first": ("--use-curriculum --curriculum-by score", lambda easy, _: easy),
    "hard first": ("--use-curriculum --curriculum-by score", lambda easy, _: -easy),
    "shuffled": ("--use-curriculum --curriculum-by score", lambda _, chance: chance),
    "by loss": ("--use-curriculum --curriculum-by loss", None),
}


def ordered(place: Path, seed: int, base: str, name: str, easy) -> str:
    """Flags for a copy of the rows whose reward says how early they come; `easy(row)`."""
    value = ORDERS[name][1]
    if value is None:
        return f"--data {place}/data --data-base {base}"
    folder, chance = place / f"ordered_{base}{name.replace(' ', '_')}", random.Random(seed)
    folder.mkdir(exist_ok=True)
    for split in ("train", "valid", "test"):
        lines = (place / "data" / f"{base}{split}.jsonl").read_text("utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        made = [row | {"reward": value(easy(row), chance.random())} for row in rows]
        text = "".join(json.dumps(row) + "\n" for row in made)
        (folder / f"{base}{split}.jsonl").write_text(text, encoding="utf-8")
    return f"--data {folder} --data-base {base}"


def curriculum_sft(place: Path, seed: int) -> dict:
    """Validation loss over updates; easy is short."""
    found = {}
    for name, (flags, _) in ORDERS.items():
        data = ordered(place, seed, REWARD, name, lambda row: -len(row["text"].split()))
        rows = sft(
            place,
            seed,
            f"curriculum_sft_{name.replace(' ', '_')}",
            f"{data} --iters 200 --batch-size 16 --steps-per-eval 20 {flags}",
        )
        steps, losses = series(rows, "valid/loss")
        found[name] = {
            "lowest": float(losses.min()),
            "last": float(losses[-1]),
            "at_60": float(losses[list(steps).index(60)]),
            "steps": steps.tolist(),
            "curve": losses.tolist(),
        }
    return found


def curriculum_ppo(place: Path, seed: int) -> dict:
    """True score over steps; easy is a prompt that begins low, with room above it to rise into."""
    found = {}
    for name, (flags, _) in ORDERS.items():
        if name == "by loss":  # prompts of two numbers: all are of one kind
            continue
        data = ordered(place, seed, PROMPTS, name, lambda row: -int(row["prompt"].split()[-1]))
        rows = ppo(place, seed, f"curriculum_ppo_{name.replace(' ', '_')}", f"{data} {flags}")
        scores = series(rows, "env/ground_truth_mean")[1]
        found[name] = {
            "score": end(rows, "env/ground_truth_mean"),
            "mean": float(scores.mean()),
            "curve": curve(rows, "env/ground_truth_mean"),
        }
    return found
