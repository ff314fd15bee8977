"""A chatbot of messages, from the database to PPO: a synthetic friend, on the digits model."""

import json
import random

import pytest
from message_database import MessageDatabase, archive
from short_runs import run

import ppo_training
import preference_training
import sft
from data import imessage
from models.load import DEFAULT_MODEL

pytestmark = pytest.mark.long
KINDS = {
    "lora": (["--lora-layers", "-1"], {"sft": 5e-3, "ppo": 3e-3}),
    "prompt": (["--prompt-tuning"], {"sft": 5e-2, "ppo": 1e-1}),
    "full": (["--fine-tune-type", "full"], {"sft": 1e-3, "ppo": 3e-4}),
}


@pytest.fixture(scope="module")
def friend(tmp_path_factory):
    """Ann writes two numbers; I answer with the next three even ones above them."""
    folder, chance = tmp_path_factory.mktemp("friend"), random.Random(0)
    database = MessageDatabase(folder / "chat.db")
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    for number in range(300):
        first = 2 * chance.randrange(40)
        asked = archive(f"{first} {first + 2}")
        database.message(chat, None, handle=ann, attributedBody=asked, wait=300)
        if number % 4:  # the text alone is NULL in the other three quarters
            body = {"attributedBody": archive(f"{first + 4} {first + 6} {first + 8}")}
            database.message(chat, None, **body)
        else:
            database.message(chat, f"{first + 4} {first + 6} {first + 8}")
    database.close()
    words = ["--database", folder / "chat.db", "--output-dir", folder / "my_messages"]
    run(imessage, *words, "--negatives", DEFAULT_MODEL, "--max-tokens", 8)
    return folder


def column(folder, name):
    with open(folder / "metrics.jsonl", encoding="utf-8") as file:
        return [row[name] for row in map(json.loads, file) if name in row]


@pytest.mark.parametrize("kind", KINDS)
def test_held_out_replies_become_likelier(friend, tmp_path, kind):
    flags, rates = KINDS[kind]
    words = ["--train", "--data", friend / "my_messages", "--data-base", "", "--mask-prompt"]
    words += ["--iters", 60, "--steps-per-eval", 60, "--batch-size", 16, *flags]
    words += ["--learning-rate", rates["sft"], "--output-dir", tmp_path / "run"]
    run(sft, *words, "--save-file", tmp_path / "me.npz")
    first, *_, last = column(tmp_path / "run", "valid/loss")
    assert last < 0.7 * first, (first, last)


@pytest.fixture(scope="module")
def reward(friend):
    words = ["--reward-model", "--train", "--data", friend / "my_messages"]
    words += ["--data-base", "preference_", "--iters", 60, "--batch-size", 16]
    words += ["--learning-rate", 3e-3, "--output-dir", friend / "reward_run"]
    run(sft, *words, "--save-file", friend / "reward.npz")
    return friend / "reward.npz"


def test_a_reward_model_tells_my_replies_from_a_model_s(friend, reward):
    found = json.loads((friend / "reward_run" / "summary.json").read_text())
    assert found["heldout/accuracy"] >= 0.8, found


@pytest.mark.parametrize("kind", KINDS)
def test_ppo_raises_the_learned_score(friend, reward, tmp_path, kind):
    flags, rates = KINDS[kind]
    words = ["--me_chatbot", "--data", friend / "my_messages", "--reward_model", reward]
    words += ["--num-steps", 30, "--batch-size", 32, "--max-new-tokens", 8, "--eval-every", 0]
    words += [*flags, "--learning-rate", rates["ppo"], "--output-dir", tmp_path / "run"]
    run(ppo_training, *words, "--save-file", tmp_path / "ppo.npz")
    scores = column(tmp_path / "run", "ppo/mean_scores")
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.5, scores


def test_dpo_prefers_my_replies(friend, tmp_path):
    words = ["--train", "--data", friend / "my_messages", "--data-base", "preference_"]
    words += ["--iters", 40, "--batch-size", 16, "--learning-rate", 1e-3, "--steps-per-eval", 40]
    run(
        preference_training,
        *words,
        "--output-dir",
        tmp_path / "run",
        "--save-file",
        tmp_path / "d.npz",
    )
    accuracy = column(tmp_path / "run", "valid/rewards/accuracies")
    assert accuracy[-1] >= 0.8 > accuracy[0], accuracy
