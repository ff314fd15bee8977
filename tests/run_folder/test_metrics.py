"""Rows of a run folder, secrets in it, and the end of memory."""

import json
import os
import shutil
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from errors import UserError
from run_folder.rows import RowFile
from run_folder.run import Run, read_rows
from run_folder.secrets import REDACTED, redact
from training.endings import check_memory
from training.memory import peak_memory

ROOT = Path(__file__).resolve().parents[2]


# ------------------------------------------------------------------------------ rows


def test_a_row_is_in_the_file_at_once_and_always_json(folder):
    with Run("sft", {}, output_dir=folder) as run:
        numbers = {
            "a": mx.array(1.5),
            "b": np.float32(2.5),
            "c": float("nan"),
            "d": -np.inf,
            "e": 3,
        }
        row = run.log(1, numbers)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
    assert row == {"step": 1, "a": 1.5, "b": 2.5, "c": None, "d": None, "e": 3}
    assert [json.loads(line, parse_constant=pytest.fail) for line in lines] == [row]


def test_samples_hold_any_text(folder):
    texts = ["2 4 6", "naïve 日本", 'quote " and \n newline', "half \ud800 pair", "\u2028"]
    with Run("ppo", {}, output_dir=folder) as run:
        run.log_samples(4, [{"prompt": text, "score": mx.array(0.5)} for text in texts])
    rows = read_rows(folder / "samples.jsonl")
    assert [row["prompt"] for row in rows] == texts
    assert all(row["step"] == 4 and row["score"] == 0.5 for row in rows)


def test_a_torn_last_line_is_left_out_and_a_broken_one_is_named(folder):
    with Run("sft", {}, output_dir=folder) as run:
        run.log(1, {"x": 1})
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "x"')
    assert read_rows(folder) == [{"step": 1, "x": 1}]
    (folder / "metrics.jsonl").write_text('{"step": 1}\n{"step"\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl:2"):
        read_rows(folder)


def test_a_full_disk_is_a_clear_error(tmp_path):
    file = RowFile(tmp_path / "rows.jsonl")
    with open("/dev/full", "ab", buffering=0) as full:
        os.dup2(full.fileno(), file._file.fileno())
    with pytest.raises(UserError, match="rows.jsonl: cannot write: No space left"):
        file.append({"step": 1})


def test_half_a_row_does_not_stay(tmp_path, monkeypatch):
    """What is written next would be glued to it."""
    file = RowFile(tmp_path / "rows.jsonl")
    file.append({"step": 1})
    whole = (tmp_path / "rows.jsonl").read_bytes()

    class Torn:
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def write(self, data):
            if len(data) < 8:
                raise OSError(28, "No space left on device")
            return self.inner.write(data[:8])

    inner = file._file
    monkeypatch.setattr(file, "_file", Torn(inner))
    with pytest.raises(UserError, match="No space left"):
        file.append({"step": 2})
    monkeypatch.setattr(file, "_file", inner)
    assert (tmp_path / "rows.jsonl").read_bytes() == whole
    file.append({"step": 3})
    assert read_rows(tmp_path / "rows.jsonl") == [{"step": 1}, {"step": 3}]


def test_a_folder_that_vanishes_is_a_clear_error(folder):
    with Run("sft", {}, output_dir=folder) as run:
        shutil.rmtree(folder)
        with pytest.raises(UserError, match="metrics.jsonl: was deleted"):
            run.log(1, {"x": 1})


def test_resume_cuts_the_files_back_to_the_checkpoint(folder, capsys):
    with Run("sft", {"iters": 9}, output_dir=folder) as run:
        run.log(1, {"x": 1})
        run.log_samples(1, [{"prompt": "a"}])
        state = json.loads(json.dumps(run.state_dict()))
        run.log(2, {"x": 2})
        run.log_samples(2, [{"prompt": "b"}])
        run.log_bad_rows(2, "loss is NaN", [{"prompt": "b", "score": float("nan")}])
        bad = {"step": 2, "reason": "loss is NaN", "prompt": "b", "score": None}
        assert read_rows(folder / "bad_rows.jsonl") == [bad]
    created = json.loads((folder / "config.json").read_text())["created"]
    with Run("sft", {"iters": 12}, output_dir=folder, resume=True) as run:
        run.load_state_dict(state)
        run.log(2, {"x": 3})
    assert read_rows(folder) == [{"step": 1, "x": 1}, {"step": 2, "x": 3}]
    assert [row["prompt"] for row in read_rows(folder / "samples.jsonl")] == ["a"]
    assert read_rows(folder / "bad_rows.jsonl") == []
    config = json.loads((folder / "config.json").read_text())
    assert config["options"]["iters"] == 12 and config["created"] == created
    with pytest.raises(UserError, match="is a run of sft, and reward_model cannot go on"):
        Run("reward_model", {}, output_dir=folder, resume=True)
    # Killed before its first checkpoint: everything is made again.
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.load_state_dict({})
    assert read_rows(folder) == [] == read_rows(folder / "samples.jsonl")
    assert capsys.readouterr().err == ""
    with Run("sft", {}, output_dir=folder, resume=True) as run:
        run.load_state_dict(state)
    assert "metrics.jsonl" in capsys.readouterr().err
    assert (folder / "metrics.jsonl").read_bytes() == b""


# ------------------------------------------------------------------------------ secrets


def test_secrets_are_redacted_by_name_by_value_and_in_urls(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghij")
    monkeypatch.setenv("SHORT_KEY", "digits")
    options = {
        "hub_token": "anything",
        "note": "my hf_abcdefghij here",
        "url": "http://me:pw@host/x",
        "nested": [{"api_key": "k"}],
        "stop_token": "<end>",
        "num_prompt_tokens": 10,
        "model": "data/digits_model",
    }
    clean = redact(options)
    text = json.dumps(clean)
    for secret in ("anything", "hf_abcdefghij", "me:pw", '"k"'):
        assert secret not in text
    assert clean["note"] == f"my {REDACTED} here" and clean["url"] == f"http://{REDACTED}@host/x"
    kept = ("stop_token", "num_prompt_tokens", "model")
    assert all(clean[name] == options[name] for name in kept)


# ------------------------------------------------------------------------------ memory


def test_a_memory_limit_ends_in_advice():
    held = mx.zeros(1_000_000)
    mx.eval(held)
    assert peak_memory() >= 0.004
    check_memory(None, peak_memory())
    check_memory(1000.0, peak_memory())
    with pytest.raises(UserError, match="--memory-limit.*0.001 allowed.*--batch-size"):
        check_memory(0.001, peak_memory())
