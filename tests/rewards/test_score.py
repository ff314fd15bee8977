"""score.py: every record format, every reward, what is written, the best of several."""

import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from tiny import tiny_model_folder

import score as score_script
import sft
from command_line.exits import run_main
from data_utils import read_records, tokenise_preferences
from models.adapter_files import save_adapter
from models.load import load_model
from models.lora import LoraConfig, add_lora
from models.reward_model import RewardModel, load_reward_model, normalise, save_reward_head
from rewards.digits import digits_score

SAMPLES = ROOT / "data" / "samples"
PREFERENCES = ROOT / "data" / "preference_increasing_mult_2_test.jsonl"


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    """Every test in a folder of its own, with a reward that keeps what it was asked."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import json\n"
        "def keep(prompts, responses, **columns):\n"
        "    with open('seen.jsonl', 'a') as file:\n"
        "        for row in zip(prompts, responses, columns['ended']):\n"
        "            file.write(json.dumps(row) + '\\n')\n"
        "    return [len(r) for r in responses]\n"
        "def short(prompts, responses):\n    return [-len(r) for r in responses]\n"
        "def fails(prompts, responses):\n    raise RuntimeError('no')\n"
        "def level(prompts, responses, level):\n    return level\n"
    )


def score(*words, status=0) -> str:
    """score.py in this process; its output, or its error where a failure is expected."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: score_script.main([str(word) for word in words]))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    if status:
        assert err.getvalue().splitlines()[-1].startswith("error: ")
        return err.getvalue()
    return out.getvalue()


def write(name, *rows) -> str:
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def read(name) -> list[dict]:
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def summary(out: str, name: str) -> dict[str, float]:
    """The numbers on the line of a reward."""
    (line,) = [line for line in out.splitlines() if line.startswith(f"{name} ")]
    cells = line.split()[1:]
    return {key: float(value) for key, value in zip(cells[::2], cells[1::2], strict=True)}


# ------------------------------------------------------------------------------ formats


def turn(role, content):
    return {"role": role, "content": content}


# File -> what a reward is asked about it: (prompt, response, whether it ended).
ASKED = {
    "text.jsonl": [
        ["", "8 20 22 30 36 38 50 60 68", True],
        ["", "4 18 33 40 52 61 70", True],
        ["", "Rows without a reward are for fine-tuning alone.", True],
    ],
    "prompt_completion.jsonl": [
        ["8 20 22", " 30 36 38 50 60 68", True],
        ["Water boils at", " 100 degrees Celsius at sea level.", True],
    ],
    "instruction.jsonl": [
        ["Name the capital of the country.\n\nFrance", "Paris.", True],
        [
            'Write a sentence with the word "river".',
            "The river froze in the first week of January.",
            True,
        ],
        ["Which of these is a fruit?\n\ncarrot, pear, leek", "The pear.", True],
    ],
    "question_answer.jsonl": [
        [
            [turn("system", "Answer with a name."), turn("user", "Who wrote Faust?")],
            "Goethe.",
            True,
        ],
        ["What do bees make?", "Honey and wax.", True],
    ],
    "conversation.jsonl": [
        [[turn("user", "Is 51 a prime number?")], "No, it is 3 times 17.", True],
        [[turn("user", "Is 57 a prime number?")], "Yes.", True],
    ],
    "unpaired.jsonl": [["8 20", " 22 30 36 38", True], ["8 20", " 7 7 7 7", True]],
    "preference.jsonl": [
        ["8 20", " 22 30 36 38 50", True],
        ["8 20", " 21 7 36 35 50", True],
        ["Name a planet with rings.", "Saturn.", True],
        ["Name a planet with rings.", "The moon.", True],
    ],
    "hh_rlhf.jsonl": [
        [
            [
                turn("user", "My bread does not rise."),
                turn("assistant", "How old is the yeast?"),
                turn("user", "Two years."),
            ],
            answer,
            True,
        ]
        for answer in ("Then try fresh yeast first.", "Bread is baked at 220 degrees.")
    ],
}


@pytest.mark.parametrize("name", ASKED)
def test_every_format_with_a_response_is_scored(name):
    out = score("--input", SAMPLES / name, "--reward-function", "mine.py:keep", "--output", "s")
    asked = ASKED[name]
    assert sorted(read("seen.jsonl"), key=str) == sorted(asked, key=str)
    rows = read("s")
    assert [row["score"] for row in rows] == [len(response) for _, response, _ in asked]
    assert all(row["rewards"] == {"keep": row["score"]} for row in rows)
    assert summary(out, "score")["count"] == len(asked)


