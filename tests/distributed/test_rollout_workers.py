"""Two workers on this machine do what one does: PPO and the group methods."""

import os
import random
from pathlib import Path

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

LONG = pytest.mark.long
# The rate is one at which Adam does not blow up the rounding of a gradient that is almost 0.
COMMON = (
    "--data DATA --output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 "
    "--learning-rate 1e-3 --num-steps 3 --max-new-tokens 8 --batch-size 8 --eval-every 2 "
    "--eval-prompts 3 --eval-samples 1 --save-every 1"
)
NO_EVALUATION = COMMON.replace("--eval-every 2 --eval-prompts 3 --eval-samples 1", "--eval-every 0")
TRUE = "--ground_truth_reward"
PPO = f"{TRUE} {COMMON} --mini-batch-size 4 --ppo-epochs 2"
GROUP = f"{TRUE} {COMMON} --num-generations 4 --mini-batch-size 4 --ppo-epochs 2"
MASKED = (
    f"{TRUE} {NO_EVALUATION} --num-generations 4 --mini-batch-size 2 --max-new-tokens 9 "
    "--mask-truncated-completions"
)
SAME = {
    "ppo": ("ppo_training.py", PPO),
    "ppo accumulated": (
        "ppo_training.py",
        f"{PPO} --gradient-accumulation-steps 2 --kl-penalty full --no-rollout-logprobs "
        "--adap_kl_ctrl --use-score-scaling --use-score-norm --whiten-rewards --early-stopping "
        "--target-kl 1e-3 --reference-samples 1 --min-response-length 2",
    ),
    "ppo full": (
        "ppo_training.py",
        f"{TRUE} {COMMON.replace('--lora-rank 2 --lora-layers 2', '')} --fine-tune-type full "
        "--optimizer sgd",
    ),
    # Of two blocks the first is frozen, and what it gives is kept for reference and epochs.
    "ppo frozen": ("ppo_training.py", PPO.replace("--lora-layers 2", "--lora-layers 1")),
    "grpo frozen": (
        "group_training.py",
        f"{GROUP.replace('--lora-layers 2', '--lora-layers 1')} --beta 0.05",
    ),
    "ppo inside": (
        "ppo_training.py",
        f"{PPO} --adlf-alpha 0.5 --use-fluency-reward --use-length-penalty",
    ),
    "grpo": ("group_training.py", f"{GROUP} --beta 0.05 --loss-type grpo --entropy-coef 0.01"),
    "dapo": ("group_training.py", f"{GROUP} --loss-type dapo --dynamic-sampling"),
    "bnpo": (
        "group_training.py",
        f"{GROUP} --loss-type bnpo --mask-truncated-completions --entropy-coef 0.01",
    ),
    "dr_grpo": ("group_training.py", f"{GROUP} --loss-type dr_grpo"),
    "gspo": ("group_training.py", f"{GROUP} --loss-type grpo --importance-sampling-level sequence"),
    "vespo": ("group_training.py", f"{GROUP} --loss-type vespo"),
    "rloo": ("group_training.py", f"{GROUP} --advantage-estimator rloo --beta 0.05"),
    "pairs": (
        "group_training.py",
        f"{TRUE} {COMMON} --online-dpo --mini-batch-size 4",
    ),
    # Rows of one minibatch, of which one worker's has no token: constants of the loss, row means.
    "masked rloo": (
        "group_training.py",
        f"{MASKED} --advantage-estimator rloo --beta 0.05",
    ),
    "masked vespo": ("group_training.py", f"{MASKED} --loss-type vespo"),
    # One prompt a step: the group lies on both workers in the update, on one in the rollout.
    "one prompt": ("group_training.py", f"{GROUP} --num-generations 8"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in ("ppo", "grpo") else LONG, id=n) for n in SAME]
)
def test_two_workers_do_what_one_does(name, tmp_path):
    """Weights, and every metric of every row: scores, evaluations, variances, extremes."""
    script, line = SAME[name]
    ran(tmp_path / "one", script, line)
    ran(tmp_path / "two", script, line, 2)
    one, two = tmp_path / "one" / "out.npz", tmp_path / "two" / "out.npz"
    assert moved(one) > 50 * CLOSE
    assert largest_difference(one, two) < CLOSE
    assert_same_numbers(rows(tmp_path / "one"), rows(tmp_path / "two"))


COUNTED = """
import os
def reward(prompts, responses):
    with open("calls.txt", "a") as file:
        file.write(f"{os.environ.get('MLX_RANK', '0')} {len(responses)}\\n")
    if os.path.exists("broken"):
        raise ValueError("the reward broke")
    return [float(len(response)) for response in responses]
"""


def with_function(folder: Path, workers: int, code: int = 0):
    folder.mkdir(exist_ok=True)
    (folder / "own.py").write_text(COUNTED, encoding="utf-8")
    line = f"--reward_function own.py:reward {NO_EVALUATION} --num-steps 2"
    return ran(folder, "ppo_training.py", line, workers, code)


