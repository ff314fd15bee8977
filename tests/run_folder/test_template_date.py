"""A chat template that reads the date: a run that is resumed the day after sees the first day."""

import datetime
import json

import mlx.core as mx
import pytest
from tiny import tiny_model_folder
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

import ppo_training
import sft
from errors import UserError
from models.load import load_model

TODAY = "<|system|>\nToday is {{ strftime_now('%d %b %Y') }}<|end|>\n"
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
NEXT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]


def make_model(folder, template):
    tiny_model_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", template
    tiny_model_folder(folder, vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    tokenizer.save_pretrained(folder)


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "today", TODAY + TURNS + NEXT)
    rows = [{"prompt": f"q{i}", "completion": f"a{i}"} for i in range(8)]
    pairs = [{"prompt": f"q{i}", "chosen": f"a{i}", "rejected": f"no {i}"} for i in range(8)]
    for name, found in (("rows", rows), ("pairs", pairs)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in found))
    (tmp_path / "mine.py").write_text(
        "def length(prompts, responses):\n    return [float(len(r)) for r in responses]\n"
    )
    return "today"


def days_later(monkeypatch, days):
    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime.now(tz) + datetime.timedelta(days=days)

    monkeypatch.setattr(chat_template_utils, "datetime", Day)


SMALL = ["--lora-rank", "2", "--save-every", "1"]
SFT = [*SMALL, "--train", "--batch-size", "2", "--train-file"]
SCRIPTS = {
    "sft": (sft, [*SFT, "rows.jsonl"], "--iters"),
    "reward model": (sft, [*SFT, "pairs.jsonl", "--reward-model"], "--iters"),
    "ppo": (
        ppo_training,
        [
            *SMALL,
            "--train-file",
            "rows.jsonl",
            "--reward-function",
            "mine.py:length",
            "--batch-size",
            "2",
            "--max-new-tokens",
            "4",
            "--eval-every",
            "0",
            "--lr-schedule",
            "constant",
        ],
        "--num-steps",
    ),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_resume_the_day_after_is_the_run_that_was_never_stopped(model, monkeypatch, name):
    script, words, length = SCRIPTS[name]
    words = ["--model", model, *words]
    script.main([*words, length, "4", "--output-dir", "whole", "--save-file", "whole.npz"])
    script.main([*words, length, "2", "--output-dir", "part", "--save-file", "part.npz"])
    days_later(monkeypatch, 1)
    script.main(["--resume", "part", length, "4"])
    whole, part = mx.load("whole.npz"), mx.load("part.npz")
    assert all(mx.array_equal(whole[key], part[key]) for key in whole if "lora" in key)
    options = json.loads(open("part/config.json").read())["options"]
    assert options["template_date"][:10] == datetime.date.today().isoformat()


def test_the_date_can_be_given_and_is_what_the_model_reads(model, monkeypatch, capsys):
    days_later(monkeypatch, 3)
    sft.main(["--model", model, *SFT, "rows.jsonl", "--preview", "--template-date", "2001-02-03"])
    assert "Today is 03 Feb 2001" in capsys.readouterr().out


FORMS = {
    # As Llama 3.1: only where no date_string was given.
    "set": "{% if strftime_now is defined %}{% set date_string = strftime_now('%d %b %Y') %}"
    "{% else %}{% set date_string = '26 Jul 2024' %}{% endif %}Today is {{ date_string }}. ",
    # As gpt-oss: in a macro.
    "macro": "{% macro now() %}{{ strftime_now('%d %b %Y') }}{% endmacro %}Today is {{ now() }}. ",
    "weekday": "{{ strftime_now('%A, ') }}Today is {{ strftime_now('%d %b %Y') }}. ",
}


@pytest.mark.parametrize("form", FORMS)
def test_every_way_of_asking_for_the_date_gets_the_recorded_one(form, model, tmp_path, monkeypatch):
    make_model(tmp_path / form, FORMS[form] + TURNS + NEXT)
    words = ["--model", form, *SFT, "rows.jsonl"]
    sft.main([*words, "--iters", "4", "--output-dir", "whole", "--save-file", "whole.npz"])
    sft.main([*words, "--iters", "2", "--output-dir", "part", "--save-file", "part.npz"])
    days_later(monkeypatch, 2)
    sft.main(["--resume", "part", "--iters", "4"])
    whole, part = mx.load("whole.npz"), mx.load("part.npz")
    assert all(mx.array_equal(whole[key], part[key]) for key in whole if "lora" in key)


def test_a_date_that_nothing_reads_or_that_is_none_is_refused(model, tmp_path):
    make_model(tmp_path / "timeless", TURNS + NEXT)
    with pytest.raises(UserError, match="no effect"):
        sft.main(["--model", "timeless", *SFT, "rows.jsonl", "--template-date", "2001-02-03"])
    with pytest.raises(SystemExit):
        sft.main(["--model", model, *SFT, "rows.jsonl", "--template-date", "tomorrow"])


def test_a_tokenizer_is_given_one_date_at_a_time(model):
    from data_utils import use_date

    tokenizer = load_model(model).tokenizer
    for date in ("2001-02-03", "2002-03-04"):
        use_date(tokenizer, date)
    turns = [{"role": "user", "content": "a"}]
    assert "04 Mar 2002" in tokenizer.apply_chat_template(turns, tokenize=False)
