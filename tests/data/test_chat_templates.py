"""What a row says for its chat template gets there; what the template loses or changes is said."""

import json
import re

import pytest
from tiny_tokenizers import tiny_tokenizer
from transformers import PreTrainedTokenizerFast

from data_loading.chat_templates import marked_source
from data_utils import (
    data_report,
    read_records,
    tokenise_pairs,
    tokenise_preferences,
    tokenise_prompts,
    tokenise_scalar,
    tokenise_sft,
)
from errors import UserError

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
NEXT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
CALLS = "{% if m.tool_calls %}CALL {{ m.tool_calls[0].function | tojson }}{% endif %}"
TOOLS = "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}"
THOUGHTS = "{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
SAY = "{{ m['content'] }}"
TEMPLATES = {
    "plain": TURNS + NEXT,
    # EOS at the end begins with the same characters as the next turn, as in Phi 3.
    "eos_at_the_end": TURNS + NEXT.replace("{% endif %}", "{% else %}{{ eos_token }}{% endif %}"),
    # Another end of the last turn than of those before, as in gpt-oss.
    "return": TURNS.replace(
        "<|end|>\n", "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    )
    + NEXT,
    # The next header in the loop itself, as in Zephyr.
    "in_the_loop": TURNS.replace(
        "{% endfor %}",
        "{% if loop.last and add_generation_prompt %}<|assistant|>\n{% endif %}{% endfor %}",
    ),
    # A look through the messages first, whitespace stripped, a loop over a part of them.
    "two_loops": "{%- for m in messages[::-1] -%}\n  {%- set last = m -%}\n{%- endfor -%}\n"
    "{%- set loop_messages = messages -%}\n{%- for m in loop_messages %}\n"
    "    {{- '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' -}}\n{%- endfor -%}\n" + NEXT,
    "tools": TOOLS + TURNS.replace(SAY, SAY + CALLS) + NEXT,
    "thoughts": TURNS.replace(SAY, THOUGHTS + SAY) + NEXT,
    "drops": TURNS.replace(SAY, "{{ m['content'].split('</think>')[-1] }}")
    + NEXT.replace("<|assistant|>\n", "<|assistant|>\n<think>\n"),
    "documents": "{% for d in documents or [] %}DOC {{ d.text }}\n{% endfor %}" + TURNS + NEXT,
    "parts": TURNS.replace(SAY, "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}")
    + NEXT,
    "marks": TURNS.replace(
        SAY + "<|end|>",
        "{% if m['role'] == 'assistant' %}{% generation %}"
        + SAY
        + "{% endgeneration %}{% else %}"
        + SAY
        + "{% endif %}<|end|>",
    )
    + NEXT,
    "arguments_text": TURNS.replace(
        SAY,
        SAY + "{% if m.tool_calls %}{{ 'CALL ' + m.tool_calls[0].function.arguments }}{% endif %}",
    )
    + NEXT,
}
# A brace of the text before a tag that strips blanks, as in Gemma 4's declarations of tools.
TEMPLATES["braces"] = (
    "{% for t in tools or [] %}{\n  {%- if t %}x{% endif %}{ {{- t.name }}{ {#- no -#} }}\n"
    "{% endfor %}" + TEMPLATES["return"]
)
SPECIAL = "<|user|> <|assistant|> <|system|> <|tool|> <|end|> <|return|> <|endoftext|>".split()


def tokenizer(name):
    plain = tiny_tokenizer(bos=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer, eos_token="<|endoftext|>"
    )
    made.add_special_tokens({"additional_special_tokens": SPECIAL})
    made.chat_template = TEMPLATES[name]
    return made


def ask(text="what"):
    return {"role": "user", "content": text}


def answer(text="the answer", **more):
    return {"role": "assistant", "content": text, **more}


def call(**arguments):
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def records_of(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return read_records(path)


def shown(row, tok):
    """The text of a row with the trained stretches in brackets."""
    text, before = "", 0
    for token, bit in zip(row.tokens, row.mask, strict=True):
        text += "[" * (bit > before) + "]" * (bit < before) + tok.decode([token])
        before = bit
    return text + "]" * before


SEVERAL = [ask("what"), answer("the answer"), ask("hello"), answer("world")]
ONE = "<|user|>\nwhat<|end|>\n<|assistant|>\n[the answer<|end|>\n]<|user|>\nhello<|end|>\n"
TWO = ONE + "<|assistant|>\n[world<|end|>\n<|endoftext|>]"
MASKED = {
    "plain": TWO,
    "eos_at_the_end": TWO,
    "in_the_loop": TWO,
    "two_loops": TWO,
    "parts": TWO,
    "return": TWO.replace("<|end|>\n", "<|end|>").replace("world<|end|>", "world<|return|>"),
    "braces": TWO.replace("<|end|>\n", "<|end|>").replace("world<|end|>", "world<|return|>"),
    "marks": "<|user|>\nwhat<|end|>\n<|assistant|>\n[the answer]<|end|>\n<|user|>\nhello<|end|>\n"
    "<|assistant|>\n[world]<|end|>\n<|endoftext|>",
}


@pytest.mark.parametrize("name", MASKED)
def test_tokens_are_those_of_the_whole_text_and_answers_whole(tmp_path, name):
    tok, records = tokenizer(name), records_of(tmp_path, {"messages": SEVERAL})
    done = tokenise_sft(records, tok, mask_prompt=True)
    assert shown(done[0], tok) == MASKED[name]
    text = MASKED[name].replace("[", "").replace("]", "")
    assert done[0].tokens == tok.encode(text, add_special_tokens=False)
    records[0].reward = 1.0
    scalar = tokenise_scalar(records, tok)[0].tokens
    assert scalar[:-2] == done[0].tokens[: len(scalar) - 2]
    prompt = tokenise_prompts(records, tok)[0].tokens
    assert prompt == done[0].tokens[: len(prompt)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_marked_copy_says_the_same(name):
    tok = tokenizer(name)
    marked = marked_source(TEMPLATES[name])
    for messages in (SEVERAL, SEVERAL[:1], SEVERAL[:3]):
        if name == "parts":
            messages = [{**m, "content": [{"text": m["content"]}]} for m in messages]
        for more in (False, True):
            options = {"tokenize": False, "add_generation_prompt": more}
            plain = tok.apply_chat_template(messages, **options)
            copy = tok.apply_chat_template(messages, chat_template=marked, **options)
            assert copy != plain  # it has marks
            assert re.sub("\ue000[^\ue001]*\ue001", "", copy) == plain


# What belongs to the template ----------------------------------------------------------------

WEATHER = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
TALK = [
    ask("Weather?"),
    answer(None, tool_calls=[call(city="Rome")]),
    {"role": "tool", "content": "12", "tool_call_id": "c1"},
    answer("12 degrees"),
]


@pytest.mark.parametrize("content", [None, "", ..., "Let me see."])
@pytest.mark.parametrize("written", [False, True])
def test_calls_and_tools_reach_the_template_everywhere(tmp_path, content, written):
    tok, talk, tools = tokenizer("tools"), [dict(m) for m in TALK], WEATHER
    talk[1]["content"] = content
    if content is ...:
        del talk[1]["content"]
    if written:  # as in tables and in OpenAI's own answers
        tools = json.dumps(tools)
        function = {"name": "weather", "arguments": json.dumps({"city": "Rome"})}
        talk[1] = {**talk[1], "tool_calls": [{"type": "function", "function": function}]}
    pair = {"prompt": talk[:3], "chosen": talk[3:], "rejected": [answer("no")], "tools": tools}
    rows = {"messages": talk, "tools": tools}, pair, {"prompt": talk[:3], "tools": tools}
    conversation, preference, prompt = (records_of(tmp_path, row) for row in rows)
    done = tokenise_sft(conversation, tok, mask_prompt=True)
    conversation[0].reward = 1.0
    found = [shown(done[0], tok).replace("[", "").replace("]", "")]
    found += [tok.decode(tokenise_scalar(conversation, tok)[0].tokens)]
    found += map(tok.decode, tokenise_preferences(preference, tok)[0].responses)
    found += [
        tok.decode(tokenise_prompts(made, tok)[0].tokens)
        for made in (conversation, preference, prompt)
    ]
    for text in found:
        assert text.startswith('TOOLS {"type"') or text.startswith("TOOLS ")
        assert '"name": "weather", "parameters": {}' in text
        assert 'CALL {"arguments": {"city": "Rome"}, "name": "weather"}' in text or (
            'CALL {"name": "weather", "arguments": {"city": "Rome"}}' in text
        )
        assert "<|tool|>\n12<|end|>" in text
    trained = shown(done[0], tok)
    assert "[12 degrees<|end|>" in trained and ("[CALL" in trained or "[Let me see.CALL" in trained)
    assert not done.notes and not done.unused


def test_arguments_are_text_for_a_template_that_joins_them(tmp_path):
    tok = tokenizer("arguments_text")
    done = tokenise_sft(records_of(tmp_path, {"messages": TALK}), tok, mask_prompt=True)
    assert '[CALL {"city": "Rome"}<|end|>\n]' in shown(done[0], tok)


def test_openais_older_function_call_is_a_tool_call(tmp_path):
    talk = [
        ask(),
        answer(None, function_call={"name": "weather", "arguments": '{"city": "Rome"}'}),
        {"role": "function", "name": "weather", "content": "12"},
        answer("12"),
    ]
    done = tokenise_sft(records_of(tmp_path, {"messages": talk}), tokenizer("tools"))
    assert "weather" in tokenizer("tools").decode(done[0].tokens)


@pytest.mark.parametrize(
    ("name", "row", "text"),
    [
        (
            "thoughts",
            {"messages": [ask(), answer("4", reasoning_content="Two and two.")]},
            "[<think>Two and two.</think>4<|end|>\n",
        ),
        (
            "documents",
            {"messages": [ask(), answer()], "documents": [{"text": "a page"}]},
            "DOC a page\n<|user|>",
        ),
        (
            "documents",
            {"prompt": "a", "completion": "b", "documents": '[{"text": "a page"}]'},
            "DOC a page\n<|user|>",
        ),
    ],
)
def test_thoughts_and_documents_reach_the_template(tmp_path, name, row, text):
    tok = tokenizer(name)
    done = tokenise_sft(records_of(tmp_path, row), tok, mask_prompt=True)
    assert text in shown(done[0], tok) and not done.notes


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"loss": False}])
@pytest.mark.parametrize("mask_prompt", [False, True])
def test_turns_marked_not_to_train_are_masked(tmp_path, mark, mask_prompt):
    tok = tokenizer("plain")
    talk = [SEVERAL[0], {**SEVERAL[1], **mark}, *SEVERAL[2:]]
    records = records_of(tmp_path, {"messages": talk})
    row = tokenise_sft(records, tok, mask_prompt=mask_prompt)[0]
    whole = tokenise_sft(records_of(tmp_path, {"messages": SEVERAL}), tok)[0]
    assert row.tokens == whole.tokens
    masked = tok.decode([t for t, bit in zip(row.tokens, row.mask, strict=True) if not bit])
    trained = tok.decode([t for t, bit in zip(row.tokens, row.mask, strict=True) if bit])
    assert "the answer" in masked and "the answer" not in trained and "world" in trained


