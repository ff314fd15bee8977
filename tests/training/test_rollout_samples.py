"""samples.jsonl and reward functions have prompts as they were written, not as a model has them."""

import json

import pytest
from tiny import tiny_model_folder

import group_training
import ppo_training

HI = {"role": "user", "content": "hello"}
TURNS = [HI, {"role": "assistant", "content": "the world"}, {"role": "user", "content": "what"}]
SYSTEM = {"role": "system", "content": "be brief"}
HH = "\n\nHuman: what is\n\nAssistant:"
# rows -> their prompts as a reward function and a reader of samples get them
ROWS = {
    "text": ({"prompt": "what is"}, "what is"),
    "question": ({"question": "what is", "context": "the answer"}, "what is\n\nthe answer"),
    "messages": ({"prompt": [HI]}, [HI]),
    "turns": ({"messages": TURNS}, TURNS),
    "answered": ({"messages": [*TURNS, {"role": "assistant", "content": "no"}]}, TURNS),
    "system": ({"prompt": "what is", "system": "be brief"}, [SYSTEM, {**HI, "content": "what is"}]),
    "hh-rlhf": ({"prompt": HH}, "what is"),
    "preference": ({"prompt": "what is", "chosen": "a", "rejected": "b"}, "what is"),
}
SOME = ("text", "turns")
REWARD = """import json
def seen(prompts, responses, prompt_text, **columns):
    with open("seen.jsonl", "a") as file:
        for prompt, text in zip(prompts, prompt_text):
            file.write(json.dumps([prompt, text]) + "\\n")
    return [float(len(r)) for r in responses]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return {
        name: str(tiny_model_folder(tmp_path_factory.mktemp("model"), template=name))
        for name in ("chatml", "llama3")
    }


@pytest.mark.parametrize(
    ("script", "name", "template"),
    [
        *((ppo_training, name, "chatml") for name in ROWS),
        *((script, name, "llama3") for script in (ppo_training, group_training) for name in SOME),
    ],
)
def test_prompts_are_as_they_were_written(script, name, template, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row, written = ROWS[name]
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 4)
    (tmp_path / "mine.py").write_text(REWARD)
    words = (
        f"--model {model[template]} --train-file rows.jsonl --reward-function mine.py:seen "
        "--batch-size 2 --num-steps 1 --max-new-tokens 2 --save-every 0 --output-dir run "
        "--lora-rank 2 --validation-file rows.jsonl --eval-every 1"
    )
    words += " --mini-batch-size 2" if script is ppo_training else " --num-generations 2"
    script.main(words.split())
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    samples = [
        json.loads(line) for line in (tmp_path / "run/samples.jsonl").read_text().splitlines()
    ]
    assert len(seen) >= 4 and len(samples) >= 4  # of training and of evaluations
    start = {"chatml": "<|im_start|>", "llama3": "<s>["}[template]
    for prompt, text in [*seen, *((s["prompt"], s["prompt_text"]) for s in samples)]:
        assert prompt == written
        assert text.startswith(start) and text != written
