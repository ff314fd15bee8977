"""rest.py: what is kept and trained, the same bytes as sft.py, resumed runs, bad input."""

import contextlib
import io
import json
import os
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from files import ROOT
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer

import rest
import sft
from command_line.exits import run_main
from command_line.rest_flags import parse_arguments
from models.adapter_files import read_adapter
from models.load import load_model
from rewards.digits import digits_score
from training.grow import text_rows
from training.rest_loop import Improve, RestLoop

DATA = str(ROOT / "data")
SMALL = (
    "--ground-truth-reward --max-rows 16 --samples-per-prompt 4 --iters 4 --batch-size 8 "
    "--eval-prompts 4 --eval-samples 1 --save-file out.npz --output-dir run"
)


@pytest.fixture(autouse=True)
def in_tmp(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*words, status: int = 0, small: str = SMALL) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    line = ["--data", DATA, *small.split(), *(w for one in words for w in str(one).split())]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        with pytest.raises(SystemExit) as end:
            run_main(lambda: rest.main(line))
    assert end.value.code == status, out.getvalue() + err.getvalue()
    return out.getvalue(), err.getvalue()


def lines(name) -> list[dict]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def stages(folder="run") -> list[dict]:
    """What was logged at the end of each improve step."""
    return [row for row in lines(f"{folder}/metrics.jsonl") if "rest/kept" in row]


# ------------------------------------------------------------------------------ rows


def test_a_grow_file_holds_what_the_policy_wrote_and_what_it_earned():
    run("--grow-steps 1 --quantiles .5")
    rows, tokenizer = lines("run/grow_1.jsonl"), load_model().tokenizer
    assert len(rows) == 16 * 4 and all(row["grow"] == 1 for row in rows)
    assert [row["prompt"] for row in rows[::4]] == [
        " ".join(row["text"].split()[:2])
        for row in lines(f"{DATA}/increasing_mult_2_train.jsonl")[:16]
    ]
    for row in rows:
        text = row["prompt"] + row["completion"]
        assert row["reward"] == digits_score(text, cut_off=not row["ended"])
        whole = tokenizer.decode(
            [*row["query_tokens"], *row["response_tokens"]], skip_special_tokens=True
        )
        assert whole == text
        assert row["ended"] == (row["response_tokens"][-1] in tokenizer.eos_token_ids)


def test_rows_from_a_rising_threshold_on_are_kept_once_each():
    run("--grow-steps 2 --thresholds .4 .6")
    found = stages()
    assert [(s["rest/grow"], s["rest/improve"]) for s in found] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    for stage in found:
        rows = lines(f"run/grow_{stage['rest/grow']}.jsonl")
        kept = [row for row in rows if row["reward"] >= stage["rest/threshold"]]
        assert stage["rest/kept"] == len(kept)
        assert stage["rest/rows"] == len(
            {tuple(r["query_tokens"] + r["response_tokens"]) for r in kept}
        )
        assert stage["rest/score_all"] == pytest.approx(np.mean([r["reward"] for r in rows]))
        assert stage["rest/score_kept"] == pytest.approx(np.mean([r["reward"] for r in kept]))
        assert 0 <= stage["eval/sampled/score"] <= 1
    assert [s["step"] for s in found] == [4, 8, 12, 16]


def test_quantiles_are_those_of_that_grow():
    run("--grow-steps 2 --quantiles .25 .75")
    for stage, share in zip(stages(), [0.25, 0.75] * 2, strict=True):
        rewards = [row["reward"] for row in lines(f"run/grow_{stage['rest/grow']}.jsonl")]
        assert stage["rest/threshold"] == pytest.approx(np.quantile(rewards, share))


def test_answers_alone_are_trained_as_the_ids_that_were_sampled():
    """Whatever the text says: it is never read."""
    row = {"query_tokens": [1, 5], "response_tokens": [7, 8, 2], "reward": 0.5}
    rows = [row | {"completion": "\0 else"}, row | {"completion": "another text"}]
    (made,) = text_rows(rows, "grow_1.jsonl")
    assert made.tokens == [1, 5, 7, 8, 2] and made.mask == [0, 0, 1, 1, 1]
    assert made.where == "grow_1.jsonl:1" and made.reward == 0.5