@LONG
def test_a_reward_function_is_called_once_with_the_whole_batch(tmp_path):
    for workers in (1, 2):
        with_function(tmp_path / f"{workers}", workers)
    calls = [(tmp_path / n / "calls.txt").read_text().splitlines() for n in ("1", "2")]
    assert calls[0] == calls[1] == ["0 8", "0 8"]
    assert largest_difference(tmp_path / "1" / "out.npz", tmp_path / "2" / "out.npz") < CLOSE


def test_a_reward_function_that_raises_ends_both_with_one_line(tmp_path):
    (tmp_path / "broken").touch()
    found = with_function(tmp_path, 2, code=2)
    assert found.error.startswith("error: reward 'reward' raised ValueError: the reward broke")


@LONG
def test_a_learned_reward_is_shared_out(tmp_path):
    """Scores of the reward model in the metrics of both runs, and the weights."""
    line = (
        "--train --reward-model --data DATA --data-base reward_function_increasing_mult_2_ "
        "--iters 4 --batch-size 8 --output-dir reward_run --save-file ../reward.npz"
    )
    ran(tmp_path / "reward", "sft.py", line)
    line = f"--reward_model ../reward.npz {COMMON} --eval-prompts 3"
    ran(tmp_path / "one", "ppo_training.py", line)
    ran(tmp_path / "two", "ppo_training.py", line, 2)
    assert largest_difference(tmp_path / "one" / "out.npz", tmp_path / "two" / "out.npz") < CLOSE
    assert_same_numbers(rows(tmp_path / "one"), rows(tmp_path / "two"))


@LONG
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_is_heard_in_steps_without_an_update(rank, tmp_path):
    """No response ends, so every one is masked, and no gradient is added up."""
    line = f"{GROUP} --mask-truncated-completions --max-new-tokens 1 --num-steps 5000 "
    line += "--eval-every 0 --save-every 0"
    line = line.replace("--eval-every 2 --eval-prompts 3 --eval-samples 1", "")
    found = signalled(tmp_path, "group_training.py", line, INT, rank, after=3)
    assert found.code == 130, found.err
    assert "stopped; go on with:" in found.out


UNEVEN = {
    "--batch-size 7": "--batch-size 7 cannot be shared out among 2 workers",
    "--mini-batch-size 1": "--mini-batch-size 1 cannot be shared out among 2 workers",
    "--use-self-critique": "--use-self-critique weighs thirds of a minibatch",
}


@pytest.mark.parametrize("flags", UNEVEN)
def test_what_cannot_be_shared_out_is_refused(flags, tmp_path):
    line = f"{TRUE} --data DATA --num-training-workers 2 {flags}"
    found = ran(tmp_path, "ppo_training.py", line, code=2)
    assert found.error.startswith(f"error: {UNEVEN[flags]}")


# ------------------------------------------------------------------------------ kills

KILLS = -(-int(os.environ.get("MLX_RLHF_KILLS", "2")) // 3)  # of each kind
SFT = (
    "--train --data DATA --output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2 "
    "--iters 12 --batch-size 6 --lora-dropout 0.2 --save-every 2 --steps-per-eval 5 --val-batches 1"
)
KILLED = {"sft": ("sft.py", SFT, 12), "ppo": ("ppo_training.py", f"{PPO} --num-steps 8", 8)}
KILLED["group"] = ("group_training.py", f"{GROUP} --num-steps 8", 8)


@LONG
@pytest.mark.parametrize("name", KILLED)
def test_killed_at_random_a_run_goes_on_to_the_same_bytes(name, tmp_path):
    script, line, steps = KILLED[name]
    ran(tmp_path / "whole", script, line, 2)
    random_ = random.Random(name)
    for number in range(KILLS):
        folder = tmp_path / f"{number}"
        rank = random_.randrange(2)
        found = signalled(folder, script, line, KILL, rank, after=random_.randrange(1, steps - 2))
        assert found.code == 3
        said = f"error: worker {rank} is gone (signal 9); go on with --resume run"
        assert found.error == said
        ran(folder, script, "--resume run")
        assert (folder / "out.npz").read_bytes() == (tmp_path / "whole" / "out.npz").read_bytes()
        assert_same_numbers(rows(tmp_path / "whole"), rows(folder), 0.0)


@LONG
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_worker_is_named(rank, tmp_path):
    line = f"{PPO} --num-steps 500 --worker-timeout 15"
    found = signalled(tmp_path, "ppo_training.py", line, STOP, rank, after=2)
    assert found.code == 3
    assert f"worker {rank} does not answer after 15 s (--worker-timeout) in the" in found.error
    assert found.error.endswith("; go on with --resume run")
