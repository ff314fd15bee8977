"""A flag that cannot have an effect is refused, a default written out is not."""

import json

import mlx.core as mx
import pytest
from reliable_runs import ROOT, shared_server, words

import ppo_training
import sft
from command_line.adapter_file import check_save_file
from command_line.ppo_flags import settle_for_model
from models.adapter_description import read_description
from models.adapter_files import attach, read_adapter, save_adapter, save_head
from models.load import load_model

SFT, RM = "--train", "--train --reward-model"
PPO = "--ground-truth-reward"
NO_ROWS = "without rows to validate on: give --validation-file or --validation-split-percentage"
TRAIN = "DATA/increasing_mult_2_train.jsonl"


def parse(script, line: str, *more: str):
    return script.parse_arguments([*words(line), "--data", str(ROOT / "data"), *more])


def refusal(capsys, script, line: str, *more: str) -> str:
    with pytest.raises(SystemExit) as end:
        parse(script, line, *more)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ------------------------------------------------------------------------------ flags that need one

WITHOUT = [
    # script, its other flags, the flag with a value, its default, what the refusal says
    (ppo_training, PPO, "--target 3", "--target 6", "without --adap-kl-ctrl"),
    (ppo_training, PPO, "--horizon 500", "--horizon 1e4", "without --adap-kl-ctrl"),
    (ppo_training, PPO, "--kl-target 3", "--kl-target 0.1", "without --use-dynamic-kl"),
    (ppo_training, f"{PPO} --use-dynamic-kl", "--target 3", "--target 6", "without --adap-kl-ctrl"),
    (ppo_training, PPO, "--target-kl 3", "--target-kl 1", "without --early-stopping"),
    (ppo_training, PPO, "--overlong-penalty 3", "--overlong-penalty 1", "at --overlong-buffer 0"),
    (
        ppo_training,
        f"{PPO} --overlong-penalty 0",
        "--overlong-buffer 3",
        "",
        "at --overlong-penalty 0",
    ),
    (ppo_training, PPO, "--reward-retries 7", "--reward-retries 3", "without --reward-url"),
    (ppo_training, PPO, "--reward-timeout 7", "--reward-timeout 120", "on the digits score"),
    (ppo_training, PPO, "--lora-dropout 0.5", "--lora-dropout 0", "on rollouts"),
    (
        ppo_training,
        f"{PPO} --eval-every 0",
        "--eval-samples 2",
        "--eval-samples 4",
        "at --eval-every 0",
    ),
    (
        ppo_training,
        f"{PPO} --eval-every 0",
        "--eval-prompts 2",
        "--eval-prompts 128",
        "at --eval-every 0",
    ),
    (ppo_training, f"{PPO} --train-file {TRAIN}", "--eval-every 1", "--eval-every 20", NO_ROWS),
    (ppo_training, f"{PPO} --train-file {TRAIN}", "--eval-samples 2", "--eval-samples 4", NO_ROWS),
    (
        ppo_training,
        f"{PPO} --data-base nothing_",
        "--eval-prompts 2",
        "--eval-prompts 128",
        NO_ROWS,
    ),
    (sft, SFT, "--centering 1", "--centering 0", "without --reward-model"),
    (sft, SFT, "--no-margins", "--margins", "without --reward-model"),
    (sft, SFT, "--pooling last", "--pooling mean", "without --reward-model"),
    (sft, SFT, "--test-file x", "", "without --test"),
    (sft, f"{SFT} --train-file {TRAIN}", "--steps-per-eval 1", "--steps-per-eval 200", NO_ROWS),
    (sft, f"{SFT} --train-file {TRAIN}", "--val-batches 2", "--val-batches 25", NO_ROWS),
]


@pytest.mark.parametrize(
    "script, line, flag, default, said",
    WITHOUT,
    ids=[f"{line} {flag}" for _, line, flag, *_ in WITHOUT],
)
def test_a_flag_without_the_one_it_needs(capsys, tmp_path, script, line, flag, default, said):
    if default:
        parse(script, line, *words(default))
    assert f"error: {flag} has no effect {said}" in refusal(capsys, script, line, *words(flag))
    name, _, value = flag.removeprefix("--").partition(" ")
    config = tmp_path / "c.json"
    config.write_text(json.dumps({name.removeprefix("no-"): value or False}))
    assert said in refusal(capsys, script, line, "--config", str(config))


