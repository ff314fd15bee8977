"""Every field that is part of a prompt reaches it, in every format; what nothing used is named."""

import json

import pytest
from tiny_tokenizers import TEMPLATES, tiny_tokenizer

from data_utils import (
    data_report,
    read_records,
    tokenise_preferences,
    tokenise_prompts,
    tokenise_scalar,
    tokenise_sft,
    tokenise_unpaired,
)
from errors import UserError

CHATML = tiny_tokenizer(template="chatml")
PAIR = {"chosen": "bonjour", "rejected": "hola"}
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
DIALOGUES = {
    "chosen": [HI, {"role": "assistant", "content": "bonjour"}],
    "rejected": [HI, {"role": "assistant", "content": "hi"}],
}
HEAD = "How many heads?"
TABLE = "CREATE TABLE head (age INTEGER)"
EARLIER = [["who", "me"], ["where", "here"]]


def records_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(path)


def texts(records):
    """Every text that a script makes of a row: training, reward model, prompts, answers apart."""
    made = []
    record = records[0]
    if record.kind == "preference":
        rows = tokenise_preferences(records, CHATML).rows[0]
        made += [CHATML.decode(tokens) for tokens in rows.responses]
        chosen = tokenise_sft(records, CHATML, chosen=True).rows[0]
        made.append(CHATML.decode(chosen.tokens))
    elif record.kind != "prompt":
        if record.kind == "unpaired":
            made.append(CHATML.decode(tokenise_unpaired(records, CHATML)[0].tokens))
        else:
            made.append(CHATML.decode(tokenise_sft(records, CHATML)[0].tokens))
        record.reward = 1.0
        made.append(CHATML.decode(tokenise_scalar(records, CHATML)[0].tokens))
    return [*made, CHATML.decode(tokenise_prompts(records, CHATML)[0].tokens)]


# (the row, what stands in its prompt in this order)
ROWS = [
    ({"question": HEAD, "context": TABLE, "answer": "SELECT"}, [HEAD, TABLE]),
    ({"question": HEAD, "input": TABLE, "response": "SELECT"}, [HEAD, TABLE]),
    (
        {"query": HEAD, "context": [TABLE, "a second passage"], "response": "x"},
        [HEAD, TABLE, "a second passage"],
    ),
    ({"input": HEAD, "output": "SELECT"}, [HEAD]),
    ({"prompt": HEAD, "context": TABLE, "completion": "SELECT"}, [HEAD, TABLE]),
    ({"prompt": HEAD, "context": TABLE, "completion": "x", "label": True}, [HEAD, TABLE]),
    ({"prompt": HEAD, "history": EARLIER, "response": "x"}, ["who", "me", "where", "here", HEAD]),
    ({"instruction": HEAD, "history": [HI, HELLO], "output": "x"}, ["hi", "hello", HEAD]),
    (
        {"question": HEAD, "history": EARLIER, "answer": "x", "system": "be brief"},
        ["be brief", "who", "me", HEAD],
    ),
    ({"prompt": HEAD, "context": TABLE, "answer": "42"}, [HEAD, TABLE]),
    ({"instruction": HEAD, "input": TABLE}, [HEAD, TABLE]),
    ({"query": HEAD, "system_prompt": "be brief"}, ["be brief", HEAD]),
    ({"prompt": [HI], "context": TABLE, "answer": "x"}, ["hi", TABLE]),
    (
        {"instruction": "Translate.", "input": "good morning", **PAIR},
        ["Translate.", "good morning"],
    ),
    ({"query": "good morning", **PAIR}, ["good morning"]),
    ({"input": "good morning", **PAIR}, ["good morning"]),
    ({"messages": [HI], **PAIR}, ["hi"]),
    ({"messages": [HI], "system": "be brief", "context": TABLE, **PAIR}, ["be brief", "hi", TABLE]),
    ({"prompt": "now", "history": EARLIER, **PAIR}, ["who", "here", "now"]),
    ({"context": "good morning", **PAIR}, ["good morning"]),
    ({"query": "now", "context": TABLE, "responses": ["a", "b"]}, ["now", TABLE]),
    ({"system": "Answer in French.", **DIALOGUES}, ["Answer in French.", "hi"]),
    ({"system": "Answer.", "context": TABLE, **DIALOGUES}, ["Answer.", "hi", TABLE]),
    (
        {
            "system": "Answer.",
            "chosen": "\n\nHuman: hi\n\nAssistant: a",
            "rejected": "\n\nHuman: hi\n\nAssistant: b",
        },
        ["Answer.", "hi"],
    ),
    ({"messages": [HI, HELLO], "system": "be brief"}, ["be brief", "hi"]),
    ({"messages": [HI, HELLO], "context": TABLE, "history": EARLIER}, ["who", "here", "hi", TABLE]),
    ({"messages": [HI], "response": "hello"}, ["hi"]),
]


