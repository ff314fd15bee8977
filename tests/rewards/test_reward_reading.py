"""A reward model sees each text in the form and with the ending that it was trained on."""

import json

import mlx.core as mx
import pytest
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer
from transformers import AutoTokenizer

import sft
from data_loading.formats import to_record
from data_utils import Records, tokenise_preferences, tokenise_prompts
from models.load import load_model
from models.reading import Ending, Reading, imported_reading, template_tail, trained_reading
from models.reward_model import RewardModel, load_reward_model, retokeniser, save_reward_head
from rewards.learned import learned_reward
from rewards.reward_rows import tokenise_reward_rows

TURNS = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
NEXT = "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
TEMPLATES = {
    "chat": TURNS + NEXT,
    "square": TURNS.replace("<|{{ m['role'] }}|>", "[{{ m['role'] }}]")
    + NEXT.replace("<|assistant|>", "[assistant]"),
    "eos_last": TURNS + "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}"
    "{% endif %}",
    "no_break": TURNS.replace("<|end|>\n", "<|end|>") + NEXT,
    "plain": None,
}
SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|endoftext|>"]
PAIRS = [
    {"prompt": f"what is {i}", "chosen": f"the answer {i}", "rejected": f"no {i}"} for i in range(6)
]
CHATS = [
    {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "chosen": [{"role": "assistant", "content": row["chosen"]}],
        "rejected": [{"role": "assistant", "content": row["rejected"]}],
    }
    for row in PAIRS
]


