"""The whole job on the embedded model: what `make demo` runs.

Every stage is a command that is printed first; what it writes goes to demo_run/.
"""

import shutil
import sys
import time

from digits_stages import (
    GROUND_TRUTH,
    ROOT,
    Stage,
    base_stages,
    fuse,
    learned,
    ppo_stage,
    run,
    summary,
    true_score,
)

FOLDER = "demo_run"
MARK = ".made-by-make-demo"  # only a folder with this file in it is deleted
PROMPTS = ("8 20", "4 6", "30 32 40")


def stages() -> list[Stage]:
    return [
        *base_stages(FOLDER),
        ppo_stage("ppo", FOLDER, GROUND_TRUTH),
        ppo_stage("ppo_learned", FOLDER, learned(FOLDER)),
        fuse("fuse PPO", f"{FOLDER}/ppo.npz", f"{FOLDER}/ppo_model", f"{FOLDER}/sft_model"),
    ]


def main() -> None:
    if len(sys.argv) > 1:
        sys.exit("error: the demo takes no arguments; docs/sequential_digits.md has the commands")
    start_afresh()
    started = time.monotonic()
    seconds = {}
    for number, stage in enumerate(stages(), 1):
        say(f"[{number}/{len(stages()) + 1}] {stage.name}", stage.command)
        seconds[stage.name] = run(stage)
    chat = f"python talk_to_model.py --model {FOLDER}/ppo_model --temp 0 --max-tokens 20"
    lines = "\\n".join(PROMPTS)
    say(f"[{len(stages()) + 1}/{len(stages()) + 1}] chat", f"printf '{lines}\\n' | {chat}")
    run(Stage("chat", chat), stdin="".join(f"{prompt}\n" for prompt in PROMPTS))
    report(seconds, time.monotonic() - started)


def start_afresh() -> None:
    folder = ROOT / FOLDER
    if folder.exists():
        if not (folder / MARK).exists():
            sys.exit(f"error: {folder}: exists and was not made by the demo; move it away")
        shutil.rmtree(folder)
    folder.mkdir()
    (folder / MARK).touch()


def say(title: str, command: str) -> None:
    bold, dim, plain = ("\x1b[1m", "\x1b[2m", "\x1b[0m") if sys.stdout.isatty() else ("",) * 3
    print(f"\n{bold}{title}{plain}\n{dim}$ {command}{plain}", flush=True)


def report(seconds: dict[str, float], total: float) -> None:
    """The table, where everything lies, and what to try next."""
    ppo, by_model, reward = (
        summary(f"{FOLDER}/{name}") for name in ("ppo", "ppo_learned", "reward")
    )
    rows = [("after", "true score", "numbers", "KL, nats", "seconds")]
    before = true_score(ppo["evaluation"]["first"][0])
    rows.append(("SFT on noisy rows", *show(before, 0.0, seconds["SFT"])))
    for name, done, key in (
        ("PPO, ground truth", ppo, "ppo"),
        ("PPO, learned reward", by_model, "ppo_learned"),
    ):
        after = true_score(done["evaluation"]["last"][0])
        rows.append((name, *show(after, done["kl"], seconds[key])))
    print("\nTrue score of sampled texts, on prompts that were never trained on (best: 1):\n")
    for row in rows:
        print(
            "  "
            + "".join(cell.ljust(22) if i == 0 else cell.rjust(12) for i, cell in enumerate(row))
        )
    pearson = reward["heldout/pearson"]
    print(
        "\nReward model: correlation with the true score on held-out rows "
        f"{pearson:.3f} (Pearson), {seconds['reward model']:.0f} s of training."
    )
    print(f"All of it took {total:.0f} s.\n")
    print("Plots:")
    for plot in sorted((ROOT / FOLDER).glob("*/plots/*.png")):
        print(f"  {plot.relative_to(ROOT)}")
    print(f"""
Everything lies in {FOLDER}/: the data, a run folder for each training (options, metrics, samples,
checkpoints), adapters (*.npz) and the fused models sft_model, reward_model and ppo_model.

Next (python: .venv/bin/python, or any with requirements.txt installed):
  python talk_to_model.py --model {FOLDER}/ppo_model --compare {FOLDER}/sft_model
  docs/sequential_digits.md goes through the same steps one by one
  data/README.md lists the record formats for data of your own""")


def show(score: tuple[float, float], kl: float, seconds: float) -> tuple[str, ...]:
    return f"{score[0]:.3f}", f"{score[1]:.1f}", f"{kl:.1f}", f"{seconds:.0f}"


if __name__ == "__main__":
    main()
