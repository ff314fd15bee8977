"""Whether a long run stays flat: 2,000 PPO steps on the embedded model, memory and open files.

    python benchmarks/long_run.py [--steps 2000]     exit status 1 where something grew

About two minutes on two idle cores.

It starts ppo_training.py and asks the system about that process from outside: resident size from
`ps`, open files from /proc or `lsof`.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WARM = 200  # steps after which memory has to stay where it is: caches are filled, shapes seen
ALLOWED = 1.05  # of the resident size at WARM steps
EVERY = 50  # steps between samples
LINE = (
    "--ground_truth_reward --batch-size 8 --mini-batch-size 4 --ppo-epochs 2 --max-new-tokens 12 "
    "--adap-kl-ctrl --use-score-scaling --eval-every 250 --eval-prompts 16 --eval-samples 1 "
    "--save-every 50 --samples-per-step 1 --steps-per-report 250"
)


@dataclass
class Sample:
    """What the system says of the process after so many steps."""

    step: int
    resident_mb: float
    open_files: int
    seconds: float


def resident_mb(pid: int) -> float:
    done = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, text=True)
    return int(done.stdout) * 1024 / 1e6


def open_files(pid: int) -> int:
    folder = Path(f"/proc/{pid}/fd")
    if folder.exists():
        return len(os.listdir(folder))
    done = subprocess.run(["lsof", "-p", str(pid)], capture_output=True, text=True)
    return len(done.stdout.splitlines()) - 1


def steps_done(metrics: Path) -> int:
    """The step of the last row; the row's own first entry."""
    if not metrics.exists():
        return 0
    with open(metrics, "rb") as file:
        file.seek(max(0, metrics.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return int(lines[-1].split(b":")[1].split(b",")[0]) if lines else 0


def watch(process: subprocess.Popen, metrics: Path) -> list[Sample]:
    """A sample every EVERY steps until the process has ended."""
    samples, started = [], time.monotonic()
    while process.poll() is None:
        try:
            size, files = resident_mb(process.pid), open_files(process.pid)
        except (ValueError, OSError):  # it has ended meanwhile
            break
        latest = Sample(steps_done(metrics), size, files, time.monotonic() - started)
        if latest.step >= (samples[-1].step + EVERY if samples else EVERY):
            samples.append(latest)
            show(latest)
        time.sleep(0.25)
    return samples


def show(sample: Sample) -> None:
    print(
        f"{sample.step:>6}  {sample.resident_mb:>11.1f}  {sample.open_files:>10}  "
        f"{sample.seconds:>7.0f}",
        flush=True,
    )


def verdict(samples: list[Sample]) -> bool:
    """Print what grew between WARM steps and the end; whether that is within bounds."""
    after = [sample for sample in samples if sample.step >= WARM]
    if len(after) < 2:
        print(f"too few samples after step {WARM} to say anything")
        return False
    first, last = after[0], after[-1]
    largest = max(after, key=lambda sample: sample.resident_mb)
    growth = last.resident_mb / first.resident_mb - 1
    more = last.open_files - first.open_files
    print(
        f"resident size from step {first.step} to {last.step}: {first.resident_mb:.1f} MB to "
        f"{last.resident_mb:.1f} MB ({growth:+.1%}; largest {largest.resident_mb:.1f} MB at step "
        f"{largest.step}); open files {first.open_files} to {last.open_files}"
    )
    return last.resident_mb <= ALLOWED * first.resident_mb and more <= 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="PPO steps (default: 2000)")
    steps = parser.parse_args().steps
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [
            sys.executable,
            str(ROOT / "ppo_training.py"),
            *LINE.split(),
            "--num-steps",
            str(steps),
            "--data",
            str(ROOT / "data"),
            "--output-dir",
            str(run),
            "--save-file",
            str(Path(folder) / "weights.npz"),
        ]
        print("python ppo_training.py", *command[2:-4])
        print("  step  resident MB  open files  seconds")
        with open(Path(folder) / "log", "w+", encoding="utf-8") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
            try:
                samples = watch(process, run / "metrics.jsonl")
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
            log.seek(0)
            if process.wait() != 0:
                print(log.read()[-2000:], file=sys.stderr)
                return 1
    return 0 if verdict(samples) else 1


if __name__ == "__main__":
    sys.exit(main())
