"""benchmarks/real_model.py: the rules by which rows are made, and stages that are done once."""

import itertools
import json
import sys

import pytest
from files import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import real_model  # noqa: E402
import real_model_data as data  # noqa: E402
import real_model_report as report  # noqa: E402


def test_held_out_prompts_share_no_subject_with_the_others():
    train, held = data.prompts(False), data.prompts(True)
    assert len(train) == 320 and len(held) == 80
    assert train == data.prompts(False) and len({row["prompt"] for row in train}) == 320
    for subject, row in itertools.product(data.SUBJECTS[4::5], train):
        assert f"about {subject} " not in row["prompt"]


@pytest.mark.parametrize(
    "text, ended, kept",
    [
        ("The dog ran over the wet road.", True, True),
        (" What a day it was for the old dog!", True, True),
        ("The dog ran over the wet road.", False, False),  # cut off
        ("The dog ran.", True, False),  # too short
        ("The dog ran over the road. It was wet.", True, False),  # two sentences
        ("Here is one:\nThe dog ran over the road.", True, False),
        ("The dog ran over the wet road", True, False),
        ("The " + "very " * 25 + "old dog ran.", True, False),
    ],
)
def test_sft_rows_are_one_whole_sentence(text, ended, kept):
    row = {"prompt": "p", "completion": text, "ended": ended}
    expected = [{"prompt": "p", "completion": text.strip()}] if kept else []
    assert data.sft_rows([row, row]) == expected


def test_pairs_are_the_best_against_the_worst_where_they_are_apart():
    scores = {"p": [0.1, 0.9, 0.5, -0.5, 0.3, 0.35], "q": [0.1, 0.2, 0.0, 0.1]}
    samples = [
        {"prompt": p, "completion": f"{p} {s}", "score": s}
        for p, some in scores.items()
        for s in some
    ]
    assert data.pairs(samples) == [
        {"prompt": "p", "chosen": "p 0.9", "rejected": "p -0.5"},
        {"prompt": "p", "chosen": "p 0.5", "rejected": "p 0.1"},
    ]


def test_a_stage_is_done_once_and_one_that_failed_adds_up(tmp_path):
    seed = real_model.Seed(tmp_path, 0)
    (tmp_path / "fails").touch()
    code = (
        "import os, sys; open('{0}/ran', 'a').write('x'); sys.exit(3 * os.path.exists('{0}/fails'))"
    )
    stage = real_model.Stage("one", ["-c", code.format(tmp_path)])
    with pytest.raises(SystemExit, match="one ended with 3"):
        seed.do(stage)
    assert seed.done["one stopped"]["seconds"] > 0
    first = seed.done["one stopped"]["seconds"]
    (tmp_path / "fails").unlink()
    again = real_model.Seed(tmp_path, 0)
    again.do(stage)
    again.do(stage)
    assert (tmp_path / "ran").read_text() == "xx"
    found = json.loads((tmp_path / "seed_0" / "stages.json").read_text())
    assert set(found) == {"one"} and found["one"]["seconds"] > first
    assert found["one"]["peak_gb"] > 0


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    seed, seen = real_model.Seed(tmp_path, 0), []

    class Popen(real_model.subprocess.Popen):
        def __init__(self, words, **options):
            seen.append(words[1:])
            super().__init__([words[0], "-c", ""], **options)

    monkeypatch.setattr(real_model.subprocess, "Popen", Popen)
    stage = real_model.training("ppo", tmp_path, "ppo_training.py", "--num-steps 2", 0)
    (tmp_path / "ppo").mkdir()
    (tmp_path / "ppo" / "config.json").write_text("{}")
    seed.do(stage)
    assert seen == [["ppo_training.py", "--resume", str(tmp_path / "ppo")]]


def test_the_plan_s_commands_are_taken_by_the_scripts(tmp_path):
    """Every command of a seed is one that its script's parser accepts."""
    import importlib

    seed, seen = real_model.Seed(tmp_path, 0), []
    (seed.place / "reward.npz").touch()
    (tmp_path / "sft_train.jsonl").touch()
    seed.do = seen.append
    for name in ("samples", "sft_samples"):
        data.write(seed.place / f"{name}.jsonl", [])
    for part in ("sft", "ppo", "rates", "reward"):
        getattr(seed, part)()
    assert len({stage.name for stage in seen}) == len(seen) == 8
    flags = {
        "score.py": "score_flags",
        "sft.py": "sft_flags",
        "ppo_training.py": "ppo_flags",
    }
    for stage in seen:
        script, *words = stage.words
        if script in flags:
            module = importlib.import_module(f"command_line.{flags[script]}")
            args = module.parse_arguments(words)
            assert args.seed == 0
    assert {s.words[0] for s in seen} == {*flags, "fuse.py"}


def test_the_table_has_a_row_for_each_rate():
    def run(rate, last):
        rows = [
            {"step": s, report.HELD_OUT: v, "eval/sampled/response_tokens": 20.0}
            for s, v in ((0, 0.2), (24, last))
        ]
        curve = [{"step": 24, "env/reward_mean": last, "objective/kl": 3.0}]
        return {"rate": rate, "evaluations": rows, "curve": curve, "summary": {}, "samples": []}

    time = {"seconds": 10.0, "cpu_seconds": 9.0, "peak_gb": 2.0}
    seeds = {
        n: {
            "stages": {"ppo": time},
            "runs": {"ppo": run(1e-4, 0.6 + 0.1 * n), "ppo_0.001": run(1e-3, 0.9)},
        }
        for n in (0, 1)
    }
    text = report.table(seeds)
    assert "| VADER | 0.0001 | 2 | 0.20 | 0.65 | 0.60 | 3.0 | 20.0 |" in text
    assert "| VADER | 0.001 | 2 | 0.20 | 0.90 | 0.90 | 3.0 | 20.0 |" in text
    assert "| ppo | 2 | 10 | 9 | 2.00 |" in text
