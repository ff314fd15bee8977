"""Commands below `next:` can be pasted: quoted, and on the model that was trained or asked."""

import importlib
import shlex

import pytest
from judge_runs import write
from script_table import SHORT, TRAINED
from tiny import tiny_model_folder

import fuse
import score
import sft
from command_line.sft_flags import parse_arguments as sft_arguments
from models.base_fingerprint import DEFAULT_MODEL
from run_folder.console import command

PAIRS = [{"prompt": f"q {i}", "chosen": f"the a{i}", "rejected": f"no {i}"} for i in range(6)]
ANSWERS = [{"prompt": "what", "response": f"a {i}", "label": i > 2} for i in range(5)]
TRAIN = ["--train", "--iters", "2", "--lora-rank", "2", "--save-every", "0"]


@pytest.fixture(autouse=True)
def given(in_tmp):
    write("pairs.jsonl", PAIRS)
    write("numbers.jsonl", [{"text": "8 20 22 30"}, {"text": "4 18 33"}, {"text": "1 2 3"}])
    write("answers.jsonl", ANSWERS)


def commands(out: str) -> list[list[str]]:
    """The words of every command below `next:`, as a shell would take them."""
    lines = out[out.index("next:") :].removeprefix("next:").splitlines()
    return [shlex.split(line) for line in lines if line.strip().startswith("python ")]


@pytest.mark.parametrize("name", ["plain", "with space", "quo'te$x"])
def test_the_next_lines_of_sft_can_be_pasted(tmp_path, capsys, name):
    base = tiny_model_folder(tmp_path / name)
    words = ["--model", str(base), *TRAIN, "--output-dir", "run"]
    sft.main([*words, "--train-file", "numbers.jsonl", "--save-file", f"{name}.npz"])
    (line,) = commands(capsys.readouterr().out)
    assert line == [
        "python",
        "fuse.py",
        "--model",
        str(base),
        "--adapter-file",
        f"{name}.npz",
        "--save-path",
        "my_model/",
    ]
    sft.main(
        [
            *words[:-1],
            "run2",
            "--reward-model",
            "--train-file",
            "pairs.jsonl",
            "--save-file",
            f"r{name}.npz",
        ]
    )
    (line,) = commands(capsys.readouterr().out)
    assert line[1:] == [
        "ppo_training.py",
        "--model",
        str(base),
        "--reward-model",
        f"r{name}.npz",
        "--train-file",
        "pairs.jsonl",
    ]


LENGTH = ["--length-reward", "10", "--best-of", "--output", "the best.jsonl"]


@pytest.mark.parametrize(
    ("rows", "words", "named"),
    [
        ("answers.jsonl", ["--model", "my base"], ["--model", "my base"]),
        ("answers.jsonl", [], ["--model", "MODEL"]),  # the embedded one knows numbers alone
        ("digits.jsonl", [], []),
        ("digits.jsonl", ["--tokenizer", "my digits"], ["--tokenizer", "my digits"]),
        (
            "answers.jsonl",
            ["--model", "my base", "--prompt-template", "Q {prompt}\nA: "],
            ["--prompt-template", "Q {prompt}\\nA: "],
        ),
        (None, ["--model", "my base", "--max-new-tokens", "3"], ["--model", "my base"]),
    ],
)
def test_score_says_which_model_to_train(tmp_path, capsys, rows, words, named):
    tiny_model_folder(tmp_path / "my base")
    (tmp_path / "my digits").symlink_to(DEFAULT_MODEL, target_is_directory=True)
    write("digits.jsonl", [{"prompt": "8 20", "response": f"{i} {i}"} for i in range(3)])
    write("asked.jsonl", [{"prompt": "what"}, {"prompt": "the question"}])
    read = ["--input", rows] if rows else ["--prompts", "asked.jsonl"]
    score.main([*read, *words, *LENGTH])
    (line,) = commands(capsys.readouterr().out)
    assert line[line.index("--train-file") + 1] == "the best.jsonl"
    assert all(word in line for word in named) and ("--model" in line) == (rows != "digits.jsonl")
    for flag, value in zip(named[::2], named[1::2], strict=True):
        assert line[line.index(flag) + 1] == value


@pytest.mark.parametrize("name", TRAINED)
def test_every_training_script_names_the_model_that_it_trained(tmp_path, capsys, name):
    (tmp_path / "my digits").symlink_to(DEFAULT_MODEL, target_is_directory=True)
    short = SHORT[name]
    script = importlib.import_module(short.script.removesuffix(".py"))
    script.main([*short.line, "--model", "my digits"])
    lines = commands(capsys.readouterr().out)
    assert lines and all(line[line.index("--model") + 1] == "my digits" for line in lines)


@pytest.mark.parametrize(
    ("script", "kind"),
    [
        ("process_data", []),
        *(("process_data_rlhf", ["--kind", k]) for k in ("preference", "prompts")),
    ],
)
def test_rows_that_were_converted_are_for_a_model_of_ones_own(tmp_path, capsys, script, kind):
    rows = (
        {"prompt": "why", "chosen": "so", "rejected": "no"}
        if kind
        else {"prompt": "why", "response": "so"}
    )
    write("own.jsonl", [rows] * 2)
    main = importlib.import_module(f"data.{script}").main
    main([*kind, "--input", "own.jsonl", "--output", "made rows.jsonl"])
    (line,) = commands(capsys.readouterr().out)
    assert line[line.index("--model") + 1] == "MODEL"
    assert line[line.index("--train-file") + 1] == "made rows.jsonl"


def test_only_the_digits_model_is_sent_to_the_digits_score(tmp_path, capsys):
    fuse.main(["--dtype", "float32", "--save-path", "digits"])
    assert ["--ground-truth-reward" in line for line in commands(capsys.readouterr().out)] == [
        False,
        True,
    ]
    for name in ("other", "digits of mine"):  # by what it is, not by what it is called
        base = tiny_model_folder(tmp_path / name)
        fuse.main(["--model", str(base), "--dtype", "float32", "--save-path", f"fused {name}"])
        lines = commands(capsys.readouterr().out)
        assert not any("--ground-truth-reward" in line for line in lines)
        assert all(line[line.index("--model") + 1] == f"fused {name}" for line in lines)
        assert "--reward-function" in lines[1]


def test_a_command_is_quoted_and_leaves_out_what_is_not_given():
    made = command("a.py", "--x", model=None, save_path="b c", other="$(rm)")
    assert shlex.split(made) == ["python", "a.py", "--save-path", "b c", "--other", "$(rm)", "--x"]


@pytest.mark.parametrize("template", ["Q: {prompt}\nA:", "{prompt}\n\n", "\n{prompt}"])
def test_a_command_is_one_line_and_its_template_is_read_back(template):
    made = command("sft.py", prompt_template=template)
    assert "\n" not in made
    assert sft_arguments([*shlex.split(made)[2:], "--train"]).prompt_template == template
