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
