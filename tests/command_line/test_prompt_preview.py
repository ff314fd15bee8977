"""--preview of the scripts on rollouts: prompts, columns and lengths; nothing is trained."""

import json

import pytest

import group_training
import ppo_training
from models.load import load_model


@pytest.mark.parametrize("script", [ppo_training, group_training])
def test_three_prompts_are_shown_and_no_run_is_made(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"{n} {n + 2}", "level": n} for n in range(2, 12, 2)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "own.py").write_text("def mine(prompts, responses, level):\n    raise OSError\n")
    words = "--train-file rows.jsonl --reward-function own.py:mine --eval-every 0 --preview"
    assert script.main([*words.split(), "--max-new-tokens", "7", "--batch-size", "16"]) == 0
    out = capsys.readouterr().out
    assert out.count("prompt of") == 3 and "rows.jsonl:4" not in out
    tokenizer = load_model().tokenizer
    for row in rows[:3]:
        tokens = tokenizer.encode(row["prompt"])
        assert "  ".join(f"{t} {tokenizer.decode([t])!r}" for t in tokens) in out
        assert f"level: {row['level']}" in out and f'rewards get: prompt "{row["prompt"]}"' in out
    longest = max(len(tokenizer.encode(row["prompt"])) for row in rows)
    assert f"{longest + 7} tokens a row, {16 * (longest + 7)} in a gradient of 16 rows" in out
    assert "rewards: 1 x mine; beside prompt and response" in out and "ended" in out
    assert not (tmp_path / "runs").exists()
