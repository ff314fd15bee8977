"""The parts of the chat, one by one: prompts, cache, penalties, conversations, rating files."""

import json
import os
from dataclasses import replace

import mlx.core as mx
import pytest
from adapters import LORA, PROMPT, randomised, write_adapter
from tiny import tiny_model_folder
from tiny_tokenizers import tiny_tokenizer

from chat.conversation import Conversation, Prompting
from chat.keyboard import StopKey
from chat.rating import Ratings, cannot_rate
from chat.screen import ReplyWriter, WordWrap, columns, columns_of, wrap
from chat.settings import Settings
from chat.speaker import Loader, Speaker, continuation
from data_utils import read_records
from errors import UserError
from models.adapter_files import attach
from models.beam_search import beam_search
from models.load import DEFAULT_MODEL, load_model
from run_folder.output import printable

PLAIN = {"token_format": "standard", "prompt_template": None}


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def digits(description: dict | None = None) -> Speaker:
    loaded = load_model()
    tuning = randomised(attach(loaded.model, description)) if description else None
    return Speaker("digits", loaded, Prompting(loaded.tokenizer), tuning)


# ------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize("template", ["chatml", "llama3"])
def test_a_conversation_is_what_the_chat_template_makes_of_it(template):
    tokenizer = tiny_tokenizer(bos=template == "llama3", template=template, wrapped=True)
    prompting = Prompting(tokenizer)
    said = [
        {"role": "system", "content": "be kind"},
        *user("hello"),
        {"role": "assistant", "content": "hi"},
        *user("again"),
    ]
    tokens, text = prompting.tokens(said)
    expected = tokenizer.apply_chat_template(said, add_generation_prompt=True)
    assert prompting.has_turns and tokens == expected
    assert tokens.count(tokenizer.bos_token_id) == (template == "llama3")
    assert text in tokenizer.decode(expected)


def test_a_plain_model_is_given_the_last_text_with_one_bos():
    tokenizer = tiny_tokenizer(wrapped=True)
    prompting = Prompting(tokenizer)
    said = [*user("first"), {"role": "assistant", "content": "x"}, *user("hello")]
    assert not prompting.has_turns
    assert prompting.tokens(said) == (tokenizer.encode("hello"), "hello")
    assert prompting.tokens(user("<s>hello"))[0] == tokenizer.encode("hello")
    framed = Prompting(tokenizer, prompt_template="Q: {prompt}\\nA:")
    assert framed.tokens(user("hello"))[0] == tokenizer.encode("Q: hello\nA:")
    marked = Prompting(tokenizer, token_format="role_markers")
    assert marked.has_turns
    assert marked.tokens(user("hello"))[1] == "User: hello\n\nAssistant:"
    with pytest.raises(UserError, match="leave one of them out"):
        Prompting(tokenizer, token_format="role_markers", prompt_template="{prompt}")


def test_a_reply_ends_at_the_token_that_ends_a_turn():
    tokenizer = tiny_tokenizer(template="llama3", wrapped=True)
    turn_end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    tokenizer._eos_token_ids = {tokenizer.eos_token_id}  # the tokenizer is shared between tests
    Prompting(tokenizer).stop_at_turn_end()
    assert tokenizer.eos_token_ids == {tokenizer.eos_token_id, turn_end}
    plain = tiny_tokenizer(wrapped=True)
    Prompting(plain).stop_at_turn_end()
    assert plain.eos_token_ids == {plain.eos_token_id}


def test_the_text_of_a_reply_keeps_its_leading_space():
    tokenizer = load_model().tokenizer
    prompt = tokenizer.encode("8 20")
    reply = tokenizer.encode(" 22 30", add_special_tokens=False)
    eos = tokenizer.eos_token_id
    assert continuation(tokenizer, prompt, [*reply, eos], {eos}) == " 22 30"
    assert continuation(tokenizer, prompt, [eos], {eos}) == ""


# ------------------------------------------------------------------------------ replies


@pytest.mark.parametrize("description", [None, LORA, PROMPT])
def test_a_kept_cache_changes_no_reply(description):
    speaker = digits(description)
    settings = Settings(max_tokens=8, repetition_penalty=5.0)
    prompts = ["8 20", "8 20 22", "8 20 22 30 36", "5 7", "5"]
    replies = [speaker.reply(user(p), settings) for p in prompts]
    assert speaker._cached  # or nothing was tested
    for prompt, reply in zip(prompts, replies, strict=True):
        speaker._forget()
        assert speaker.reply(user(prompt), settings).tokens == reply.tokens


