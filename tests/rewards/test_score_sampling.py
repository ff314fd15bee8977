"""score.py --prompts: responses are sampled, scored as PPO would, and written."""

import json

import pytest
from files import ROOT
from tiny import tiny_model_folder

import score
from errors import UserError
from models.load import load_model

PROMPTS = ROOT / "data" / "preference_increasing_mult_2_test.jsonl"
MINE = """
import json
def keep(prompts, responses, ended, token_ids, prompt_text):
    with open("seen.jsonl", "a") as file:
        for row in zip(prompts, responses, ended, token_ids, prompt_text):
            file.write(json.dumps(row) + "\\n")
    return [float(len(r)) for r in responses]
"""


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)


def lines(name) -> list[dict]:
    with open(name, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def run(*words, prompts=PROMPTS):
    """score.py on three prompts of the digits task; the rows that it wrote."""
    wanted = ["--reward-function", "mine.py:keep", "--max-rows", "3", "--output", "out.jsonl"]
    assert score.main(["--prompts", str(prompts), *wanted, *map(str, words)]) == 0
    return lines("out.jsonl")


def test_samples_are_those_of_the_model_and_ended_is_whether_it_ended():
    rows = run("--samples", 4, "--max-new-tokens", 12)
    seen = lines("seen.jsonl")
    loaded = load_model()
    assert len(rows) == len(seen) == 12
    assert [row["prompt"] for row in rows[::4]] == [r["prompt"] for r in lines(PROMPTS)[:3]]
    texts = {(row["prompt"], row["completion"]): row for row in rows}
    for prompt, response, ended, tokens, prompt_text in seen:
        row = texts[prompt, response]
        assert row["score"] == len(response) and row["ended"] is ended
        asked = list(loaded.tokenizer.encode(prompt_text))
        assert tokens[: len(asked)] == asked
        made = tokens[len(asked) :]
        assert ended == (made[-1] in loaded.eos_ids) and len(made) <= 12
        assert ended or len(made) == 12
    assert {ended for _, _, ended, _, _ in seen} == {True, False}
    assert len({row["completion"] for row in rows}) > 6


def test_the_seed_decides_and_the_size_of_a_batch_is_free():
    first = [row["completion"] for row in run("--max-new-tokens", 8)]
    again = [row["completion"] for row in run("--max-new-tokens", 8, "--force")]
    other = [row["completion"] for row in run("--max-new-tokens", 8, "--force", "--seed", 1)]
    assert first == again != other
    small = run("--max-new-tokens", 8, "--force", "--batch-size", 1)
    assert [row["prompt"] for row in small] == [row["prompt"] for row in lines("out.jsonl")]
    assert len(small) == 12


def test_best_of_the_samples_is_written_for_sft():
    every = run("--samples", 4, "--max-new-tokens", 12)
    best = run("--samples", 4, "--max-new-tokens", 12, "--force", "--best-of")
    assert len(best) == 3
    for place, row in enumerate(best):
        of_prompt = every[4 * place : 4 * place + 4]
        assert row["prompt"] == of_prompt[0]["prompt"]
        assert row["score"] == max(other["score"] for other in of_prompt)


def test_rows_keep_their_columns_and_lose_their_old_answers(tmp_path):
    row = {"prompt": "2 4", "chosen": "6 8", "rejected": "1", "level": 3}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(row) + "\n")
    (found,) = run("--samples", 1, "--max-new-tokens", 4, "--temperature", 0, prompts="pairs.jsonl")
    assert {"prompt", "completion", "level", "score", "rewards", "ended"} == set(found)
    assert found["level"] == 3 and found["completion"] != "6 8"


def test_a_chat_template_s_end_of_turn_ends_a_response(tmp_path):
    """Prompts are put in the template of the model, and its end of turn is no part of the text."""
    folder = tiny_model_folder(tmp_path / "model", template="chatml")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "2 4"}) + "\n")
    run("--model", folder, "--samples", 16, "--max-new-tokens", 40, prompts="p.jsonl")
    loaded = load_model(folder)
    (turn_end,) = loaded.tokenizer.encode("<|im_end|>", add_special_tokens=False)
    for prompt, response, ended, tokens, prompt_text in lines("seen.jsonl"):
        assert prompt == "2 4" and prompt_text != prompt
        assert ended == (tokens[-1] in {*loaded.eos_ids, turn_end})
        assert not any(special in response for special in loaded.tokenizer.all_special_tokens)


@pytest.mark.parametrize(
    "words, said",
    [
        ("--prompts p --input i", "--prompts and --input: --prompts samples responses"),
        ("--prompts p --dataset d", "--prompts and --dataset"),
        ("--input i --samples 3", "--samples 3 has no effect without --prompts"),
        ("--input i --max-new-tokens 3", "--max-new-tokens 3 has no effect without --prompts"),
        ("--prompts p --temperature 0", "--samples 4 with --temperature 0: all would be the same"),
        ("--prompts p --samples 0", "--samples: 0 is below 1"),
        ("--prompts p --top-p 0", "--top-p: give a probability above 0"),
        ("--prompts p --temperature -1", "--temperature: give a number that is not below 0"),
    ],
)
def test_contradictions_are_refused(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        score.main([*words.split(), "--ground-truth-reward"])
    assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_prompt_that_leaves_no_room_is_named(tmp_path):
    folder = tiny_model_folder(tmp_path / "model")
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "2 " * 40}) + "\n")
    with pytest.raises((SystemExit, UserError)):
        run("--model", folder, "--max-length", 8, prompts="p.jsonl")