def test_a_row_keeps_its_fields_and_ranked_responses_are_rows_of_their_own():
    row = {"prompt": "a", "completion": " bc", "level": 3, "note": "n"}
    score("--input", write("in", row), "--reward-function", "mine.py:level", "--output", "s")
    assert read("s") == [{**row, "score": 3, "rewards": {"level": 3}}]
    ranked = {"prompt": "a", "responses": [" x", " yyy", " zz"], "scores": [1, 3, 2], "note": "n"}
    out = score(
        "--input",
        write("in", ranked),
        "--reward-function",
        "mine.py:short",
        "--output",
        "s",
        "--force",
    )
    rows = read("s")
    assert [(r["response"], r["rank"], r["score"]) for r in rows] == [
        (" yyy", 0, -4),
        (" zz", 1, -3),
        (" x", 2, -2),
    ]
    assert rows[0]["note"] == "n" and "scores" not in rows[0]
    assert summary(out, "score")["accuracy"] == 0  # the longest is the best, and scored lowest


def test_a_reward_gets_the_prompt_as_written_and_beside_it_as_a_policy_is_given_it(tmp_path):
    (tmp_path / "given.py").write_text(
        "import json\n"
        "def given(prompts, responses, prompt_text):\n"
        "    with open('seen.jsonl', 'a') as file:\n"
        "        for row in zip(prompts, responses, prompt_text):\n"
        "            file.write(json.dumps(row) + '\\n')\n"
        "    return [0.0] * len(responses)\n"
    )
    folder = tiny_model_folder(tmp_path / "chat", template="chatml")
    rows = {"prompt": "what is", "completion": "the answer"}
    function = ("--reward-function", "given.py:given")
    score("--input", write("in", rows), "--model", folder, *function)
    prompt = "<|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\n"
    assert read("seen.jsonl") == [["what is", "the answer", prompt]]
    score(
        "--input",
        write("in", {"question": "what", "response": "is"}),
        *function,
        "--prompt-template",
        "Q: {question}\\nA: ",
    )
    assert read("seen.jsonl")[1] == ["what", "is", "Q: what\nA: "]
    score(
        "--input",
        SAMPLES / "conversation.jsonl",
        "--max-rows",
        1,
        "--token-format",
        "role_markers",
        *function,
    )
    prompt = "User: Is 51 a prime number?\n\nAssistant:"
    asked = [turn("user", "Is 51 a prime number?")]
    assert read("seen.jsonl")[2] == [asked, " No, it is 3 times 17.", prompt]


def test_rows_without_a_response_or_too_long():
    prompts = write("p", {"prompt": "8 20"})
    function = ("--reward-function", "mine.py:keep")
    assert "p:1: a prompt without a response" in score("--input", prompts, *function, status=2)
    open_end = {"messages": [{"role": "user", "content": "hi"}]}
    closed = {"messages": [*open_end["messages"], {"role": "assistant", "content": "yes"}]}
    talks = write("t", open_end, closed)
    assert "t:1: the conversation does not end" in score("--input", talks, *function, status=2)
    out = score("--input", talks, *function, "--skip-bad-rows")
    assert "1 refused" in out and summary(out, "score")["count"] == 1
    rows = write("r", {"prompt": "8", "completion": " 20"}, {"prompt": "8", "completion": " 2" * 9})
    out = score("--input", rows, *function, "--max-length", 6, "--output", "s")
    assert "refused 1: longer than 6 tokens (r:2)" in out and len(read("s")) == 1
    score("--input", rows, *function, "--max-length", 6, "--too-long", "cut")
    assert read("seen.jsonl")[-2:] == [["8", " 2 2 2 2", False], ["8", " 20", True]]


# ------------------------------------------------------------------------------ rewards


def test_the_ground_truth_is_that_of_ppo():
    out = score("--input", PREFERENCES, "--ground-truth-reward", "--output", "s")
    rows = read("s")
    assert len(rows) == 60 and [row["rank"] for row in rows[:4]] == [0, 1, 0, 1]
    for row in rows:
        assert row["score"] == digits_score(row["prompt"] + row["response"])
    found = summary(out, "score")
    scores = np.array([row["score"] for row in rows])
    assert found["mean"] == pytest.approx(scores.mean(), abs=1e-3)
    assert found["std"] == pytest.approx(scores.std(), abs=1e-3)
    assert found["accuracy"] == 1
    rule = ("--decreasing", "--multiple-of", 3)
    score("--input", PREFERENCES, "--ground-truth-reward", *rule, "--output", "s", "--force")
    row = read("s")[0]
    text = row["prompt"] + row["response"]
    assert row["score"] == digits_score(text, increasing=False, multiple_of=3) != scores[0]