@pytest.fixture
def trained(monkeypatch):
    """Token rows of every improve step."""
    seen, inner = [], RestLoop.begin_stage

    def noting(self, progress):
        inner(self, progress)
        weights = {name: np.array(a) for name, a in self.groups["adapters"].get().items()}
        seen.append((list(self.batches.rows), weights))

    monkeypatch.setattr(RestLoop, "begin_stage", noting)
    return seen


def test_every_row_reaches_a_threshold_below_all_and_trains_the_bytes_of_sft():
    run("--grow-steps 1 --thresholds -1000 --iters 6 --eval-prompts 2 --lora-dropout .1")
    rows = lines("run/grow_1.jsonl")
    assert all(row["ended"] for row in rows)  # else sft.py would put an end there
    line = (
        "--train --mask-prompt --train-file run/grow_1.jsonl --iters 6 --batch-size 8 "
        "--learning-rate 3e-3 --lora-dropout .1 --save-file sft.npz --output-dir sft"
    )
    assert sft.main(line.split()) == 0
    one, other = (read_adapter(Path(name))[0] for name in ("out.npz", "sft.npz"))
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(np.array(one[name]), np.array(other[name]))


def test_scored_rows_of_the_data_join_where_they_reach_the_threshold(trained):
    run("--grow-steps 1 --thresholds .9 --mix-data")  # every row of the data has reward 1
    (rows, _), (stage,) = trained[0], stages()
    assert stage["rest/rows"] == len(rows) >= 16
    tokenizer = load_model().tokenizer
    given = lines(f"{DATA}/increasing_mult_2_train.jsonl")[:16]
    for row, text in zip(rows[-16:], given, strict=True):
        assert tokenizer.decode(row.tokens, skip_special_tokens=True) == text["text"]
        # BOS and two numbers are no answer.
        assert row.mask == [0, 0, 0] + [1] * (len(row.tokens) - 3)
    Path("mine.jsonl").write_text(
        json.dumps({"prompt": "2 4", "completion": " 6 8", "reward": 0.5})
        + "\n"
        + json.dumps({"prompt": "2 4", "completion": " 6 9", "reward": 0.1})
        + "\n"
    )
    run("--grow-steps 1 --thresholds .3 --mix-data mine.jsonl --output-dir other")
    assert tokenizer.decode(trained[1][0][-1].tokens, skip_special_tokens=True) == "2 4 6 8"


def test_mixed_rows_are_checked_against_the_model_and_their_score_is_used(tmp_path):
    base = tiny_model_folder(tmp_path / "base")
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    tokenizer.save_pretrained(base)
    tiny_tokenizer.cache_clear()
    Path("reward.py").write_text(
        "def length(prompts, responses, **columns):\n    return [1.0] * 4\n"
    )
    Path("prompts.jsonl").write_text('{"prompt": "8 20"}\n')
    small = "--reward-function reward.py:length --samples-per-prompt 4 --iters 1 --batch-size 2 "
    small += f"--model {base} --train-file prompts.jsonl --max-new-tokens 2 --mix-data mine.jsonl "
    small += "--output-dir run --thresholds .5 --grow-steps 1 --save-file out.npz"
    for place in ("<|end|> a", "a <|end|> b", "a <|end|>"):
        row = {"prompt": "8", "completion": place, "reward": 1.0}
        Path("mine.jsonl").write_text(json.dumps(row) + "\n")
        _, said = run(status=2, small=small)
        assert "mine.jsonl:1: has token" in said and not Path("run").exists()
    Path("mine.jsonl").write_text('{"prompt": "8", "completion": "9", "reward": 1.0, "x": 2}\n')
    said, _ = run(small=small)
    assert "fields that nothing used: x\n" in said


