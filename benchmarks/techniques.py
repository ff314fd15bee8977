"""What each technique of docs/techniques.md does on the digits task, over seeds, and what it costs.

    python benchmarks/techniques.py [--parts NAMES] [--seeds 0 1 2]

Parts are functions of techniques_runs.py and techniques_models.py, and `cost` (techniques_cost.py),
processor time of a step with and without, in turns. What a part found for a seed is kept in
--folder, and not made again. Writes results/techniques.json, a Markdown table beside it, and
docs/images/techniques_*.png from all that is there. About 20 minutes of processor time.
"""

import argparse
import json
import sys
from pathlib import Path

from tables import machine, save
from techniques_cost import costs
from techniques_models import conditioning, contrastive, critique_ppo, critique_sft
from techniques_plots import PICTURES
from techniques_report import report
from techniques_runs import (
    ROOT,
    composite,
    curriculum_ppo,
    curriculum_sft,
    dynamic_kl,
    make_data,
    objectives,
)

sys.path.insert(0, str(ROOT))
from safe_files import write_atomically  # noqa: E402

COST = "cost"
PARTS = {
    part.__name__: part
    for part in (
        composite,
        objectives,
        dynamic_kl,
        curriculum_sft,
        curriculum_ppo,
        contrastive,
        conditioning,
        critique_sft,
        critique_ppo,
    )
}


def kept(folder: Path, part: str, seed: int) -> Path:
    return folder / "figures" / f"{part}_{seed}.json"


def measure(folder: Path, part: str, seed: int) -> None:
    """Run a part for a seed, unless its figures are there."""
    file = kept(folder, part, seed)
    if file.exists():
        return
    print(f"seed {seed}: {part}", flush=True)
    place = folder / str(seed)
    make_data(place, seed)
    found = PARTS[part](place, seed)
    file.parent.mkdir(exist_ok=True)
    write_atomically(file, json.dumps(found) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=[*PARTS, COST], default=[*PARTS, COST])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "techniques")
    parser.add_argument("--real", action="store_true", help="cost on the model of `make real` too")
    args = parser.parse_args()
    for part in args.parts:
        for seed in args.seeds if part != COST else ():
            measure(args.folder, part, seed)
    found: dict = {}
    for part in PARTS:
        files = {seed: kept(args.folder, part, seed) for seed in args.seeds}
        if all(file.exists() for file in files.values()):
            found[part] = {seed: json.loads(file.read_text()) for seed, file in files.items()}
            PICTURES[part](found[part])
    if COST in args.parts:
        found[COST] = costs(args.folder / "figures", args.real)
    save("techniques", {"machine": machine(), **found}, report(found))


if __name__ == "__main__":
    main()
