"""What a reward model scores is the training row of the same conversation and answer, id by id."""

import json

import pytest
from scored_texts import ASK, PROMPTS, Listening, sampled, trained
from tiny_tokenizers import tiny_tokenizer

from data_loading.formats import to_record
from data_utils import Records, tokenise_prompts
from models.reading import Ending, trained_reading
from rewards.learned import learned_reward
from rewards.reward_set import RewardSet
from rewards.scored_rows import make_pairs, score_pairs
from rewards.texts import response_text

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
_CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function.name }}</call>{% endfor %}"
_ASK = "{% if add_generation_prompt %}[assistant]{% endif %}"
TEMPLATES = {
    "chatml": "chatml",
    "trims": "llama3",
    "blank before": "mistral",
    "drops thoughts": "thinking",
    # An answer begins with an empty thought, which its prompt does not open (Qwen 3).
    "empty thought": "{% for m in messages %}[{{ m.role }}]"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
    "{{ m.content }}<|eot_id|>{% endfor %}" + _ASK,
    # A prompt opens a thought that no row has (DeepSeek R1).
    "opened thought": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}"
    "<|eot_id|>{% endfor %}" + _ASK.replace("[assistant]", "[assistant]<think>"),
    "shows calls": "{% for m in messages %}[{{ m.role }}]{{ m.content or '' }}"
    + _CALLS
    + "<|eot_id|>"
    "{% endfor %}" + _ASK,
    "call ends otherwise": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}"
    + _CALLS
    + "{{ '<|im_end|>' if m.tool_calls else '<|eot_id|>' }}{% endfor %}"
    + _ASK,
}
NO = {"role": "assistant", "content": "no"}
ANSWERS = ["the answer", "the answer \n", "\n\n the answer\n", "<think>what</think>the answer"]


def tokenizer(name):
    made = tiny_tokenizer(template="chatml")
    made = type(made)(tokenizer_object=made.backend_tokenizer, **made.special_tokens_map)
    source = TEMPLATES[name]
    known = len(source) < 20
    made.chat_template = tiny_tokenizer(template=source).chat_template if known else source
    return made


