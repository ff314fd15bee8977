"""What a model repeats: exposure of planted codes, and runs of words out of training rows."""

import json
import math
import subprocess
import sys

import pytest
from files import ROOT
from message_database import MessageDatabase, archive

from histories.privacy import Grams, exposure, longest_overlap, make_canaries, others


def test_exposure_is_the_log_of_the_rank():
    assert exposure(0.0, [-1.0] * 255) == 8
    assert exposure(-2.0, [-1.0] * 255) == 0
    assert exposure(-1.0, [-1.0] * 255) == 0  # as likely as all others: nothing was learned
    assert exposure(-1.0, [0.0] + [-2.0] * 254) == 7
    ranks = range(1, 257)
    unseen = sum(8 - math.log2(rank) for rank in ranks) / len(ranks)
    assert unseen == pytest.approx(1.4, abs=0.05)  # what the program says of unseen codes


def test_planted_codes_and_those_they_are_compared_with_are_apart():
    first, second = make_canaries(2, seed=0)
    assert first["question"] != second["question"] and len(first["answer"]) == 6
    rest = others(first, 255, seed=0)
    assert len({*rest, first["answer"]}) == 256
    assert make_canaries(2, seed=0) == [first, second] != make_canaries(2, seed=1)


@pytest.mark.parametrize(
    ("text", "longest"),
    [
        ("well then see you at the old bridge ok", "see you at the old bridge"),
        ("nothing alike here", ""),
        ("see you see you at the", "see you at the"),
        ("", ""),
    ],
)
def test_the_longest_run_of_words(text, longest):
    grams = Grams(["we will see you at the old bridge", "at the sea"])
    assert longest_overlap(text, grams) == longest


def run(*words):
    done = subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_model_that_learned_the_codes_by_heart_shows_it(tmp_path):
    database = MessageDatabase(tmp_path / "chat.db")
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    for number in range(24):
        asked = archive(f"{number} {number + 2}")
        database.message(chat, None, handle=ann, attributedBody=asked, wait=300)
        database.message(chat, f"{number + 4} {number + 6} {number + 8}")
    database.close()
    mine = tmp_path / "mine"
    run(
        "data/imessage.py",
        "--database",
        tmp_path / "chat.db",
        "--output-dir",
        mine,
        "--canaries",
        2,
        "--negatives",
        "data/digits_model",
        "--max-tokens",
        8,
    )
    canaries = json.loads((mine / "canaries.json").read_text())
    told, pairs = (
        [json.loads(line) for line in (mine / name).read_text().splitlines()]
        for name in ("train.jsonl", "preference_train.jsonl")
    )
    assert [row["messages"][1]["content"] for row in told[-2:]] == [c["answer"] for c in canaries]
    pairs = [
        json.loads(line) for line in (mine / "preference_train.jsonl").read_text().splitlines()
    ]
    assert pairs and all(p["chosen"] != p["rejected"] for p in pairs)
    assert {p["chosen"][0]["content"] for p in pairs} <= {
        f"{n + 4} {n + 6} {n + 8}" for n in range(24)
    }
    look = ["data/memorisation.py", "--data", mine, "--samples", 8, "--others", 63]
    before = run(*look)
    run(
        "sft.py",
        "--train",
        "--data",
        mine,
        "--data-base",
        "",
        "--mask-prompt",
        "--iters",
        150,
        "--batch-size",
        8,
        "--learning-rate",
        "1e-2",
        "--lora-layers",
        "-1",
        "--val-batches",
        1,
        "--steps-per-eval",
        0,
        "--save-file",
        tmp_path / "me.npz",
        "--output-dir",
        tmp_path / "run",
    )
    after = run(*look, "--resume-file", tmp_path / "me.npz")
    for canary in canaries:
        bits = [
            float(line.split()[0])
            for text in (before, after)
            for line in text.splitlines()
            if line.endswith(canary["question"])
        ]
        assert bits[1] == 6 and bits[0] < 6, (before, after)  # the likeliest of 64
    assert "8 sampled answers" in after