WITH = [
    (ppo_training, f"{PPO} --adap_kl_ctrl True --init_kl_coef 0.2 --target 3 --horizon 500"),
    (
        ppo_training,
        f"{PPO} --early-stopping --target-kl 3 --overlong-buffer 3 --overlong-penalty 2",
    ),
    (ppo_training, "--reward-url http://127.0.0.1:1 --reward-retries 7 --reward-timeout 3"),
    (ppo_training, f"{PPO} --eval-every 3 --eval-samples 2 --eval-prompts 2"),
    (ppo_training, f"{PPO} --train-file {TRAIN} --eval-every 0"),
    (ppo_training, f"{PPO} --train-file {TRAIN} --validation-file x --eval-samples 2"),
    (sft, f"{RM} --centering 1 --no-margins --pooling last"),
    (sft, f"{SFT} --test --test-file x"),
    (sft, f"{SFT} --train-file {TRAIN} --steps-per-eval 0"),
    (sft, f"{SFT} --train-file {TRAIN} --validation-split-percentage 5 --val-batches 2"),
    (sft, f"{SFT} --steps-per-eval 0 --val-batches 2"),  # for the validation at the end
    (sft, f"{RM} --steps-per-eval 0 --val-batches 2"),
]


@pytest.mark.parametrize("script, line", WITH, ids=[line for _, line in WITH])
def test_with_the_other_flag_it_is_taken(script, line):
    parse(script, line)


OF_TRAINING = (
    "--learning-rate 1",
    "--iters 5",
    "--output-dir x",
    "--momentum 0.5",
    "--lora-dropout 0.1",
    "--sample-prompts x",
)


@pytest.mark.parametrize("flag", OF_TRAINING)
def test_what_only_training_reads_is_refused_on_the_command_line_of_a_test(capsys, tmp_path, flag):
    """In a file it is taken, as one serves to train and to test; so it is beside --preview."""
    more = ["--optimizer", "sgd"] if "momentum" in flag else []
    assert " has no effect without --train" in refusal(capsys, sft, "--test", *words(flag), *more)
    parse(sft, "--preview", *words(flag), *more)
    name, _, value = flag.removeprefix("--").partition(" ")
    (tmp_path / "c.json").write_text(json.dumps({"train": True, "optimizer": "sgd", name: value}))
    parse(sft, "--test --no-train", "--config", str(tmp_path / "c.json"))


OF_AN_ADAPTER = (
    "--fine-tune-type full",
    "--fine-tune-type dora",
    "--lora-layers 2",
    "--lora-rank 3",
    "--lora-scale 2",
    "--lora-alpha 3",
    "--lora-keys q_proj",
)


@pytest.mark.parametrize("flag", OF_AN_ADAPTER)
def test_what_describes_an_adapter_is_refused_at_a_test_of_none(capsys, tmp_path, flag):
    """In a file it is taken: without a file of an adapter the base is tested all the same."""
    err = refusal(capsys, sft, "--test", *words(flag))
    assert f"error: {flag} has no effect without --train or --resume-adapter-file" in err
    parse(sft, "--test --train", *words(flag))
    parse(sft, "--preview", *words(flag))
    name, _, value = flag.removeprefix("--").partition(" ")
    (tmp_path / "c.json").write_text(json.dumps({name: value}))
    parse(sft, "--test", "--config", str(tmp_path / "c.json"))


def test_a_soft_prompt_that_nobody_trained_is_not_tested(capsys, files, tmp_path):
    (tmp_path / "c.json").write_text('{"prompt_tuning": true, "num_prompt_tokens": 3}')
    for line in ("--prompt-tuning", f"--config {tmp_path / 'c.json'}"):
        err = refusal(capsys, sft, "--test", *line.split())
        assert "--prompt-tuning has no effect without --train or --resume-adapter-file" in err
        more = [] if "config" in line else ["--num-prompt-tokens", "3"]
        file = ["--resume-adapter-file", str(files / "prompt.npz")]
        parse(sft, "--test", *line.split(), *more, *file)
    err = refusal(capsys, sft, "--test --reward-model --prompt-tuning")
    assert "--test of a reward model needs --resume-adapter-file, or --train" in err


SENSELESS = [
    (ppo_training, f"{PPO} --top_p 0", "--top-p 0: give a probability above 0"),
    (ppo_training, f"{PPO} --top-k -7", "--top-k"),
    (ppo_training, f"{PPO} --eval-prompts 0", "--eval-prompts: give a number above 0, or -1"),
    (ppo_training, f"{PPO} --test-file x", "unknown flag --test-file"),
    (sft, f"{SFT} --validation-split-percentage 0", "--validation-split-percentage 0: give"),
    (sft, f"{SFT} --validation-split-percentage 100", "--validation-split-percentage 100: give"),
]


@pytest.mark.parametrize("script, line, said", SENSELESS, ids=[line for _, line, _ in SENSELESS])
def test_a_value_without_sense_is_refused(capsys, script, line, said):
    assert said in refusal(capsys, script, line)


