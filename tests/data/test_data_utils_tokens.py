"""Tokens and loss masks: one BOS, EOS trained, answers only where asked, nothing lost unseen."""

import itertools

import pytest
from tiny_tokenizers import TEMPLATES, metaspace_tokenizer, tiny_tokenizer

from data_utils import (
    Record,
    columns_of,
    encode_prompt,
    tokenise_preferences,
    tokenise_prompts,
    tokenise_scalar,
    tokenise_sft,
)
from errors import UserError

BOS, EOS = 1, 2
ALL_TOKENIZERS = list(itertools.product((True, False), (None, *TEMPLATES), (False, True)))

TEXT = Record("text", "f:1", {"text": "hello world"}, text="hello world")
PAIR = Record(
    "prompt_completion",
    "f:2",
    {"prompt": "what is", "completion": " the answer"},
    prompt="what is",
    completion=" the answer",
)
CHAT = Record(
    "conversation",
    "f:3",
    {},
    messages=[
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "first world"},
        {"role": "user", "content": "what"},
        {"role": "assistant", "content": "the end"},
    ],
)
BETTER = Record(
    "preference", "f:4", {}, prompt="what", responses=[" yes", " maybe", " no"], ranks=[0, 1, 1]
)


def masked(row, tokenizer, value=1):
    """The stretches of tokens whose mask is `value`, decoded."""
    stretches = itertools.groupby(zip(row.tokens, row.mask, strict=True), lambda pair: pair[1])
    return [tokenizer.decode([t for t, _ in part]) for bit, part in stretches if bit == value]


@pytest.mark.parametrize(("bos", "template", "wrapped"), ALL_TOKENIZERS)
@pytest.mark.parametrize(
    ("record", "mask_prompt"),
    [(TEXT, False), (PAIR, False), (PAIR, True), (CHAT, False), (CHAT, True)],
    ids=lambda x: getattr(x, "kind", None),
)
def test_one_bos_and_a_trained_eos(bos, template, wrapped, record, mask_prompt):
    tokenizer = tiny_tokenizer(bos, template, wrapped=wrapped)
    row = tokenise_sft([record], tokenizer, mask_prompt=mask_prompt)[0]
    from_template = template in ("llama3", "mistral") and record is not TEXT
    assert row.tokens.count(BOS) == int(bos or from_template)
    assert BOS not in row.tokens[1:]
    assert row.tokens[-1] == EOS and row.mask[-1] == 1
    assert row.tokens[-2] != EOS
    assert row.mask[0] == 0 and len(row.mask) == len(row.tokens)


def test_bos_and_eos_that_the_text_brings_along_are_not_doubled():
    record = Record("text", "f:1", {}, text="<s><s>hello</s>")
    tokens = tokenise_sft([record], tiny_tokenizer())[0].tokens
    assert tokens.count(BOS) == 1 and tokens.count(EOS) == 1


def test_without_mask_prompt_every_token_but_the_first_is_a_target():
    for record in (TEXT, PAIR, CHAT):
        mask = tokenise_sft([record], tiny_tokenizer(template="chatml"))[0].mask
        assert mask == [0] + [1] * (len(mask) - 1)


def test_mask_prompt_trains_the_completion_alone():
    tokenizer = tiny_tokenizer()
    row = tokenise_sft([PAIR], tokenizer, mask_prompt=True)[0]
    assert masked(row, tokenizer) == [" the answer</s>"]
    assert masked(row, tokenizer, 0) == ["<s>what is"]


# What is trained of CHAT: the answers and what ends them, never the header.
CHAT_TARGETS = {
    None: ["first world</s>", "the end</s>"],
    "chatml": ["first world<|im_end|>\n", "the end<|im_end|>\n</s>"],
    "no_header": ["first world<|im_end|>\n", "the end<|im_end|>\n</s>"],
    "thinking": ["first world<|im_end|>\n", "the end<|im_end|>\n</s>"],
    "llama3": ["first world<|eot_id|>", "the end<|eot_id|></s>"],
    "mistral": [" first world</s>", " the end</s>"],
}


@pytest.mark.parametrize(("bos", "template", "wrapped"), ALL_TOKENIZERS)
def test_mask_prompt_trains_assistant_turns_alone_without_the_header(bos, template, wrapped):
    tokenizer = tiny_tokenizer(bos, template, wrapped=wrapped)
    row = tokenise_sft([CHAT], tokenizer, mask_prompt=True)[0]
    assert masked(row, tokenizer) == CHAT_TARGETS[template]