@pytest.mark.parametrize(("row", "parts"), ROWS, ids=lambda x: " ".join(x)[:50])
def test_every_part_of_a_prompt_reaches_it_everywhere(tmp_path, row, parts):
    records = records_of(tmp_path, row)
    found = texts(records)
    assert len(found) == {"preference": 4, "prompt": 1}.get(records[0].kind, 3)
    for text in found:
        at = 0
        for part in parts:
            at = text.index(part, at) + len(part)
        assert all(text.count(part) == 1 for part in parts if " " in part)
    rows = tokenise_prompts(records, CHATML)
    assert set(rows.unused) <= {"answer"}


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        (
            {"instruction": "Translate into French.", "input": "in", "output": "dans"},
            "Translate into French.\n\nin",
        ),
        (
            {"instruction": "Noun or verb?", "input": "verb", "output": "noun"},
            "Noun or verb?\n\nverb",
        ),
        (
            {"prompt": [{"role": "user", "content": "Is 12 odd?"}], "input": "1", **PAIR},
            "Is 12 odd?\n\n1",
        ),
        ({"question": "Spell it: verb", "context": "verb", "answer": "x"}, "Spell it: verb"),
        (
            {"question": "Spell it\nverb\nnow", "context": "verb", "answer": "x"},
            "Spell it\nverb\nnow",
        ),
        (
            {"question": f"In {TABLE}; how many?", "context": TABLE, "answer": "x"},
            f"In {TABLE}; how many?",
        ),
    ],
)
def test_words_that_a_prompt_only_mentions_are_still_its_input(tmp_path, row, prompt):
    for text in texts(records_of(tmp_path, row)):
        assert f"<|im_start|>user\n{prompt}<|im_end|>" in text


def test_a_context_that_only_the_answer_repeats_reaches_the_prompt(tmp_path):
    row = {"messages": [HI, {"role": "assistant", "content": "Paris"}], "context": "Paris"}
    for text in texts(records_of(tmp_path, row)):
        assert "user\nhi\n\nParis<|im_end|>" in text


@pytest.mark.parametrize("rest", [{"messages": [HI, HELLO]}, {"prompt": [HI], **PAIR}])
def test_a_history_that_is_a_text_stands_before_messages_too(tmp_path, rest):
    for text in texts(records_of(tmp_path, {"history": "You: who\nMe: me", **rest})):
        assert "user\nYou: who\nMe: me\n\nhi<|im_end|>" in text


def test_a_history_that_stands_behind_the_system_message_is_there_once(tmp_path):
    system = {"role": "system", "content": "be brief"}
    row = {"messages": [system, HI, HELLO, HI, HELLO], "history": [["hi", "hello"]]}
    for text in texts(records_of(tmp_path, row)):
        assert text.count("user\nhi<|im_end|>") == 2 and text.count("system\n") == 1
    row = {"prompt": [system, HI], "history": [system, HI, HELLO], "answer": "x"}
    [text] = texts(records_of(tmp_path, row))
    assert text.count("be brief") == 1


def test_an_empty_system_message_with_tools_reaches_the_template(tmp_path, monkeypatch):
    monkeypatch.setitem(
        TEMPLATES,
        "tools of a turn",
        "{% for m in messages %}{{ m.role }} {{ m.tools | default('') }} {{ m.content }}\n"
        "{% endfor %}",
    )
    tools = tiny_tokenizer(template="tools of a turn")
    system = {"role": "system", "content": "", "tools": [{"name": "weather"}]}
    records = records_of(tmp_path, {"messages": [system, HI, HELLO]})
    assert "weather" in tools.decode(tokenise_sft(records, tools)[0].tokens)
    assert "weather" in tools.decode(tokenise_prompts(records, tools)[0].tokens)


