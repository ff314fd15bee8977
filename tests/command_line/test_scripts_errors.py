"""What a person gets wrong: one line that says what and where, exit status 2, nothing written.

Each case is a process of its own. What needs no model answers before MLX is loaded, and is started
from the command line; the rest are forks of one server.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from files import tree
from reliable_runs import ROOT, Ended, command, shared_server, words

SFT, PPO = "sft.py --train", "ppo_training.py --ground_truth_reward"
FINE = [{"text": f"{n} {n + 2} {n + 4} {n + 6} {n + 8} {n + 10}"} for n in range(0, 20, 2)]


def lines(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Data files with a fault each, a run folder, and option files."""
    files = {
        "torn_train.jsonl": lines([FINE[0], '{"text": "2 4', FINE[1]]),
        "missing_train.jsonl": lines([FINE[0], FINE[1], {"txet": "2 4"}]),
        "wrong_train.jsonl": lines([FINE[0], {"text": 5}]),
        "reward_train.jsonl": lines([{**FINE[0], "reward": 1}, FINE[1]]),
        "empty_train.jsonl": "",
        "unknown.yaml": "learnig-rate: 0.1\n",
        "unknown.json": '{"batch_size": 4, "lora-rnk": 2}',
        "wrong.yaml": "seed: 1\nbatch-size: many\n",
        "torn.json": '{"batch_size": ',
        "notes.txt": "not a model",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    for name in ("torn", "missing", "wrong", "reward", "empty"):
        (tmp_path / f"{name}_valid.jsonl").write_text(lines(FINE))
    (tmp_path / "no_model").mkdir()
    return tmp_path


def check(start, line: str, folder: Path, said: str) -> None:
    """`start` the command in `folder`; the error says all parts of `said`, split at "|"."""
    before = tree(folder)
    script, *rest = words(line)
    ended: Ended = start(script, rest, folder)
    assert ended.code == 2, ended.err
    for part in said.split("|"):
        assert part in ended.error, ended.error
    assert ended.err.splitlines()[-1].startswith("error: ")
    assert tree(folder) == before


# ------------------------------------------------------------------------------ at once

AT_ONCE = [
    # contradictory flags
    (f"{SFT} --iters 5 --epochs 2", "--iters and --epochs"),
    (f"{SFT} --prompt-tuning --fine-tune-type full", "--prompt-tuning|--fine-tune-type"),
    (f"{SFT} --overwrite", "--overwrite needs --output-dir"),
    (f"{PPO} --increasing --decreasing", "--increasing and --decreasing contradict"),
    # values that make no sense
    (f"{SFT} --output-dir=", "--output-dir: the name is empty"),
    ("fuse.py --model . --dtype float32 --save-path= --force", "--save-path: the name is empty"),
    (f"{PPO} --adap-kl-ctrl --init-kl-coef 0", "--adap-kl-ctrl has no effect at --init-kl-coef 0"),
    (f"{SFT} --val-batches 0", "--val-batches: give a number of batches, or -1"),
    (f"{SFT} --val-batches -2", "--val-batches: give a number of batches, or -1"),
    (f"{PPO} --adap_kl_ctrl --target 0", "--target: 0.0 given, must be above 0"),
    (f"{PPO} --adap_kl_ctrl --target -5", "--target: -5.0 given, must be above 0"),
    (f"{PPO} --pad_to_multiple -3", "--pad-to-multiple: -3 given, must be finite and not below 0"),
    (f"{PPO} --batch-size 6 --mini-batch-size 4", "--batch-size 6|--mini-batch-size 4"),
    ("data/generate_digit_data.py --increasing --decreasing", "--increasing or --decreasing|both"),
    # nothing to do
    ("sft.py", "--train, --test"),
    ("ppo_training.py", "no reward|--ground-truth-reward"),
    ("data/generate_digit_data.py", "--increasing or --decreasing"),
    # unknown and malformed flags
    (f"{SFT} --learnig-rate 1", "unknown flag --learnig-rate|did you mean --learning-rate?"),
    (f"{SFT} --batch-size many", "--batch-size|many"),
    (f"{SFT} True surplus", "unexpected argument 'surplus'"),
    (f"{PPO} --tempreature 1", "did you mean --temperature?"),
    (f"{PPO} --seed -1", "--seed: -1 is below 0"),
    ("preference_training.py", "--train, --test"),
    ("preference_training.py --train --bta 1", "did you mean --beta?"),
    ("group_training.py", "no reward|--ground-truth-reward"),
    ("group_training.py --ground-truth-reward --num-generations 1", "--num-generations"),
    ("score.py", "nothing to score|--input"),
    ("fuse.py --save-pth x", "did you mean --save-path?"),
    ("label.py", "nothing to label|--prompts FILE|--report FILE"),
    ("judge.py", "nothing to judge|--input FILE"),
    ("rest.py", "no reward|--ground-truth-reward"),
    ("talk_to_model.py --tmp 1", "did you mean --temp?"),
    ("data/make_digits_model.py --sede 1", "did you mean --seed?"),
    # option files
    (f"{SFT} --config unknown.yaml", "unknown.yaml:1|'learnig-rate'|--learning-rate"),
    (f"{PPO} --config unknown.json", "unknown.json|'lora-rnk'|--lora-rank"),
    (f"{SFT} --config wrong.yaml", "wrong.yaml:2|batch-size|many"),
    (f"{PPO} --config torn.json", "torn.json:1"),
    (f"{SFT} --config nowhere.yaml", "nowhere.yaml"),
    (f"{SFT} --resume nowhere", "nowhere: no run to resume"),
]


@pytest.mark.parametrize("line, said", AT_ONCE, ids=[line for line, _ in AT_ONCE])
def test_a_wrong_command_line_ends_in_one_line(folder, line, said):
    check(command, line, folder, said)


# ------------------------------------------------------------------------------ later

LATER = [
    # models
    (f"{SFT} --model nowhere", "nowhere: no model folder there"),
    (f"{SFT} --model no_model", "no_model: not a model folder: config.json is missing"),
    (f"{PPO} --model notes.txt", "notes.txt: no model folder there"),
    (f"{PPO} --data DATA --resume-file nowhere.npz", "nowhere.npz: no such file"),
    ("ppo_training.py --data DATA --reward-model nowhere", "nowhere: no such reward model"),
    ("ppo_training.py --data DATA --reward-function nowhere.py:f", "nowhere.py"),
    (f"{SFT} --data DATA --lora-keys nonsense", "--lora-keys nonsense: no such layer"),
    ("fuse.py --adapter-file nowhere.npz --save-path y", "nowhere.npz: no such file"),
    ("talk_to_model.py --model nowhere hello", "nowhere: no model folder there"),
    ("talk_to_model.py --resume-file nowhere.npz hello", "nowhere.npz: no such file"),
    ("label.py --prompts nowhere.jsonl --web", "nowhere.jsonl: no such file"),
    ("label.py --prompts torn_train.jsonl --web", "torn_train.jsonl:1: the rows are plain texts"),
    ("judge.py --ground-truth-reward --input torn_train.jsonl --output y", "torn_train.jsonl:2"),
    ("rest.py --ground-truth-reward --model nowhere", "nowhere: no model folder there"),
    ("score.py --ground-truth-reward --input nowhere.jsonl --output y", "nowhere.jsonl"),
    ("score.py --ground-truth-reward --input torn_train.jsonl --output y", "torn_train.jsonl:2"),
    # data
    (f"{SFT} --data nowhere", "nowhere: no such folder"),
    ("preference_training.py --train --model nowhere", "nowhere: no model folder there"),
    ("group_training.py --ground-truth-reward --model nowhere", "nowhere: no model folder there"),
    (f"{SFT} --data . --data-base absent_", "absent_train"),
    (f"{PPO} --data nowhere", "nowhere: no such folder"),
    (f"{SFT} --data . --data-base torn_", "torn_train.jsonl:2"),
    (f"{SFT} --data . --data-base missing_", "missing_train.jsonl:3|text"),
    (f"{SFT} --data . --data-base wrong_", "wrong_train.jsonl:2|text"),
    (f"{SFT} --data . --data-base empty_", "empty_train.jsonl"),
    (f"{PPO} --data . --data-base torn_", "torn_train.jsonl:2"),
    (f"{SFT} --dataset torn_valid.jsonl --split test", "torn_valid.jsonl|no split 'test'"),
    (f"{SFT} --dataset torn_valid.jsonl --dataset-config a", "torn_valid.jsonl|--dataset-config"),
    (f"{SFT} --dataset torn_valid.jsonl --streaming", "torn_valid.jsonl|--streaming"),
    (f"{SFT} --reward-model --data . --data-base reward_", "reward_train.jsonl:2|reward"),
]


@pytest.mark.parametrize("line, said", LATER, ids=[line for line, _ in LATER])
def test_a_wrong_model_or_file_ends_in_one_line(folder, line, said):
    check(lambda *w: shared_server().run(*w), line, folder, said)


# ------------------------------------------------------------------------------ folders


def test_a_folder_that_holds_a_run_is_not_touched(folder):
    (folder / "run").mkdir()
    (folder / "run" / "config.json").write_text('{"script": "sft", "options": {}}')
    (folder / "run" / "metrics.jsonl").write_text('{"step": 1}\n')
    line = f"{SFT} --data DATA --iters 1 --output-dir run"
    check(lambda *w: shared_server().run(*w), line, folder, "run: holds a run already|--resume run")


@pytest.mark.parametrize("flag", ["", "--overwrite"])
@pytest.mark.parametrize("script", [f"{SFT} --iters 2 --steps-per-eval 0", PPO])
def test_a_folder_of_a_model_is_not_taken_for_a_run(folder, script, flag):
    """It has a config.json too, and a run with --overwrite would replace that."""
    shutil.copytree(ROOT / "data" / "digits_model", folder / "my_model")
    line = f"{script} --data DATA --output-dir my_model {flag}"
    check(
        lambda *w: shared_server().run(*w),
        line,
        folder,
        "my_model: holds config.json, and no run|another --output-dir",
    )
    assert not (folder / "my_model" / ".lock").exists()


def test_every_script_is_tried_above():
    scripts = [path.name for path in ROOT.glob("*.py") if "run_main(main" in path.read_text()]
    tried = {line.split()[0] for line, _ in AT_ONCE} & {line.split()[0] for line, _ in LATER}
    assert len(scripts) > 4 and set(scripts) <= tried


@pytest.mark.parametrize("flag", ["--config", "--json-reward"])
@pytest.mark.parametrize("file", ["/dev/zero", "/dev/urandom"])
def test_a_file_without_end_is_one_line(flag, file):
    done = subprocess.run(
        [sys.executable, "ppo_training.py", "--ground-truth-reward", flag, file],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
    )
    assert done.returncode == 2
    assert "larger than 16 MB" in done.stderr and done.stderr.count("\n") == 1