def test_an_empty_stop_text_is_refused(capsys):
    assert "--stop: an empty text" in refusal(capsys, ppo_training, PPO, "--stop", "x", "")


@pytest.mark.parametrize("script, line", [(sft, SFT), (ppo_training, PPO)], ids=["sft", "ppo"])
def test_a_place_that_cannot_be_written_is_refused_at_once(capsys, tmp_path, script, line):
    (tmp_path / "rows.jsonl").write_text("{}")
    (tmp_path / "old.npz").write_text("")
    (tmp_path / "folder.npz").mkdir()
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / "manifest.json").touch()
    for name, said in (
        ("step", "is a checkpoint of a run"),
        ("rows.jsonl", "is a file, and neither .npz nor .safetensors"),
        ("folder.npz", "is a folder"),
        ("rows.jsonl/new/out.npz", "rows.jsonl is no folder"),
    ):
        assert said in refusal(capsys, script, line, "--save-file", str(tmp_path / name))
    assert "the name is empty" in refusal(capsys, script, line, "--save-file", "")
    for name in ("old.npz", "new.npz", "new/deep.safetensors", "new", "."):
        check_save_file(str(tmp_path / name))


# ------------------------------------------------------------------------------ adapters in files

LORA = {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": ["self_attn.q_proj", "self_attn.v_proj"]}
KINDS = {
    "lora": {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": LORA},
    "dora": {"fine_tune_type": "dora", "num_layers": 2, "lora_parameters": LORA},
    "prompt": {"fine_tune_type": "prompt", "num_prompt_tokens": 3},
    "full": {"fine_tune_type": "full"},
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """An adapter of each kind, as .npz, .safetensors and folder; lora.npz has a value head."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind, description in KINDS.items():
        loaded = load_model()
        tuning = attach(loaded.model, description)
        for name in (f"{kind}.npz", f"{kind}.safetensors", kind):
            save_adapter(folder / name, tuning, loaded)
    arrays, _ = read_adapter(folder / "dora.npz")
    mx.savez(str(folder / "old.npz"), **arrays)  # as older tools write it: no description
    save_head(folder / "lora.npz", "value_head", {"weight": mx.zeros((1, 64))}, {})
    return folder


def test_descriptions_are_the_same_with_and_without_mlx(files):
    for kind, asked in KINDS.items():
        for name in (f"{kind}.npz", f"{kind}.safetensors", kind):
            found = read_description(files / name)
            assert found == read_adapter(files / name)[1]
            assert found["fine_tune_type"] == kind and asked.items() <= found.items()
    assert read_description(files / "old.npz") == read_adapter(files / "old.npz")[1]
    assert read_description(files / "old.npz")["lora_parameters"]["rank"] == 4


RATES = {
    (sft, "--resume-adapter-file"): {"lora": 2e-4, "dora": 2e-4, "prompt": 1e-2, "full": 2e-5},
    (ppo_training, "--resume-file"): {"lora": 3e-3, "dora": 3e-3, "prompt": 1e-1},
}


def rate_of(script, args) -> float:
    """The rate that a tiny model is trained at."""
    if script is ppo_training:
        settle_for_model(args, weights=10**5)
    return args.learning_rate


def test_the_learning_rate_is_that_of_the_kind_in_the_file(files):
    for (script, flag), rates in RATES.items():
        line = SFT if script is sft else PPO
        for kind, rate in rates.items():
            for name in (f"{kind}.npz", kind):
                assert rate_of(script, parse(script, line, flag, str(files / name))) == rate
            given = parse(script, line, flag, str(files / kind), "--learning-rate", "0.5")
            assert rate_of(script, given) == 0.5
        assert rate_of(script, parse(script, line, "--prompt-tuning")) == rates["prompt"]
        assert rate_of(script, parse(script, line, flag, str(files / "old.npz"))) == rates["dora"]


OTHER = [
    ("lora", "--lora-rank 64", "--lora-rank 64: FILE has 4"),
    ("lora", "--lora-rank 8", "--lora-rank 8: FILE has 4"),  # the default, but asked for
    ("lora", "--lora-scale 7", "--lora-scale 7: FILE has 2"),
    ("lora", "--lora-alpha 16", "--lora-scale 4: FILE has 2"),  # of the file's rank
    ("lora", "--lora-keys q_proj", "--lora-keys q_proj: FILE has self_attn.q_proj"),
    ("lora", "--fine-tune-type dora", "FILE: holds lora, not dora"),
    ("lora", "--prompt-tuning --num-prompt-tokens 3", "FILE: holds lora, not prompt"),
    ("prompt", "--prompt-tuning --num-prompt-tokens 5", "--num-prompt-tokens 5: FILE has 3"),
    ("prompt", "--lora-rank 64", "--lora-rank has no effect: FILE holds prompt, not lora"),
]
SAME = [
    ("lora", "--lora-rank 4 --lora-alpha 8 --lora-keys q_proj,v_proj"),
    ("lora", "--lora-alpha 8 --lora-keys self_attn.v_proj q_proj"),
    ("dora", "--fine-tune-type dora --lora-layers 2 --lora-scale 2"),
    ("prompt", "--prompt-tuning --num-prompt-tokens 3"),
]


@pytest.mark.parametrize("script, flag", RATES, ids=["sft", "ppo"])
def test_flags_that_ask_for_another_adapter_are_refused(capsys, files, script, flag):
    line = SFT if script is sft else PPO
    for kind, more, said in OTHER:
        file = str(files / f"{kind}.npz")
        err = refusal(capsys, script, line, flag, file, *words(more))
        assert said.replace("FILE", file) in err, more
    for kind, more in SAME:
        parse(script, line, flag, str(files / f"{kind}.npz"), *words(more))
    parse(sft, SFT, "--resume-adapter-file", str(files / "full"), "--fine-tune-type", "full")


def test_sft_keeps_the_dropout_of_a_file_and_ppo_has_none(capsys, files):
    more = ("--lora-dropout", "0")
    err = refusal(capsys, sft, SFT, "--resume-adapter-file", str(files / "lora"), *more)
    assert "--lora-dropout 0: " in err and "has 0.1" in err
    parse(ppo_training, PPO, "--resume-file", str(files / "lora"), *more)


def test_ppo_refuses_a_file_of_every_weight(capsys, files):
    for words_ in ((), ("--fine-tune-type", "full"), ("--use-peft", "False")):
        err = refusal(capsys, ppo_training, PPO, "--resume-file", str(files / "full.npz"), *words_)
        assert "--resume-file takes an adapter" in err and "fuse it first" in err


def test_a_value_head_in_the_file_is_not_started_anew(capsys, files):
    more = ("--value-head-init-std", "5")
    err = refusal(capsys, ppo_training, PPO, "--resume-file", str(files / "lora.npz"), *more)
    assert "--value-head-init-std 5 has no effect" in err and "lora.value_head" in err
    parse(ppo_training, PPO, "--resume-file", str(files / "dora.npz"), *more)


@pytest.mark.parametrize(
    "line",
    [
        f"sft.py {SFT} --data DATA --resume-adapter-file FILE --lora-layers 1",
        f"ppo_training.py {PPO} --data DATA --resume-file FILE --lora-layers 1",
    ],
    ids=["sft", "ppo"],
)
def test_a_number_of_layers_is_compared_once_the_model_is_there(files, tmp_path, line):
    script, *rest = words(line.replace("FILE", str(files / "lora.npz")))
    ended = shared_server().run(script, rest, tmp_path)
    assert ended.code == 2 and "--lora-layers 1: " in ended.error and "has 2" in ended.error
    assert not list(tmp_path.iterdir())


def test_layers_beyond_those_of_the_model_are_no_contradiction(files):
    from command_line.adapter_file import differences

    args = parse(sft, SFT, "--lora-layers", "16")
    there = {"fine_tune_type": "lora", "num_layers": 4, "lora_parameters": {}}
    asked = {"lora_parameters": {"scale": 4.0, "dropout": 0.0}}
    assert not list(differences(args, asked, there, 4))
    assert [name for name, *_ in differences(args, asked, there, 8)] == ["lora_layers"]


# ------------------------------------------------------------------------------ rows decide

ROWS = [
    (
        f"sft.py {RM} --data DATA --data-base reward_function_increasing_mult_2_ --centering 1",
        "--centering 1 has no effect on rows with a reward",
    ),
    (
        f"sft.py {RM} --data DATA --data-base reward_function_increasing_mult_2_ --no-margins",
        "--no-margins has no effect on rows with a reward",
    ),
    (
        f"sft.py {SFT} --data DATA --token-format turn_markers",
        "--token-format turn_markers has no effect on rows of plain text",
    ),
    (
        f"ppo_training.py {PPO} --train-file DATA/samples/question_answer.jsonl --prompt-words 3",
        "--prompt-words 3 has no effect on rows that have prompts of their own",
    ),
]


@pytest.mark.parametrize("line, said", ROWS, ids=[line for line, _ in ROWS])
def test_a_flag_for_other_rows_than_there_are(tmp_path, line, said):
    script, *rest = words(line)
    ended = shared_server().run(script, rest, tmp_path)
    assert ended.code == 2 and said in ended.error
    assert not list(tmp_path.iterdir())
