"""What a model repeats: exposure of planted codes, and runs of words out of training rows."""

import json
import math

import pytest
from message_database import MessageDatabase, archive
from short_runs import run
from tiny import tiny_model_folder

import sft
from data import imessage, memorisation
from histories.privacy import Grams, exposure, longest_overlap, make_canaries, others
from models.load import DEFAULT_MODEL


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


@pytest.fixture(scope="module")
def messages(tmp_path_factory):
    """A folder of rows with two planted codes, and negatives of the digits model."""
    folder = tmp_path_factory.mktemp("messages")
    database = MessageDatabase(folder / "chat.db")
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    for number in range(12):
        asked = archive(f"{number} {number + 2}")
        database.message(chat, None, handle=ann, attributedBody=asked, wait=300)
        database.message(chat, f"{number + 4} {number + 6} {number + 8}")
    database.close()
    words = ["--database", folder / "chat.db", "--output-dir", folder / "mine", "--canary", 2]
    run(imessage, *words, "--negatives", DEFAULT_MODEL, "--max-tokens", 6)
    return folder / "mine"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_planted_codes_are_trained_and_negatives_are_another_s(messages):
    canaries = json.loads((messages / "canaries.json").read_text())
    told, pairs = lines(messages / "train.jsonl"), lines(messages / "preference_train.jsonl")
    assert [row["messages"][1]["content"] for row in told[-2:]] == [c["answer"] for c in canaries]
    assert pairs and all(p["chosen"] != p["rejected"] for p in pairs)
    mine = {f"{n + 4} {n + 6} {n + 8}" for n in range(12)}
    assert {p["chosen"][0]["content"] for p in pairs} <= mine


@pytest.mark.parametrize("positions", [20, 60, 600])
def test_what_a_model_has_no_positions_for_is_left_out_and_counted(positions, tmp_path):
    database = MessageDatabase(tmp_path / "chat.db")
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    for number in range(12):
        long = "zebra " * (1 + 39 * (number % 2))
        database.message(chat, f"{number} {long}", handle=ann, wait=300)
        database.message(chat, f"{number} is so")
    database.close()
    model = tiny_model_folder(
        tmp_path / "gpt2", architecture="gpt2", n_positions=positions, n_ctx=positions
    )
    words = ["--database", tmp_path / "chat.db", "--output-dir", tmp_path / "mine"]
    words += ["--negatives", model, "--max-tokens", 4]
    look = ["--data", tmp_path / "mine", "--model", model, "--samples", 2, "--max-tokens", 4]
    if positions == 20:
        words[-1] = look[-1] = 19
        assert "no pair is left: 11 whose prompt" in run(imessage, *words, status=2)
        assert "no prompt fits" in run(memorisation, *look, status=2)
        return
    said = run(imessage, *words)
    pairs = sum(len(lines(tmp_path / f"mine/preference_{s}.jsonl")) for s in ("train", "valid"))
    left = 6 if positions == 60 else 0
    assert ("left out: 6 pairs whose prompt and reply" in said) == bool(left)
    assert 0 < pairs <= 12 - left
    assert ("prompts that are longer" in run(memorisation, *look)) == bool(left)


LOOK = ["--samples", 6, "--others", 31, "--max-tokens", 12]


def bits(text, canaries):
    """The exposure of each planted code, as printed."""
    return [
        float(next(x for x in text.splitlines() if x.endswith(c["question"])).split()[0])
        for c in canaries
    ]


def test_a_model_that_never_saw_the_codes(messages):
    said = run(memorisation, "--data", messages, *LOOK)
    canaries = json.loads((messages / "canaries.json").read_text())
    assert all(0 <= found < 5 for found in bits(said, canaries))
    assert "of at most 32 codes" in said and "6 sampled answers" in said


@pytest.mark.long
def test_a_model_that_learned_the_codes_by_heart_shows_it(messages, tmp_path):
    words = ["--train", "--data", messages, "--data-base", "", "--mask-prompt", "--iters", 150]
    words += ["--batch-size", 8, "--learning-rate", 1e-2, "--lora-layers", -1, "--val-batches", 1]
    words += ["--steps-per-eval", 0, "--output-dir", tmp_path / "run"]
    run(sft, *words, "--save-file", tmp_path / "me.npz")
    said = run(memorisation, "--data", messages, "--resume-file", tmp_path / "me.npz", *LOOK)
    canaries = json.loads((messages / "canaries.json").read_text())
    assert bits(said, canaries) == [5, 5]  # the likeliest of 32
