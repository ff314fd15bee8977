"""What a step costs with each technique: processor time, in turns with the same step without."""

import sys
from pathlib import Path

from side_by_side import Worker, interleave, ratio, summary

PLAIN = "plain"
STEPS = {  # kind of step, model -> (rows, most tokens, repeats, techniques)
    ("ppo", "-"): (64, 32, 15, ["internal rewards", "curriculum", "dynamic KL", "self-critique"]),
    ("sft", "-"): (32, 64, 40, ["curriculum", "contrastive loss", "conditioning"]),
}
REAL = Path("~/.cache/mlx-rlhf/real_model/SmolLM2-135M-Instruct").expanduser()
REAL_STEP = (8, 24, 4, ["internal rewards"])


def costs() -> list[dict]:
    """A row for each technique, one thread."""
    steps = dict(STEPS)
    if REAL.exists():
        steps["ppo", str(REAL)] = REAL_STEP
    rows = []
    for (kind, model), (count, tokens, repeats, names) in steps.items():
        for name in names:
            calls = [PLAIN, name]
            arguments = [kind, model, count, tokens, *calls]
            with Worker(sys.executable, "techniques_worker.py", *arguments) as worker:
                samples = interleave({call: (worker, call) for call in calls}, repeats)
            found = summary(samples)
            rows.append(
                {
                    "step": kind,
                    "model": "embedded" if model == "-" else Path(model).name,
                    "rows": count,
                    "technique": name,
                    "repeats": repeats,
                    "cpu": {call: found[call]["cpu"] for call in calls},
                    "tokens": {call: found[call]["tokens"]["median"] for call in calls},
                    "times": ratio(samples, name, PLAIN),
                }
            )
            print(name, rows[-1]["times"], flush=True)
    return rows