@pytest.mark.parametrize("description", [None, PROMPT])
def test_the_repetition_penalty_is_that_of_the_paper(description):
    """Keskar et al. 2019: logits of the last tokens are divided (below 0: multiplied)."""
    speaker = digits(description)
    prompt, eos = speaker.prompting.tokens(user("8 20 22 8"))[0], speaker.loaded.eos_ids
    prefix = speaker.tuning.prefix if speaker.tuning else ()
    settings = Settings(max_tokens=6, repetition_penalty=1.8, repetition_context_size=4)
    reply = speaker.reply(user("8 20 22 8"), settings)
    tokens = list(prompt)
    while len(tokens) < len(prompt) + 6 and not (tokens[-1] in eos and tokens != prompt):
        logits = speaker.loaded.model(mx.array([[*prefix, *tokens]]))[0, -1].tolist()
        for token in set(tokens[-4:]):
            logits[token] = logits[token] / 1.8 if logits[token] > 0 else logits[token] * 1.8
        tokens.append(logits.index(max(logits)))
    assert reply.tokens == tokens[len(prompt) :]


@pytest.mark.parametrize("description", [None, PROMPT])
def test_the_repetition_penalty_in_a_beam_search(tmp_path, description):
    loaded = load_model(tiny_model_folder(tmp_path / "m"))
    tuning = randomised(attach(loaded.model, description)) if description else None
    speaker = Speaker("tiny", loaded, Prompting(loaded.tokenizer), tuning)
    prompt = speaker.prompting.tokens(user("hello world"))[0]

    def penalise(tokens, logprobs):
        rows = logprobs[0].tolist()
        for token in set(tokens[-20:]) & set(range(len(rows))):  # virtual tokens have no logits
            rows[token] *= 4
        return mx.array([rows])

    prefix = tuning.prefix if tuning else ()
    beams = dict(num_beams=3, max_tokens=30, eos_ids=loaded.eos_ids)
    expected = beam_search(loaded.model, [*prefix, *prompt], processor=penalise, **beams)[0]
    settings = Settings(max_tokens=30, num_beams=3)
    penalised = replace(settings, repetition_penalty=4.0, repetition_context_size=20)
    assert speaker.reply(user("hello world"), penalised).tokens == expected.tokens
    assert speaker.reply(user("hello world"), settings).tokens != expected.tokens


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_each_filter_at_its_narrowest_leaves_the_likeliest(only):
    speaker = digits()
    greedy = speaker.reply(user("8 20"), Settings(max_tokens=6))
    mx.random.seed(0)
    assert speaker.reply(user("8 20"), Settings(max_tokens=6, temp=2.0, **only)).tokens == (
        greedy.tokens
    )
    free = [speaker.reply(user("8 20"), Settings(max_tokens=6, temp=2.0)) for _ in range(3)]
    assert any(reply.tokens != greedy.tokens for reply in free)


def test_what_is_shown_is_what_is_kept(tmp_path):
    loaded = load_model(tiny_model_folder(tmp_path / "m"))
    speaker = Speaker("tiny", loaded, Prompting(loaded.tokenizer))
    for beams in (1, 2):
        shown = []
        reply = speaker.reply(
            user("hello"), Settings(max_tokens=20, num_beams=beams), show=shown.append
        )
        assert "".join(shown) == reply.text != ""
        assert len(reply.tokens) == 20 and reply.ended == "length"


def test_stopping_keeps_what_was_written():
    speaker, seen = digits(), []
    reply = speaker.reply(
        user("8 20"), Settings(max_tokens=9), show=seen.append, should_stop=lambda: len(seen) >= 3
    )
    assert len(reply.tokens) == 3 and reply.ended == "interrupted"
    whole = speaker.reply(user("8 20"), Settings(max_tokens=9))
    assert whole.tokens[:3] == reply.tokens and len(whole.tokens) > 3