def test_turns_marked_not_to_train_are_masked_in_pairs(tmp_path):
    tok = tokenizer("plain")
    quiet = answer("never", weight=0)
    chosen = [quiet, ask("hello"), answer("world")]
    row = {"prompt": [ask()], "chosen": chosen, "rejected": [answer("no")]}
    made = tokenise_pairs(records_of(tmp_path, row), tok)[0]
    for tokens, mask, said in zip(made.responses, made.masks, ("world", "no"), strict=True):
        trained = tok.decode([t for t, on in zip(tokens, mask, strict=True) if on])
        assert trained == f"{said}<|end|>\n<|endoftext|>"
    for side in ("chosen", "rejected"):
        silent = {**row, "chosen": [answer("yes")], side: [quiet]}
        with pytest.raises(UserError, match="the first: no turn of an answer is to be trained"):
            tokenise_pairs(records_of(tmp_path, silent), tok)


def test_training_marks_have_to_be_yes_or_no(tmp_path):
    with pytest.raises(UserError, match=r"messages\[1\]: weight must be 0 or 1, found 0.5"):
        records_of(tmp_path, {"messages": [ask(), answer(weight=0.5)]})
    only = records_of(tmp_path, {"messages": [ask(), answer(weight=0)]})
    with pytest.raises(UserError, match="no assistant turn to train"):
        tokenise_sft(only, tokenizer("plain"), mask_prompt=True)