def test_an_end_of_turn_that_is_the_eos_stands_once():
    tokenizer = tiny_tokenizer(template="chatml", eos="<|im_end|>")
    row = tokenise_sft([CHAT], tokenizer, mask_prompt=True)[0]
    assert masked(row, tokenizer) == ["first world<|im_end|>\n", "the end<|im_end|>\n"]


def test_a_template_that_rewrites_earlier_turns_still_has_exact_answers():
    thought = [dict(m) for m in CHAT.messages]
    thought[1]["content"], thought[3]["content"] = "<think>a</think>one", "<think>b</think>two"
    record = Record("conversation", "f:1", {}, messages=thought)
    tokenizer = tiny_tokenizer(template="thinking")
    row = tokenise_sft([record], tokenizer, mask_prompt=True)[0]
    assert masked(row, tokenizer) == ["one<|im_end|>\n", "<think>b</think>two<|im_end|>\n</s>"]


FORMATTED = {
    "standard": "<s>hello\n\n[first world</s>]\n\nwhat\n\n[the end</s>]",
    "role_markers": "<s>User: hello\n\nAssistant:[ first world</s>]\n\nUser: what\n\n"
    "Assistant:[ the end</s>]",
    "turn_markers": "<s><|user|>\nhello\n<|assistant|>\n[first world</s>]\n<|user|>\nwhat\n"
    "<|assistant|>\n[the end</s>]",
}


@pytest.mark.parametrize("token_format", FORMATTED)
def test_token_formats(token_format):
    """The whole text, trained stretches in brackets; the prompt is what stands before the last."""
    tokenizer = tiny_tokenizer()
    row = tokenise_sft([CHAT], tokenizer, mask_prompt=True, token_format=token_format)[0]
    parts = itertools.groupby(zip(row.tokens, row.mask, strict=True), lambda pair: pair[1])
    decoded = [(bit, tokenizer.decode([t for t, _ in part])) for bit, part in parts]
    assert "".join(f"[{text}]" if bit else text for bit, text in decoded) == FORMATTED[token_format]
    prompt = tokenise_prompts([CHAT], tokenizer, token_format=token_format)[0]
    expected = FORMATTED[token_format].rpartition("[")[0].replace("[", "").replace("]", "")
    assert tokenizer.decode(prompt.tokens) == expected


def test_markers_are_used_instead_of_the_chat_template():
    plain, chat = tiny_tokenizer(), tiny_tokenizer(template="chatml")
    rows = [tokenise_sft([CHAT], t, token_format="role_markers")[0] for t in (plain, chat)]
    assert rows[0] == rows[1]


def test_prompt_and_completion_go_through_the_chat_template_where_there_is_one():
    tokenizer = tiny_tokenizer(template="chatml")
    row = tokenise_sft([PAIR], tokenizer, mask_prompt=True)[0]
    assert masked(row, tokenizer, 0) == [
        "<s><|im_start|>user\nwhat is<|im_end|>\n<|im_start|>assistant\n"
    ]
    raw = tokenise_sft([PAIR], tokenizer, prompt_template="{prompt}")[0]
    assert tokenizer.decode(raw.tokens) == "<s>what is the answer</s>"


QUESTION = Record(
    "prompt_completion",
    "f:9",
    {"question": "hello", "response": "world", "n": 3},
    prompt=[{"role": "user", "content": "hello"}],
    completion=[{"role": "assistant", "content": "world"}],
)


@pytest.mark.parametrize("template", [None, "chatml"])
def test_prompt_template(template):
    tokenizer = tiny_tokenizer(template=template)
    options = {"prompt_template": "Question: {question} ({n})\\n\\n{{}} Answer:\\n"}
    row = tokenise_sft([QUESTION], tokenizer, mask_prompt=True, **options)[0]
    assert masked(row, tokenizer, 0) == ["<s>Question: hello (3)\n\n{} Answer:\n"]
    assert masked(row, tokenizer) == ["world</s>"]
    prompt = tokenise_prompts([QUESTION], tokenizer, **options)[0]
    assert prompt.text == "Question: hello (3)\n\n{} Answer:\n"
    assert prompt.tokens == row.tokens[: len(prompt.tokens)]


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{query}", "asks for query; the row has n, question, response"),
        ("{question.__class__}", "a field name"),
        ("{question!r}", "a field name"),
        ("{}", "a field name"),
        ("{question", "expected '}'"),
        ("no field", "names no field"),
    ],
)
def test_prompt_templates_that_do_not_fit_are_errors(template, says):
    with pytest.raises(UserError, match=says):
        tokenise_sft([QUESTION], tiny_tokenizer(), prompt_template=template)


