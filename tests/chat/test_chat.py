"""talk_to_model.py as it is run: one-shot, and in a pipe."""

import subprocess
import sys

import mlx.core as mx
import pytest
from adapters import LORA, PROMPT, randomised
from chat_runs import SCRIPT, run

from chat.settings import Settings
from models.adapter_files import attach
from models.load import DEFAULT_MODEL, load_model
from models.reward_model import load_reward_model
from talk_to_model import parse_arguments


def greedy(loaded, text: str, count: int, prefix=()) -> str:
    """The slow way: no cache, the whole text again for every token."""
    prompt = loaded.tokenizer.encode(text)
    tokens = list(prompt)
    for _ in range(count):
        logits = loaded.model(mx.array([[*prefix, *tokens]]))[0, -1]
        tokens.append(int(mx.argmax(logits)))
        if tokens[-1] in loaded.eos_ids:
            break
    return loaded.tokenizer.decode(tokens, skip_special_tokens=True)[len(text) :].rstrip()


# ------------------------------------------------------------------------------ one-shot, pipe


def test_one_reply_with_an_adapter_is_the_greedy_continuation(files):
    plain = load_model()
    out, err = run("8 20 22", "--max-tokens", 9)
    assert out == greedy(plain, "8 20 22", 9) + "\n"
    assert "tokens/s" in err
    base = load_model()
    randomised(attach(base.model, LORA))
    words = ("--model", DEFAULT_MODEL, "--resume-file", files / "lora.npz", "--temp", "0.0")
    adapted, _ = run(*words, "--max_tokens", 9, "8 20 22")
    assert adapted == greedy(base, "8 20 22", 9) + "\n" != out


def test_one_reply_with_a_soft_prompt(files):
    base = load_model()
    prefix = randomised(attach(base.model, PROMPT)).prefix
    words = ("--resume-file", files / "soft.safetensors", "--max-tokens", 9)
    out, _ = run(*words, "8", "20", "22")
    assert out == greedy(base, "8 20 22", 9, prefix) + "\n"


def test_a_pipe_gets_a_reply_to_each_line_and_nothing_else(files):
    model = load_model()
    out, err = run("--max-tokens", 6, text="8 20\n\n5 7 9\n")
    assert out == greedy(model, "8 20", 6) + "\n" + greedy(model, "5 7 9", 6) + "\n"
    assert err.count("tokens/s") == 2
    assert run(text="")[1] == "note: standard input held no prompts\n"


def test_the_seed_repeats_samples():
    words = ("--temp", 1, "--max-tokens", 8)
    lines = "8 20\n" * 4
    first = run(*words, "--seed", 3, text=lines)[0]
    assert first == run(*words, "--seed", 3, text=lines)[0]
    assert len(set(first.splitlines())) > 1  # the same prompt, sampled anew
    assert first != run(*words, "--seed", 4, text=lines)[0]


def test_scores_of_a_reward_model_and_a_function(files):
    words = ("--reward_model", files / "reward.npz", "--resume-file", files / "lora.npz")
    words += ("--max-tokens", 9)
    own = f"{files / 'rewards.py'}:words"
    out, err = run(*words, "--reward-function", own, "--reward-function", own, "8 20 22")
    loaded = load_model()
    judge = load_reward_model(files / "reward.npz", loaded)
    tokens = loaded.tokenizer.encode("8 20 22" + out.rstrip())
    tokens += [loaded.tokenizer.eos_token_id] * ("cut at --max-tokens" not in err)
    count = len(out.split())
    score = judge.score([tokens])[0]
    assert f"reward_model {score:.3f}, words {count:.3f}, words_2 {count:.3f}" in err


def test_compare_without_a_terminal_names_the_replies(files):
    out, _ = run(
        "8 20 22",
        "--resume-file",
        files / "lora.npz",
        "--compare",
        DEFAULT_MODEL,
        "--max-tokens",
        9,
    )
    base = load_model()
    after = f"[digits_model]\n{greedy(base, '8 20 22', 9).strip()}\n"
    randomised(attach(base.model, LORA))
    assert out == f"[digits_model + lora.npz]\n{greedy(base, '8 20 22', 9).strip()}\n" + after


@pytest.mark.parametrize(
    "words, message",
    [
        (("--top-p", "0.9", "x"), "--top-p has no effect at --temp 0"),
        (("--num-beams", "2", "--top-k", "3", "x"), "--top-k has no effect at --temp 0"),
        (("--length-penalty", "2", "x"), "--length-penalty has no effect without --num-beams"),
        (("--max-tokens", "0", "x"), "--max-tokens: 0 is not at least 1"),
        (("--ratings-file", "r.jsonl", "x"), "--ratings-file has no effect without --rate"),
        (("--blind", "--rate", "x"), "--blind has no effect without --compare"),
        (("--rate", "x"), "--rate reads key presses and needs a terminal"),
        (("--system-prompt", "be kind", "x"), "a system prompt needs a chat template"),
        (("--resume-file", "gone.npz", "x"), "gone.npz: no such file"),
        (("--model", "./gone", "x"), "./gone: no model folder there"),
        ((" ",), "the prompt is empty"),
    ],
)
def test_mistakes_end_in_one_line(words, message):
    done = subprocess.run(
        [sys.executable, SCRIPT, *words],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and message in done.stderr
    assert done.stderr.count("\n") == 1


def test_broken_text_in_a_pipe():
    done = subprocess.run(
        [sys.executable, SCRIPT, "--max-tokens", "3"], input=b"8 20\n\xff\n", capture_output=True
    )
    assert done.returncode == 2 and done.stdout.count(b"\n") == 1
    assert b"error: standard input, line 2: not UTF-8" in done.stderr


def test_the_defaults_are_those_of_the_settings():
    assert parse_arguments(["x"]).settings == Settings()
