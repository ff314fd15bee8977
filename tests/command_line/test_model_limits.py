"""No script reads beyond a model's tables: tokens without a row, positions without one."""

import contextlib
import io
import json
import shutil

import pytest
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer

import group_training
import judge
import ppo_training
import preference_training
import rest
import score
import sft
import talk_to_model
from command_line.exits import run_main
from errors import UserError
from models.decoding import generate
from models.limits import Limits, find_limits
from models.load import load_model
from models.reading import trained_reading
from models.reward_model import RewardModel, save_reward_head

TURNS = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
LONG = "what is the answer to the question " * 8
REWARD = "def length(prompts, responses, **columns):\n    return [len(r) for r in responses]\n"


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A folder with models, rows of every kind and a reward."""
    folder = tmp_path_factory.mktemp("limits")
    for name, architecture in (("rows", "llama"), ("tied", "gemma"), ("heads", "gpt_neox")):
        tiny_model_folder(folder / name, architecture=architecture)
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|end|>"]}
        )
        tokenizer.chat_template = TURNS
        tokenizer.save_pretrained(folder / name)
    tiny_tokenizer.cache_clear()
    tiny_model_folder(folder / "gpt2", architecture="gpt2", n_positions=32, n_ctx=32)
    tiny_model_folder(folder / "gpt2_48", architecture="gpt2", n_positions=48, n_ctx=48)
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the answer"}]
    rows = {
        "chat": {"messages": turns},
        "chat_pairs": {
            "prompt": turns[:1],
            "chosen": turns[1:],
            "rejected": [{"role": "assistant", "content": "the question"}],
        },
        "long": {"text": LONG},
        "long_prompt": {"prompt": LONG, "completion": "the answer"},
        "short": {"prompt": "what is", "completion": "the answer"},
        "long_pairs": {"prompt": LONG, "chosen": "the answer", "rejected": "the question"},
        "long_answers": {"prompt": "what is", "chosen": LONG, "rejected": LONG[9:] + LONG},
    }
    for name, row in rows.items():
        (folder / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (folder / "reward.py").write_text(REWARD)
    return folder


def run(script, folder, words: str, status: int = 0) -> str:
    out, err = io.StringIO(), io.StringIO()
    streams = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)
    with contextlib.chdir(folder), streams[0], streams[1], pytest.raises(SystemExit) as end:
        run_main(lambda: script.main(words.split()))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    said = err.getvalue() if status else out.getvalue() + err.getvalue()
    assert "Traceback" not in said and (not status or said.strip().splitlines()[-1][:6] == "error:")
    return said


SFT = "--train --iters 1 --batch-size 2 --steps-per-eval 0 --save-every 0 --output-dir runs/x"
ROLLOUT = (
    "--reward_function reward.py:length --batch_size 2 --num_steps 1 --eval-every 0 "
    "--save-every 0 --output-dir runs/x"
)
PPO = f"{ROLLOUT} --mini_batch_size 2"
JUDGE = "--reward-function reward.py:length --max-new-tokens 4 --output judged.jsonl"
REST = (
    "--reward-function reward.py:length --samples-per-prompt 2 --grow-steps 1 --iters 1 "
    "--max-new-tokens 4 --output-dir runs/x"
)


@pytest.mark.parametrize("model", ["rows", "tied", "heads"])
@pytest.mark.parametrize(
    "script, words",
    [
        (sft, f"{SFT} --train-file chat.jsonl"),
        (sft, f"{SFT} --reward-model --train-file chat_pairs.jsonl"),
        (preference_training, f"{SFT} --train-file chat_pairs.jsonl"),
        (preference_training, f"{SFT} --algorithm kto --train-file chat_pairs.jsonl"),
        (ppo_training, f"{PPO} --train-file chat.jsonl --max-new-tokens 4"),
        (
            group_training,
            f"{ROLLOUT} --num_generations 2 --train-file chat.jsonl --max-new-tokens 4",
        ),
        (talk_to_model, "hello"),
        (rest, f"{REST} --train-file chat.jsonl"),
        (judge, f"{JUDGE} --prompts chat.jsonl"),
    ],
    ids=["sft", "reward_model", "preference", "kto", "ppo", "group", "chat", "rest", "judge"],
)
def test_a_token_without_a_row_is_refused_before_training(script, words, model, places):
    said = run(script, places, f"{words} --model {model}", status=2)
    assert "has token" in said and "rows for 0 to 295" in said
    assert not (places / "runs").exists()


def test_a_default_length_is_lowered_and_said(places, tmp_path):
    out = run(
        sft,
        places,
        f"{SFT} --model gpt2 --train-file long.jsonl --overwrite "
        f"--output-dir {tmp_path}/run --save-file {tmp_path}/a.npz",
    )
    assert "note: --max-length is 32: the model has 32 positions" in out
    kept = json.loads((tmp_path / "run" / "config.json").read_text())
    assert kept["options"]["max_length"] == 32
    out = run(
        sft,
        places,
        f"{SFT} --model gpt2_48 --train-file long.jsonl --prompt-tuning "
        f"--num-prompt-tokens 5 --output-dir {tmp_path}/prompt "
        f"--save-file {tmp_path}/b.npz",
    )
    assert "--max-length is 43: the model has 48 positions, 5 for the soft prompt" in out
    with pytest.warns(UserWarning, match="--max-tokens is .* 32 positions"):
        run(talk_to_model, places, "hello --model gpt2 --temp 0")


@pytest.mark.parametrize("algorithm", ["dpo", "kto", "simpo"])
def test_preferences_are_cut_to_the_positions_that_there_are(places, tmp_path, algorithm):
    words = (
        f"{SFT} --model gpt2_48 --algorithm {algorithm} --train-file long_answers.jsonl "
        f"--overwrite --output-dir {tmp_path}/run"
    )
    out = run(
        preference_training,
        places,
        f"{words} --prompt-tuning --num-prompt-tokens 5 --save-file {tmp_path}/prompt.npz",
    )
    assert "--max-length is 43: the model has 48 positions, 5 for the soft prompt" in out
    # Of an adapter that training goes on with as well.
    out = run(
        preference_training,
        places,
        f"{words} --resume-adapter-file {tmp_path}/prompt.npz --save-file {tmp_path}/again.npz",
    )
    assert "--max-length is 43" in out


@pytest.mark.parametrize(
    "script, words, wrong",
    [
        (sft, f"{SFT} --train-file long.jsonl --max-length 2048", "--max-length 2048"),
        (sft, f"{SFT} --train-file long.jsonl --max-length 33", "give at most 32"),
        (
            preference_training,
            f"{SFT} --train-file long_pairs.jsonl --max-length 33",
            "give at most 32",
        ),
        (
            preference_training,
            f"{SFT} --train-file long_pairs.jsonl --prompt-tuning --max-length 30",
            "10 for the soft prompt",
        ),
        (
            preference_training,
            f"{SFT} --train-file chat_pairs.jsonl --algorithm orpo --sample-prompts "
            f"{LONG.replace(' ', '_')} --steps-per-eval 1 --validation-file chat_pairs.jsonl",
            "--sample-prompts",
        ),
        (ppo_training, f"{PPO} --train-file short.jsonl --max-new-tokens 40", "40"),
        (
            ppo_training,
            f"{PPO} --train-file short.jsonl --max-new-tokens 30 --max-length 20",
            "a response of up to 30",
        ),
        (
            ppo_training,
            f"{PPO} --train-file short.jsonl --max-new-tokens 4 --max-length 64",
            "--max-length 64",
        ),
        (
            group_training,
            f"{ROLLOUT} --num_generations 2 --train-file short.jsonl --max-new-tokens 40",
            "40",
        ),
        (talk_to_model, "hello --max-tokens 100", "a response of up to 100"),
    ],
)
def test_what_does_not_fit_the_positions_is_refused(script, words, wrong, places):
    said = run(script, places, f"{words} --model gpt2", status=2)
    assert wrong in said and "32 positions" in said
    assert not (places / "runs").exists()


def test_rewards_read_no_further_either(places, tmp_path):
    run(
        sft,
        places,
        f"{SFT} --reward-model --model gpt2_48 --train-file chat_pairs.jsonl "
        f"--output-dir {tmp_path}/r --save-file {tmp_path}/reward.npz",
    )
    said = run(
        score,
        places,
        f"--input long_pairs.jsonl --model gpt2_48 --reward-model {tmp_path}/reward.npz",
        status=2,
    )
    assert "a text to score: has" in said and "48 positions" in said


@pytest.mark.parametrize("script", [ppo_training, group_training])
@pytest.mark.parametrize(
    "judge, wrong",
    [("rows", "rows for 0 to 295"), ("gpt2", "32 positions"), ("unused", None)],
)
def test_what_the_reward_model_alone_cannot_read_is_refused_before_training(
    script, judge, wrong, places, tmp_path
):
    """Its own template has tokens without a row; it has fewer positions; or neither."""
    folder = tmp_path / "judge"
    loaded = load_model(places / ("gpt2_48" if judge == "unused" else judge))
    model = RewardModel(loaded.model)
    model.reading = trained_reading(loaded.tokenizer)
    shutil.copytree(loaded.path, folder)
    save_reward_head(folder, model)
    options = ROLLOUT.replace("--reward_function reward.py:length", f"--reward-model {folder}")
    options += " --num_generations 2" if script is group_training else " --mini_batch_size 2"
    words = f"{options} --train-file short.jsonl --max-new-tokens 30 --model gpt2_64"
    words = words.replace("runs/x", str(tmp_path / "run"))
    tiny_model_folder(places / "gpt2_64", architecture="gpt2", n_positions=64, n_ctx=64)
    said = run(script, places, words, status=2 if wrong else 0)
    if wrong:
        assert "short.jsonl:1 for the reward model: has" in said and wrong in said
        assert not (tmp_path / "run").exists()


def test_the_rows_in_front_of_opts_positions_do_not_count(tmp_path):
    folder = tiny_model_folder(tmp_path, architecture="opt", max_position_embeddings=40)
    assert find_limits(load_model(folder).model).positions == 40


def test_the_functions_themselves(places):
    model = load_model(places / "gpt2").model
    assert find_limits(model) == Limits(296, 32)
    with pytest.raises(UserError, match="token 296"):
        generate(model, [[3, 296]], max_tokens=2, eos_ids={2})
    with pytest.raises(UserError, match="31 tokens and a response of up to 2"):
        generate(model, [[3] * 31], max_tokens=2, eos_ids={2})
    assert len(generate(model, [[3] * 30], max_tokens=2, eos_ids=set()).responses[0]) == 2
