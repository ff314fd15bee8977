"""Two rounds of feedback by a simulated person: true score after each, by method and seed.

    python benchmarks/feedback_rounds.py [--seeds 0 1 2 3 4] [--noise 0.1]

Of two samples of a policy the person prefers the one with the higher true score and, at the rate
of the noise, the other one. A round has 150 pairs. A reward model learns from all pairs so far; PPO
and ReST follow it, from the embedded model on. DPO goes on from its adapter with the new pairs.
Each method samples its second round from its own policy. Runs lie below runs/feedback_rounds/.
"""

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fast_blas  # noqa: E402, F401  before MLX

import mlx.core as mx  # noqa: E402

from models.adapter_files import load_adapter  # noqa: E402
from models.decoding import generate  # noqa: E402
from models.load import load_model  # noqa: E402
from rewards.digits import digits_score  # noqa: E402

FOLDER = ROOT / "runs/feedback_rounds"
RESULTS = ROOT / "benchmarks/results/feedback_rounds.json"
PAIRS, ROUNDS = 150, 2
METHODS = ("reward model + PPO", "reward model + ReST", "DPO")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--noise", type=float, default=0.1)
    args = parser.parse_args()
    found = []
    for seed in args.seeds:
        shutil.rmtree(FOLDER / str(seed), ignore_errors=True)
        found.append(Rounds(seed, args.noise).run())
        RESULTS.write_text(json.dumps({"noise": args.noise, "seeds": found}, indent=1) + "\n")
    print(table(found))


class Rounds:
    """All methods with one seed."""

    def __init__(self, seed: int, noise: float):
        self.seed, self.noise, self.folder = seed, noise, FOLDER / str(seed)
        self.folder.mkdir(parents=True)
        self.prompts = prompts_of("train")
        self.random = np.random.default_rng(seed)

    def run(self) -> dict:
        base = {"true": self.measured(None, None)["true"]}
        first = self.labelled(None, "pairs_1", 1)
        found = {"seed": self.seed, "base": base, "agreement": self.agreement()}
        taste = self.reward_model([first], "taste_1", 30)
        for method, learn in zip(METHODS, (self.ppo, self.rest, self.dpo), strict=True):
            name = learn.__name__
            policy = learn(f"{name}_1", taste, first, None)
            rows = [self.measured(policy, taste)]
            second = self.labelled(policy, f"{name}_pairs_2", 2)
            again = taste
            if learn != self.dpo:
                again = self.reward_model([first, second], f"{name}_taste_2", 60)
            policy = learn(f"{name}_2", again, second, policy)
            rows.append(self.measured(policy, again) | {"by the first": self.learned(taste)})
            found[method] = rows
            print(self.seed, method, rows, flush=True)
        return found

    # ------------------------------------------------------------------ the person

    def labelled(self, policy: Path | None, name: str, number: int) -> Path:
        """150 pairs of this policy, chosen by the person."""
        rows, seed = [], 1000 * self.seed + 100 * number
        while len(rows) < PAIRS:
            texts = sampled(policy, self.prompts, 2, seed := seed + 1)
            for prompt, one, other in zip(self.prompts, texts[::2], texts[1::2], strict=True):
                gain = digits_score(prompt + one) - digits_score(prompt + other)
                # Of two equals the person prefers none.
                if gain and readable(one) and readable(other) and len(rows) < PAIRS:
                    best = gain > 0
                    best ^= self.random.random() < self.noise
                    chosen, rejected = (one, other) if best else (other, one)
                    rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return write(self.folder / f"{name}.jsonl", rows)

    def agreement(self) -> dict[str, float]:
        """Of the person with the truth, and with a second one of the same noise, on 150 pairs."""
        rows = read(self.folder / "pairs_1.jsonl")
        right = [
            digits_score(r["prompt"] + r["chosen"]) > digits_score(r["prompt"] + r["rejected"])
            for r in rows
        ]
        # Whether a second person chooses rightly; the two agree where both do, or neither.
        second = self.random.random(len(rows)) >= self.noise
        same = [a == b for a, b in zip(right, second, strict=True)]
        return {"truth": float(np.mean(right)), "second person": float(np.mean(same))}

    # ------------------------------------------------------------------ methods

    def reward_model(self, pairs: list[Path], name: str, iters: int) -> Path:
        words = ["--reward-model", "--train", "--train-file", *pairs, "--batch-size", 16]
        words += ["--validation-split-percentage", 20, "--iters", iters, "--learning-rate", 2e-3]
        return self.trained("sft.py", words, name)

    def ppo(self, name: str, taste: Path, pairs: Path, before: Path | None) -> Path:
        words = ["--reward-model", taste, "--true-score", "--init-kl-coef", 0.3]
        return self.trained("ppo_training.py", [*words, "--num-steps", 50, "--eval-every", 0], name)

    def rest(self, name: str, taste: Path, pairs: Path, before: Path | None) -> Path:
        return self.trained("rest.py", ["--reward-model", taste, "--true-score"], name)

    def dpo(self, name: str, taste: Path, pairs: Path, before: Path | None) -> Path:
        words = ["--train", "--train-file", pairs, "--batch-size", 16, "--iters", 30]
        words += ["--validation-split-percentage", 20, "--learning-rate", 1e-3]
        words += [] if before is None else ["--resume-adapter-file", before]
        return self.trained("preference_training.py", words, name)

    def trained(self, script: str, words: list, name: str) -> Path:
        made = self.folder / f"{name}.npz"
        run(
            script,
            *words,
            "--seed",
            self.seed,
            "--save-file",
            made,
            "--output-dir",
            made.with_suffix(""),
        )
        return made

    # ------------------------------------------------------------------ figures

    def measured(self, policy: Path | None, taste: Path | None) -> dict[str, float]:
        """Mean true score, learned score and length of 8 answers to each prompt of the test set."""
        prompts = prompts_of("test")
        texts = sampled(policy, prompts, 8, 77)
        rows = [
            {"prompt": prompt, "completion": text}
            for prompt, text in zip([p for p in prompts for _ in range(8)], texts, strict=True)
        ]
        readable_rows = [row for row in rows if readable(row["completion"])]
        write(self.folder / "answers.jsonl", readable_rows)
        scores = [digits_score(row["prompt"] + row["completion"]) for row in rows]
        found = {
            "true": float(np.mean(scores)),
            "numbers": float(np.mean([len(text.split()) for text in texts])),
        }
        return found if taste is None else found | {"learned": self.learned(taste)}

    def learned(self, taste: Path) -> float:
        """The reward model's mean score of the answers that were measured last."""
        scored = self.folder / "scored.jsonl"
        words = ["--input", self.folder / "answers.jsonl", "--reward-model", taste]
        run("score.py", *words, "--output", scored, "--force")
        return float(np.mean([row["score"] for row in read(scored)]))