def make_model(folder, template, **changes):
    """A tiny model whose template has special tokens of its own."""
    tiny_model_folder(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.eos_token, tokenizer.chat_template = "<|endoftext|>", TEMPLATES[template]
    size = len(tokenizer)
    tiny_model_folder(folder, vocab_size=size, eos_token_id=tokenizer.eos_token_id, **changes)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {name: make_model(root / name, name) for name in TEMPLATES}


@pytest.fixture(scope="module")
def loaded(folders):
    return {name: load_model(folder) for name, folder in folders.items()}


@pytest.mark.parametrize("mark", [{"train": False}, {"loss": 0}, {"weight": 0}])
@pytest.mark.parametrize("kind", ["chosen", "rejected", "scored"])
def test_an_answer_marked_not_to_train_trains_no_reward_model(kind, mark):
    tokenizer = tiny_tokenizer(template="chatml")
    asked, said = {"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}
    no, rows = {"role": "assistant", "content": "no"}, []
    for turns in ((said, no), (said | mark, no), (said, no | mark)):
        rows.append({"prompt": [asked], "chosen": [turns[0]], "rejected": [turns[1]]})
    taken = [rows[0], rows[1 + (kind == "rejected")]]
    if kind == "scored":
        taken = [{"messages": [asked, one], "reward": 1.0} for one in (said, said | mark)]
    reading = trained_reading(tokenizer, turns=True)
    form = "conversation" if kind == "scored" else "preference"
    rows = Records([to_record(row, form, f"rows:{i}") for i, row in enumerate(taken, 1)])
    done = tokenise_reward_rows(rows, tokenizer, reading, max_length=100)
    assert len(done) == 1
    assert [why for _, why in done.refused] == ["no turn of an answer is to be trained"]


def records(rows, kind="preference"):
    return Records([to_record(row, kind, f"rows:{i}") for i, row in enumerate(rows, 1)])


def reward_of(model, **reading) -> RewardModel:
    mx.random.seed(3)
    made = RewardModel(model.model, pooling="last")
    made.source = model
    made.reading = trained_reading(model.tokenizer, **reading)
    return made


class Listening:
    """A reward model that keeps what it is asked to score."""

    def __init__(self, model, reading):
        self.source, self.reading, self.seen = model, reading, []

    def score(self, rows, batch_size):
        self.seen += rows
        return [0.0] * len(rows)


def ask(reward, policy, rows, ends_with=None):
    """Score the chosen answers as PPO does: its prompts, its answers, its own end of turn."""
    prompts = tokenise_prompts(records([{"prompt": r["prompt"]} for r in rows], "prompt"), policy)
    texts = [
        r["chosen"] if isinstance(r["chosen"], str) else r["chosen"][-1]["content"] for r in rows
    ]
    end = [policy.convert_tokens_to_ids(ends_with)] if ends_with else [policy.eos_token_id]
    ids = [
        [*prompt.tokens, *policy.encode(text, add_special_tokens=False), *end]
        for prompt, text in zip(prompts.rows, texts, strict=True)
    ]
    asked = [prompt.prompt for prompt in prompts.rows]
    reward.function(asked, texts, token_ids=ids, ended=[True] * len(ids))


# ------------------------------------------------------------------------------ endings


@pytest.mark.parametrize("rows", [PAIRS, CHATS], ids=["texts", "messages"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_ppo_scores_the_tokens_of_the_training_rows(loaded, name, rows):
    model = loaded[name]
    if name == "plain" and rows is CHATS:
        return
    reading = trained_reading(model.tokenizer)
    done = tokenise_reward_rows(records(rows), model.tokenizer, reading, max_length=100)
    reward = Listening(model, reading)
    learned = learned_reward(reward, model.tokenizer)
    for end in ("<|endoftext|>", *(["<|end|>"] if TEMPLATES[name] else [])):
        reward.seen.clear()
        ask(learned, model.tokenizer, rows, end)
        assert reward.seen == [row.responses[0] for row in done.rows]


@pytest.mark.parametrize("name", [name for name, text in TEMPLATES.items() if text])
def test_rows_end_as_the_template_writes_them(loaded, name):
    """As TRL's RewardTrainer: apply_chat_template, and nothing behind it."""
    tokenizer = loaded[name].tokenizer
    reading = trained_reading(tokenizer)
    done = tokenise_reward_rows(records(CHATS), tokenizer, reading, max_length=100)
    for row, chat in zip(done.rows, CHATS, strict=True):
        for ours, answer in zip(row.responses, ("chosen", "rejected"), strict=True):
            text = tokenizer.apply_chat_template([*chat["prompt"], *chat[answer]], tokenize=False)
            theirs = tokenizer.encode(text, add_special_tokens=False)
            bos = [tokenizer.bos_token_id]
            assert ours in (theirs, bos + theirs)
        assert all(len(m) == len(t) for m, t in zip(row.masks, row.responses, strict=True))
        assert sum(row.masks[0]) >= len(reading.ending)


def test_what_has_not_ended_gets_no_ending_and_a_stop_text_is_an_end(loaded):
    model = loaded["chat"]
    reward = Listening(model, trained_reading(model.tokenizer))
    learned = learned_reward(reward, model.tokenizer)
    learned.function(["a"] * 2, ["b"] * 2, token_ids=[[1, 30, 40]] * 2, ended=[True, False])
    assert reward.seen == [[1, 30, 40, *reward.reading.ending], [1, 30, 40]]


def test_an_ending_is_recorded_and_taken_up_again(tmp_path, loaded):
    model = loaded["chat"]
    made = reward_of(model)
    ending = made.reading.ending
    assert model.tokenizer.decode(list(ending)) == "<|end|>\n"
    save_reward_head(tmp_path / "a.npz", made)
    again = RewardModel(model.model)
    from models.reward_model import load_reward_head

    load_reward_head(again, tmp_path / "a.npz")
    assert again.reading == made.reading and again.reading.ending == ending


def test_without_a_record_texts_end_in_eos_as_they_did(loaded):
    tokenizer = loaded["chat"].tokenizer
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    old = Ending(tokenizer, Reading())
    assert old.put([1, 5, end]) == [1, 5, end, eos]
    assert old.put([1, 5, eos]) == [1, 5, eos] and old.put([1, 5], ended=False) == [1, 5]
    done = tokenise_reward_rows(records(PAIRS), tokenizer, Reading(), max_length=100)
    assert all(tokens[-1] == eos for row in done.rows for tokens in row.responses)


@pytest.mark.parametrize("name", TEMPLATES)
def test_imported_classifiers_get_the_ending_of_trl(loaded, name):
    tokenizer = loaded[name].tokenizer
    reading = imported_reading(tokenizer, {"id2label": {"0": "LABEL_0"}})
    tail = template_tail(tokenizer)
    assert reading.ending == (tuple(tail) if tail else (tokenizer.eos_token_id,))
    # What this program exported before it recorded an ending was trained on another.
    assert imported_reading(tokenizer, {"id2label": {"0": "reward"}}).ending is None


def test_a_row_that_the_ending_makes_too_long_is_refused_and_said(loaded):
    tokenizer = loaded["chat"].tokenizer
    reading = trained_reading(tokenizer)
    longest = max(
        len(tokens)
        for row in tokenise_reward_rows(records(PAIRS), tokenizer, reading, max_length=99).rows
        for tokens in row.responses
    )
    done = tokenise_reward_rows(records(PAIRS), tokenizer, reading, max_length=longest)
    assert len(done) == len(PAIRS) and not done.refused
    cut = tokenise_reward_rows(
        records(PAIRS), tokenizer, reading, max_length=longest - 1, too_long="cut"
    )
    assert max(len(tokens) for row in cut.rows for tokens in row.responses) == longest - 1


# ------------------------------------------------------------------------------ own templates


@pytest.mark.parametrize("theirs", ["square", "chat", "no_break", "plain"])
def test_a_reward_model_with_its_own_template_renders_prompt_and_response(loaded, theirs):
    policy, model = loaded["eos_last"], loaded[theirs]
    rows = PAIRS if theirs == "plain" else CHATS
    reading = trained_reading(model.tokenizer)
    trained = tokenise_reward_rows(records(rows), model.tokenizer, reading, max_length=100)
    reward = Listening(model, reading)
    ask(learned_reward(reward, policy.tokenizer), policy.tokenizer, rows, "<|end|>")
    assert reward.seen == [row.responses[0] for row in trained.rows]


@pytest.mark.parametrize(
    "options",
    [
        {"prompt_template": "Q: {question}\nA: "},
        {"token_format": "role_markers"},
        {"plain": True},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_reward_model_trained_with_other_flags_reads_by_those(loaded, options):
    model = loaded["chat"]
    reading = trained_reading(model.tokenizer, **options)
    assert Reading.described(json.loads(json.dumps(reading.description()))) == reading
    reward = Listening(model, reading)
    learned = learned_reward(reward, model.tokenizer)
    learned.function(
        [[{"role": "user", "content": "hello"}]] if "token_format" in options else ["hello"],
        ["world"],
        token_ids=[[9, 9]],
        ended=[True],
    )
    (seen,) = reward.seen
    text = model.tokenizer.decode(seen[1:])
    assert (
        text
        == {
            "prompt_template": "Q: hello\nA: world<|endoftext|>",
            "token_format": "User: hello\n\nAssistant: world<|endoftext|>",
            "plain": "helloworld<|endoftext|>",
        }[next(iter(options))]
    )


def test_training_writes_down_how_it_read(tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in PAIRS))
    sft.main(
        [
            "--model",
            str(folders["chat"]),
            "--reward-model",
            "--train",
            "--iters",
            "2",
            "--train-file",
            "pairs.jsonl",
            "--save-file",
            "rm.npz",
            "--lora-rank",
            "2",
            "--pooling",
            "last",
            "--output-dir",
            "run",
            "--batch-size",
            "2",
        ]
    )
    base = load_model(folders["chat"])
    made = load_reward_model("rm.npz", base)
    assert made.reading == trained_reading(base.tokenizer)
    chats = base.tokenizer.apply_chat_template(
        [*CHATS[0]["prompt"], *CHATS[0]["chosen"]], tokenize=False
    )
    tokens = base.tokenizer.encode(chats)
    reward = learned_reward(made, base.tokenizer)
    ids = made.source.tokenizer.encode(chats.removesuffix("\n"))
    scores = reward.function(["what is 0"], ["the answer 0"], token_ids=[ids], ended=[True])
    assert scores == made.score([tokens])


@pytest.mark.parametrize("policy", ["chat", "eos_last", "no_break"])
@pytest.mark.parametrize("judge", ["square", "plain"])
def test_texts_that_a_policy_rendered_are_rendered_anew(loaded, policy, judge):
    theirs, own = loaded[policy].tokenizer, loaded[judge].tokenizer
    encode, reading = retokeniser(theirs, own), trained_reading(own)
    prompts = tokenise_prompts(records([{"prompt": r["prompt"]} for r in PAIRS], "prompt"), theirs)
    done = tokenise_reward_rows(records(PAIRS), own, reading, max_length=100)
    # Ends as training rows do, whoever tokenises them.
    alone = tokenise_preferences(records(PAIRS), own)
    assert [row.responses for row in alone.rows] == [row.responses for row in done.rows]
    texts = [
        prompt.text + (" " if judge == "plain" else "") + row["chosen"]
        for prompt, row in zip(prompts.rows, PAIRS, strict=True)
    ]
    if judge == "square":  # its rows have the same tokens; plain text is joined as it stands
        assert [encode(text, True) for text in texts] == [r.responses[0] for r in done.rows]
    assert all(theirs.eos_token not in own.decode(encode(text, False)) for text in texts)
    assert not any("<|user|>" in own.decode(encode(text, True)) for text in texts)
    assert retokeniser(own, own) is None
