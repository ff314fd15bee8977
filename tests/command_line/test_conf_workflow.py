"""The conf files of the workflow on Ray: its three commands, end to end; what its keys mean."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from files import ROOT

import ppo_training
import sft
from command_line.option_files import read_config
from command_line.parser import Parser

SAMPLES = ROOT / "data" / "conf"
CORES = os.cpu_count() or 1


def run(folder, *words):
    line = [sys.executable, str(ROOT / words[0]), *words[1:]]
    done = subprocess.run(line, capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_three_commands_on_the_samples(tmp_path):
    """As docs/conf_files.md has them, in a folder with the samples alone."""
    shutil.copytree(ROOT / "data" / "digits_model", tmp_path / "data" / "digits_model")
    for name in ("finetune", "reward", "ppo"):
        shutil.copy(SAMPLES / f"{name}.conf", tmp_path)
    given = ["--input", str(SAMPLES / "trees.jsonl"), "--output"]
    run(tmp_path, "data/process_data.py", *given, "runs/conf/sft_data.jsonl", "--lang", "en")
    convert = ["data/process_data_rlhf.py", *given]
    run(tmp_path, *convert, "runs/conf/rm_data.jsonl", "--kind", "preference")
    run(tmp_path, *convert, "runs/conf/ppo_data.jsonl", "--kind", "prompts")
    out = run(tmp_path, "sft.py", "--config_path", "finetune.conf")
    assert "wrote runs/conf/sft_model" in out and "--train, which such a file asks for" in out
    assert out.count("batch_size -> --batch-size 4 (2 for each of 2 workers)") == 1
    out = run(tmp_path, "sft.py", "--reward-model", "--config_path", "reward.conf")
    assert "wrote runs/conf/rm_model" in out
    out = run(tmp_path, "ppo_training.py", "--config_path", "ppo.conf")
    assert "model_pretrain -> --model runs/conf/sft_model" in out
    assert "rm_pretrain -> --reward-model runs/conf/rm_model" in out
    assert "wrote runs/conf/ppo_model" in out
    for name in ("sft_model", "rm_model", "ppo_model"):
        assert (tmp_path / "runs" / "conf" / name / "model.safetensors").is_file()
    rows = (tmp_path / "runs" / "conf" / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert any("env/reward_model_mean" in json.loads(row) for row in rows)
    talk = ["talk_to_model.py", "--model", "runs/conf/ppo_model", "8 20", "--temp", "0"]
    assert run(tmp_path, *talk, "--max-tokens", "4")


def settings(tmp_path, capsys, text, *, ppo=False, workers=True):
    """({flag: value} of a file, the note on it), for a script with or without workers."""
    parser = Parser()
    names = ["--batch-size", "--reward-model", "--train-file", "--seed"]
    names += ["--num-training-workers", "--cpus-per-worker"] if workers else []
    names += ["--mini-batch-size"] if ppo else []
    for name in names:
        parser.add_argument(name)
    file = tmp_path / "w.conf"
    file.write_text(text)
    found = {s.key.replace("_", "-"): s.value for s in read_config(file, parser._flags())}
    return found, capsys.readouterr().out


def training(keys, cores):
    resources = f'"num_training_workers": 3, "resources_per_worker": {{"CPU": {cores}}}'
    return f'{{"Training": {{{keys}, {resources}}}}}'


@pytest.mark.parametrize(
    ("ppo", "keys", "found"),
    [
        (False, '"batch_size": 4', {"batch-size": 12}),
        (False, '"per_device_train_batch_size": 5', {"batch-size": 15}),
        (True, '"batch_size": 4', {"batch-size": 12}),
        (True, '"experience_batch_size": 48', {"batch-size": 48}),
        (
            True,
            '"experience_batch_size": 48, "batch_size": 4',
            {"batch-size": 48, "mini-batch-size": 12},
        ),
        (
            True,
            '"experience_batch_size": 6, "batch_size": 4',
            {"batch-size": 6, "mini-batch-size": 6},
        ),
    ],
)
def test_batches_are_counted_for_all_workers(tmp_path, capsys, ppo, keys, found):
    made, note = settings(tmp_path, capsys, training(keys, 1), ppo=ppo)
    assert made == {**found, "num-training-workers": 3, "cpus-per-worker": 1}
    if '"batch_size": 4' in keys:
        assert "(4 for each of 3 workers)" in note
    if found.get("mini-batch-size") == 6:
        assert "--mini-batch-size is 6, not 12: the batch has 6" in note
    alone, note = settings(tmp_path, capsys, training(keys, 1), ppo=ppo, workers=False)
    assert "for each of" not in note and "num-training-workers" not in alone
    assert "num_training_workers is not used here" in note


@pytest.mark.parametrize(
    "key", ['"num_training_workers": 1, ', '"num_training_workers": None, ', ""]
)
def test_one_worker_has_all_cores(tmp_path, capsys, key):
    text = f'{{"Training": {{{key}"batch_size": 4, "resources_per_worker": {{"CPU": 32}}}}}}'
    made, note = settings(tmp_path, capsys, text)
    assert "cpus-per-worker" not in made and made["batch-size"] == 4
    assert "resources_per_worker is not used with one worker" in note


@pytest.mark.parametrize("asked", [1, CORES + 1, CORES + 30])
def test_no_worker_gets_more_cores_than_there_are(tmp_path, capsys, asked):
    made, note = settings(tmp_path, capsys, training('"seed": 1', asked))
    share = max(1, CORES // 3)
    assert made["cpus-per-worker"] == min(asked, share)
    assert (f"(not {asked}: there are {CORES} cores for 3 workers)" in note) == (asked > share)


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ('{"CPU": "many"}', "'many' is not a whole number"),
        ('{"CPU": [1]}', "'[1]' is no value for this option"),
        ('{"CPU": 2.5, "GPU": 1}', "'2.5' is not a whole number"),
        ('{"CPU": 1, "RAM": 3}', "unknown key 'RAM'"),
    ],
)
def test_resources_that_are_none_are_named(tmp_path, capsys, value, wrong):
    parser = Parser()
    parser.add_argument("--config")
    parser.add_argument("--cpus-per-worker", type=int)
    parser.add_argument("--num-training-workers", type=int)
    file = tmp_path / "w.conf"
    text = f'"resources_per_worker": {value}, "num_training_workers": 2'
    file.write_text(f'{{"Training": {{\n{text}}}}}')
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--config", str(file)])
    said = capsys.readouterr().err
    assert end.value.code == 2 and f"{file}:2: " in said and wrong in said


@pytest.mark.parametrize(
    ("words", "train"),
    [([], True), (["--preview"], False), (["--test"], False), (["--train"], True)],
)
def test_such_a_file_asks_for_training(tmp_path, words, train):
    file = tmp_path / "w.conf"
    file.write_text('{"Training": {"batch_size": 2}}')
    args = sft.parse_arguments([*words, "--config_path", str(file)])
    assert (args.train, args.batch_size) == (train, 2)
    again = tmp_path / "w.yaml"
    again.write_text("batch_size: 2\n")
    if not words:
        with pytest.raises(SystemExit):
            sft.parse_arguments(["--config", str(again)])


def test_ppo_needs_no_such_flag(tmp_path, capsys):
    file = tmp_path / "w.conf"
    file.write_text('{"Training": {"experience_batch_size": 8}}')
    args = ppo_training.parse_arguments(["--ground-truth-reward", "--config_path", str(file)])
    assert args.batch_size == 8 and "--train" not in capsys.readouterr().out
