"""Rows as scripts read them: --chosen, the kind of rows before a bad one, scores and chats."""

import json

import pytest
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer

import sft
from chat.conversation import Conversation, Prompting
from command_line.sft_flags import parse_arguments
from command_line.sft_rows import load_rows
from data_loading.formats import to_record
from data_utils import Records
from errors import UserError
from rewards.best_of import best_of, best_rows
from rewards.scored_rows import make_pairs, scored_rows

ASK = {"role": "user", "content": "Weather?"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "12"}
SAID = {"role": "assistant", "content": "12 degrees", "reasoning_content": "It says 12."}
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TEMPLATE = (
    "{% if tools %}TOOLS {{ tools[0].function.name }}\n{% endif %}{% for m in messages %}"
    "<|im_start|>{{ m['role'] }}\n{{ m.reasoning_content }}{% if m.tool_calls %}CALL "
    "{{ m.tool_calls[0].function.name }} {{ m.tool_calls[0].function.arguments | tojson }}"
    "{% endif %}{{ m['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HH = {"chosen": "\n\nHuman: hi\n\nAssistant: hello", "rejected": "\n\nHuman: hi\n\nAssistant: go"}
BAD = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: d"}


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def with_tools():
    made = tiny_tokenizer(bos=False, template="chatml", wrapped=True)
    made._tokenizer.chat_template = TEMPLATE
    return made


@pytest.mark.parametrize(
    "row",
    [
        HH,
        {"prompt": "hi", "chosen": "hello", "rejected": ["go", "no"]},
        {"instruction": "hi", "responses": ["go", "hello"], "scores": [0, 1]},
    ],
)
def test_chosen_trains_the_best_answers(tmp_path, row):
    tokenizer = tiny_tokenizer(template="chatml", wrapped=True)
    words = ["--train", "--train-file", write(tmp_path, row, row), "--mask-prompt", "--chosen"]
    rows = load_rows(parse_arguments(words), tokenizer)["train"]
    trained = [t for t, bit in zip(rows[0].tokens, rows[0].mask, strict=True) if bit]
    assert len(rows) == 2 and tokenizer.decode(trained) == "hello<|im_end|>\n</s>"


@pytest.mark.parametrize(
    "row", [BAD, {"prompt": "a", "chosen": "b"}, {"prompt": "a", "rejected": 3}]
)
def test_the_kind_of_rows_is_refused_before_a_bad_one_is_read(tmp_path, row):
    args = parse_arguments(["--train", "--train-file", write(tmp_path, row, HH)])
    says = "rows.jsonl:1: a row of kind preference is not for .*--chosen trains their best answers"
    with pytest.raises(UserError, match=says):
        load_rows(args, tiny_tokenizer(template="chatml"))


def test_chosen_is_refused_where_it_would_do_nothing(tmp_path, capsys):
    model = str(tiny_model_folder(tmp_path / "model", template="chatml"))
    rows = write(tmp_path, {"prompt": "a", "completion": "b"})
    with pytest.raises(UserError, match="--chosen has no effect without preference rows"):
        sft.main(["--model", model, "--preview", "--train-file", rows, "--chosen"])
    with pytest.raises(SystemExit):
        parse_arguments(["--train", "--train-file", rows, "--chosen", "--reward-model"])
    assert "--chosen has no effect with --reward-model" in capsys.readouterr().err


# Scores and chats ------------------------------------------------------------------------------


def test_scored_rows_say_all_that_they_said(tmp_path):
    row = {
        "messages": [ASK, CALLED, RESULT],
        "tools": TOOLS,
        "system": "be brief",
        "id": 7,
        "chosen": [SAID],
        "rejected": [{"role": "assistant", "content": "no"}],
    }
    records = Records([to_record(row, "preference", "f:1")], name="f")
    options = {"skip_bad_rows": False, "max_length": 500}
    pairs, _ = make_pairs(records, with_tools(), options)
    assert all("TOOLS weather" in pair.prompt_text for pair in pairs)
    assert all('CALL weather {"city": "Rome"}' in pair.prompt_text for pair in pairs)
    for made in (scored_rows(pairs), best_rows(best_of(pairs))):
        again = Records([to_record(made[0], "prompt_completion", "g:1")], name="g")
        record = again[0]
        assert record.extras == {"tools": TOOLS} and record.prompt[0]["content"] == "be brief"
        assert record.prompt[2]["tool_calls"] == [CALL] and "system" not in made[0]
        assert record.completion == [SAID]
        pair = make_pairs(again, with_tools(), options)[0][0]
        assert pair.tokens == pairs[0].tokens
    assert scored_rows(pairs)[0]["id"] == 7


@pytest.mark.parametrize("turns", [[ASK, CALLED, RESULT, SAID], [ASK, SAID]])
def test_a_loaded_conversation_goes_on_with_tools_and_thoughts(tmp_path, turns):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": turns, "tools": TOOLS, "system": "be brief"}))
    talk = Conversation.load(path)
    assert talk.extras == {"tools": TOOLS} and talk.system == "be brief"
    tokens, text = Prompting(with_tools()).tokens(talk.messages("and now?"), talk.extras)
    assert text.startswith("TOOLS weather\n<|im_start|>system\nbe brief")
    assert "It says 12.12 degrees<|im_end|>" in text
    assert (CALLED in turns) == ('CALL weather {"city": "Rome"}' in text)
    talk.save(tmp_path / "again.json")
    assert Conversation.load(tmp_path / "again.json") == talk
    assert talk.undo().prompt == "Weather?" and not talk.exchanges


@pytest.mark.parametrize("turns", [[ASK, CALLED, RESULT], [SAID], [ASK, ASK, SAID]])
def test_a_conversation_that_does_not_take_turns_is_refused(tmp_path, turns):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": turns}))
    with pytest.raises(UserError, match="must take turns"):
        Conversation.load(path)
