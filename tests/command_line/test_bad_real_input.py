"""What goes wrong with a model and data of one's own ends in one line that says what to do."""

import json

import pytest
from tiny import tiny_model_folder

import group_training
import judge
import ppo_training
import preference_training
import rest
import score
import sft
from command_line.exits import run_main
from models.limits import context_of

TURNS = [{"role": "user", "content": "what is"}, {"role": "assistant", "content": "the answer"}]
OTHER = [{"role": "assistant", "content": "the question"}]
ROWS = {
    "conversation": {"messages": TURNS},
    "prompt": {"prompt": TURNS[:1]},
    "text_prompt": {"prompt": "what is"},
    "pairs": {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": OTHER},
    "long": {"prompt": "what is the answer to the question " * 8},
}
REWARDED = "--reward-function reward.py:length --eval-every 0 --batch-size 4 "
SCRIPTS = {
    ppo_training: REWARDED + "--mini-batch-size 2",
    group_training: REWARDED + "--num-generations 2",
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run a script in a folder with models, rows and a reward; (status, what it said)."""
    monkeypatch.chdir(tmp_path)
    small = {"max_position_embeddings": 64, "num_hidden_layers": 1}
    tiny_model_folder(tmp_path / "base", **small)
    tiny_model_folder(tmp_path / "instruct", template="chatml", **small)
    for name, row in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (tmp_path / "reward.py").write_text(
        "def length(prompts, responses):\n    return [len(r) for r in responses]\n"
    )

    def run(script, words: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as end:
            run_main(lambda: script.main(words.split()))
        told = capsys.readouterr()
        return end.value.code, told.out + told.err

    return run


# ------------------------------------------------------------------------------ context


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_a_prompt_and_its_response_fit_the_context(run, tmp_path, script):
    words = f"{SCRIPTS[script]} --model base --preview --max-new-tokens "
    status, said = run(script, words + "40 --train-file long.jsonl")
    errors = [line for line in said.splitlines() if line.startswith("error")]
    assert status == 2 and len(errors) == 1
    assert errors[0].startswith("error: long.jsonl:1: a prompt of ")
    assert "longer than the model's context, 64 tokens" in errors[0]
    assert "--max-length 24 --too-long cut" in errors[0]
    count = int(errors[0].split("a prompt of ")[1].split()[0])
    room = f"--max-new-tokens {64 - count} or fewer" if count < 64 else "a shorter prompt"
    assert room in errors[0]
    cut = "40 --train-file long.jsonl --max-length 24 --too-long cut"  # as it says
    assert run(script, words + cut)[0] == 0
    assert run(script, words + "40 --train-file text_prompt.jsonl")[0] == 0
    assert not (tmp_path / "runs").exists()


def test_samples_of_a_model_fit_its_context(run):
    words = "--prompts long.jsonl --model base --reward-function reward.py:length "
    status, said = run(score, words + "--max-new-tokens 100")
    assert status == 2 and "context, 64 tokens" in said and "--max-length" not in said
    assert run(score, words + "--max-new-tokens 2 --max-length 30 --too-long cut")[0] == 0


@pytest.mark.parametrize(
    "config, tokens",
    [
        ({"max_position_embeddings": 64}, 64),
        ({"text_config": {"max_position_embeddings": 64}}, 64),
        ({"n_positions": 32}, 32),
        ({"max_position_embeddings": 64, "rope_scaling": {"factor": 4.0}}, 256),
        ({"max_position_embeddings": 64, "rope_scaling": None}, 64),
        ({"max_position_embeddings": 64, "rope_parameters": {"full": {"factor": 8}}}, 64),
        ({}, None),
    ],
)
def test_the_context_is_read_from_the_config(config, tokens):
    assert context_of(config) == tokens


# ------------------------------------------------------------------------------ conversations


TRAINED = {
    (sft, "conversation"): "--train --preview",
    (preference_training, "pairs"): "--train --preview",
    (ppo_training, "prompt"): SCRIPTS[ppo_training] + " --max-new-tokens 4 --preview",
    (group_training, "prompt"): SCRIPTS[group_training] + " --max-new-tokens 4 --preview",
}


REWARD = "--reward-function reward.py:length "
READ = {
    (score, "--input conversation.jsonl"): REWARD,
    (score, "--prompts prompt.jsonl"): REWARD + "--samples 1 --max-new-tokens 2",
    (judge, "--input pairs.jsonl"): REWARD + "--output labels.jsonl --force",
    (rest, "--train-file prompt.jsonl"): REWARD + "--max-new-tokens 2 --grow-steps 1 --iters 1 "
    "--quantiles 0 --lora-rank 1 --overwrite --output-dir run --save-file a.npz",
}


@pytest.mark.parametrize("script, rows, words", [(*key, w) for key, w in READ.items()], ids=str)
def test_conversations_of_other_scripts_for_a_base_model(run, script, rows, words):
    for more, count in (("--model base", 1), ("--model instruct", 0)):
        status, said = run(script, f"{rows} {words} {more}")
        assert status == 0, said
        assert said.count("has no chat template") == count


@pytest.mark.parametrize(
    "script, rows, words", [(*key, words) for key, words in TRAINED.items()], ids=str
)
def test_conversations_for_a_base_model(run, script, rows, words):
    def said(more: str) -> list[str]:
        status, text = run(script, f"{words} --train-file {rows}.jsonl {more}")
        assert status == 0
        return [line for line in text.splitlines() if "no chat template" in line]

    (line,) = said("--model base")
    assert line.startswith(f"warning: {rows}.jsonl:1: is a conversation")
    assert "--token-format role_markers" in line
    assert not said("--model instruct")
    assert not said("--model base --token-format role_markers")


def test_texts_for_a_base_model_are_no_conversations(run):
    words = SCRIPTS[ppo_training] + " --max-new-tokens 4 --preview --model base"
    status, said = run(ppo_training, f"{words} --train-file text_prompt.jsonl")
    assert status == 0 and "chat template" not in said