def test_agreement_with_labels_and_rewards():
    said = ((" xxx", True), (" x", False), (" xx", False), (" xx", True))
    labelled = [{"prompt": "a", "completion": text, "label": good} for text, good in said]
    out = score("--input", write("in", *labelled), "--reward-function", "mine.py:keep")
    assert summary(out, "score")["accuracy"] == pytest.approx(3.5 / 4, abs=1e-3)
    rated = [{"text": "x" * n, "reward": r} for n, r in ((1, 0), (2, 1), (3, 4))]
    out = score("--input", write("in", *rated), "--reward-function", "mine.py:keep")
    assert summary(out, "score")["spearman"] == 1
    assert summary(out, "score")["pearson"] == pytest.approx(0.9608, abs=1e-3)


@pytest.fixture
def reward_files(tmp_path):
    """A reward adapter with random arrays and its fused folder; the model that scores."""
    mx.random.seed(3)
    loaded = load_model()
    tuning = add_lora(loaded.model, LoraConfig(rank=2))
    arrays = {k: a + 0.05 * mx.random.normal(a.shape) for k, a in tuning.arrays().items()}
    tuning.load_arrays(arrays)
    model = RewardModel(loaded.model, pooling="last", tuning=tuning)
    normalise(model, [loaded.tokenizer.encode(f"{n} {n + 2} 7") for n in range(0, 60, 7)])
    save_adapter(tmp_path / "rm.npz", tuning, loaded)
    save_reward_head(tmp_path / "rm.npz", model)
    return loaded, model


def test_a_reward_model_scores_the_tokens_that_it_was_trained_on(reward_files):
    loaded, model = reward_files
    rows = tokenise_preferences(read_records(PREFERENCES), loaded.tokenizer).rows
    expected = model.score([tokens for row in rows for tokens in row.responses])
    out = score(
        "--input", PREFERENCES, "--reward-model", "rm.npz", "--output", "adapter", "--batch-size", 7
    )
    assert [r["score"] for r in read("adapter")] == pytest.approx(expected, abs=1e-5)
    pairs = np.array(expected).reshape(-1, 2)
    accuracy = (pairs[:, 0] > pairs[:, 1]).mean()
    assert summary(out, "reward_model")["accuracy"] == pytest.approx(accuracy, abs=1e-3)
    import fuse

    fuse.main(["--adapter-file", "rm.npz", "--save-path", "fused"])
    assert load_reward_model("fused").gain == pytest.approx(model.gain)
    for words in (
        ["--reward-model", "fused"],
        ["--reward-model", "fused", "--model", str(ROOT / "data" / "digits_model")],
    ):
        score("--input", PREFERENCES, *words, "--output", "fused.jsonl", "--force")
        assert [r["score"] for r in read("fused.jsonl")] == pytest.approx(expected, abs=1e-4)
    error = score("--input", PREFERENCES, "--reward-model", "fused", "--quantize", 4, status=2)
    assert "--quantize is for the base of an adapter" in error
    score("--input", PREFERENCES, "--reward-model", "rm.npz", "--quantize", 4, "--output", "4bit")
    found = [r["score"] for r in read("4bit")]
    assert found != pytest.approx(expected, abs=1e-3) and np.corrcoef(found, expected)[0, 1] > 0.5