def test_a_prompt_template_is_refused_where_it_would_do_nothing():
    for record in (TEXT, CHAT):
        with pytest.raises(UserError, match="f:[13]: a .*prompt template"):
            tokenise_sft([record], tiny_tokenizer(), prompt_template="{text}")


@pytest.mark.parametrize("kind", ["preference", "unpaired", "prompt"])
def test_rows_that_would_be_trained_on_by_accident_are_errors(kind):
    record = Record(kind, "f:7", {}, prompt="a", completion="b", responses=["a", "b"])
    with pytest.raises(UserError, match=f"f:7: a row of kind {kind} is not for supervised"):
        tokenise_sft([record], tiny_tokenizer())


def test_mask_prompt_on_plain_text_alone_is_an_error():
    with pytest.raises(UserError, match="mask-prompt"):
        tokenise_sft([TEXT], tiny_tokenizer(), mask_prompt=True)
    mixed = tokenise_sft([TEXT, PAIR], tiny_tokenizer(), mask_prompt=True)
    assert sum(mixed[0].mask) == len(mixed[0].mask) - 1


@pytest.mark.parametrize(
    ("prompt", "completion", "joint"),
    [("wo", "rld the", "wor"), ("what ", "is", " is"), ("the qu", "estion", " question")],
)
def test_a_row_has_the_tokens_of_its_whole_text_and_a_shared_token_is_said(
    prompt, completion, joint
):
    tokenizer = tiny_tokenizer()
    record = Record("prompt_completion", "f:1", {}, prompt=prompt, completion=completion)
    done = tokenise_sft([record], tokenizer, mask_prompt=True)
    assert done[0].tokens == [*tokenizer.encode(prompt + completion), EOS]
    assert masked(done[0], tokenizer)[0].startswith(joint)  # it has a character of the answer
    assert [(where, example) for where, _, example in done.notes] == [("f:1", repr(joint))]
    assert "the prompt alone has other tokens" in done.notes[0][1]
    assert not tokenise_sft([PAIR], tokenizer, mask_prompt=True).notes


@pytest.mark.parametrize("completion", [" the answer", "the answer", "the of what it"])
def test_no_space_is_added_at_the_joint(completion):
    """Tokenizers that put a space before every text must not put one before the completion."""
    tokenizer = metaspace_tokenizer()
    record = Record("prompt_completion", "f:1", {}, prompt="what is", completion=completion)
    row = tokenise_sft([record], tokenizer, mask_prompt=True)[0]
    assert row.tokens == [*tokenizer.encode("what is" + completion), EOS]
    answer = [t for t, bit in zip(row.tokens, row.mask, strict=True) if bit]
    shown = "".join(tokenizer.convert_ids_to_tokens(answer)).replace("\u2581", " ")
    assert shown.endswith(completion + "</s>") and not shown.startswith(" what is")


def test_too_long_rows_are_cut_or_refused_and_counted():
    long = Record("text", "f:8", {}, text="hello world " * 20)
    tokenizer = tiny_tokenizer()
    cut = tokenise_sft([TEXT, long], tokenizer, max_length=10, too_long="cut")
    assert (len(cut), cut.cut, cut.refused) == (2, 1, [])
    assert len(cut[1].tokens) == len(cut[1].mask) == 10 and cut[1].tokens[-1] != EOS
    refused = tokenise_sft([TEXT, long], tokenizer, max_length=10, too_long="refuse")
    assert (len(refused), refused.cut) == (1, 0)
    assert refused.refused == [("f:8", "longer than 10 tokens")]


def test_a_cut_that_leaves_no_target_refuses_the_row():
    long = Record("prompt_completion", "f:8", {}, prompt="hello " * 20, completion="world")
    done = tokenise_sft([PAIR, long], tiny_tokenizer(), max_length=10, mask_prompt=True)
    assert [row.where for row in done.rows] == ["f:2"]
    assert done.refused == [("f:8", "no trained token is left")]
    with pytest.raises(UserError, match="f:8: no row is left; of 1 refused"):
        tokenise_sft([long], tiny_tokenizer(), max_length=10, mask_prompt=True)


