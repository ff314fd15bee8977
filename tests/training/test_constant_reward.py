"""A reward that tells no response from another is said, once."""

import pytest

import group_training
import ppo_training
import rest
import score

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


OTHERS = {
    group_training: SMALL.replace("--ppo-epochs 1", "--num-generations 2 --num-steps 3"),
    rest: "--reward-function own.py:mine --max-rows 4 --samples-per-prompt 2 --iters 1 "
    "--batch-size 4 --max-new-tokens 2 --grow-steps 1 --quantiles 0 .5 "
    "--eval-prompts 1 --eval-samples 1 --output-dir run --save-file out.npz --lora-rank 1",
    score: "--reward-function own.py:mine",
}


@pytest.mark.parametrize("script", OTHERS, ids=lambda script: script.__name__)
@pytest.mark.parametrize("body, said", [("[7] * len(responses)", 1), ("range(len(responses))", 0)])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_other_scripts_say_it_too(tmp_path, monkeypatch, capsys, script, body, said):
    data = str(ppo_training.__file__).rpartition("/")[0] + "/data"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(f"def mine(prompts, responses):\n    return list({body})\n")
    rows = f"--input {data}/preference_increasing_mult_2_test.jsonl" if script is score else ""
    script.main([*OTHERS[script].split(), *(rows or f"--data {data}").split()])
    told = capsys.readouterr()
    assert (told.out + told.err).count(" has the score 7, so ") == said
