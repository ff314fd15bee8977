"""A reward model with a template or a tokenizer of its own scores the tokens it was trained on."""

import copy

import pytest
from tiny_tokenizers import metaspace_tokenizer, tiny_tokenizer

from data_loading.formats import to_record
from data_utils import Records
from errors import UserError
from models.reading import Reading
from rewards.learned import learned_reward
from rewards.reward_rows import reading_of_rows, tokenise_reward_rows
from rewards.reward_set import RewardSet
from rewards.scored_rows import make_pairs, score_pairs

SQUARE = (
    "{% if tools %}TOOLS {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "[{{ m['role'] }}]\n{{ m['content'] }}<|eot_id|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n{% endif %}"
)
ASK, SAID = {"role": "user", "content": "the hello"}, {"role": "assistant", "content": "of the"}
NO = {"role": "assistant", "content": "no"}
TOOLS = [{"type": "function", "function": {"name": "weather"}}]
ROWS = {
    "texts": {"prompt": "what is the", "chosen": "the answer", "rejected": "no"},
    "joined by a blank": {"prompt": "what is the", "chosen": " the answer", "rejected": " no"},
    "messages": {"prompt": [ASK], "chosen": [SAID], "rejected": [NO]},
    "turns": {"prompt": [ASK, SAID, ASK], "chosen": [SAID], "rejected": [NO]},
    "answers of several turns": {
        "prompt": [ASK],
        "chosen": [SAID, ASK, SAID],
        "rejected": [SAID, ASK, NO],
    },
    "tools": {"prompt": [ASK], "tools": TOOLS, "chosen": [SAID], "rejected": [NO]},
    "context": {"question": "what is", "context": "the answer", "chosen": "the", "rejected": "no"},
    "hh-rlhf": {
        "chosen": "\n\nHuman: what is\n\nAssistant: the answer",
        "rejected": "\n\nHuman: what is\n\nAssistant: no",
    },
    "dialogues": {"chosen": [ASK, SAID], "rejected": [ASK, NO]},
    "history": {"prompt": "what is", "history": [["a", "b"]], "chosen": "the", "rejected": "no"},
    "several": {"prompt": "what", "responses": ["the answer", "hello", "no"]},
}
POLICIES = {name: tiny_tokenizer(template=name) for name in ("chatml", "llama3", "mistral", None)}


def judge(kind):
    """Another template, another vocabulary, or no template at all."""
    made = copy.deepcopy(tiny_tokenizer() if kind == "template" else metaspace_tokenizer())
    made.chat_template = None if kind == "no template" else SQUARE
    return made


class Listening:
    """A reward model that keeps what it is asked to score."""

    def __init__(self, tokenizer, reading):
        self.source = type("Source", (), {"tokenizer": tokenizer})
        self.reading, self.seen = Reading.described(reading.description()), []

    def score(self, rows, batch_size):
        self.seen += map(list, rows)
        return [0.0] * len(rows)


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("kind", ["template", "vocabulary", "no template"])
@pytest.mark.parametrize(
    "options",
    [{}, {"prompt_template": "Q: {prompt}\nA: "}, {"token_format": "role_markers"}],
    ids=["standard", "prompt_template", "role_markers"],
)
def test_scored_tokens_are_those_of_training_rows(kind, policy, options):
    own, compared = judge(kind), 0
    for name, row in ROWS.items():
        rows = Records([to_record(row, "ranked" if "responses" in row else "preference", "x:1")])
        reading = reading_of_rows(rows, own, **options)
        try:
            trained = tokenise_reward_rows(rows, own, reading, max_length=500, **options).rows[0]
        except UserError:
            assert "prompt_template" in options  # takes no messages
            continue
        model = Listening(own, reading)
        pairs, _ = make_pairs(rows, policy, {"max_length": 500, "skip_bad_rows": False})
        score_pairs(RewardSet([learned_reward(model, policy)]), pairs, 64, lambda count: None)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].tokens))
        seen = [model.seen[order.index(i)] for i in range(len(pairs))]
        assert seen == trained.responses, name
        compared += 1
    assert compared >= (5 if "prompt_template" in options else len(ROWS))


@pytest.mark.parametrize("template", ["chatml", "llama3", "mistral", None])
def test_reward_functions_get_the_tokens_that_a_policy_writes(template):
    """What score.py hands over ends in the token at which PPO's responses stop."""
    tokenizer, ends = tiny_tokenizer(template=template), {"chatml": "<|im_end|>"}
    ends |= {"llama3": "<|eot_id|>"}
    rows = Records([to_record(ROWS["texts"], "preference", "x:1")])
    for pair in make_pairs(rows, tokenizer, {"max_length": 500, "skip_bad_rows": False})[0]:
        assert pair.ended
        assert tokenizer.decode(pair.tokens[-1:]) == ends.get(template, "</s>")
        assert tokenizer.decode(pair.tokens).count(ends.get(template, "</s>")) <= 2


def test_of_an_answer_of_several_turns_the_last_is_the_response():
    rows = Records([to_record(ROWS["answers of several turns"], "preference", "x:1")])
    made, _ = make_pairs(rows, POLICIES["chatml"], {"max_length": 500, "skip_bad_rows": False})
    assert [pair.response for pair in made] == ["of the", "no"]
    assert [pair.prompt for pair in made] == [[ASK, SAID, ASK]] * 2