def test_an_improve_step_starts_from_the_last_policy_or_from_the_base(trained):
    words = "--grow-steps 1 --quantiles .2 .4"
    run(words)
    run(words, "--start-from base --output-dir other")
    (_, first), (_, second), (_, base), (_, again) = trained
    same = lambda a, b: all((a[name] == b[name]).all() for name in a)  # noqa: E731
    assert same(first, base) and same(base, again) and not same(first, second)
    # What is sampled after it is the last policy's either way.
    run("--grow-steps 2 --quantiles .2 --start-from base --output-dir third")
    assert lines("third/grow_1.jsonl") != [row | {"grow": 1} for row in lines("third/grow_2.jsonl")]


def test_with_scores_before_prompts_nothing_is_filtered(trained):
    run("--grow-steps 2 --use-decision-transformer --save-file dt.npz")
    assert ["rest/threshold" in stage for stage in stages()] == [False, False]
    tokenizer = load_model().tokenizer
    for (rows, _), number in zip(trained, (1, 2), strict=True):
        grown = lines(f"run/grow_{number}.jsonl")
        assert len(rows) == len({tuple(r["query_tokens"] + r["response_tokens"]) for r in grown})
        texts = {tokenizer.decode(row.tokens, skip_special_tokens=True) for row in rows}
        for row in grown:
            said = f"[Target Score: {row['reward']:.1f}] {row['prompt']}{row['completion']}"
            again = tokenizer.decode(tokenizer.encode(said), skip_special_tokens=True)
            assert any(text.endswith(row["completion"]) for text in texts) and again
        assert len({len(row.tokens) - sum(row.mask) for row in rows}) == 1  # prefix and prompt
    described = read_adapter(Path("dt.npz"))[1]
    best = max(row["reward"] for row in lines("run/grow_2.jsonl"))
    assert described["score_conditioning"]["target"] == best
    # Its file has the prompt alone: rewards and readers see texts without the score.
    assert all(len(row["query_tokens"]) == 3 for row in lines("run/grow_2.jsonl"))


# ------------------------------------------------------------------------------ ends


def test_no_row_left_is_a_line_and_an_end():
    out, err = run("--grow-steps 2 --thresholds .1 7")
    assert "grow 1, improve 2: no row reaches 7, the highest reward is" in err
    assert "stopped here" in err and Path("out.npz").exists() and len(stages()) == 1
    assert not Path("run/grow_2.jsonl").exists()
    _, err = run("--thresholds 7 --output-dir other", status=2)
    assert err.rpartition("error: ")[2].startswith("grow 1, improve 1: no row reaches 7")


def test_a_run_goes_on_inside_an_improve_step_with_the_bytes_of_one_never_stopped():
    """The whole of it, kills at any touch, is in tests/reliability."""
    words = "--grow-steps 2 --quantiles .2 .5 --save-every 3 --keep-checkpoints 9"
    run(words)
    whole = {name: Path("run", name).read_bytes() for name in ("grow_1.jsonl", "grow_2.jsonl")}
    arrays, logged = mx.load("out.npz"), stages()
    for step in (3, 8, 9):
        (checkpoint,) = Path("run/checkpoints").glob(f"step-*{step:02d}")
        run("--resume", checkpoint, small="")
        assert {name: Path("run", name).read_bytes() for name in whole} == whole
        assert stages() == logged
        again = mx.load("out.npz")
        assert all((again[name] == arrays[name]).all() for name in arrays)


def test_rows_without_a_score_are_left_out_and_counted(trained):
    Path("mine.py").write_text(
        "def some(prompts, responses):\n"
        "    return [None if len(r) % 2 else float(len(r)) for r in responses]\n"
    )
    small = SMALL.replace("--ground-truth-reward", "--reward-function mine.py:some")
    _, err = run("--grow-steps 1 --quantiles 0", small=small)
    rows = lines("run/grow_1.jsonl")
    without = sum(row["reward"] is None for row in rows)
    assert 0 < without < len(rows)
    assert f"; {without} without a score are left out" in err
    assert all(row.reward is not None for row in trained[0][0])
    assert stages()[0]["rest/kept"] == len(rows) - without


