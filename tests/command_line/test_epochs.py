"""--epochs of methods on rollouts: passes over the prompts, in place of --num-steps."""

import json

import pytest
from short_runs import run

import group_training
import ppo_training
from command_line.group_flags import parse_arguments as group_arguments
from command_line.ppo_flags import parse_arguments as ppo_arguments

pytestmark = pytest.mark.usefixtures("in_tmp")

REWARD = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
COMMON = [
    "--train-file",
    "ten.jsonl",
    "--reward-function",
    "mine.py:length",
    "--eval-every",
    0,
    "--save-every",
    0,
    "--max-new-tokens",
    3,
    "--lora-rank",
    2,
]
GROUP = ["--batch-size", 8, "--num-generations", 2]


@pytest.fixture(autouse=True)
def prompts(tmp_path, in_tmp):  # noqa: F811
    rows = [{"prompt": f"{i} {i + 2}"} for i in range(2, 22, 2)]
    (tmp_path / "ten.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.py").write_text(REWARD)


def sampled(folder) -> list[str]:
    """The prompts that were answered, in their order."""
    with open(f"{folder}/samples.jsonl", encoding="utf-8") as file:
        return [json.loads(line)["prompt"] for line in file]


@pytest.mark.parametrize(
    ("script", "words", "epochs", "steps", "each"),
    [
        (ppo_training, ["--batch-size", 5], 1, 2, 1),
        (ppo_training, ["--batch-size", 4], 2, 5, 2),
        (ppo_training, ["--batch-size", 4], 0.5, 2, 0),  # 5 prompts, and 3 more to fill a step
        (group_training, GROUP, 2, 5, 4),  # 4 prompts a step, 2 responses each
        (group_training, [*GROUP, "--online-dpo"], 0.8, 2, 0),
    ],
)
def test_epochs_are_passes_over_the_prompts(script, words, epochs, steps, each):
    out = run(
        script, *COMMON, *words, "--epochs", epochs, "--samples-per-step", 8, "--output-dir", "run"
    )
    assert f"--epochs {epochs}: {steps} steps of" in out and f": {steps} steps of" in out
    with open("run/metrics.jsonl", encoding="utf-8") as file:
        assert [json.loads(line)["step"] for line in file][-1] == steps
    seen = sampled("run")
    if each:
        assert len(seen) == 10 * each and {seen.count(prompt) for prompt in seen} == {each}
    options = json.load(open("run/config.json", encoding="utf-8"))["options"]
    assert (options["epochs"], options["num_steps"]) == (epochs, steps)


def test_a_resumed_run_keeps_its_epochs_and_may_get_more():
    words = ["--batch-size", 5, "--lr-schedule", "constant", "--output-dir", "run"]
    run(ppo_training, *COMMON, *words, "--epochs", 1)
    assert "run: 2 steps of 5" in run(ppo_training, "--resume", "run")
    assert "run: 4 steps of 5" in run(ppo_training, "--resume", "run", "--epochs", 2)
    assert "run: 5 steps of 5" in run(ppo_training, "--resume", "run", "--num-steps", 5)


@pytest.mark.parametrize("parse", [ppo_arguments, group_arguments])
@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["--epochs", "2", "--num-steps", "9"], "--num-steps and --epochs both say how long"),
        (["--epochs", "1", "--steps", "60"], "give one of them"),  # the default, written out
        (["--epochs", "0"], "--epochs: give a number above 0"),
        (["--epochs", "nan"], "--epochs"),
        (["--config", "both.yaml"], "give one of them"),
    ],
)
def test_what_contradicts_itself_is_refused(capsys, tmp_path, parse, words, wrong):
    (tmp_path / "both.yaml").write_text("num_steps: 4\nepochs: 1\n")
    with pytest.raises(SystemExit):
        parse(["--ground-truth-reward", *words])
    assert wrong in capsys.readouterr().err


@pytest.mark.parametrize("parse", [ppo_arguments, group_arguments])
def test_the_command_line_replaces_what_a_file_says(tmp_path, parse):
    (tmp_path / "steps.yaml").write_text("num_steps: 4\nepochs: null\n")
    (tmp_path / "epochs.yaml").write_text("epochs: 3\n")
    reward = "--ground-truth-reward"
    args = parse([reward, "--config", "steps.yaml"])
    assert (args.num_steps, args.epochs) == (4, None)
    assert parse([reward, "--config", "steps.yaml", "--epochs", "2"]).epochs == 2
    args = parse([reward, "--config", "epochs.yaml", "--num-steps", "2"])
    assert (args.num_steps, args.epochs) == (2, None)
