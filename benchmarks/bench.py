"""Every benchmark against its peer, one after the other: `make bench`.

    .venv-bench-mlx/bin/python benchmarks/bench.py            about twenty minutes
    .venv-bench-mlx/bin/python benchmarks/bench.py --only rollout memory
    .venv-bench-mlx/bin/python benchmarks/bench.py --only     the tables anew from stored results

Each writes results/NAME.json and NAME.md; all together become results/bench.json,
docs/benchmarks.md and the table in the README. Programs run in turns, each in a process of its own,
one thread each.
"""

import argparse
import json
import subprocess
import sys
import time

import memory
import ppo_parts
import ppo_step
import reward_training
import rollout
import scaling
import sft_speed
from side_by_side import ROOT
from tables import RESULTS, replace_between, table

BENCHMARKS = {
    "ppo_step": ppo_step,
    "rollout": rollout,
    "sft_speed": sft_speed,
    "reward_training": reward_training,
    "ppo_parts": ppo_parts,
    "scaling": scaling,
    "memory": memory,
}
HEADER = ["", "ours", "the other", "ratio (middle half of the repeats)"]
NOT_MEASURED = """\
Not measured: Apple GPUs, CUDA, and any model above 200 MB. No figure here says anything of them."""


def run(name: str) -> bool:
    """Whether it ended well."""
    print(f"\n## {name}", flush=True)
    start = time.perf_counter()
    done = subprocess.run([sys.executable, f"benchmarks/{name}.py"], cwd=ROOT)
    print(f"({time.perf_counter() - start:.0f} s)", flush=True)
    return done.returncode == 0


def stored(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def machine_line(of: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in of["packages"].items())
    return (
        f"Measured on {of['date']}: {of['cpu']}, {of['cores']} cores shared with other work, "
        f"{of['system']}, Python {of['python']}, {packages}; BLAS under MLX {of['blas']}, one "
        "thread each. Ratios are of processor time, turn by turn, but for bytes."
    )


def document(rows: list[list[str]], about: str) -> str:
    """docs/benchmarks.md: the table of all, then each benchmark's own with what it measures."""
    parts = ["# Benchmarks\n", f"`make bench` writes this page. {about}\n", table(HEADER, rows), ""]
    parts += [NOT_MEASURED + "\n"]
    for name, module in BENCHMARKS.items():
        title, _, rest = module.__doc__.partition("\n")
        what = rest.split("\n\n", 1)[1]  # after the command
        own = (RESULTS / f"{name}.md").read_text(encoding="utf-8")
        parts += [f"## {title.rstrip('.')}\n", f"`benchmarks/{name}.py`\n", what, own]
    return "\n".join(parts).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=BENCHMARKS, default=list(BENCHMARKS))
    failed = [name for name in parser.parse_args().only if not run(name)]
    found = {name: stored(name) for name in BENCHMARKS}
    rows = [row for name, module in BENCHMARKS.items() for row in module.headline(found[name])]
    about = machine_line(found["ppo_step"]["machine"])
    (RESULTS / "bench.json").write_text(
        json.dumps(
            {"machine": found["ppo_step"]["machine"], "header": HEADER, "rows": rows}, indent=1
        )
        + "\n",
        encoding="utf-8",
    )
    (ROOT / "docs" / "benchmarks.md").write_text(document(rows, about), encoding="utf-8")
    replace_between(ROOT / "README.md", "bench", f"{table(HEADER, rows)}\n\n{about} {NOT_MEASURED}")
    print(
        f"\n{table(HEADER, rows)}\n\nwrote docs/benchmarks.md, benchmarks/results/bench.json and "
        "the table in README.md"
    )
    for name in failed:
        print(f"error: benchmarks/{name}.py failed or missed a target; its figures may be old")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