# What a template loses is said ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "says"),
    [
        (
            "drops",
            {"messages": [ask(), answer("<think>\nTwo.\n</think>\n\n4")]},
            [
                "drops text of an assistant turn: '<think>\\nTwo.\\n</think>'",
                "the answer in the row does not follow: '<think>\\n'",
            ],
        ),
        ("drops", {"prompt": "what", "completion": "4"}, ["does not follow: '<think>\\n'"]),
        (
            "plain",
            {"messages": [ask(), answer("4", reasoning_content="Two.")]},
            ["drops text of an assistant turn: 'Two.'"],
        ),
        (
            "plain",
            {"messages": TALK[:2], "tools": WEATHER},
            [
                "does not read a key of a message: tool_calls",
                "does not read a field of the row: tools",
                "drops text of an assistant turn: 'weather'",
            ],
        ),
        (
            "plain",
            {"messages": [ask(), answer(mood="merry")], "documents": [{"text": "x"}]},
            ["a key of a message: mood", "a field of the row: documents"],
        ),
    ],
)
def test_what_a_template_loses_is_said_with_the_row(tmp_path, name, row, says):
    records = records_of(tmp_path, row)
    done = tokenise_sft(records, tokenizer(name), mask_prompt=True)
    report = data_report("train", records, done)
    for text in says:
        assert text in report
    assert "rows.jsonl:1)" in report


