"""What scripts print: with nobody reading, on a closed or narrow output, and from hostile input."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from reliable_runs import (
    ROOT,
    RUNS,
    clean_environment,
    data_in,
    differences,
    left_by,
    shared_server,
    whole,
)
from script_table import SHORT, TRAINED

from run_folder.output import Output, printable

# A screen that is cleared, a colour, a title, an 8-bit control, a bell and a line written over.
HOSTILE = "\x1b[2J\x1b[31m\x1b]0;title\x07\x9b1m\x08\roverwritten"
PLACES = "--output-dir run --save-file out.npz --lora-rank 2 --lora-layers 2".split()
TRAIN = {
    "sft.py": ["--train", "--iters", "3", "--steps-per-eval", "0", "--steps-per-report", "1"],
    "ppo_training.py": [
        "--ground-truth-reward",
        "--num-steps",
        "1",
        "--batch-size",
        "4",
        "--mini-batch-size",
        "4",
        "--eval-every",
        "0",
        "--max-new-tokens",
        "4",
    ],
}


def shell(line: str, folder, *words: str, **environment: str) -> subprocess.CompletedProcess:
    """`line` in bash; PYTHON there is `python SCRIPT WORDS`."""
    command = [sys.executable, str(ROOT / words[0]), *words[1:]]
    return subprocess.run(
        ["bash", "-c", line.replace("PYTHON", '"$@"'), "bash", *command],
        cwd=folder,
        env=clean_environment() | environment,
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=300,
    )


WAYS = {
    "| head -1": "PYTHON | head -1; exit ${PIPESTATUS[0]}",
    "2>&1 | head -1": "PYTHON 2>&1 | head -1; exit ${PIPESTATUS[0]}",
    "| true": "PYTHON | true; exit ${PIPESTATUS[0]}",
    ">&-": "PYTHON >&-",
    ">&- 2>&-": "PYTHON >&- 2>&-",
    "<&- >&-": "PYTHON <&- >&-",
}


@pytest.mark.parametrize(
    "way",
    [
        "2>&1 | head -1",
        *(pytest.param(w, marks=pytest.mark.long) for w in WAYS if w != "2>&1 | head -1"),
    ],
)
@pytest.mark.parametrize("name", ["sft", pytest.param("ppo", marks=pytest.mark.long)])
def test_training_goes_on_without_its_output(tmp_path, name, way):
    """`| head` ended it with status 0 and nothing trained."""
    script, line = RUNS[name]
    done = shell(WAYS[way], tmp_path, script, *line)
    assert done.returncode == 0, done.stderr
    found = differences(whole(name)[0], left_by(tmp_path / "run", "out.npz"))
    # Imports draw from Python's generator, which nothing of a run reads; forks have done them.
    assert [place for place in found if "state/rng/python" not in place] == []


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_output_cannot_show_is_replaced(tmp_path, encoding):
    (tmp_path / "日本_train.jsonl").write_text('{"text": "caf\u00e9 日本 🙂 8"}\n' * 8)
    words = ["--preview", "--data", ".", "--data-base", "日本_"]
    done = shell("PYTHON", tmp_path, "sft.py", *words, PYTHONIOENCODING=encoding, PYTHONUTF8="0")
    assert done.returncode == 0, done.stderr
    assert b"\\u65e5\\u672c_train.jsonl:1" in done.stdout


def test_a_full_output_is_said_at_the_end(tmp_path):
    words = [*TRAIN["sft.py"], *PLACES, "--data", str(ROOT / "data")]
    done = shell("PYTHON > /dev/full", tmp_path, "sft.py", *words)
    assert done.returncode == 2 and (tmp_path / "out.npz").exists()
    assert b"error: standard output: cannot write: No space left on device\n" in done.stderr


# ------------------------------------------------------------------------------ escape sequences


def controls(done: subprocess.CompletedProcess) -> set[str]:
    shown = (done.stdout + done.stderr).decode()
    return {c for c in shown if c != "\n" and c != "\t" and printable(c) != c}


def test_control_characters_are_taken_out_and_nothing_else():
    assert printable(HOSTILE) == "[2J[31m]0;title1moverwritten"
    for fine in ("a\n\tb", "日本 🙂 é", "👩‍👩‍👧", "שלום"):
        assert printable(fine) == fine


CASES = {
    # script, words after it, what is printed of it
    "data": ("sft.py", ["--preview", "--train-file", "rows.jsonl"], "overwritten"),
    "name of a data file": ("sft.py", ["--preview", "--train-file", f"a{HOSTILE}.jsonl"], "[2J"),
    "name of a model": ("sft.py", ["--train", "--model", f"no{HOSTILE}"], "[2J"),
    "an unknown flag": ("sft.py", [f"--{HOSTILE}"], "[2J"),
    "a value": ("ppo_training.py", ["--batch-size", HOSTILE], "error: --batch-size"),
    "a config file": ("ppo_training.py", ["--config", "bad.json"], "[2J"),
    "a run": ("sft.py", ["--resume", f"{HOSTILE}"], "no run to resume"),
    "a reward that raises": (
        "ppo_training.py",
        [*TRAIN["ppo_training.py"][1:], *PLACES, "--reward-function", "reward.py:raises"],
        "raised ValueError",
    ),
    "a reward that prints": (
        "score.py",
        ["--input", "rows.jsonl", "--reward-function", "reward.py:prints"],
        "overwritten",
    ),
    "a warning": (
        "score.py",
        ["--input", "rows.jsonl", "--reward-function", "reward.py:warns"],
        "warning: ",
    ),
    "an adapter": ("fuse.py", ["--adapter-file", f"a{HOSTILE}.npz", "--save-path", "x"], "[2J"),
    "a prompt": ("talk_to_model.py", ["--model", f"no{HOSTILE}", "hello"], "[2J"),
}
REWARD = f"""
import warnings
HOSTILE = {HOSTILE!r}
def raises(prompts, responses):
    raise ValueError(HOSTILE)
