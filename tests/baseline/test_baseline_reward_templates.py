"""What a reward model scores is what it was trained on, with every chat template that TRL ships."""

import pytest
from scored_texts import PROMPTS, Listening, sampled, trained
from trl_templates import NAMES, RESULT, ROWS, answer, ask, tokenizer_for

from data_loading.formats import to_record
from data_utils import Records
from errors import UserError
from models.reading import Ending, trained_reading
from rewards.learned import learned_reward
from rewards.reward_set import RewardSet
from rewards.scored_rows import make_pairs, score_pairs

pytest.importorskip("trl")
pytestmark = pytest.mark.torch

CALLING = ROWS["tools"]["messages"][1]
TOOLS = ROWS["tools"]["tools"]
RECORDED = [
    {"prompt": [ask("hello")], "chosen": [answer(" the answer \n")]},
    {"prompt": [ask("hello")], "chosen": [answer("4", reasoning_content="so")]},
    {"prompt": [ask("Weather?")], "tools": TOOLS, "chosen": [CALLING]},
    {"prompt": [ask("Weather?")], "tools": TOOLS, "chosen": [CALLING, RESULT, answer("12")]},
]


@pytest.mark.parametrize("name", NAMES)
def test_sampled_answers_are_read_as_rows(name):
    own = tokenizer_for(name)
    reading = trained_reading(own)
    model, ending = Listening(own, reading), Ending(own, reading)
    for kind, asked in PROMPTS.items():
        for text in ("the answer", "the answer \n", "<think>\nso\n</think>\n\nthe answer"):
            chosen, rejected = [answer(text)], [answer("no")]
            if kind == "text":
                chosen, rejected = text, "no"
            [ids, _] = trained(own, reading, {**asked, "chosen": chosen, "rejected": rejected})
            for ended in (True, False):
                seen = sampled(own, model, asked, text, ended)
                assert seen == (ids if ended else ending.bare(ids)), (kind, text)


@pytest.mark.parametrize("policy", ["qwen3", "llama3", "phi3", "deepseekv3"])
@pytest.mark.parametrize("name", NAMES)
def test_answers_of_rows_are_read_as_rows(name, policy):
    """Tool calls that the policy's template leaves out, and blanks that it trims."""
    writer, own = tokenizer_for(policy), tokenizer_for(name)
    reading, compared = trained_reading(own), 0
    for row in RECORDED:
        row = {**row, "rejected": [answer("no")]}
        try:
            wanted = trained(own, reading, row)
        except UserError:  # the template takes no tools
            continue
        rows, model = Records([to_record(row, "preference", "x:1")]), Listening(own, reading)
        pairs, _ = make_pairs(rows, writer, {"max_length": 9000, "skip_bad_rows": False})
        score_pairs(RewardSet([learned_reward(model, writer)]), pairs, 64, lambda count: None)
        order = sorted(range(len(pairs)), key=lambda i: -len(pairs[i].tokens))
        assert [model.seen[order.index(i)] for i in range(len(pairs))] == wanted
        compared += 1
    assert compared >= 2
