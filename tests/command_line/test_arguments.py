"""The command line: how flags may be written, resumed options, exit statuses."""

import subprocess
import sys
from pathlib import Path

import parsers
import pytest
from flag_check import unread_flags
from small_parser import Knobs, parse, refused, write

from command_line.dataclass_flags import dataclass_from_arguments
from command_line.exits import run_main
from command_line.parser import Parser
from command_line.shared_flags import (
    optimizer_options,
)
from errors import UserError

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------ writing flags


@pytest.mark.parametrize(
    "words",
    [["--save-file", "a"], ["--save_file", "a"], ["--save_file=a"], ["--save-f", "a"]],
)
def test_dashes_underscores_equals_and_prefixes(words):
    args = parse(*words)
    assert args.save_file == "a"
    assert args.explicit == {"save_file"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--adap_kl_ctrl", "False"], False),
        (["--adap-kl-ctrl", "false"], False),
        (["--adap-kl-ctrl=0"], False),
        (["--no-adap-kl-ctrl"], False),
        (["--no_adap_kl_ctrl"], False),
        (["--no-adap"], False),
        (["--no-adap-kl-ctrl=false"], True),
        (["--adap_kl_ctrl", "True"], True),
        (["--adap"], True),
        (["--adap-kl-ctrl", "--iters", "3"], True),
        ([], True),
    ],
)
def test_every_form_of_a_boolean(words, expected):
    args = parse(*words)
    assert args.adap_kl_ctrl is expected
    assert ("adap_kl_ctrl" in args.explicit) == bool(words)


def test_a_boolean_leaves_positional_words_alone():
    parser = Parser()
    parser.add_argument("--stream", type=bool, default=False, help="x")
    parser.add_argument("prompt", nargs="*", help="x")
    args = parser.parse_args(["--stream", "2 4 6"])
    assert args.stream is True and args.prompt == ["2 4 6"]
    assert parser.parse_args(["--stream", "False", "--", "--x"]).prompt == ["--x"]


