"""The code on a classifier's card gives our score; so does apply_chat_template."""

import contextlib
import io
import json
import re

import mlx.core as mx
import numpy as np
import pytest
from baseline_setup import torch
from tiny import tiny_model_folder
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import fuse
import sft
from models.load import load_model
from models.model_folders import write_model
from models.reading import Reading, trained_reading
from models.reward_model import RewardModel, load_reward_model, save_reward_head
from publishing.scoring_code import PROMPT, RESPONSE
from rewards.learned import score_texts

pytestmark = pytest.mark.torch
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
NEXT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "chat": TURNS + NEXT,
    "no_break": TURNS.replace("<|end|>\n", "<|end|>") + NEXT,
    "eos_last": TURNS + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}"
    "{% endif %}",
    "plain": None,
}
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]
ANSWERS = ["4", "the answer", "no", "hello world"]


def make_base(folder, template, bos=True):
    tiny_model_folder(folder, bos=bos)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", TEMPLATES[template]
    tiny_model_folder(
        folder, bos=bos, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id
    )
    tokenizer.save_pretrained(folder)
    return folder


def make_classifier(root, base, reading=None, bias=0.0):
    """A random reward model on `base`, exported; (its folder, itself)."""
    loaded = load_model(base, dtype="float32")
    mx.random.seed(5)
    model = RewardModel(loaded.model, pooling="last")
    model.head["bias"] = mx.array([bias])
    model.reading = reading or trained_reading(loaded.tokenizer)
    model.source = loaded
    (root / "ours").mkdir(parents=True)
    write_model(root / "ours", loaded)
    save_reward_head(root / "ours", model)
    fuse.main(
        [
            "--model",
            str(root / "ours"),
            "--format",
            "classifier",
            "--save-path",
            str(root / "theirs"),
        ]
    )
    return root / "theirs", model


def run_card(folder, answer=RESPONSE) -> float:
    """What the transformers code on the card prints, for another response where one is given."""
    card = (folder / "README.md").read_text(encoding="utf-8")
    (code,) = [c for c in re.findall(r"```python\n(.*?)```", card, re.S) if "transformers" in c]
    assert RESPONSE in code and PROMPT in code
    code = code.replace(f'from_pretrained("{folder.name}")', f'from_pretrained("{folder}")')
    code = code.replace(f'"{RESPONSE}"', json.dumps(answer))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "card", "exec"), {})
    return float(out.getvalue())


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_code_on_the_card_gives_our_score(tmp_path, template, bos):
    base = make_base(tmp_path / "base", template, bos)
    folder, model = make_classifier(tmp_path, base, bias=0.5 if template == "chat" else 0.0)
    ours = score_texts(model, [PROMPT] * len(ANSWERS), ANSWERS)
    assert np.std(ours) > 0.01
    again = load_reward_model(folder, dtype="float32")
    assert again.reading == model.reading
    assert np.allclose(score_texts(again, [PROMPT] * len(ANSWERS), ANSWERS), ours, atol=1e-4)
    for answer, score in zip(ANSWERS, ours, strict=True):
        assert run_card(folder, answer) == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize("reading", [Reading(), Reading((13, 7))], ids=["of before", "other"])
def test_the_code_on_the_card_of_another_ending_gives_our_score(tmp_path, reading):
    folder, model = make_classifier(tmp_path, make_base(tmp_path / "base", "chat"), reading)
    assert run_card(folder) == pytest.approx(score_texts(model, [PROMPT], [RESPONSE])[0], abs=1e-4)


@pytest.mark.parametrize("template", [name for name, text in TEMPLATES.items() if text])
def test_through_apply_chat_template_scores_are_ours(tmp_path, monkeypatch, template):
    """A reward model as sft.py trains it, exported, scored as users of transformers do."""
    monkeypatch.chdir(tmp_path)
    base = make_base(tmp_path / "base", template)
    rows = [
        {"prompt": f"what is {i}", "chosen": f"the answer {i}", "rejected": f"no {i}"}
        for i in range(6)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sft.main(
        [
            "--model",
            "base",
            "--reward-model",
            "--train",
            "--iters",
            "8",
            "--train-file",
            "pairs.jsonl",
            "--save-file",
            "rm.npz",
            "--pooling",
            "last",
            "--output-dir",
            "run",
            "--learning-rate",
            "3e-3",
        ]
    )
    fuse.main(
        [
            "--model",
            "base",
            "--adapter-file",
            "rm.npz",
            "--format",
            "classifier",
            "--save-path",
            "theirs",
        ]
    )
    ours = load_reward_model("rm.npz", load_model(base))
    tokenizer = AutoTokenizer.from_pretrained("theirs")
    model = AutoModelForSequenceClassification.from_pretrained("theirs")
    for row in rows[:3]:
        for answer in (row["chosen"], row["rejected"]):
            turns = [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": answer},
            ]
            inputs = tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)
            with torch.no_grad():
                found = model(**inputs).logits[0, 0].item()
            expected = score_texts(ours, [row["prompt"]], [answer])[0]
            constant = getattr(model.config, "reward_offset", 0.0)
            assert found + constant == pytest.approx(expected, abs=1e-4)
