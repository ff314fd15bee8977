"""Runs docs/feedback.md word for word, pressing the keys of a person who keeps to the rule.

    python benchmarks/feedback.py

Of two rows the one is chosen of which more numbers are even and rise, and none where both are as
good; one row alone is good if three quarters of it are. runs/feedback/ is emptied first.
"""

import json
import os
import re
import shutil
import sys
import time
from pathlib import Path

import pexpect

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fast_blas  # noqa: E402, F401  before MLX

from rewards.digits import digits_score  # noqa: E402

FOLDER = ROOT / "runs/feedback"
GOOD = 0.75
INTERACTIVE = "python talk_to_model.py --temp 1"
WIDE = (50, 400)  # rows, columns: no reply is wrapped


def commands(document: Path = ROOT / "docs/feedback.md") -> list[str]:
    """The shell commands of the walkthrough, in order, less those with a placeholder."""
    blocks = re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [line for line in lines if "MODEL" not in line]


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    for command in commands():
        if command == INTERACTIVE:
            continue
        print(f"\n$ {command}", flush=True)
        started = time.monotonic()
        child = start(command)
        asks = "--rate" in command or "label.py --" in command and "--report" not in command
        pairs = "--compare" in command or "--samples 1" not in command
        last = rate(child, pairs) if asks else wait(child)
        print(f"{last}\n({time.monotonic() - started:.0f} s)")
    for name in ("ppo", "ppo_2", "label_ppo"):
        print(f"{name}: {course(FOLDER / name / 'metrics.jsonl')}")
    for name in (None, "policy", "rest", "dpo", "policy_2", "label_policy", "kto"):
        score, numbers = true_score(FOLDER / f"{name}.npz" if name else None)
        print(f"{name or 'embedded model'}: true score {score:.2f}, {numbers:.1f} tokens")


def start(command: str) -> pexpect.spawn:
    environment = {**os.environ, "NO_COLOR": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    child = pexpect.spawn(
        "/bin/sh",
        ["-c", command],
        cwd=ROOT,
        env=environment,
        timeout=600,
        encoding="utf-8",
        dimensions=WIDE,
    )
    child.delaybeforesend = None
    return child


def wait(child: pexpect.spawn) -> str:
    """Let it end; returns the end of what it has written."""
    child.expect(pexpect.EOF)
    child.close()
    if child.exitstatus:
        sys.exit(child.before)
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", child.before).strip().split("\r\n")
    return "\n".join(line.split("\r")[-1] for line in lines if not line.startswith("next:"))


def rate(child: pexpect.spawn, pairs: bool) -> str:
    """Press a key for every question until the prompts are used up."""
    prompt = ""
    while True:
        found = child.expect([r"> ([0-9 ]+)\r\n", r"skip \(s\)\?", pexpect.EOF])
        if found == 2:
            return child.before.strip().split("\n")[-1]
        if found == 0:
            prompt = child.match[1]
            continue
        child.send(choice(prompt, child.before) if pairs else label(prompt, child.before))


def label(prompt: str, shown: str) -> str:
    reply = shown.strip().splitlines()[0]
    return "g" if digits_score(f"{prompt} {reply}") >= GOOD else "b"


def choice(prompt: str, shown: str) -> str:
    rows = [line.split("│") for line in shown.splitlines() if "│" in line]
    left, right = (digits_score(f"{prompt} {cell}") for cell in rows[1])
    return "s" if left == right else "l" if left > right else "r"


def true_score(adapter: Path | None) -> tuple[float, float]:
    """(mean true score, mean tokens) of 8 sampled replies to each prompt of the test set."""
    import mlx.core as mx

    from models.adapter_files import load_adapter
    from models.decoding import generate
    from models.load import load_model

    loaded = load_model()
    if adapter is not None:
        load_adapter(loaded, str(adapter))
    loaded.model.eval()
    prompts = (FOLDER / "test_prompts.txt").read_text(encoding="utf-8").split("\n")[:-1]
    made = generate(
        loaded.model,
        [loaded.tokenizer.encode(prompt) for prompt in prompts],
        max_tokens=32,
        eos_ids=loaded.eos_ids,
        key=mx.random.key(0),
        samples=8,
    )
    texts = [loaded.tokenizer.decode(r, skip_special_tokens=True) for r in made.responses]
    rows = [prompt for prompt in prompts for _ in range(8)]
    scores = [digits_score(f"{p} {text}") for p, text in zip(rows, texts, strict=True)]
    lengths = [len(r) for r in made.responses]
    return sum(scores) / len(scores), sum(lengths) / len(lengths)


def course(file: Path) -> str:
    """Learned and true score at the beginning and the end of a run."""
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "objective/kl" in row]
    parts = []
    for name in (
        "env/ground_truth_mean",
        "env/reward_model_mean",
        "env/numbers_mean",
        "objective/kl",
    ):
        values = [row[name] for row in rows]
        parts.append(f"{name} {values[0]:.2f} -> {sum(values[-5:]) / 5:.2f}")
    return ", ".join(parts)


if __name__ == "__main__":
    main()
