"""Bad input of label.py: one line, exit status 2, and nothing lost."""

import fast_blas  # noqa: F401  isort: skip

import json
import os
import shutil
import socket
import subprocess
import sys

import pytest
from label_setup import REPLIES, SCRIPT, Server, line, rows_of, write_samples

import label
from errors import UserError

PROMPTS = "--prompts prompts.jsonl"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Files that are wrong in different ways, beside good prompts; it is the working folder."""
    monkeypatch.chdir(tmp_path)
    files = {
        "prompts.jsonl": '{"prompt": "8 20"}\n{"prompt": "8 22"}\n',
        "texts.jsonl": '{"text": "8 20 22"}\n',
        "empty.jsonl": "",
        "torn.jsonl": '{"prompt": "8 20"}\n{"prompt": \n',
        "blank.jsonl": '{"prompt": " "}\n',
        "foreign.jsonl": '{"prompt": "x", "chosen": "a", "rejected": "b"}\n',
        "foreign.samples.jsonl": '{"step": 1}\n',
        "nothing.jsonl": '{"prompt": "x"}\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "no_model").mkdir()
    (tmp_path / "shut").mkdir()
    return tmp_path


AT_ONCE = [
    ("", "nothing to label: give --prompts FILE, or --report"),
    (f"{PROMPTS} --report foreign.jsonl", "--prompts and --report"),
    (f"{PROMPTS} --samples 0", "--samples 0: give 2 to 4"),
    (f"{PROMPTS} --samples 1 --against x", "--against x has no effect with --samples 1"),
    (f"{PROMPTS} --samples 1 --aspects x", "--aspects x has no effect with --samples 1"),
    (f"{PROMPTS} --samples 5", "--samples 5: give 2 to 4"),
    (f"{PROMPTS} --temperature 0", "--temperature 0: all replies"),
    (f"{PROMPTS} --temperature 0 --against x --samples 3", "--temperature 0: all replies"),
    (f"{PROMPTS} --top-p 0", "--top-p: give a probability"),
    (f"{PROMPTS} --aspects helpful,,kind", "'' is no name of an aspect"),
    (f"{PROMPTS} --aspects helpful,helpful", "a name stands there twice"),
    (f"{PROMPTS} --aspects a/b", "'a/b' is no name of an aspect"),
    (f"{PROMPTS} --port 80", "--port 80 has no effect without --web"),
    (f"{PROMPTS} --web --port 70000", "ports end at 65535"),
    (f"{PROMPTS} --plot x.png", "--plot x.png has no effect without --report"),
    (f"{PROMPTS} --any-base", "--any-base has no effect without --resume-file or --against"),
    ("--report foreign.jsonl --web", "--web has no effect with --report"),
    ("--report foreign.jsonl --model x", "--model has no effect with --report"),
    (f"{PROMPTS} --output=", "--output: the name is empty"),
    (f"{PROMPTS} --labeller=", "--labeller: give a name"),
    (f"{PROMPTS} --aspekts x", "did you mean --aspects?"),
    ("--prompts nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--prompts texts.jsonl", "texts.jsonl:1: the rows are plain texts and have no prompts"),
    ("--prompts empty.jsonl", "empty.jsonl: no rows"),
    ("--prompts torn.jsonl", "torn.jsonl:2"),
    ("--prompts blank.jsonl", "blank.jsonl:1"),
    (f"{PROMPTS} --web --output foreign.jsonl", "foreign.jsonl:1: is no row of label.py"),
    (f"{PROMPTS} --web --output shut", "shut: is not a file"),
    (f"{PROMPTS} --web --output texts.jsonl/x.jsonl", "texts.jsonl/x.jsonl: cannot write"),
    (f"{PROMPTS} --web --output /proc/x.jsonl", "/proc/x.jsonl: cannot write"),
    ("--report nowhere.jsonl", "nowhere.jsonl: no such file"),
    ("--report empty.jsonl", "empty.jsonl: no rows"),
    ("--report foreign.jsonl ./foreign.jsonl", "--report ./foreign.jsonl: is given twice"),
    ("--report texts.jsonl", "texts.jsonl:1: is a row of text, and prefers nothing"),
    ("--report torn.jsonl", "torn.jsonl:1: is a row of prompt, and prefers nothing"),
    ("--report foreign.jsonl --plot shut", "shut: cannot write: Is a directory"),
]


@pytest.mark.parametrize("words, said", AT_ONCE, ids=[words for words, _ in AT_ONCE])
def test_a_mistake_is_one_line(folder, words, said, capfd):
    before = sorted(os.listdir(folder))
    try:
        label.main(words.split())
        raise AssertionError("it went on")
    except UserError as wrong:
        text = f"error: {wrong}"
    except SystemExit as end:
        assert end.code == 2
        text = capfd.readouterr().err.strip()
    assert "\n" not in text and text.startswith("error: ")
    for part in said.split("|"):
        assert part in text
    assert sorted(os.listdir(folder)) == before


LATER = [
    ("--model nowhere", "nowhere: no model folder there"),
    ("--resume-file nowhere.npz", "nowhere.npz: no such file"),
    ("--model no_model", "no_model: not a model folder"),
    ("--model prompts.jsonl", "prompts.jsonl: no model folder there"),
    ("--against nowhere", "nowhere: no model folder there"),
    ("--template-date 2026-01-01", "--template-date has no effect"),
]


@pytest.mark.parametrize(
    "words, said",
    [*LATER[:2], *(pytest.param(*case, marks=pytest.mark.long) for case in LATER[2:])],
)
def test_a_model_that_cannot_be_loaded_is_one_line(folder, words, said):
    before = sorted(os.listdir(folder))
    words = [sys.executable, SCRIPT, *PROMPTS.split(), "--web", *words.split()]
    words += ["--output", "new/folder/labels.jsonl"]
    done = subprocess.run(words, capture_output=True, encoding="utf-8")
    assert done.returncode == 2 and done.stdout == ""
    told = done.stderr.splitlines()
    told = [x for x in told if not x.startswith("loading the model: ")]  # on a machine that is slow
    assert len(told) == 1 and told[0].startswith("error: ") and said in told[0]
    assert sorted(os.listdir(folder)) == before


def test_keys_need_a_terminal(folder):
    words = [sys.executable, SCRIPT, *PROMPTS.split()]
    done = subprocess.run(
        words, capture_output=True, text=True, stdin=subprocess.DEVNULL, start_new_session=True
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "label.py without --web reads key presses and needs a terminal" in done.stderr


def test_a_port_that_is_taken(folder, capfd):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: Address already in use"):
            label.main([*PROMPTS.split(), "--web", "--port", str(port)])


# ------------------------------------------------------------------------------ what is there


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with samples and one label, made with --aspects helpful."""
    folder, words = tmp_path_factory.mktemp("labelled"), ("--aspects", "helpful")
    write_samples(folder, [REPLIES] * 3, *words)
    with Server(folder, *words) as server:
        pair = server.ask("state")[1]["item"]["pair"]
        body = {"id": "abcdefgh", "pair": pair, "ranks": [0, 1], "aspects": {"helpful": 0}}
        assert server.ask("label", body)[0] == 200
        assert server.end()[0] == 0
    return folder


