"""Tokens from the environment, options and URLs appear in nothing that a run leaves or prints."""

from pathlib import Path

import pytest
from reliable_runs import RUNS, Ended, command, shared_server

SECRETS = {
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsT",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-not-even-ours-1234",
    "MY_PASSWORD": "correct-horse-battery",
}
IN_URLS = ("user-name-in-url", "password-in-url", "key-in-query")
URL = "http://user-name-in-url:password-in-url@127.0.0.1:9/score?key=key-in-query"


def leaks(ended: Ended, folder: Path) -> list[str]:
    """Where a secret is found, in output or in the bytes and names of files."""
    texts = {"stdout": ended.out.encode(), "stderr": ended.err.encode()}
    for path in folder.rglob("*"):
        texts[str(path)] = str(path.name).encode()
        if path.is_file():
            texts[str(path)] += path.read_bytes()
    secrets = (*SECRETS.values(), *IN_URLS)
    return [
        f"{secret} in {where}"
        for where, text in texts.items()
        for secret in secrets
        if secret.encode() in text
    ]


def test_a_run_with_wandb_leaves_no_secret(tmp_path):
    pytest.importorskip("wandb")
    script, line = RUNS["ppo"]
    # One that was copied into an option by mistake.
    line = [*line, "--num-steps", "2", "--log-with", "wandb"]
    line += ["--stop", f"x{SECRETS['MY_PASSWORD']}"]
    ended = command(script, line, tmp_path, WANDB_MODE="offline", **SECRETS)
    assert ended.code == 0, ended.err
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert "<redacted>" in (tmp_path / "run" / "config.json").read_text()
    assert leaks(ended, tmp_path) == []


def test_a_service_that_does_not_answer_leaves_no_secret(tmp_path):
    script, line = RUNS["ppo"]
    line = [word for word in line if word != "--ground_truth_reward"]
    line += ["--reward-url", URL, "--reward-retries", "0", "--reward-timeout", "5"]
    ended = shared_server().run(script, line, tmp_path, **SECRETS)
    assert ended.code == 2 and "127.0.0.1:9" in ended.error
    assert "<redacted>" in (tmp_path / "run" / "config.json").read_text()
    assert leaks(ended, tmp_path) == []
    # What is not in the file has to be given again.
    ended = shared_server().run(script, ["--resume", "run"], tmp_path, **SECRETS)
    assert ended.code == 2 and "--reward-url: it held a secret" in ended.error


REWARD = """
import os, warnings

def raises(prompts, responses):
    raise ValueError("no access with " + os.environ["SHOWN"])

def shortened(prompts, responses):
    # An error's text ends after 200 characters, here in the middle of the secret.
    raise ValueError("x" * 185 + os.environ["SHOWN"])

def warns(prompts, responses):
    warnings.warn("no access with " + os.environ["SHOWN"])
    return [1.0 for _ in responses]
"""


@pytest.mark.parametrize("name", ["HF_TOKEN", "OPENAI_API_KEY", "MY_PASSWORD", "PRIVATE_KEY"])
@pytest.mark.parametrize("reward", ["raises", "shortened", "warns"])
def test_what_a_reward_function_says_leaves_no_secret(tmp_path, reward, name):
    (tmp_path / "rewards.py").write_text(REWARD.replace("SHOWN", name))
    secrets = {**SECRETS, "PRIVATE_KEY": "-----BEGIN KEY-----\nMIIEvQIBADANBg\n-----END KEY-----"}
    script, line = RUNS["ppo"]
    line = [word for word in line if word != "--ground_truth_reward"]
    line += ["--reward-function", f"rewards.py:{reward}", "--num-steps", "1"]
    ended = shared_server().run(script, line, tmp_path, **secrets)
    if reward == "warns":
        assert ended.code == 0 and "warning: no access with <redacted>" in ended.err
    else:
        assert ended.code == 2 and "raised ValueError: " in ended.error
        assert "<redacted>" in ended.error
    shown = ended.out + ended.err
    assert secrets[name][:12] not in shown and leaks(ended, tmp_path) == []
