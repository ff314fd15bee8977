"""What a step costs with each technique: processor time, in turns with the same step without."""

import json
import sys
from pathlib import Path

from side_by_side import ROOT, Worker, interleave, ratio, summary

sys.path.insert(0, str(ROOT))
from safe_files import write_atomically  # noqa: E402

PLAIN = "plain"
REAL = Path("~/.cache/mlx-rlhf/real_model/SmolLM2-135M-Instruct").expanduser()
STEPS = [  # kind of step, model, rows, most tokens, repeats, techniques
    ("ppo", "-", 64, 32, 9, ("internal rewards", "curriculum", "dynamic KL", "self-critique")),
    ("sft", "-", 32, 64, 40, ("curriculum", "contrastive loss", "conditioning")),
    ("ppo", str(REAL), 8, 24, 4, ("internal rewards",)),
]


def costs(folder: Path, real: bool) -> list[dict]:
    """A row for each technique, one thread; what is in `folder` is not measured again.

    `real`: also those on the real model, which takes minutes (`make real` makes it).
    """
    rows = []
    for kind, model, count, tokens, repeats, names in STEPS:
        for name in names:
            title = Path(model).name if model != "-" else "embedded"
            file = folder / f"cost_{kind}_{title}_{name.replace(' ', '_')}.json"
            if not file.exists() and (model == "-" or real):
                found = measured(kind, model, count, tokens, repeats, name)
                row = {"step": kind, "model": title, "rows": count, "technique": name, **found}
                write_atomically(file, json.dumps(row) + "\n")
                print(name, row["times"], flush=True)
            if file.exists():
                rows.append(json.loads(file.read_text(encoding="utf-8")))
    return rows


def measured(kind: str, model: str, count: int, tokens: int, repeats: int, name: str) -> dict:
    calls = [PLAIN, name]
    arguments = [kind, model, count, tokens, *calls]
    with Worker(sys.executable, "techniques_worker.py", *arguments) as worker:
        samples = interleave({call: (worker, call) for call in calls}, repeats, warm_up=1)
    found = summary(samples)
    return {
        "repeats": repeats,
        "cpu": {call: found[call]["cpu"] for call in calls},
        "tokens": {call: found[call]["tokens"]["median"] for call in calls},
        "times": ratio(samples, name, PLAIN),
    }