def test_a_conversation_that_ends_with_the_user_gets_no_eos():
    open_end = Record("conversation", "f:3", {}, messages=CHAT.messages[:3])
    row = tokenise_sft([open_end], tiny_tokenizer())[0]
    assert row.tokens[-1] != EOS
    with pytest.raises(UserError, match="no assistant turn"):
        only = Record("conversation", "f:3", {}, messages=CHAT.messages[:1])
        tokenise_sft([only], tiny_tokenizer(), mask_prompt=True)


def test_a_row_that_the_chat_template_refuses():
    system = Record(
        "conversation", "f:5", {}, messages=[{"role": "system", "content": "x"}, *CHAT.messages]
    )
    tokenizer = tiny_tokenizer(template="mistral")
    with pytest.raises(UserError, match="f:5: the chat template refuses .*no role system"):
        tokenise_sft([CHAT, system], tokenizer)
    done = tokenise_sft([CHAT, system], tokenizer, skip_bad_rows=True)
    assert len(done) == 1 and done.refused[0][0] == "f:5"


def test_a_tokenizer_without_eos_is_refused():
    with pytest.raises(UserError, match="no EOS"):
        tokenise_sft([TEXT], tiny_tokenizer(eos=None))


# Reward models ------------------------------------------------------------------------------


def test_scalar_rows():
    tokenizer = tiny_tokenizer()
    records = [
        Record("text", "f:1", {}, text="hello", reward=0.5),
        Record("conversation", "f:2", {}, messages=CHAT.messages, reward=4.0),
        Record("unpaired", "f:3", {}, prompt="a", completion="b", label=True),
        Record("unpaired", "f:4", {}, prompt="a", completion="b", label=False),
    ]
    rows = tokenise_scalar(records, tokenizer)
    assert [row.reward for row in rows.rows] == [0.5, 4.0, 1.0, 0.0]
    assert rows[0].tokens == tokenise_sft(records[:1], tokenizer)[0].tokens
    open_end = tokenise_scalar(records, tokenizer, add_eos=False)[0]
    assert open_end.tokens == rows[0].tokens[:-1]
    with pytest.raises(UserError, match="f:1: no reward"):
        tokenise_scalar([TEXT], tokenizer)


def test_preference_rows_share_the_prompt_of_ppo():
    tokenizer = tiny_tokenizer(template="chatml")
    row = tokenise_preferences([BETTER], tokenizer)[0]
    prompt = tokenise_prompts([BETTER], tokenizer)[0].tokens
    assert all(tokens[: len(prompt)] == prompt for tokens in row.responses)
    answers = [tokenizer.decode(tokens[len(prompt) :]) for tokens in row.responses]
    assert answers == [f"{x}<|im_end|>\n" for x in ("yes", "maybe", "no")]
    old = tokenise_preferences([BETTER], tokenizer, add_eos=True)[0].responses[0]
    assert tokenizer.decode(old[len(prompt) :]) == "yes<|im_end|></s>"
    assert row.ranks == [0, 1, 1] and row.chosen == row.responses[0]
    assert row.rejected == row.responses[-1]


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_preference_rows_know_where_the_prompt_ends(template):
    tokenizer = tiny_tokenizer(template=template)
    turns = [*CHAT.messages[1:3], CHAT.messages[1]]
    several = Record(
        "preference",
        "f:5",
        {},
        prompt=CHAT.messages[:1],
        ranks=[0, 1],
        responses=[turns, turns[:1]],
    )
    for record in (BETTER, several):
        row = tokenise_preferences([record], tokenizer)[0]
        prompt = tokenise_prompts([record], tokenizer)[0].tokens
        for tokens, mask in zip(row.responses, row.masks, strict=True):
            assert len(mask) == len(tokens) and not any(mask[: len(prompt)])
            assert mask[len(prompt)] == mask[-1] == 1
    inner = tokenizer.decode([t for t, m in zip(row.responses[0], row.masks[0], strict=True) if m])
    assert inner.count("first world") == 2 and "what" not in inner  # a user turn within a response
    longest = max(map(len, tokenise_preferences([BETTER], tokenizer)[0].responses))
    cut = tokenise_preferences([BETTER], tokenizer, max_length=longest - 1, too_long="cut")
    assert cut.cut == 1
    assert all(len(m) == len(t) for t, m in zip(cut[0].responses, cut[0].masks, strict=True))