def sampled(adapter: Path | None, prompts: list[str], samples: int, seed: int) -> list[str]:
    """Texts of a policy, those to one prompt adjoining."""
    loaded = load_model()
    if adapter is not None:
        load_adapter(loaded, str(adapter))
    loaded.model.eval()
    made = generate(
        loaded.model,
        [loaded.tokenizer.encode(prompt) for prompt in prompts],
        max_tokens=32,
        eos_ids=loaded.eos_ids,
        key=mx.random.key(seed),
        samples=samples,
    )
    texts = (loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses)
    return [f" {text.strip()}" for text in texts]


def readable(text: str) -> bool:
    """Whether a text makes a record: it says something, and has no NUL in it."""
    return bool(text.strip()) and "\0" not in text


def prompts_of(split: str) -> list[str]:
    rows = read(ROOT / f"data/increasing_mult_2_{split}.jsonl")
    return [" ".join(row["text"].split()[:2]) for row in rows]


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(script: str, *words) -> None:
    line = [sys.executable, str(ROOT / script), *map(str, words)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(line)}\n{done.stderr}")


def table(found: list[dict]) -> str:
    """Mean and worst seed of the true score, and mean of the learned one, by method and round."""
    base = [one["base"]["true"] for one in found]
    lines = [f"embedded model: {np.mean(base):.3f}, worst {min(base):.3f}"]
    for method in METHODS:
        for number in range(ROUNDS):
            rows = [one[method][number] for one in found]
            true, learned = ([row[key] for row in rows] for key in ("true", "learned"))
            numbers = np.mean([row["numbers"] for row in rows])
            lines.append(
                f"{method}, round {number + 1}: true {np.mean(true):.3f}, worst {min(true):.3f}, "
                f"learned {np.mean(learned):.2f}, numbers {numbers:.1f}"
            )
    for name in ("truth", "second person"):
        values = [one["agreement"][name] for one in found]
        lines.append(f"agreement with the {name}: {np.mean(values):.3f}, {values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
