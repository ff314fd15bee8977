"""What a reward model is asked to score, and what it would be trained on."""

from data_loading.formats import to_record
from data_utils import Records, Template, columns_of, tokenise_prompts
from models.reading import Reading
from rewards.learned import learned_reward
from rewards.reward_rows import tokenise_reward_rows
from rewards.reward_set import RewardSet
from rewards.texts import response_text, reward_columns

ASK = {"role": "user", "content": "what is the"}
PROMPTS = {
    "text": {"prompt": "what is the"},
    "messages": {"prompt": [ASK]},
    "turns": {"prompt": [ASK, {"role": "assistant", "content": " of "}, ASK]},
}


class Listening:
    """A reward model that keeps what it is asked to score."""

    def __init__(self, tokenizer, reading):
        self.source = type("Source", (), {"tokenizer": tokenizer})
        self.reading, self.seen = Reading.described(reading.description()), []

    def score(self, rows, batch_size):
        self.seen += map(list, rows)
        return [0.0] * len(rows)


def trained(own, reading, row):
    rows = Records([to_record(row, "preference", "x:1")])
    return tokenise_reward_rows(rows, own, reading, max_length=9999).rows[0].responses


def sampled(policy, model, asked, answer, ended):
    """The tokens that are scored where a policy answers a prompt so."""
    [prompt] = tokenise_prompts(
        Records([to_record(asked, "prompt", "p:1")]), policy, max_length=9999
    ).rows
    ids = policy.encode(answer, add_special_tokens=False)
    end = [Template(policy).turn_end_id() or policy.eos_token_id]
    columns = reward_columns(
        columns_of([prompt]),
        token_ids=[[*prompt.tokens, *ids, *(end if ended else [])]],
        ended=[ended],
        prompt_text=[prompt.text],
        response_start=[len(prompt.tokens)],
    )
    model.seen.clear()
    text = response_text(policy, prompt.tokens, ids)
    RewardSet([learned_reward(model, policy)])([prompt.prompt], [text], **columns)
    return model.seen[0]