@pytest.mark.parametrize(
    "words, said",
    [
        ("--thresholds .5 --quantiles .5", "both say which rows are kept"),
        ("--thresholds .9 .5", "--thresholds 0.9 0.5: must rise"),
        ("--quantiles .5 .5", "--quantiles 0.5 0.5: must rise"),
        ("--thresholds -inf", "'-inf' is not a finite number"),
        ("--quantiles .5 1.5", "--quantiles: give shares from 0"),
        ("--grow-steps 0", "--grow-steps: 0 is below 1"),
        ("--samples-per-prompt 0", "--samples-per-prompt: 0 is below 1"),
        ("--iters 0", "--iters: 0 is below 1"),
        ("--temperature 0", "--temperature 0: all samples of a prompt would be the same"),
        ("--use-decision-transformer --thresholds .5", "--thresholds 0.5 has no effect with"),
        ("--target-score 1", "--target-score 1 has no effect without --use-decision"),
        ("--mix-data none.jsonl", "none.jsonl"),
        ("--train-file nothing.jsonl --validation-file nothing.jsonl", "nothing.jsonl"),
        ("--model nowhere", "nowhere: no model folder there"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_sampled(words, said):
    Path("nothing.jsonl").write_text("")
    _, err = run(words, status=2)
    assert said in err and err.count("error: ") == 1 and "Traceback" not in err, err
    assert not Path("run/grow_1.jsonl").exists()


def test_rows_without_a_score_are_not_mixed_in():
    Path("mine.jsonl").write_text(json.dumps({"prompt": "2", "completion": " 4"}) + "\n")
    _, err = run("--mix-data mine.jsonl", status=2)
    assert "mine.jsonl:1: --mix-data: the row has no score" in err


def test_a_threshold_is_the_number_or_the_quantile():
    def how(**options):
        return Improve(1, 1, 1, 0, 1, **options)

    assert how(thresholds=[0.5, 0.7]).threshold(1, [0, 1]) == 0.7
    below_all = parse_arguments("--ground_truth_reward --thresholds -1e9 -.5".split())
    assert below_all.thresholds == [-1e9, -0.5]  # argparse alone takes -1e9 for a flag
    assert how(quantiles=[0.5]).threshold(0, [0, 1, 1, 3]) == 1
    assert how(template="{score}").threshold(0, [0, 1]) is None
    assert how(quantiles=[0.5, 0.9]).updates == 2


# ------------------------------------------------------------------------------ behaviour

SHUFFLED = """
import random
from rewards.digits import digits_score
def shuffled(prompts, responses):
    scores = [digits_score(p + r) for p, r in zip(prompts, responses)]
    random.Random(len(prompts)).shuffle(scores)
    return scores
"""


def true_scores(folder: str) -> list[float]:
    rows = lines(f"{folder}/metrics.jsonl")
    return [r["eval/sampled/ground_truth"] for r in rows if "eval/sampled/ground_truth" in r]


@pytest.mark.long
@pytest.mark.parametrize("seed", range(3))
def test_the_true_score_rises_with_each_grow_and_not_without_a_filter(seed):
    """First measured on seed 0: 0.578 -> 0.778 -> 0.853."""
    words = f"--seed {seed} --save-file out.npz --output-dir"
    run(words, "run", small="--ground-truth-reward")
    scores = true_scores("run")
    assert len(scores) == 7
    assert scores[6] >= scores[0] + 0.15 and scores[6] > scores[3]
    Path("mine.py").write_text(SHUFFLED)
    small = "--reward-function mine.py:shuffled --true-score"
    run(words, "fake", small=small)
    fake = true_scores("fake")
    assert fake[6] <= fake[0] + 0.06
    run(words, "none", "--thresholds -1000 -1000 -1000", small="--ground-truth-reward")
    unfiltered = true_scores("none")
    assert unfiltered[6] <= unfiltered[0] + 0.06


def test_the_folder_is_named_as_is_and_nothing_else_is_written():
    run("--grow-steps 1 --quantiles .5")
    assert {*os.listdir()} == {"run", "out.npz"}