def prints(prompts, responses):
    print(HOSTILE)
    return [1.0] * len(responses)
def warns(prompts, responses):
    warnings.warn(HOSTILE)
    return [1.0] * len(responses)
"""


@pytest.mark.parametrize("case", CASES)
def test_no_escape_sequence_reaches_the_terminal(tmp_path, case):
    script, words, shown = CASES[case]
    for name in ("rows.jsonl", f"a{HOSTILE}.jsonl"):
        (tmp_path / name).write_text((json.dumps({"text": f"8 {HOSTILE} 20"}) + "\n") * 4)
    (tmp_path / "bad.json").write_text(json.dumps({HOSTILE: 1}))
    (tmp_path / "reward.py").write_text(REWARD)
    if script == "ppo_training.py" and "--reward-function" in words:
        words = [*words, "--data", str(ROOT / "data")]
    done = shell("PYTHON", tmp_path, script, *words)
    assert shown in (done.stdout + done.stderr).decode()
    assert controls(done) == set() and b"Traceback" not in done.stderr


@pytest.mark.parametrize("name", TRAINED)
def test_no_escape_sequence_of_names_and_rows_reaches_the_terminal(tmp_path, name):
    """Of files and of fields of rows; in runs that end well and badly."""
    server, short = shared_server(), SHORT[name]
    data = data_in(tmp_path / f"data{HOSTILE}", **{HOSTILE: HOSTILE})
    places = ["--output-dir", f"run{HOSTILE}", "--save-file", f"out{HOSTILE}.npz"]
    line = [*short.line, *places, "--data", str(data)]
    well = server.run(short.script, line, tmp_path)
    assert well.code == 0 and (tmp_path / f"out{HOSTILE}.npz").exists(), well.err
    again = server.run(short.script, line, tmp_path)
    assert again.code == 2 and "holds a run already" in again.error
    shutil.rmtree(data)
    gone = server.run(short.script, ["--resume", f"run{HOSTILE}"], tmp_path)
    assert gone.code == 2, gone.err
    fused = ["--adapter-file", f"out{HOSTILE}.npz", "--save-path", f"fused{HOSTILE}"]
    fused = server.run("fuse.py", fused, tmp_path)
    assert fused.code == 0, fused.err
    for ended in (well, again, gone, fused):
        shown = ended.out + ended.err
        assert "[2J" in shown
        assert {c for c in shown if c not in "\n\t" and printable(c) != c} == set()


def test_an_output_that_breaks_drops_the_rest():
    read, written = os.pipe()
    stream = open(written, "w")  # noqa: SIM115
    output = Output(stream, str.upper)
    print("kept", file=output, flush=True)
    assert os.read(read, 99) == b"KEPT\n"
    os.close(read)
    for _ in range(3):
        print("lost" * 10_000, file=output, flush=True)
    assert isinstance(output.lost, BrokenPipeError)
    stream.close()  # what was in its buffer fails no more
