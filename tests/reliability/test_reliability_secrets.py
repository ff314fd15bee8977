"""Tokens from the environment, options and URLs appear in nothing that a run leaves or prints."""

import shutil
from pathlib import Path

import pytest
from label_setup import write_samples
from reliable_runs import RUNS, Ended, data_in, shared_server
from script_table import DATA, SHORT, TRAINED

from adlf.stages import RECORD, Stage, run_stages
from run_folder.secrets import is_secret_name, redact, secret_values

LONG = pytest.mark.long

SECRETS = {
    "HF_TOKEN": "hf_aBcDeFgHiJkLmNoPqRsT",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "OPENAI_API_KEY": "sk-not-even-ours-1234",
    "MY_PASSWORD": "correct-horse-battery",
    "GH_PAT": "ghp_fourteenchars",
    "DB_PASS": "q7!x",
    "HF_TOKENS": "hf_one,hf_two",
    "APITOKEN": 'with "quotes" and \\',
    "SSHPASSPHRASE": "two words of it",
    "DATABASE_URL": "postgres://app:p%40ss-of-db@db/x",
}
SHOWN = {**SECRETS, "DATABASE_URL": "p%40ss-of-db"}
IN_URLS = ("user-name-in-url", "password@in-url", "in-url@", "key-in-query")
URL = "http://user-name-in-url:password@in-url@127.0.0.1:9/score?key=key-in-query"


def leaks(ended: Ended, folder: Path) -> list[str]:
    """Where a secret is found, in output or in the bytes and names of files."""
    texts = {"stdout": ended.out.encode(), "stderr": ended.err.encode()}
    for path in folder.rglob("*"):
        texts[str(path)] = str(path.name).encode()
        if path.is_file():
            texts[str(path)] += path.read_bytes()
    secrets = (*SHOWN.values(), *IN_URLS)
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
    ended = shared_server().run(script, line, tmp_path, WANDB_MODE="offline", **SECRETS)
    assert ended.code == 0, ended.err
    assert list(tmp_path.glob("run/wandb/offline-run-*/*.wandb"))
    assert "<redacted>" in (tmp_path / "run" / "config.json").read_text()
    assert leaks(ended, tmp_path) == []


@pytest.mark.parametrize("name", TRAINED)
def test_no_secret_is_in_what_a_script_leaves_or_says(tmp_path, tmp_path_factory, name):
    """One is in the value of an option; --resume asks for that one again."""
    data = data_in(tmp_path_factory.mktemp("data") / f"for {SECRETS['MY_PASSWORD']}")
    server, short = shared_server(), SHORT[name]
    line = [*short.line, "--data", str(data), "--log-with", "tensorboard"]
    ended = server.run(short.script, line, tmp_path, **SECRETS)
    assert ended.code == 0, ended.err
    assert "<redacted>" in (tmp_path / "run" / "config.json").read_text()
    assert leaks(ended, tmp_path) == []
    (tmp_path / "run" / "summary.json").unlink()
    ended = server.run(short.script, ["--resume", "run"], tmp_path, **SECRETS)
    assert ended.code == 2 and "--data: it held a secret" in ended.error
    line = ["--resume", "run", "--data", str(data)]
    ended = server.run(short.script, line, tmp_path, **SECRETS)
    assert ended.code == 0 and leaks(ended, tmp_path) == [], ended.err
    line = ["--adapter-file", "out.npz", "--run", "run", "--save-path", "fused"]
    ended = server.run("fuse.py", line, tmp_path, **SECRETS)
    assert ended.code == 0 and leaks(ended, tmp_path) == [], ended.err


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


# ------------------------------------------------------------------------------ other scripts

PASSWORD = SECRETS["MY_PASSWORD"]
PAIRS = str(DATA / "preference_increasing_mult_2_test.jsonl")
IN_A_NAME = {
    "a model that judges": ("judge.py", ["--judge", f"of {PASSWORD}", "--max-rows", "2"]),
    "a model that critiques": (
        "judge.py",
        ["--judge", f"of {PASSWORD}", "--revise", "--judge-max-tokens", "4", "--max-rows", "1"],
    ),
    "a reward that judges": (
        "judge.py",
        ["--reward-function", f"of {PASSWORD}/own.py:length", "--max-rows", "2"],
    ),
}