def test_one_base_serves_several_speakers(tmp_path):
    write_adapter(tmp_path / "lora.npz", LORA)
    write_adapter(tmp_path / "soft.npz", PROMPT)
    write_adapter(tmp_path / "full.npz", {"fine_tune_type": "full"})
    loader = Loader(**PLAIN)
    speakers = [
        loader.speaker(None, tmp_path / "lora.npz"),
        loader.other(str(DEFAULT_MODEL), None),
        loader.other(str(tmp_path / "soft.npz"), None),
    ]
    full = loader.other(str(tmp_path / "full.npz"), None)
    assert len({id(speaker.loaded) for speaker in speakers}) == 1
    assert full.loaded is not speakers[0].loaded
    settings = Settings(max_tokens=6)
    once = [s.reply(user("8 20"), settings).tokens for s in (*speakers, full)]
    assert once == [s.reply(user("8 20"), settings).tokens for s in (*speakers, full)]
    assert once[1] == digits().reply(user("8 20"), settings).tokens
    assert once[0] == digits(LORA).reply(user("8 20"), settings).tokens
    assert once[2] == digits(PROMPT).reply(user("8 20"), settings).tokens
    assert len({tuple(tokens) for tokens in once}) == 4


def test_a_second_ctrl_c_interrupts():
    with StopKey() as stop:
        stop._press()
        assert stop()
        with pytest.raises(KeyboardInterrupt):
            stop._press()


# ------------------------------------------------------------------------------ files


def test_a_conversation_comes_back_from_its_file(tmp_path):
    talk = Conversation("be kind")
    with pytest.raises(UserError, match="nothing has been said"):
        talk.save(tmp_path / "talk.json")
    talk.add("hello", "hi ☀")
    talk.save(tmp_path / "talk.json")
    assert Conversation.load(tmp_path / "talk.json") == talk


@pytest.mark.parametrize(
    "place, keys",
    [
        (0, {"name": "house rules"}),
        (1, {"loss": False, "name": "Ann"}),
        (2, {"train": False}),
        (2, {"weight": 0, "reasoning_content": "hm"}),
    ],
)
def test_marks_and_further_keys_of_messages_come_back_and_reach_the_template(tmp_path, place, keys):
    said = [("system", "be kind"), ("user", "hi"), ("assistant", "hello")]
    messages = [{"role": role, "content": text} for role, text in said]
    messages[place] |= keys
    path = tmp_path / "said.json"
    path.write_text(json.dumps({"messages": messages}))
    conversation = Conversation.load(path)
    assert conversation.messages("and now?") == [*messages, *user("and now?")]
    conversation.save(path)
    assert json.loads(path.read_text()) == {"messages": messages}


@pytest.mark.parametrize(
    "text, message",
    [
        ("{", "not one conversation as JSON"),
        ("[]", "not a conversation"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "must take turns"),
        ('{"messages": [{"role": "king", "content": "a"}]}', "is none of"),
    ],
)
def test_broken_conversations_are_refused(tmp_path, text, message):
    file = tmp_path / "talk.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        Conversation.load(file)


def test_ratings_are_added_behind_what_is_there(tmp_path):
    file = tmp_path / "r.jsonl"
    old = '{"prompt": "a", "completion": "b", "label": true}'
    file.write_text(old, encoding="utf-8")  # without a line break at its end
    ratings = Ratings(file, "unpaired")
    ratings.add_label("8", " 9", False)
    ratings.add_label(user("hello"), "hi", True)
    lines = file.read_text(encoding="utf-8").splitlines()
    assert lines[0] == old and json.loads(lines[1])["completion"] == " 9"
    assert json.loads(lines[2])["completion"] == [{"role": "assistant", "content": "hi"}]
    assert ratings.summary() == f"2 ratings added to {file} (1 bad, 1 good)"
    assert ratings.take_back() and ratings.take_back() and not ratings.take_back()
    assert file.read_text(encoding="utf-8") == old


def test_a_rating_is_not_taken_back_from_a_file_that_others_changed(tmp_path):
    ratings = Ratings(tmp_path / "r.jsonl", "unpaired")
    ratings.add_label("8", " 9", False)
    (tmp_path / "r.jsonl").write_text('{"prompt": "mine", "completion": "x", "label": true}\n')
    before = (tmp_path / "r.jsonl").read_bytes()
    assert not ratings.take_back()
    assert (tmp_path / "r.jsonl").read_bytes() == before


def test_a_row_that_others_added_behind_a_rating_stays(tmp_path):
    ratings = Ratings(tmp_path / "r.jsonl", "unpaired")
    ratings.add_label("8", " 9", False)
    with open(tmp_path / "r.jsonl", "a", encoding="utf-8") as file:
        file.write("{}\n")
    assert ratings.take_back()
    assert (tmp_path / "r.jsonl").read_text() == "{}\n"