@pytest.mark.parametrize("ended", [True, False], ids=["ended", "cut off"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_sampled_answers_are_read_as_rows(name, ended):
    """Blanks at its ends, thoughts: what the template makes of them, on one base too."""
    own = tokenizer(name)
    reading = trained_reading(own)
    model, ending = Listening(own, reading), Ending(own, reading)
    for kind, asked in PROMPTS.items():
        for answer in ANSWERS:
            turn = {"role": "assistant", "content": answer}
            chosen, rejected = ([turn], [NO]) if kind != "text" else (answer, "no")
            [ids, _] = trained(own, reading, {**asked, "chosen": chosen, "rejected": rejected})
            seen = sampled(own, model, asked, answer, ended)
            assert seen == (ids if ended else ending.bare(ids)), (kind, answer)


@pytest.mark.parametrize("name", ["chatml", "trims", "shows calls"])
def test_tokens_that_no_row_has_are_read_anew(name):
    """A policy may spell a word in tokens of its own."""
    own = tokenizer(name)
    reading = trained_reading(own)
    [ids, _] = trained(own, reading, {**PROMPTS["text"], "chosen": "the answer", "rejected": "no"})
    model = Listening(own, reading)
    [prompt] = tokenise_prompts(Records([to_record(PROMPTS["text"], "prompt", "p:1")]), own).rows
    spelled = [i for c in "the answer" for i in own.encode(c, add_special_tokens=False)]
    assert spelled != own.encode("the answer", add_special_tokens=False)
    given = {"token_ids": [[*prompt.tokens, *spelled]], "ended": [True]}
    learned = learned_reward(model, own)
    learned.function(["what is the"], ["the answer"], response_start=[len(prompt.tokens)], **given)
    assert model.seen == [ids]


@pytest.mark.parametrize("name", ["chatml", "trims", "shows calls"])
def test_bytes_that_are_no_text_are_scored_as_they_were_sampled(name):
    own = tokenizer(name)
    model = Listening(own, trained_reading(own))
    [prompt] = tokenise_prompts(Records([to_record(PROMPTS["text"], "prompt", "p:1")]), own).rows
    half = own.encode("é", add_special_tokens=False)[:1]
    given = {"token_ids": [[*prompt.tokens, *half]], "ended": [False]}
    text = response_text(own, prompt.tokens, half)
    learned = learned_reward(model, own)
    learned.function([prompt.prompt], [text], response_start=[len(prompt.tokens)], **given)
    assert model.seen == given["token_ids"]


@pytest.mark.parametrize("special", ["<|im_start|>", "<s>", "<|eot_id|>"])
def test_special_tokens_within_an_answer_are_not_hidden_from_the_reward_model(special):
    own = tokenizer("shows calls")
    model = Listening(own, trained_reading(own))
    [mark] = own.encode(special, add_special_tokens=False)
    seen = sampled(own, model, PROMPTS["text"], f"the {special} answer", True)
    clean = sampled(own, model, PROMPTS["text"], "the  answer", True)
    assert seen.count(mark) == clean.count(mark) + 1 and own.decode(seen).count(special + " answer")


@pytest.mark.parametrize("own_form", ["row", "text", "prompt_template", "role_markers"])
def test_words_and_forms_without_a_chat_template(own_form):
    """Plain words as a prompt stay plain words; token formats keep the blank after a header."""
    own = tokenizer("chatml")
    form = {}
    if own_form == "prompt_template":
        form = {"prompt_template": "Q: {prompt}\nA:"}
    if own_form == "role_markers":
        form = {"token_format": "role_markers"}
    reading = trained_reading(own, **form)
    model = Listening(own, reading)
    if own_form == "row":  # of text, its first words are the prompt
        rows = Records([to_record({"text": "what is the answer"}, "text", "x:1")])
        [prompt] = tokenise_prompts(rows, own, prompt_words=2).rows
        asked, answer, wanted = prompt.prompt, " the answer ", "what is the answer "
    elif own_form == "role_markers":
        rows = Records([to_record({"prompt": [ASK]}, "prompt", "x:1")])
        [prompt] = tokenise_prompts(rows, own, **form).rows
        asked, answer = [ASK], "  the \n"
        wanted = "User: what is the\n\nAssistant:  the \n"
    else:
        rows = Records([to_record({"prompt": "what"}, "prompt", "x:1")])
        [prompt] = tokenise_prompts(rows, own, **form).rows
        asked, answer = "what", " the \n"
        wanted = "Q: what\nA: the \n" if form else "<|im_start|>user\nwhat<|im_end|>\n"
        wanted += "" if form else "<|im_start|>assistant\nthe"
    ids = [*prompt.tokens, *own.encode(answer, add_special_tokens=False)]
    learned = learned_reward(model, own, **form)
    columns = {"token_ids": [ids], "ended": [False], "prompt_text": [prompt.text]}
    RewardSet([learned])([asked], [answer], response_start=[len(prompt.tokens)], **columns)
    assert own.decode(model.seen[0]).removeprefix("<s>") == wanted


RECORDED = {
    "a call": {"role": "assistant", "content": "", "tool_calls": [CALL]},
    "a call and text": {"role": "assistant", "content": "the", "tool_calls": [CALL]},
    "blanks": {"role": "assistant", "content": " \n the answer  \n"},
    "thoughts": {"role": "assistant", "content": "<think>what</think>the answer"},
}


@pytest.mark.parametrize("theirs", TEMPLATES)
@pytest.mark.parametrize("policy", TEMPLATES)
def test_answers_of_rows_are_read_as_rows(policy, theirs):
    """score.py: what the policy's template leaves out or trims is no loss to the reward model."""
    writer, own = tokenizer(policy), tokenizer(theirs)
    reading = trained_reading(own)
    for name, turn in RECORDED.items():
        row = {"prompt": [ASK], "tools": TOOLS, "chosen": [turn], "rejected": [NO]}
        wanted, model = trained(own, reading, row), Listening(own, reading)
        rows = Records([to_record(json.loads(json.dumps(row)), "preference", "x:1")])
        pairs, _ = make_pairs(rows, writer, {"max_length": 500, "skip_bad_rows": False})
        score_pairs(RewardSet([learned_reward(model, writer)]), pairs, 64, lambda count: None)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].tokens))
        assert [model.seen[order.index(i)] for i in range(len(pairs))] == wanted, name


@pytest.mark.parametrize("kind", ["text", "messages", "turns"])
def test_a_row_that_was_cut_is_scored_as_it_was_cut(kind):
    own = tokenizer("shows calls")
    model, long = Listening(own, trained_reading(own)), "the answer " * 30
    turn = {"role": "assistant", "content": long}
    answer = long if kind == "text" else [turn]
    row = {**PROMPTS[kind], "completion": answer}
    rows = Records([to_record(row, "prompt_completion", "x:1")])
    options = {"max_length": 60, "too_long": "cut", "skip_bad_rows": False}
    pairs, _ = make_pairs(rows, own, options)
    score_pairs(RewardSet([learned_reward(model, own)]), pairs, 64, lambda count: None)
    assert model.seen == [pairs[0].tokens] and len(pairs[0].tokens) == 60
