"""A reward that tells no response from another is said, once."""

import pytest

import ppo_training

SMALL = (
    "--reward-function own.py:mine --batch-size 4 --max-new-tokens 4 --ppo-epochs 1 --eval-every 0 "
    "--output-dir run --save-file out.npz --lora-rank 1 --lora-layers 1"
)


@pytest.mark.parametrize(
    "body, steps, said",
    [
        ("[7] * len(responses)", 4, 1),
        ("[7] * len(responses)", 2, 0),
        ("range(len(responses))", 4, 0),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_it_is_said_after_three_steps(tmp_path, monkeypatch, capsys, body, steps, said):
    data = str(ppo_training.__file__).rpartition("/")[0] + "/data"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(f"def mine(prompts, responses):\n    return list({body})\n")
    ppo_training.main([*SMALL.split(), "--data", data, "--num-steps", str(steps)])
    text = "every response of the last 3 steps has the score 7, so there is nothing to learn"
    assert capsys.readouterr().err.count(text) == said