def test_a_preference_without_a_prompt_is_refused():
    record = Record("preference", "f:6", {}, responses=["yes", "no"], ranks=[0, 1])
    with pytest.raises(UserError, match="f:6: the row has no prompt: one of the fields prompt"):
        tokenise_preferences([record], tiny_tokenizer())


def test_preferences_for_the_same_thing_are_refused():
    same = Record("preference", "f:6", {}, prompt="what", responses=["a", "a"], ranks=[0, 1])
    done = tokenise_preferences([BETTER, same], tiny_tokenizer())
    assert done.refused == [("f:6", "chosen and rejected are the same")]
    assert not tokenise_preferences([BETTER], tiny_tokenizer()).refused
    with pytest.raises(UserError, match="the same after the cut"):
        tokenise_preferences([BETTER], tiny_tokenizer(), max_length=3, too_long="cut")


# Prompts ------------------------------------------------------------------------------------


@pytest.mark.parametrize("record", [PAIR, BETTER, CHAT, QUESTION], ids=lambda r: r.kind)
@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_ppo_prompts_are_the_beginning_of_sft_rows(record, template):
    tokenizer = tiny_tokenizer(template=template)
    prompt = tokenise_prompts([record], tokenizer)[0]
    if record is BETTER:
        whole = tokenise_preferences([record], tokenizer)[0].chosen
    else:
        whole = tokenise_sft([record], tokenizer)[0].tokens
    assert whole[: len(prompt.tokens)] == prompt.tokens
    assert prompt.tokens.count(BOS) == 1 and prompt.tokens[-1] != EOS
    own = template in ("llama3", "mistral")  # these write BOS themselves
    assert tokenizer.decode(prompt.tokens) == "<s>" * (not own) + prompt.text


def test_the_prompt_of_a_conversation_ends_with_its_last_user_turn():
    prompt = tokenise_prompts([CHAT], tiny_tokenizer(template="no_header"))[0]
    assert prompt.text.endswith("user\nwhat<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_from_plain_text_are_its_first_words():
    tokenizer = tiny_tokenizer()
    row = Record("text", "f:1", {"text": "8 20  22 30", "reward": "1.0"}, text="8 20  22 30")
    prompt = tokenise_prompts([row], tokenizer, prompt_words=3)[0]
    assert (prompt.text, prompt.columns) == ("8 20  22", row.fields)
    with pytest.raises(UserError, match="f:1: plain text has no prompt.*--prompt-words"):
        tokenise_prompts([row], tokenizer)
    with pytest.raises(UserError, match="not more than 4 words"):
        tokenise_prompts([row], tokenizer, prompt_words=4)


def test_long_prompts_are_refused_or_cut_on_the_left():
    tokenizer = tiny_tokenizer()
    long = Record("prompt", "f:9", {}, prompt="hello " * 20 + "what is")
    refused = tokenise_prompts([PAIR, long], tokenizer, max_length=6)
    assert len(refused) == 1 and refused.refused == [("f:9", "longer than 6 tokens")]
    cut = tokenise_prompts([PAIR, long], tokenizer, max_length=6, too_long="cut")
    tokens = cut[1].tokens
    assert cut.cut == 1 and len(tokens) == 6 and tokens[0] == BOS
    assert tokens[1:] == tokenizer.encode(long.prompt)[-5:]
    assert cut[1].text == tokenizer.decode(tokens[1:])


def test_columns_for_reward_functions():
    rows = [
        Record("prompt", "f:1", {"prompt": "a", "answer": 4, "prompts": "x"}, prompt="a"),
        Record("prompt", "f:2", {"prompt": "b", "hint": "c"}, prompt="b"),
    ]
    columns = columns_of(tokenise_prompts(rows, tiny_tokenizer()).rows)
    assert columns == {"prompt": ["a", "b"], "answer": [4, None], "hint": [None, "c"]}


def test_encode_prompt_is_what_training_saw():
    tokenizer = tiny_tokenizer(template="llama3")
    asked = [{"role": "user", "content": "what is"}]
    expected = tokenise_prompts([PAIR], tokenizer)[0].tokens
    assert encode_prompt("what is", tokenizer) == encode_prompt(asked, tokenizer) == expected
