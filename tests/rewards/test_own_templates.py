"""A reward model with a template or a tokenizer of its own scores the tokens it was trained on."""

import copy
import json

import pytest
from scored_texts import Listening
from tiny import tiny_model_folder
from tiny_tokenizers import metaspace_tokenizer, tiny_tokenizer

import group_training
import ppo_training
from command_line.sft_flags import parse_arguments
from command_line.sft_rows import load_rows
from data_loading.formats import to_record
from data_utils import Records
from errors import UserError
from models.adapter_files import attach, save_adapter
from models.load import load_model
from models.reading import Ending, trained_reading
from models.reward_model import RewardModel, save_reward_head
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
LORA = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": {"rank": 2, "scale": 1.0}}
POLICIES = {name: tiny_tokenizer(template=name) for name in ("chatml", "llama3", "mistral", None)}


def judge(kind):
    """Another template, another vocabulary, or no template at all."""
    made = copy.deepcopy(tiny_tokenizer() if kind == "template" else metaspace_tokenizer())
    made.chat_template = None if kind == "no template" else SQUARE
    return made


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
    rows = Records([to_record({"text": "what is"}, "text", "x:1")])
    [pair] = make_pairs(rows, tokenizer, {"max_length": 500, "skip_bad_rows": False})[0]
    assert tokenizer.decode(pair.tokens[-1:]) == "</s>"  # no template wrote it


SEEN = """import json
def seen(prompts, responses, ended, **columns):
    with open("seen.jsonl", "a") as file:
        for row in zip(prompts, responses, ended):
            file.write(json.dumps(row) + "\\n")
    return [0.0] * len(prompts)
"""


@pytest.mark.parametrize("kind", ["template", "no template"])
@pytest.mark.parametrize("script", [ppo_training, group_training], ids=["ppo", "group"])
def test_rollouts_are_scored_as_rows_are_trained(kind, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    policy = tiny_model_folder(tmp_path / "policy", template="chatml", tie_word_embeddings=True)
    own = judge("template")
    tiny_model_folder(tmp_path / "judge")
    own.chat_template = SQUARE if kind == "template" else None
    own.save_pretrained(tmp_path / "judge")
    made = RewardModel(load_model(tmp_path / "judge").model, pooling="last")
    made.reading = trained_reading(own)
    save_reward_head(tmp_path / "judge", made)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "what is the"}) + "\n")
    (tmp_path / "mine.py").write_text(SEEN)
    scored = []
    score = RewardModel.score

    def listening(self, rows, *more):
        scored.extend(rows)
        return score(self, rows, *more)

    monkeypatch.setattr(RewardModel, "score", listening)
    words = (
        f"--model {policy} --reward-model judge --reward-function mine.py:seen --batch-size 8 "
        "--num-steps 1 --max-new-tokens 4 --eval-every 0 --save-every 0 --train-file rows.jsonl "
        "--output-dir run --lora-rank 2 --seed 2"
    )
    words += " --mini-batch-size 8" if script is ppo_training else " --num-generations 4"
    script.main(words.split())
    seen = [json.loads(line) for line in (tmp_path / "seen.jsonl").read_text().splitlines()]
    assert len(seen) == len(scored) == 8
    ending = Ending(own, made.reading)
    for (prompt, response, ended), ids in zip(seen, scored, strict=True):
        row = {"prompt": prompt, "chosen": response or " ", "rejected": "the other"}
        rows = Records([to_record(row, "preference", "x:1")])
        [trained] = tokenise_reward_rows(rows, own, made.reading, max_length=99).rows
        assert ids == (trained.chosen if ended else ending.bare(trained.chosen))


@pytest.mark.parametrize(
    "options", [{"prompt_template": "Q: {prompt}\nA:"}, {"token_format": "role_markers"}]
)
def test_a_reward_model_that_goes_on_reads_as_it_did(options, tmp_path, capsys):
    """--test, or more training, without the flags that it was first trained with."""
    model = str(tiny_model_folder(tmp_path / "model", template="chatml"))
    loaded = load_model(model)
    made = RewardModel(loaded.model, tuning=attach(loaded.model, LORA))
    made.reading = trained_reading(loaded.tokenizer, **options)
    save_adapter(tmp_path / "a.npz", made.tuning, loaded, head="reward_head")
    save_reward_head(tmp_path / "a.npz", made)
    row = {"prompt": "what", "chosen": "the answer", "rejected": "no"}
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 2)
    words = ["--model", model, "--reward-model", "--test", "--test-file"]
    words += [str(tmp_path / "rows.jsonl"), "--resume-adapter-file", str(tmp_path / "a.npz")]
    rows = load_rows(parse_arguments(words), loaded.tokenizer)
    first = loaded.tokenizer.decode(rows["test"][0].responses[0])
    assert first.startswith("<s>Q: what" if "prompt_template" in options else "<s>what")
    assert f"note: --{next(iter(options)).replace('_', '-')} is " in capsys.readouterr().out
    assert rows["reading"].description() == made.reading.description()
    chosen = load_rows(parse_arguments([*words, "--token-format", "standard"]), loaded.tokenizer)
    assert chosen["reading"] == trained_reading(loaded.tokenizer)


def test_of_an_answer_of_several_turns_the_last_is_the_response():
    rows = Records([to_record(ROWS["answers of several turns"], "preference", "x:1")])
    made, _ = make_pairs(rows, POLICIES["chatml"], {"max_length": 500, "skip_bad_rows": False})
    assert [pair.response for pair in made] == ["of the", "no"]
    assert [pair.prompt for pair in made] == [[ASK, SAID, ASK]] * 2