@pytest.fixture
def labelled(template, tmp_path, monkeypatch):
    """A copy of it, which is the working folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(folder, *words):
    """What is said of a run on the labels there; they stay as they are."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError) as wrong:
        label.main([*line(folder, "--web")[2:], *words])
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return str(wrong.value)


def test_labels_of_something_else_are_refused(labelled):
    helpful = ("--aspects", "helpful")
    assert "--seed" in refused(labelled, *helpful, "--seed", "1")
    assert "--samples" in refused(labelled, *helpful, "--samples", "3")
    assert "other options" in refused(labelled, *helpful, "--temperature", "0.7")
    assert "another template" in refused(labelled, *helpful, "--prompt-template", "Q: {prompt}")
    assert "another model" in refused(labelled, *helpful, "--model", "nowhere")
    assert "another model" in refused(labelled, *helpful, "--against", "nowhere")
    assert "labelled with the aspects helpful" in refused(labelled, "--aspects", "helpfull")
    assert "labelled with the aspects helpful" in refused(labelled)
    (labelled / "prompts.jsonl").write_text('{"prompt": "9 9"}\n')
    assert "are of other prompts" in refused(labelled, *helpful)
    (labelled / "labels.samples.jsonl").unlink()  # the labels alone say it, too
    assert "row 1 is a label of another prompt set" in refused(labelled, *helpful)


def test_labels_of_another_model_without_their_samples(labelled):
    (labelled / "labels.samples.jsonl").unlink()
    said = refused(labelled, "--aspects", "helpful", "--model", "nowhere")
    assert "row 1 is a label of another model" in said


def test_samples_that_are_none(labelled):
    (labelled / "labels.samples.jsonl").write_text('{"step": 1}\n')
    assert "holds no samples of label.py" in refused(labelled, "--aspects", "helpful")


def test_two_programs_on_one_file(labelled):
    with Server(labelled, "--aspects", "helpful") as server:
        with pytest.raises(UserError, match="is going to be written by process"):
            label.main([*line(labelled, "--web")[2:], "--aspects", "helpful"])
        assert server.ask("state")[1]["done"] == 1
    assert len(rows_of(labelled)) == 1


def test_a_full_disk_is_told_to_the_page_and_leaves_no_half(tmp_path):
    """A limit on the size of files stands for it: both make a write fail."""
    write_samples(tmp_path, [REPLIES] * 3)
    (tmp_path / "limited.py").write_text(
        "import resource, runpy, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"sys.argv[0] = {SCRIPT!r}\nsys.path[:0] = [{os.path.dirname(SCRIPT)!r}]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    with Server(tmp_path, script=tmp_path / "limited.py") as server:
        told = []
        for number in range(2):
            pair = server.ask("state")[1]["item"]["pair"]
            body = {"id": f"label-number-{number}", "pair": pair, "ranks": [0, 1]}
            told.append(server.ask("label", body))
    assert told[0][0] == 200
    assert told[1][0] == 400 and "cannot write" in told[1][1]["problem"]
    assert len(rows_of(tmp_path)) == 1


@pytest.mark.long
def test_bad_rows_that_are_skipped_are_counted(tmp_path):
    rows = ['{"prompt": "8 20"}', '{"prompt": 3}', '{"prompt": "8 22"}']
    (tmp_path / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    with Server(tmp_path, "--skip-bad-rows", "--max-new-tokens", "4") as server:
        while (state := server.ask("state")[1])["item"] is None:
            pass
        assert state["total"] == 2
    assert json.loads((tmp_path / "labels.samples.jsonl").read_text().splitlines()[0])