def test_an_answer_that_changes_once_turns_follow_is_said(tmp_path):
    tok = tiny_tokenizer(template="thinking")
    thought = [ask(), answer("<think>a</think>one"), ask(), answer("two")]
    done = tokenise_sft(records_of(tmp_path, {"messages": thought}), tok)
    _, what, example = done.notes[0]
    assert "drops text of an assistant turn" in what and "<think>a" in example
    tok = tokenizer("plain")
    tok.chat_template = (
        TURNS.replace(
            SAY, SAY + "{% if loop.last and m['role'] == 'assistant' %} (last){% endif %}"
        )
        + NEXT
    )
    done = tokenise_sft(records_of(tmp_path, {"messages": SEVERAL}), tok)
    what = "the chat template writes an answer otherwise once turns follow"
    assert [note[1:] for note in done.notes] == [(what, "' (last)' becomes ''")]


def test_earlier_answers_of_a_prompt_are_not_trained(tmp_path):
    row = {"prompt": SEVERAL[:3], "completion": SEVERAL[3:]}
    tok = tokenizer("plain")
    done = tokenise_sft(records_of(tmp_path, row), tok, mask_prompt=True)
    assert shown(done[0], tok).startswith("<|user|>\nwhat<|end|>\n<|assistant|>\nthe answer<|end|>")
    assert shown(done[0], tok).endswith("<|assistant|>\n[world<|end|>\n<|endoftext|>]")
