"""Files of options: YAML, JSON, and the sectioned .conf files of another workflow."""

import re
import textwrap

import pytest
from small_parser import parse, refused, write

import ppo_training
import sft
from command_line.ppo_flags import parse_arguments as ppo_arguments

YAML = """\
iters: 600
learning_rate: 1e-5     # PyYAML reads this as text
adap-kl-ctrl: false
lora_keys: [self_attn.q_proj, self_attn.v_proj]
score_clip: null
"""


def test_a_yaml_file_gives_defaults_and_the_command_line_wins(tmp_path):
    file = write(tmp_path / "c.yaml", YAML)
    args = parse("--config", file, "--iters", "7")
    assert args.iters == 7 and args.learning_rate == 1e-5 and args.adap_kl_ctrl is False
    assert args.lora_keys == ["self_attn.q_proj", "self_attn.v_proj"]
    assert args.explicit >= {"iters", "learning_rate", "adap_kl_ctrl", "lora_keys", "score_clip"}
    # The words on the command line may stand before the file and still win.
    assert parse("--iters", "7", "--config", file).iters == 7


def test_a_json_file_gives_defaults(tmp_path):
    file = write(tmp_path / "c.json", '{"iters": 600, "reward_model": true, "save-file": "x"}')
    args = parse(f"--config={file}")
    assert (args.iters, args.reward_model, args.save_file) == (600, True, "x")


@pytest.mark.parametrize(
    "words", ["--config_path {}", "--config-path={}", "--config_path {0} --config {0}"]
)
def test_a_file_of_options_has_a_second_name(tmp_path, words):
    file = write(tmp_path / "c.json", '{"iters": 600}')
    assert parse(*words.format(file).split()).iters == 600


@pytest.mark.parametrize(
    ("name", "text", "parts"),
    [
        ("c.yaml", "seed: 1\nitres: 5\n", ["c.yaml:2", "'itres'", "--iters"]),
        ("c.yaml", "resume: runs/x\n", ["c.yaml:1", "'resume'", "command line"]),
        ("c.yaml", "iters: many\n", ["c.yaml:1", "iters", "not a whole number"]),
        ("c.yaml", "iters: true\n", ["c.yaml:1", "iters", "True"]),
        ("c.yaml", "iters: {a: 1}\n", ["c.yaml:1", "iters"]),
        ("c.yaml", "iters: [1, 2]\n", ["c.yaml:1", "iters"]),
        ("c.yaml", "iters: null\n", ["c.yaml:1", "iters"]),
        ("c.yaml", "seed: 1\nseed: 2\n", ["c.yaml:2", "line 1"]),
        ("c.yaml", "- 1\n", ["c.yaml", "mapping"]),
        ("c.yaml", "a: [1\n", ["c.yaml:", "not YAML"]),
        ("c.yaml", "seed: !!python/object/apply:os.system ['true']\n", ["c.yaml", "not YAML"]),
        ("c.yaml", "optimizer: adagrad\n", ["c.yaml:1", "adagrad"]),
        ("c.json", '{\n"seed": 1,\n"sed": 2}', ["c.json:3", "'sed'", "--seed"]),
        ("c.json", '{"seed": 1,\n"seed": 2}', ["c.json", "already"]),
        ("c.json", '{"seed": 1,}', ["c.json:1", "not JSON"]),
        ("c.json", "[1]", ["c.json", "object"]),
        ("c.yaml", "reward_model: maybe\n", ["c.yaml:1", "maybe"]),
    ],
)
def test_a_wrong_config_file_is_named_with_its_line(tmp_path, capsys, name, text, parts):
    err = refused(capsys, "--config", write(tmp_path / name, text))
    for part in parts:
        assert part in err, err


def test_a_missing_config_file_is_named(tmp_path, capsys):
    assert "absent.yaml" in refused(capsys, "--config", str(tmp_path / "absent.yaml"))


# ------------------------------------------------------------------------------ .conf files

BODY = """
    "General": {"base_model": "m", "seed": 7,},
    "Dataset": {
        "train_file": "t.jsonl", "max_seq_len": None,
        "preprocessing_num_workers": 4, "max_seq_length": 128,
    },
    "Training": {
        "optimizer": "adamw_torch", "epochs": None, "max_steps": 30,
        "lr_scheduler": "constant_with_warmup",
        "warmup_steps": 3, "batch_size": 8, "experience_batch_size": 32, "kl_coeff": 0.1,
    },
"""
LINES = """
[General]
base_model = "m",
seed = 7  # comment, with a comma
[Dataset]
train_file = 't.jsonl',
max_seq_len = None
max_seq_length = 128
preprocessing_num_workers = 4
Training:
optimizer: "adamw_torch",
epochs = None,
max_steps = (
    30
)
lr_scheduler = "constant_with_warmup"
warmup_steps = 3
batch_size = 8,
experience_batch_size = 32,
kl_coeff = 0.1
"""
ASSIGNED = re.sub(r'"(General|Dataset|Training)": ', r"\1 = ", BODY).replace("},\n", "}\n")
ASSIGNED = textwrap.dedent(ASSIGNED)