def test_answers_as_messages_behind_a_prompt_template(tmp_path):
    quiet = {"prompt": "a", "completion": [{**HELLO, "weight": 0}]}
    records = records_of(tmp_path, quiet)
    row = tokenise_sft(records, CHATML, prompt_template="Q: {prompt}\n")[0]
    trained = [token for token, on in zip(row.tokens, row.mask, strict=True) if on]
    assert CHATML.decode(trained) == "Q: a\n"  # without --mask-prompt that is trained
    with pytest.raises(UserError, match="no assistant turn to train"):
        tokenise_sft(records, CHATML, prompt_template="Q: {prompt}\n", mask_prompt=True)
    several = {"prompt": "a", "completion": [HELLO, HI, HELLO]}
    with pytest.raises(UserError, match="rows.jsonl:1: an answer of several turns takes no prompt"):
        tokenise_sft(records_of(tmp_path, several), CHATML, prompt_template="Q: {prompt}\n")
    thought = {"prompt": "a", "completion": [{**HELLO, "reasoning_content": "hm"}]}
    done = tokenise_sft(records_of(tmp_path, thought), CHATML, prompt_template="Q: {prompt}\n")
    assert done.notes[0][2] == "reasoning_content"


def test_a_prompt_that_dialogues_hold_already_stands_there_once(tmp_path):
    row = {"prompt": "hi", "messages": DIALOGUES["chosen"], **DIALOGUES}
    records = records_of(tmp_path, row)
    assert all(text.count("hi<|im_end|>") >= 1 for text in texts(records))
    done = tokenise_preferences(records, CHATML)
    assert not done.unused
    strange = records_of(tmp_path, {"prompt": "something else", **DIALOGUES})
    done = tokenise_preferences(strange, CHATML)
    assert "fields that nothing used: prompt" in data_report("train", strange, done)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"messages": [HI, HELLO], "id": 7, "source": "web", "empty": None}, "id, source"),
        ({"text": "hello world", "reward": "1.0", "context": "x"}, "reward, context"),
        ({"prompt": "a", "completion": "b", "question": "c", "topic": "d"}, "question, topic"),
    ],
)
def test_the_report_names_fields_that_nothing_used(tmp_path, row, names):
    records = records_of(tmp_path, row)
    done = tokenise_sft(records, CHATML)
    assert f"fields that nothing used: {names}" in data_report("train", records, done)
    if "reward" in row:
        scored = tokenise_scalar(records, CHATML)
        assert "nothing used: context" in data_report("train", records, scored)


def test_in_ppo_they_are_named_as_what_reward_functions_get(tmp_path):
    records = records_of(tmp_path, {"prompt": "a", "answer": "42", "system": "be brief"})
    prompts = tokenise_prompts(records, CHATML)
    report = data_report("train prompts", records, prompts)
    assert "fields for reward functions alone: answer" in report
    assert prompts[0].columns["system"] == "be brief"


def test_what_a_prompt_template_leaves_out_is_named(tmp_path):
    records = records_of(tmp_path, {"question": HEAD, "context": TABLE, "answer": "x"})
    done = tokenise_sft(records, CHATML, prompt_template="Q: {question}\n")
    assert "fields that nothing used: context" in data_report("train", records, done)
    whole = tokenise_sft(records, CHATML, prompt_template="Q: {question} {context}\n")
    assert not whole.unused


@pytest.mark.parametrize(
    "row", [PAIR, {"prompt": "", **PAIR}, {"responses": ["a", "b"], "topic": "x"}]
)
def test_a_row_without_a_prompt_is_refused(tmp_path, row):
    records = records_of(tmp_path, row)
    for tokenise in (tokenise_preferences, tokenise_prompts):
        with pytest.raises(UserError, match="rows.jsonl:1: the row has no prompt"):
            tokenise(records, CHATML)
    with pytest.raises(UserError, match="rows.jsonl:1: the row has no prompt"):
        tokenise_sft(records, CHATML, chosen=True)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "a", "context": {"x": 1}, "completion": "b"}, "context must be a string or"),
        ({"prompt": "a", "history": [["only one"]], "completion": "b"}, r"history\[0\] must be a"),
        ({"messages": [{"role": "system", "content": "x"}, HI, HELLO], "system": "y"}, "another"),
        ({"prompt": "a", "system": "x", "system_prompt": "y", "completion": "b"}, "different"),
        ({"messages": [HI, HELLO], **PAIR}, "must end with a user turn"),
        ({"messages": [HELLO], "context": "a"}, "context belongs to a user turn"),
        (
            {
                "prompt": [{"role": "system", "content": "x"}, HI],
                "completion": "b",
                "history": [{"role": "system", "content": "y"}, HI, HELLO],
            },
            "another system message",
        ),
    ],
)
def test_what_cannot_be_part_of_a_prompt_is_refused(tmp_path, row, says):
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{says}"):
        records_of(tmp_path, row)
