"""Two workers on this machine do what one does: supervised training, reward models, preferences."""

import json
import random

import pytest
from together import (
    CLOSE,
    INT,
    KILL,
    STOP,
    assert_same_numbers,
    largest_difference,
    moved,
    ran,
    rows,
    signalled,
)

SHORT = (
    "--train --output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 "
    "--learning-rate 3e-3 --val-batches 2"
)
# 10 rows in batches of 3: shares of 2 and 1, and a tail of one row, of which worker 1 has none.
UNEVEN = (
    f"{SHORT} --data DATA --max-rows 10 --batch-size 3 --gradient-accumulation-steps 2 --iters 8"
)
LONG = pytest.mark.long
REWARD = "--reward-model --data-base reward_function_increasing_mult_2_"
SAME = {
    # Rows of 3 and 40 tokens side by side: a mean of the workers' means is another number.
    "sft": (
        "sft.py",
        f"{UNEVEN} --steps-per-eval 4 --train-file ../rows.jsonl --validation-file ../rows.jsonl",
    ),
    "rows": ("sft.py", f"{UNEVEN} --steps-per-eval 4"),
    "soft prompt": (
        "sft.py",
        "--train --data DATA --output-dir run --save-file out.npz --learning-rate 3e-3 "
        "--prompt-tuning --iters 6 --batch-size 5 --steps-per-eval 0",
    ),
    "packing": (
        "sft.py",
        f"{SHORT} --data DATA --packing --max-length 48 --iters 6 --steps-per-eval 0",
    ),
    "reward": ("sft.py", f"{UNEVEN} {REWARD} --steps-per-eval 4"),
    "pairs": (
        "sft.py",
        f"{UNEVEN} --reward-model --data-base preference_increasing_mult_2_ --centering 0.1",
    ),
    "dpo": (
        "preference_training.py",
        f"{UNEVEN} --loss-type sigmoid sft --steps-per-eval 4 --precompute-ref-log-probs",
    ),
    "kto": ("preference_training.py", f"{UNEVEN} --algorithm kto --steps-per-eval 4"),
    "orpo": ("preference_training.py", f"{UNEVEN} --algorithm orpo --steps-per-eval 0"),
}


def cases(quick: str) -> list:
    return [
        pytest.param(name, marks=() if name in quick.split() else LONG, id=name) for name in SAME
    ]


def unequal_rows() -> list[str]:
    random_ = random.Random(0)
    lengths = [40, 2, 38, 3, 41, 2, 2, 39, 3, 40]
    texts = [" ".join(str(random_.randrange(9)) for _ in range(n)) for n in lengths]
    return [json.dumps({"text": text}) for text in texts]


@pytest.mark.parametrize("name", cases("sft"))
def test_two_workers_do_what_one_does(name, tmp_path):
    """Weights, and every metric of every row: totals of all workers, means over all rows."""
    script, line = SAME[name]
    (tmp_path / "rows.jsonl").write_text("\n".join(unequal_rows()), encoding="utf-8")
    ran(tmp_path / "one", script, line)
    ran(tmp_path / "two", script, line, 2)
    one, two = tmp_path / "one" / "out.npz", tmp_path / "two" / "out.npz"
    assert moved(one) > 100 * CLOSE
    assert largest_difference(one, two) < CLOSE
    assert_same_numbers(rows(tmp_path / "one"), rows(tmp_path / "two"))
    told = [row for row in rows(tmp_path / "two") if "distributed/workers" in row]
    assert told and all(row["distributed/workers"] == 2 for row in told)
    assert all(0 <= row["distributed/wait_share"] <= 1 for row in told)


def test_a_killed_worker_is_named_and_the_run_goes_on_to_the_same_bytes(tmp_path):
    line = f"{UNEVEN} --iters 12 --save-every 2 --lora-dropout 0.2 --steps-per-eval 0"
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ran(whole, "sft.py", line, 2)
    found = signalled(killed, "sft.py", line, KILL, rank=1, after=3)
    assert found.code == 3
    assert found.error == "error: worker 1 is gone (signal 9); go on with --resume run"
    ran(killed, "sft.py", "--resume run")  # the run's own options: again two workers
    assert (killed / "out.npz").read_bytes() == (whole / "out.npz").read_bytes()
    assert_same_numbers(rows(whole), rows(killed), 0.0)


@LONG
def test_a_stopped_worker_is_named(tmp_path):
    line = f"{UNEVEN} --iters 500 --save-every 2 --steps-per-eval 0 --worker-timeout 15"
    found = signalled(tmp_path, "sft.py", line, STOP, rank=1, after=3)
    assert found.code == 3
    assert "error: worker 1 does not answer after 15 s" in found.error
    assert found.error.endswith("in the sum of gradients; go on with --resume run")


@LONG
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_workers(before, after, tmp_path):
    line = f"{UNEVEN} --save-every 4 --steps-per-eval 0"
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    ran(whole, "sft.py", line, before)
    ran(parts, "sft.py", line.replace("--iters 8", "--iters 4"), before)
    ran(parts, "sft.py", f"--resume run --iters 8 --num-training-workers {after}")
    if before == after:
        assert (parts / "out.npz").read_bytes() == (whole / "out.npz").read_bytes()
    else:
        assert largest_difference(whole / "out.npz", parts / "out.npz") < CLOSE


@LONG
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_at_any_worker_stops_all(rank, tmp_path):
    line = f"{UNEVEN} --iters 500 --save-every 0 --steps-per-eval 0"
    found = signalled(tmp_path, "sft.py", line, INT, rank=rank, after=3)
    assert found.code == 130
    assert "stopped; go on with:" in found.out
    assert len(list((tmp_path / "run" / "checkpoints").glob("step-*"))) == 1


@LONG
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_after_the_last_update_stops_all_too(rank, tmp_path):
    """Here in a long validation at the end; the run goes on to what it would have left."""
    line = f"{UNEVEN} --iters 2 --steps-per-eval 2 --save-every 0 --val-batches 140"
    line = line.replace(
        "--max-rows 10", "--train-file ../train.jsonl --validation-file ../all.jsonl"
    )
    text = "\n".join(unequal_rows())
    (tmp_path / "train.jsonl").write_text(text, encoding="utf-8")
    (tmp_path / "all.jsonl").write_text("\n".join([text] * 40), encoding="utf-8")
    found = signalled(tmp_path / "run", "sft.py", line, INT, rank=rank, after=3)
    assert found.code == 130, found.err + found.out
    assert "stopped; go on with:" in found.out and not (tmp_path / "run" / "out.npz").exists()
    ran(tmp_path / "run", "sft.py", "--resume run")
    ran(tmp_path / "whole", "sft.py", line, 2)
    for name in ("run", "whole"):
        assert (tmp_path / name / "out.npz").exists()
    one, other = ((tmp_path / name / "out.npz").read_bytes() for name in ("run", "whole"))
    assert one == other


REFUSED = {
    "--use-contrastive": ("sft.py", "--use-contrastive compares the rows of a batch"),
    "--loss-type aot": ("preference_training.py", "--loss-type aot compares the rows of a batch"),
    "--num-training-workers 0": ("sft.py", "--num-training-workers: 0 is below 1"),
    "--worker-timeout 0": ("sft.py", "--worker-timeout: give a number of seconds above 0"),
}


@pytest.mark.parametrize("flags", REFUSED)
def test_what_several_workers_cannot_do_is_refused(flags, tmp_path):
    script, said = REFUSED[flags]
    line = f"--train --data DATA --num-training-workers 2 {flags}"
    found = ran(tmp_path, script, line, code=2)
    assert found.error.startswith(f"error: {said}")
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