def test_a_rating_in_the_middle_is_taken_back_alone(tmp_path):
    file = tmp_path / "r.jsonl"
    file.write_text('{"prompt": "0", "completion": " 1", "label": true}')  # no end of line
    ratings = Ratings(file, "unpaired")
    numbers = [ratings.add_label(str(n), f" {n}", n % 2 == 0) for n in range(4)]
    assert ratings.take_back(numbers[1]) and not ratings.take_back(numbers[1])
    assert ratings.take_back(numbers[2]) and ratings.take_back()
    assert [r.prompt for r in read_records(file)] == ["0", "0"]
    assert ratings.summary().startswith("1 rating added")
    assert ratings.take_back(numbers[0])
    assert [r.completion for r in read_records(file)] == [" 1"]


def test_a_full_disk_leaves_no_half_of_a_rating(tmp_path, monkeypatch):
    ratings = Ratings(tmp_path / "r.jsonl", "unpaired")
    ratings.add_label("8", " 9", True)
    before = (tmp_path / "r.jsonl").read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left"):
            ratings.add_label("5", " 6", False)
    assert (tmp_path / "r.jsonl").read_bytes() == before
    ratings.add_label("5", " 6", False)
    assert [r.label for r in read_records(tmp_path / "r.jsonl")] == [True, False]


def test_ratings_of_two_kinds_do_not_share_a_file(tmp_path):
    Ratings(tmp_path / "r.jsonl", "unpaired").add_label("8", " 9", False)
    with pytest.raises(UserError, match="holds no preference records"):
        Ratings(tmp_path / "r.jsonl", "preference")
    with pytest.raises(UserError, match="no such folder"):
        Ratings(tmp_path / "gone" / "r.jsonl", "preference")


def test_replies_that_make_no_record_are_not_rated():
    assert "empty" in cannot_rate([" "]) and "same" in cannot_rate(["a", "a"])
    assert cannot_rate(["a"]) is None and cannot_rate(["a", "b"]) is None


# ------------------------------------------------------------------------------ screen


class Terminal:
    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


@pytest.mark.parametrize(("continues", "first"), [(False, ""), (True, " \n ")])
def test_white_space_at_the_ends_of_a_reply(continues, first):
    terminal = Terminal()
    writer = ReplyWriter(terminal, width=80, continues=continues)
    for piece in (" ", "\n a", " ", "b\x1b[2J", "\n\n"):
        writer(piece)
    writer.end()
    assert terminal.text == first.lstrip(" ") + "a b[2J\n"  # and no escape sequence gets there
    plain = Terminal()
    writer = ReplyWriter(plain, width=None, continues=continues)
    writer(" 8 ")
    writer.end()
    assert plain.text == (" 8\n" if continues else "8\n")


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two three four", ["one two", "three four"]),
        ("one two\n\n  three", ["one two", "", "  three"]),
        ("abcdefghijklmnopq rs", ["abcdefghij", "klmnopq rs"]),
        ("日本語日本語", ["日本語日本", "語"]),
        ("exactly 10 columns", ["exactly 10", "columns"]),
    ],
)
def test_a_stream_is_broken_between_words(text, lines, size):
    wrap = WordWrap(10)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    shown = "".join(wrap.add(piece) for piece in pieces) + wrap.rest()
    assert shown.split("\n") == lines


def test_columns_stand_under_each_other():
    assert columns_of("日本") == 4 and printable("a\x07b\n") == "ab\n"
    rows = columns([wrap("日本語", 10), wrap("one two three", 10)], 10)
    assert rows == ["日本語" + " " * 4 + "  │  one two", " " * 10 + "  │  three"]
    assert all(columns_of(line) <= 10 for line in wrap("日本語" * 9, 10))


# ------------------------------------------------------------------------------ settings


def test_settings_change_by_any_spelling_and_are_checked():
    settings = Settings()
    for written in ("top-p", "top_p", "--top-p"):
        assert settings.changed(Settings.full_name(written), "0.5").top_p == 0.5
    assert settings.changed("temp", "0.7").temp == 0.7
    assert settings.changed("seed", "3").changed("seed", "none").seed is None
    for name, value in (("top_p", "2"), ("top_p", "high"), ("max_tokens", "1.5"), ("x", "1")):
        with pytest.raises(UserError):
            settings.changed(name, value)
