"""Two keys of one meaning, answers beside messages, contents in parts, a third speaker."""

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
HI = {"role": "user", "content": "hi"}
HELLO = {"role": "assistant", "content": "hello"}
TALK = [HI, HELLO]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}


def records_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(path)


def trained(row, tokenizer=CHATML):
    kept = [token for token, bit in zip(row.tokens, row.mask, strict=True) if bit]
    return tokenizer.decode(kept)


# ------------------------------------------------------------------------------ one meaning

# (a row, the two keys that say different things in it)
DIFFERENT = [
    ({"text": "hello", "reward": 1, "meta_eval_score": 2}, "reward and meta_eval_score"),
    ({"prompt": "a", "completion": "b", "system": "x", "system_prompt": "y"}, "system_prompt and"),
    ({"messages": [{**HI, "value": "ho"}, HELLO]}, r"messages\[0\]: content and value"),
    ({"messages": [HI, {**HELLO, "from": "human"}]}, r"messages\[1\]: role and from"),
    ({"messages": [HI, {**HELLO, "weight": 1, "train": False}]}, "weight and train"),
    ({"messages": [HI, {**HELLO, "loss": 0, "training": True}]}, "training and loss"),
    (
        {
            "messages": [
                HI,
                {
                    "role": "assistant",
                    "tool_calls": [{"type": "function", "function": CALL}],
                    "function_call": {**CALL, "name": "other"},
                },
            ]
        },
        "tool_calls and function_call",
    ),
    (
        {
            "messages": TALK,
            "tools": [{"name": "a"}],
            "chat_template_kwargs": {"tools": [{"name": "b"}]},
        },
        "tools and chat_template_kwargs",
    ),
    (
        {"prompt": [{**HI, "value": "ho"}], "chosen": "a", "rejected": "b"},
        r"prompt\[0\]: content and value",
    ),
]


@pytest.mark.parametrize(("row", "names"), DIFFERENT, ids=lambda x: str(x)[-30:])
def test_keys_of_one_meaning_that_say_different_things_are_refused(tmp_path, row, names):
    with pytest.raises(UserError, match=rf"rows.jsonl:1: .*{names}.*say different things"):
        records_of(tmp_path, row)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "hello", "reward": 1, "meta_eval_score": "1.0"},
        {"prompt": "a", "completion": "b", "system": "x", "system_prompt": "x"},
        {"messages": [{**HI, "value": "hi", "from": "human"}, {**HELLO, "from": "gpt"}]},
        {"messages": [HI, {**HELLO, "weight": 1, "train": True}]},
        {"messages": TALK, "conversations": TALK},
        {"messages": TALK, "response": "hello", "question": "hi"},
        {"prompt": "a", "question": "a", "completion": "b", "response": "b"},
        {"messages": [HI], "answer": "b", "output": "b"},
        {
            "messages": TALK,
            "tools": [{"name": "a"}],
            "chat_template_kwargs": {"tools": [{"name": "a"}]},
        },
    ],
    ids=lambda row: " ".join(row)[:40],
)
def test_keys_of_one_meaning_that_agree_count_as_read(tmp_path, row):
    records = records_of(tmp_path, row)
    assert not tokenise_scalar([replace_reward(r) for r in records], CHATML).unused


def replace_reward(record):
    record.reward = 1.0
    return record


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"prompt": "a", "question": "other", "completion": "b"}, "question"),
        ({"messages": TALK, "conversations": [HI, {**HELLO, "content": "no"}]}, "conversations"),
        ({"messages": [HI], "answer": "b", "output": "c"}, "output"),
        ({"instruction": "a", "response": "b", "output": "c"}, "output"),
    ],
)
def test_fields_of_one_meaning_that_differ_are_named(tmp_path, row, left):
    records = records_of(tmp_path, row)
    done = tokenise_sft(records, CHATML)
    assert f"fields that nothing used: {left}" in data_report("train", records, done)


# ------------------------------------------------------------------------------ answers


@pytest.mark.parametrize("name", ["completion", "response", "answer", "output"])
def test_an_answer_beside_messages_that_ask_is_trained(tmp_path, name):
    records = records_of(tmp_path, {"messages": [HI], name: "hello", "reward": 1})
    done = tokenise_sft(records, CHATML, mask_prompt=True)
    assert trained(done[0]) == "hello<|im_end|>\n</s>" and not {name} & {*done.unused}
    assert CHATML.decode(tokenise_scalar(records, CHATML)[0].tokens).count("hello") == 1
    assert CHATML.decode(tokenise_prompts(records, CHATML)[0].tokens).endswith("assistant\n")


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TALK, "label": True},
        {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
        {"messages": [*TALK, HI, HELLO], "label": "false"},
        {"messages": [HI], "answer": "hello", "label": 1},
        {"question": "hi", "response": "hello", "label": 0},
        {"instruction": "hi", "output": "hello", "label": True},
        {"messages": [{"role": "system", "content": "be brief"}, *TALK], "label": False},
    ],
    ids=lambda row: " ".join(row),
)
def test_kto_takes_every_row_with_an_answer_and_a_label(tmp_path, row):
    row = {"label": True, **row}
    done = tokenise_unpaired(records_of(tmp_path, row), CHATML)
    assert trained(done[0]) == "hello<|im_end|>\n</s>"  # the last answer alone
    assert done[0].label is (str(row["label"]).lower() in ("true", "1")) and not done.unused
    assert tokenise_scalar(records_of(tmp_path, row), CHATML)[0].reward == float(done[0].label)