@pytest.mark.parametrize("case", IN_A_NAME)
def test_names_of_judges_in_labels_hold_no_secret(tmp_path, case):
    script, words = IN_A_NAME[case]
    shutil.copytree(DATA / "digits_model", tmp_path / "x" / f"of {PASSWORD}")
    own = "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    (tmp_path / "x" / f"of {PASSWORD}" / "own.py").write_text(own)
    words = ["--input", PAIRS, *words, "--output", "labels.jsonl"]
    for _ in range(2):  # the second goes on with the first's
        ended = shared_server().run(script, words, tmp_path / "x", **SECRETS)
        assert ended.code == 0, ended.err
    assert "goes on after" in ended.out
    rows = [*(tmp_path / "x").glob("labels*.jsonl")]
    assert rows and not any(PASSWORD in file.read_text() for file in rows)
    assert PASSWORD not in ended.out + ended.err


def test_models_in_labels_and_samples_hold_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    shutil.copytree(DATA / "digits_model", folder := tmp_path / f"of {PASSWORD}")
    for words in ([], ["--against", str(folder)], ["--tokenizer", str(folder)]):
        write_samples(tmp_path, [["8", "9"]], "--model", str(folder), *words)
        head = (tmp_path / "labels.samples.jsonl").read_text()
        assert "of <redacted>" in head and PASSWORD not in head


def test_the_record_of_stages_holds_no_secret(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_PASSWORD", PASSWORD)
    made = tmp_path / "made"
    made.touch()
    (tmp_path / "stage.py").write_text("")
    for words in (["--data", f"in/{PASSWORD}"], [f"--url=http://u:{PASSWORD}@h"], [PASSWORD]):
        stage = Stage("one", str(tmp_path / "stage.py"), words, made)
        run_stages(folder := tmp_path / str(len(words[0])), [stage])
        assert PASSWORD not in (folder / RECORD).read_text()
        run_stages(folder, [stage])  # which knows it again


# ------------------------------------------------------------------------------ reward functions

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


NAMES = [
    "HF_TOKEN",
    "MY_PASSWORD",
    "PRIVATE_KEY",
    "GH_PAT",
    "DB_PASS",
    "HF_TOKENS",
    "APITOKEN",
    "SSHPASSPHRASE",
]
QUICK = [
    ("raises", "PRIVATE_KEY"),
    ("raises", "APITOKEN"),
    ("shortened", "HF_TOKEN"),
    ("warns", "DB_PASS"),
    ("warns", "SSHPASSPHRASE"),
]
CASES = [
    (reward, name) if (reward, name) in QUICK else pytest.param(reward, name, marks=LONG)
    for reward in ("raises", "shortened", "warns")
    for name in NAMES
    if reward != "shortened" or len(SECRETS.get(name, "x" * 20)) > 15
]


@pytest.mark.parametrize("reward, name", CASES)
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


NAMED = "GH_PAT DB_PASS HF_TOKENS APITOKEN KEY_PASSPHRASE SSHPASSPHRASE apiKey X-API-Key PGPASSWORD"
NAMED += " GITHUB_TOKEN_2 DBPASS AWS_SECRET_ACCESS_KEY MYSQL_PWD API_KEYS SMTP_PASS client_secret"
PLAIN = "PATH PWD OLDPWD COMPASS BYPASS MAX_TOKENS TOKENIZERS_PARALLELISM author monkey keyboard"
PLAIN += " stop_token eos_token_id token_format lora_keys num_prompt_tokens max_new_tokens pattern"


def test_names_of_secrets():
    assert [name for name in NAMED.split() if not is_secret_name(name)] == []
    assert [name for name in PLAIN.split() if is_secret_name(name)] == []


def test_passwords_in_urls_end_at_the_last_at():
    for url, shown in (
        ("http://user:p@ss@host/x", "http://<redacted>@host/x"),
        (
            "ftp://u:a/b#c?d@h:80/p and http://x:y@z",
            "ftp://<redacted>@h:80/p and http://<redacted>@z",
        ),
        ("http://a:b@host/x?key=1", "http://<redacted>@host/x?<redacted>"),
        ("http://u@host", "http://<redacted>@host"),
        ("http://host:80/a@b and https://host/@user", "http://host:80/a@b and https://host/@user"),
    ):
        assert redact(url, []) == shown


def test_short_values_are_hidden_where_they_are_the_secret():
    found = secret_values({"DB_PASS": "abc", "GH_PAT": "abcd", "USER_NAME": "someone-else"})
    assert found == ["abcd"]
    assert redact("abc abcd abcde", found) == "abc <redacted> abcde"
    assert redact({"api_key": "k", "url": "http://u:p@h"}, found) == {
        "api_key": "<redacted>",
        "url": "http://<redacted>@h",
    }
