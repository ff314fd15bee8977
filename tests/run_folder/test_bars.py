"""In a terminal whatever may take long has a bar, after two seconds; here after none."""

import io
import json

import pytest
from tiny import tiny_model_folder

import fuse
import ppo_training
import score
import sft
import talk_to_model
from command_line.exits import run_main
from run_folder import console


class Terminal(io.StringIO):
    """Takes what is written to a terminal."""

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        raise io.UnsupportedOperation  # so that nobody asks the real one for its width


@pytest.fixture
def bars(tmp_path, monkeypatch, capsys):
    """Run a script whose standard error is a terminal; what was written there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(console, "PATIENCE", 0.0)
    monkeypatch.setenv("COLUMNS", "80")
    tiny_model_folder(tmp_path / "model")
    texts = [{"prompt": "what is", "completion": f"the answer {n}"} for n in range(6)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    pairs = [row | {"chosen": row.pop("completion"), "rejected": "no"} for row in texts]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (tmp_path / "own.py").write_text(
        "def mine(prompts, responses):\n    return [len(r) for r in responses]\n"
    )

    def run(script, words: str) -> str:
        terminal = Terminal()
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
            patch.setattr("sys.stderr", terminal)
            run_main(lambda: script.main(words.split()))
        said = terminal.getvalue()
        assert end.value.code == 0, said + capsys.readouterr().out
        return said

    return run


TRAINED = "--model model --lora-rank 1 --save-every 0 --output-dir run --overwrite "


def test_fine_tuning_fusing_and_the_chat(bars):
    words = (
        "--train --iters 1 --train-file rows.jsonl --validation-file rows.jsonl --save-file a.npz"
    )
    said = bars(sft, TRAINED + words)
    for name in ("loading", "tokenising", "validation"):
        assert f"\r{name} " in said, name
    assert "left" in said and "/s" in said  # with rate and time left
    said = bars(fuse, "--model model --adapter-file a.npz --save-path fused")
    for name in ("loading", "checking", "fusing"):
        assert f"\r{name} " in said, name
    assert "\rloading " in bars(talk_to_model, "hello --model model --max-tokens 2")


def test_a_reward_model_and_scoring(bars):
    words = "--train --iters 1 --reward-model --train-file pairs.jsonl --save-file r.npz "
    said = bars(sft, TRAINED + words + "--validation-file pairs.jsonl")
    assert "\rscoring " in said
    said = bars(
        score,
        "--prompts rows.jsonl --model model --reward-model r.npz --samples 1 --max-new-tokens 2",
    )
    for name in ("loading", "sampling", "scoring"):
        assert f"\r{name} " in said, name


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rollouts(bars):
    words = (
        "--reward-function own.py:mine --num-steps 1 --batch-size 2 --max-new-tokens 2 "
        "--train-file rows.jsonl --validation-file rows.jsonl --save-file p.npz"
    )
    said = bars(ppo_training, TRAINED + words)
    for name in ("loading", "tokenising", "evaluation"):
        assert f"\r{name} " in said, name
    for line in said.replace("\r", "\n").splitlines():
        if "left" in line:  # a bar
            assert len(line) <= 80


def test_elsewhere_short_work_says_nothing(bars, monkeypatch, capsys):
    monkeypatch.setattr(console, "PATIENCE", 2.0)
    with pytest.raises(SystemExit):
        run_main(lambda: score.main("--input rows.jsonl --reward-function own.py:mine".split()))
    assert "loading" not in capsys.readouterr().err