def test_several_rewards_weighted_and_a_service():
    class Service(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = json.dumps({"scores": [len(p) for p in asked["prompts"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(reply)))
            self.end_headers()
            self.wfile.write(reply)

        def log_message(self, *words):
            pass

    server = HTTPServer(("127.0.0.1", 0), Service)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/score"
        out = score(
            "--input",
            PREFERENCES,
            "--ground-truth-reward",
            "--reward-function",
            "mine.py:short",
            "--reward-url",
            url,
            "--reward-weights",
            2,
            0.5,
            10,
            "--output",
            "s",
        )
    finally:
        server.shutdown()
        server.server_close()
    for row in read("s"):
        parts = row["rewards"]
        assert parts["short"] == -len(row["response"]) and parts["service"] == len(row["prompt"])
        total = 2 * parts["ground_truth"] + 0.5 * parts["short"] + 10 * parts["service"]
        assert row["score"] == pytest.approx(total)
    assert summary(out, "service")["min"] >= 3


# ------------------------------------------------------------------------------ best of n


def test_the_best_of_several_is_picked_and_sft_trains_on_it():
    rows = [
        {"prompt": p, "response": r}
        for p, r in (
            ("8 20", " 22 7"),
            ("2 4", " 1 3"),
            ("8 20", " 22 30 36"),
            ("2 4", " 6 8 10"),
            ("8 20", " 22 40 90"),
        )
    ]
    out = score(
        "--input",
        write("in", *rows),
        "--ground-truth-reward",
        "--best-of",
        "--output",
        "best.jsonl",
    )
    best = read("best.jsonl")
    assert [(r["prompt"], r["completion"]) for r in best] == [
        ("8 20", " 22 30 36"),
        ("2 4", " 6 8 10"),  # the first of equals
    ]
    assert [r["score"] for r in best] == [1, 1] and "best of 2.5 responses to each of 2" in out
    assert {record.kind for record in read_records("best.jsonl")} == {"prompt_completion"}
    sft.main(
        [
            "--train",
            "--train-file",
            "best.jsonl",
            "--mask-prompt",
            "--iters",
            "1",
            "--batch-size",
            "2",
            "--output-dir",
            "run",
        ]
    )
    (row,) = read("run/metrics.jsonl")
    assert row["train/tokens_total"] == 8  # three numbers and EOS of each


def test_the_best_of_messages_and_of_preference_rows():
    files = [SAMPLES / name for name in ("preference_messages.jsonl", "conversation.jsonl")]
    score("--input", *files, "--reward-function", "mine.py:short", "--best-of", "--output", "b")
    records = list(read_records("b"))
    assert [r.kind for r in records] == ["prompt_completion"] * 4
    assert [r.completion[0]["content"] for r in records] == [
        "Eggs come from hens.",
        "42.",
        "No, it is 3 times 17.",
        "Yes.",
    ]
    error = score(
        "--input",
        SAMPLES / "text.jsonl",
        "--reward-function",
        "mine.py:short",
        "--best-of",
        "--output",
        "c",
        status=2,
    )
    assert "text.jsonl:1: --best-of picks among the responses to a prompt" in error


# ------------------------------------------------------------------------------ files


def test_a_file_is_overwritten_only_by_force_and_never_half_written(tmp_path):
    rows = write("in", {"prompt": "a", "completion": " b"})
    words = ("--input", rows, "--output", "s")
    score(*words, "--reward-function", "mine.py:short")
    before = (tmp_path / "s").read_bytes()
    error = score(*words, "--reward-function", "mine.py:short", status=2)
    assert "s: is there already; --force overwrites it" in error
    score(*words, "--reward-function", "mine.py:fails", "--force", status=2)
    assert (tmp_path / "s").read_bytes() == before
    score(*words, "--reward-function", "mine.py:keep", "--force")
    assert (tmp_path / "s").read_bytes() != before
    left = {path.name for path in tmp_path.iterdir()} - {"__pycache__"}
    assert left == {"in", "s", "mine.py", "seen.jsonl"}
    error = score(
        "--input", rows, "--output", "no/such/s", "--reward-function", "mine.py:short", status=2
    )
    assert "no/such/s: cannot write" in error


def test_data_sets_and_several_files():
    pytest.importorskip("datasets")
    import datasets

    row = {"prompt": "a", "completion": " b", "level": 2.0}
    datasets.Dataset.from_list([row] * 3).save_to_disk("saved")
    out = score(
        "--input",
        write("in", {**row, "level": 1.0}),
        "--dataset",
        "saved",
        "--reward-function",
        "mine.py:level",
        "--output",
        "s",
    )
    assert [r["score"] for r in read("s")] == [1, 2, 2, 2]
    assert summary(out, "score")["mean"] == 1.75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to score: give --input FILE, --dataset NAME, or --prompts FILE"),
        (["--input", "in"], "no reward: give --ground-truth-reward"),
        (["--input", "gone", "--ground-truth-reward"], "gone"),
        (["--input", "in", "--ground-truth-reward", "--best-of"], "--best-of needs --output"),
        (["--input", "in", "--ground-truth-reward", "--force"], "--force has no effect"),
        (["--input", "in", "--ground-truth-reward", "--split", "x"], "--split has no effect"),
        (["--input", "in", "--ground-truth-reward", "--batch-size", "0"], "--batch-size"),
        (["--input", "in", "--reward-model", "gone"], "gone: no such reward model"),
        (["--input", "in", "--reward-function", "mine.py:fails"], "raised RuntimeError: no"),
        (["--input", "in", "--ground-truth-reward", "--train-file", "x"], "unknown flag"),
    ],
)
def test_mistakes_are_one_line(words, message):
    write("in", {"prompt": "a", "completion": " b"})
    assert message in score(*words, status=2)