def test_an_unambiguous_prefix_is_enough_and_an_ambiguous_one_is_named(capsys):
    assert parse("--ppo_epoch", "2").ppo_epochs == 2
    err = refused(capsys, "--lora", "2")
    assert "--lora-rank" in err and "--lora-alpha" in err
    # An exact name wins over longer ones that begin with it.
    assert (
        parse("--resume-x".replace("-x", ""), str(make_run(Path("/nonexistent"), None))) if 0 else 1
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--iter-s", "3"], ["--iter-s", "did you mean --iters?"]),
        (["--learning-rte", "1"], ["did you mean --learning-rate?"]),
        (["--iters", "many"], ["--iters", "'many' is not a whole number"]),
        (["--iters", "1.5"], ["not a whole number"]),
        (["--learning-rate", "nan"], ["--learning-rate", "not a finite number"]),
        (["--optimizer", "adagrad"], ["--optimizer", "'adagrad'", "'adamw'"]),
        (["--reward-model", "Ture"], ["--reward-model", "'Ture' is neither True nor False"]),
        (["--iters"], ["--iters", "expected one argument"]),
        (["stray"], ["'stray'"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--rslora"], ["--lora-alpha"]),
        (["--lora-scale", "2", "--lora-alpha", "16"], ["--lora-scale", "--lora-alpha"]),
        (["--fine-tune-type", "full", "--lora-rank", "4"], ["--lora-rank", "full"]),
        (["--prompt-tuning", "--lora-keys", "a"], ["--lora-keys", "--prompt-tuning"]),
        (["--num-prompt-tokens", "4"], ["--prompt-tuning"]),
        (["--momentum", "0.9"], ["--momentum", "adam"]),
        (["--num-cycles", "3"], ["cosine_with_restarts"]),
        (["--lr-power", "3"], ["polynomial"]),
        (["--lr-schedule", "polynomial", "--lr-power", "nan"], ["--lr-power"]),
        (["--lr-schedule", "polynomial", "--lr-power", "0"], ["--lr-power"]),
        (["--lr-end-factor", "0.1"], ["constant"]),
        (["--max-grad-norm", "0"], ["--max-grad-norm"]),
        (["--overwrite"], ["--output-dir"]),
        (["--force-resume"], ["--resume"]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(capsys, words, parts):
    err = refused(capsys, *words)
    for part in parts:
        assert part in err


TWO_VALUES = {int: ("3", "5"), float: ("0.3", "0.5"), bool: ("true", "false")}


@pytest.mark.parametrize("script", parsers.SCRIPTS)
def test_two_names_of_a_flag_that_say_different_things_are_refused(script, capsys):
    parser = parsers.parser_of(script)
    several = [a for a in parser._actions if len(a.option_strings) > 1 and a.type is not bool]
    for action in (a for a in several if a.dest != "help"):
        a, b = action.choices[:2] if action.choices else TWO_VALUES.get(action.type, ("3", "5"))
        one, other = action.option_strings[:2]
        for line in (
            [one, a, other, b],
            [f"{other}={b}", "--seed", "1", f"{one}={a}"],
            [other.replace("-", "_") if other.startswith("--") else other, b, one, a, other, b],
        ):
            with pytest.raises(SystemExit) as stop:
                parser._spell_out(line)
            err = capsys.readouterr().err
            assert stop.value.code == 2 and err.count("\n") == 1
            assert f"{one} {a}" in err and f"{other} {b}" in err and "one flag" in err
        parser._spell_out([one, a, other, a])  # one thing, said twice
        parser._spell_out([one, a, one, b])  # a line that is changed at its end


def test_whole_numbers_may_be_written_as_floats():
    assert parse("--iters", "1e3").iters == 1000


def test_help_shows_dashed_names_once_with_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--help-all")
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--save-file" in text and "--save_file" not in text
    assert "--adap-kl-ctrl, --no-adap-kl-ctrl" in text
    assert "updates (default: 1000)" in text
    assert "(default: None)" not in text
    assert len(text.partition("Test.")[0]) < 40  # no twenty lines of usage


def test_help_of_a_script_loads_no_mlx():
    code = (
        "import sys; from command_line.parser import Parser\n"
        "import command_line.shared_flags as g, command_line.dataclass_flags, run_folder.run\n"
        "p = Parser(); g.add_run_arguments(p); g.add_model_arguments(p)\n"
        "p.parse_args([])\n"
        "sys.exit(any(name in sys.modules for name in ('mlx', 'wandb', 'transformers', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# ------------------------------------------------------------------------------ groups


def test_lora_scale_follows_from_alpha_and_rank():
    assert parse().lora_scale == 20.0
    assert parse("--lora-alpha", "16", "--lora-rank", "4").lora_scale == 4.0
    assert parse("--lora-alpha", "16", "--lora-rank", "4", "--rslora").lora_scale == 8.0
    assert parse("--lora-scale", "3").lora_scale == 3.0
    assert parse("--lora-keys", "a,b", "c").lora_keys == ["a", "b", "c"]


def test_a_flag_set_to_its_off_value_contradicts_nothing():
    assert parse("--fine-tune-type", "full", "--no-rslora").fine_tune_type == "full"


def test_optimizer_options_build_an_optimizer():
    from training.optimizers import build_optimizer

    args = parse("--optimizer", "sgd", "--momentum", "0.5", "--learning-rate", "0.25")
    optimizer = build_optimizer(**optimizer_options(args), steps=10)
    assert optimizer.momentum == 0.5 and optimizer.learning_rate.item() == 0.25


# ------------------------------------------------------------------------------ dataclasses


def test_a_dataclass_gives_flags_and_comes_back():
    args = parse(
        "--score_clip", "2.5", "--kl-mode", "abs", "--stops", "a", "b", "--ppo-epochs", "1"
    )
    knobs = dataclass_from_arguments(Knobs, args, adap_kl_ctrl=False)
    assert knobs == Knobs(1, False, 2.5, "abs", ["a", "b"])
    assert dataclass_from_arguments(Knobs, parse()) == Knobs()
    assert parse("--score-clip", "none").score_clip is None


def test_a_dataclass_flag_checks_its_type_and_choices(capsys):
    assert "not a finite number" in refused(capsys, "--score-clip", "high")
    assert "'mse'" in refused(capsys, "--kl-mode", "mse")
    assert "not a whole number" in refused(capsys, "--ppo-epochs", "none")


# ------------------------------------------------------------------------------ resume


def make_run(folder: Path, *words: str) -> Path:
    """A run folder as ``Run`` leaves it, from a command line."""
    from run_folder.run import Run

    with Run("sft", vars(parse(*words)), output_dir=folder):
        pass
    return folder


def test_resume_takes_over_the_options_of_the_run(tmp_path):
    folder = make_run(tmp_path / "r", "--iters", "50", "--lora-alpha", "16", "--save-every", "5")
    args = parse("--resume", str(folder))
    assert (args.iters, args.save_every, args.lora_scale) == (50, 5, 2.0)
    assert args.output_dir == str(folder) and args.explicit == {"resume"}
    checkpoint = folder / "checkpoints" / "step-00000005"
    assert parse("--resume", str(checkpoint)).output_dir == str(folder)


def test_resume_refuses_a_changed_option_unless_harmless_or_forced(tmp_path, capsys):
    folder = str(make_run(tmp_path / "r", "--iters", "50"))
    err = refused(capsys, "--resume", folder, "--learning-rate", "0.5")
    assert "--learning-rate" in err and "0.5" in err and "0.0001" in err and "--force-resume" in err
    assert parse("--resume", folder, "--learning-rate", "0.0001").learning_rate == 1e-4
    forced = parse("--resume", folder, "--learning-rate", "0.5", "--force-resume")
    assert forced.learning_rate == 0.5
    assert parse("--resume", folder, "--iters", "90", "--save-every", "9").iters == 90
    assert parse("--resume", folder, "--sample-every", "3").sample_every == 3
    assert "--output-dir" in refused(capsys, "--resume", folder, "--output-dir", "elsewhere")


def test_the_command_line_replaces_what_a_config_file_says_in_another_way(tmp_path, capsys):
    file = write(tmp_path / "c.yaml", "lora_alpha: 16\n")
    assert parse("--config", file).lora_scale == 2.0
    args = parse("--config", file, "--lora-scale", "3")
    assert (args.lora_scale, args.lora_alpha) == (3.0, None) and "lora_alpha" not in args.explicit
    file = write(tmp_path / "d.yaml", "lora_scale: 3\n")
    assert parse("--config", file, "--lora-alpha", "8").lora_scale == 1.0
    file = write(tmp_path / "both.yaml", "lora_scale: 3\nlora_alpha: 16\n")
    assert "give one of them" in refused(capsys, "--config", file)


def test_a_changed_lora_scale_replaces_the_alpha_of_the_run(tmp_path):
    folder = make_run(tmp_path / "r", "--lora-alpha", "16")
    args = parse("--resume", str(folder), "--lora-scale", "5", "--force-resume")
    assert args.lora_scale == 5.0


def test_more_steps_are_not_harmless_when_the_rate_depends_on_them(tmp_path, capsys):
    folder = str(make_run(tmp_path / "r", "--iters", "50", "--lr-schedule", "cosine"))
    assert "--iters" in refused(capsys, "--resume", folder, "--iters", "90")


def test_a_config_file_counts_as_a_change_too(tmp_path, capsys):
    folder = str(make_run(tmp_path / "r", "--seed", "3"))
    file = write(tmp_path / "c.yaml", "seed: 4\n")
    assert "--seed" in refused(capsys, "--resume", folder, "--config", file)


def test_resuming_what_is_no_run_is_refused(tmp_path, capsys):
    assert "no config.json" in refused(capsys, "--resume", str(tmp_path))
    write(tmp_path / "config.json", "{}")
    assert "options" in refused(capsys, "--resume", str(tmp_path))


def test_an_option_with_a_secret_has_to_be_given_again(tmp_path, capsys):
    folder = make_run(tmp_path / "r", "--train-file", "https://me:pw@host/f")
    assert "me:pw" not in (folder / "config.json").read_text()
    err = refused(capsys, "--resume", str(folder))
    assert "--train-file" in err and "once more" in err
    again = parse("--resume", str(folder), "--train-file", "https://me:pw@host/f")
    assert again.train_file == ["https://me:pw@host/f"]


# ------------------------------------------------------------------------------ run_main


def fail_with(error: BaseException):
    def main():
        raise error

    return main


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("f.jsonl:3: no text,\n write one"), 2, "error: f.jsonl:3: no text, write one\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (OSError(28, "No space left on device", "x/y"), 2, "error: x/y: No space left on device\n"),
        (OSError(30, "Read-only file system", "x"), 2, "error: x: Read-only file system\n"),
    ],
)
def test_run_main_ends_with_one_line(capsys, error, code, text):
    with pytest.raises(SystemExit) as stop:
        run_main(fail_with(error))
    assert stop.value.code == code and capsys.readouterr().err == text


def test_run_main_says_which_flags_save_memory(capsys):
    with pytest.raises(SystemExit):
        run_main(fail_with(RuntimeError("[malloc] Unable to allocate 99 bytes.")))
    assert "--batch-size" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("bug"), RuntimeError("bug"), OSError(5, "bug")])
def test_run_main_leaves_bugs_their_traceback(error):
    with pytest.raises(type(error)):
        run_main(fail_with(error))


def test_a_closed_pipe_is_no_error():
    code = (
        "from command_line.exits import run_main\n"
        "def main():\n    for _ in range(100000): print('x' * 80)\nrun_main(main)"
    )
    command = f'{sys.executable} -c "$CODE" | head -1; echo ${{PIPESTATUS[0]}}'
    ran = subprocess.run(
        ["bash", "-c", command], env={"CODE": code}, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.stdout.splitlines()[-1] == "0" and ran.stderr == ""


# ------------------------------------------------------------------------------ flags are read


def test_flags_that_nothing_reads_are_found(tmp_path):
    parser = Parser()
    for name in ("--seen", "--got", "--field", "--written", "--refused", "--lost"):
        parser.add_argument(name, help="x")
    source = tmp_path / "s.py"
    source.write_text(
        "def main(args, self):\n"
        "    print(args.seen, getattr(args, 'got'), self.config.field)\n"
        "    args.written = 1\n"
        "    other.lost\n"
        "def check(args):\n    print(args.refused)\n"
    )
    assert unread_flags(parser, [source]) == ["lost", "refused", "written"]
