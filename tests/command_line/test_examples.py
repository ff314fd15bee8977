"""examples/: every file of options is taken by the script that its command names."""

import importlib
import re
import shlex
import sys

import pytest
from files import ROOT

FILES = sorted((ROOT / "examples").glob("*.yaml"))


def commands(file) -> list[list[str]]:
    """The commands in a file's comment that take it."""
    lines = re.findall(r"^#\s+python (.*)$", file.read_text(encoding="utf-8"), re.M)
    return [words for words in map(shlex.split, lines) if "--config" in words]


def test_there_is_one_for_each_step():
    assert {file.stem for file in FILES} == {"sft", "reward_model", "ppo_sentiment"}
    assert all(commands(file) for file in FILES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_an_example_is_parsed(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_data").mkdir()
    for name in (
        "train.jsonl",
        "valid.jsonl",
        "preferences_train.jsonl",
        "preferences_valid.jsonl",
    ):
        (tmp_path / "my_data" / name).touch()
    for script, *words in commands(file):
        place = words.index("--config") + 1
        assert words[place] == f"examples/{file.name}"
        words[place] = str(file)
        args = importlib.import_module(script.removesuffix(".py")).parse_arguments(words)
        text = file.read_text(encoding="utf-8")
        keys = [key.replace("-", "_") for key in re.findall(r"^([\w-]+):", text, re.M)]
        assert len(keys) > 8 and set(keys) <= args.explicit
        assert args.data_base in ("", "preferences_") and args.learning_rate != 3e-3


def test_the_sentiment_reward_scores_texts(monkeypatch):
    class Analyser:
        def polarity_scores(self, text):
            return {"compound": 1.0 if "good" in text else -0.5}

    module = type(sys)("vaderSentiment.vaderSentiment")
    module.SentimentIntensityAnalyzer = Analyser
    monkeypatch.setitem(sys.modules, "vaderSentiment", type(sys)("vaderSentiment"))
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    from rewards.user_function import load_function

    positive = load_function(f"{ROOT}/examples/sentiment.py:positive")
    assert positive(["a", "b"], ["good", "bad"]) == [1.0, -0.5]