def test_what_is_no_label_is_refused_by_kto_alone(tmp_path):
    records = records_of(tmp_path, {"messages": TALK, "label": 3})
    with pytest.raises(UserError, match="rows.jsonl:1: label must be true or false, found 3"):
        tokenise_unpaired(records, CHATML)
    assert tokenise_sft(records, CHATML).unused == {"label": 1}
    with pytest.raises(UserError, match="does not end with an answer to a user turn"):
        tokenise_unpaired(records_of(tmp_path, {"messages": [HELLO, HI], "label": 1}), CHATML)


@pytest.mark.parametrize("answer", [42, ["4"], {}, None, True, {"n": 4}])
def test_what_is_compared_with_answers_stays_a_column(tmp_path, answer):
    records = records_of(tmp_path, {"messages": [HI], "answer": answer})
    prompts = tokenise_prompts(records, CHATML)
    assert CHATML.decode(prompts[0].tokens).count("assistant") == 1
    assert prompts[0].columns["answer"] == answer
    with pytest.raises(UserError, match="no assistant turn to train"):
        tokenise_sft(records, CHATML, mask_prompt=True)


# ------------------------------------------------------------------------------ parts


def part(kind, **more):
    return {"type": kind, **more}


@pytest.mark.parametrize(
    ("content", "text", "thoughts"),
    [
        ([part("text", text="a"), part("text", text="b")], "ab", {}),
        ([part("input_text", text="a"), {"text": "b"}], "ab", {}),
        ([part("thinking", thinking="hm"), part("text", text="a")], "a", {"thinking": "hm"}),
        ([part("thinking", text="hm"), part("text", text="a")], "a", {"thinking": "hm"}),
        (
            [part("reasoning", reasoning="h"), part("reasoning", text="m"), part("text", text="a")],
            "a",
            {"reasoning_content": "hm"},
        ),
        ([part("text", text="a", image=None, index=0)], "a", {}),
    ],
)
def test_parts_of_text_and_thoughts(tmp_path, content, text, thoughts):
    row = {"messages": [HI, {"role": "assistant", "content": content}]}
    assert records_of(tmp_path, row)[0].messages[1] == {
        "role": "assistant",
        "content": text,
        **thoughts,
    }


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        (part("image"), "a part of type 'image'"),
        (part("image", text="a cat"), "a part of type 'image'"),
        (part("image_url", image_url={"url": "x"}), "a part of type 'image_url'"),
        (part("tool_result", content="x"), "a part of type 'tool_result'"),
        ({"text": "a", "image": "x.png"}, "a part of type 'image'"),
        (part("thinking"), "a part of type thinking without text"),
        (part("text"), "only parts with a text"),
        ("a", "a part must be an object"),
    ],
)
def test_other_parts_are_refused_in_one_line(tmp_path, bad, says):
    row = {"messages": [{"role": "user", "content": [part("text", text="see"), bad]}, HELLO]}
    with pytest.raises(UserError, match=rf"rows.jsonl:1: messages\[0\]: {says}") as found:
        records_of(tmp_path, row)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("read", ["reasoning_content", "thinking"])
@pytest.mark.parametrize("written", ["reasoning_content", "thinking", "reasoning", "part"])
def test_thoughts_stand_under_the_key_that_the_template_reads(tmp_path, monkeypatch, read, written):
    template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m." + read + " %}<think>"
        "{{ m." + read + " }}</think>{% endif %}{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if enable_thinking %} {% endif %}"
    )
    name = f"thoughts in {read}"
    monkeypatch.setitem(TEMPLATES, name, template)
    answer = {**HELLO, written: "hm"}
    if written == "part":
        parts = [part("thinking", thinking="hm"), part("text", text="hello")]
        answer = {"role": "assistant", "content": parts}
    tokenizer = tiny_tokenizer(template=name)
    done = tokenise_sft(records_of(tmp_path, {"messages": [HI, answer]}), tokenizer)
    assert "<think>hm</think>hello" in tokenizer.decode(done[0].tokens) and not done.notes


# ------------------------------------------------------------------------------ dialogues


@pytest.mark.parametrize("who", ["System", "User", "Bot", "Human 2"])
@pytest.mark.parametrize("place", ["answer", "question"])
def test_a_third_speaker_in_a_dialogue_is_refused(tmp_path, who, place):
    behind = f"\n\n{who}: go on"
    ask = "\n\nHuman: hi" + behind * (place == "question") + "\n\nAssistant: "
    row = {"chosen": f"{ask}hello" + behind * (place == "answer"), "rejected": f"{ask}no"}
    with pytest.raises(UserError, match=f"rows.jsonl:1: chosen: {who} speaks in a dialogue"):
        records_of(tmp_path, row)


def test_a_system_prompt_before_a_dialogue_is_its_system_message(tmp_path):
    ask = "System: be brief\n\nHuman: hi\n\nAssistant: "
    records = records_of(tmp_path, {"chosen": f"{ask}hello", "rejected": f"{ask}no"})
    [row] = tokenise_preferences(records, CHATML).rows
    assert "system\nbe brief<|im_end|>" in CHATML.decode(row.responses[0])
    [row] = tokenise_prompts(records_of(tmp_path, {"prompt": ask}), CHATML).rows
    assert row.prompt == [{"role": "system", "content": "be brief"}, HI]


def test_words_with_a_colon_are_no_speakers(tmp_path):
    ask = "\n\nHuman: hi\n\nAssistant: "
    row = {"chosen": f"{ask}hello\n\nNote: the System: go on", "rejected": f"{ask}no"}
    assert "Note: the System: go on" in records_of(tmp_path, row)[0].responses[0][0]["content"]