@pytest.mark.parametrize("text", ["{" + BODY + "}", BODY, LINES, ASSIGNED])
def test_a_sectioned_conf_file_is_mapped_to_our_flags(tmp_path, capsys, text):
    args = parse("--config", write(tmp_path / "w.conf", text))
    assert (args.model, args.seed, args.train_file) == ("m", 7, ["t.jsonl"])
    assert (args.optimizer, args.lr_schedule, args.warmup_steps) == ("adamw", "constant", 3)
    assert (args.batch_size, args.mini_batch_size, args.iters) == (32, 8, 30)
    assert args.max_length == 128 and "epochs" not in args.explicit
    note = capsys.readouterr().out
    assert "base_model -> --model m" in note and "kl_coeff is not used here" in note
    assert "preprocessing_num_workers is not used here" in note


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("[Training]\nlearnin_rate = 1", ["w.conf:2", "learnin_rate", "--learning-rate"]),
        ('[General]\nbase_model = open("x")', ["w.conf:2", "not a Python literal"]),
        ("{'Training': {'seed': 1,\n'iters': __import__('os')}}", ["w.conf:2", "literal"]),
        ("[General]\nbase_model = [1,\n", ["w.conf:2", "not closed"]),
        ("[General]\nnonsense\n", ["w.conf:2"]),
        ("[Training]\nlr = 1e-3\nlearning_rate = 1e-4", ["w.conf:3", "line 2"]),
    ],
)
def test_a_wrong_conf_file_is_named_with_its_line(tmp_path, capsys, text, parts):
    err = refused(capsys, "--config", write(tmp_path / "w.conf", text))
    for part in parts:
        assert part in err, err


@pytest.mark.parametrize(
    ("key", "value", "name"),
    [("kl_target", 3.0, "target"), ("target_kl_value", 2.5, "target"), ("target", 4.0, "target")],
)
@pytest.mark.parametrize("form", ["[Training]\n{} = {}", '{{"Training": {{"{}": {}}}}}'])
def test_the_target_of_the_kl_stays_what_it_was(key, value, name, form, tmp_path, capsys):
    path = write(tmp_path / "w.conf", form.format(key, value))
    args = ppo_arguments(["--ground_truth_reward", "--config", path])
    assert args.target == value and "kl_target" not in args.changed and args.adap_kl_ctrl
    assert f"--target {value:g}" in capsys.readouterr().out or key == name


def test_a_batch_is_a_batch_where_there_is_no_experience(tmp_path, capsys):
    text = "[Training]\nexperience_batch_size = 8\nbatch_size = 4\n"
    args = sft.parse_arguments(["--train", "--config", write(tmp_path / "w.conf", text)])
    note = capsys.readouterr().out
    assert args.batch_size == 4 and "batch_size -> --batch-size 4" in note
    assert "experience_batch_size is not used here" in note


@pytest.mark.parametrize("script, words", [(sft, ["--train"]), (ppo_training, ["--increasing"])])
def test_an_unknown_key_is_not_mapped_to_anything(tmp_path, capsys, script, words):
    file = write(tmp_path / "w.conf", "[Training]\nlr = 1e-3\ngenerate = True\n")
    with pytest.raises(SystemExit):
        script.parse_arguments([*words, "--config", file])
    said = capsys.readouterr()
    assert said.out == f"note: {file}: lr -> --learning-rate 0.001\n"
    assert said.err == f"error: {file}:3: unknown key 'generate'; --help-all lists the flags\n"


@pytest.mark.parametrize(
    ("name", "keys", "model", "adapter"),
    [
        ("whole", {"model_name": "base", "model_pretrain": "trained"}, "trained", None),
        ("none", {"model_name": "base", "model_pretrain": None}, "base", None),
        ("adapter", {"model_name": "base", "model_pretrain": "a.npz"}, "base", "a.npz"),
        ("alone", {"model_pretrain": "trained"}, "trained", None),
    ],
)
def test_a_trained_model_comes_before_the_base_that_a_conf_names(
    tmp_path, capsys, name, keys, model, adapter
):
    from command_line.option_files import read_config
    from command_line.parser import Parser

    parser = Parser()
    for flag in ("--model", "--reward-model", "--resume-file"):
        parser.add_argument(flag)
    file = tmp_path / "a.conf"
    file.write_text(repr({"Training": {**keys, "rm_name": "base", "rm_pretrain": "judge"}}))
    found = {s.key.replace("_", "-"): s.value for s in read_config(file, parser._flags())}
    assert found == {"model": model, "reward-model": "judge"} | (
        {"resume-file": adapter} if adapter else {}
    )
    assert "not used here" not in capsys.readouterr().out
