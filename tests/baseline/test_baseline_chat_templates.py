"""Every chat template that TRL ships: a row has the tokenizer's own ids, and TRL's assistant mask.

TRL marks the answers of most of its templates in a training variant of them. Where the mask or the
text of that differs from ours, EXCEPTIONS says why.
"""

import copy
import json
import re

import pytest
from trl_templates import CALL, FOLDER, NAMES, RESULT, ROWS, answer, ask, source, tokenizer_for

from data_utils import read_records, tokenise_preferences, tokenise_prompts, tokenise_sft
from errors import UserError

pytest.importorskip("trl")
pytestmark = pytest.mark.torch

# The template refuses the row itself.
REFUSED = {
    ("cohere", "tools"),
    ("cohere2", "tools"),
    ("gemma", "tools"),
    ("gemma3", "tools"),
    ("llava_next", "tools"),
    ("gemma", "system"),
}
NO_CALLS = {"deepseek_r1_distill", "idefics3", "lfm2", "qwen2_5_vl", "smolvlm"}  # drop tool calls

HEADER = "TRL trains a part of the header that the generation prompt ends with: nobody writes it"
THOUGHTS = "TRL's variant keeps thoughts in earlier turns, which the model's own template drops"
EXCEPTIONS = {
    ("qwen2_5", None): HEADER,  # the line break after <|im_start|>assistant
    ("gptoss", None): HEADER,  # <|start|>assistant
    ("muse_glimmer", None): HEADER,  # <|start|>assistant
    ("deepseek_r1_distill", None): HEADER,  # <｜Assistant｜>
    ("deepseekv3", None): HEADER,  # <｜Assistant｜>
    ("deepseek_r1_distill", "thought in text"): THOUGHTS,
    ("qwen3", "several"): THOUGHTS,
    ("qwen3", "tools"): THOUGHTS,
    ("qwen3_5_think", "several"): THOUGHTS,
    ("qwen3_5_nothink", "several"): THOUGHTS,
    ("qwen3_6", "several"): THOUGHTS,
    ("glm4moe", None): "TRL's variant writes the next role's token behind each answer, as its end",
    ("llava_next", None): "TRL leaves out the blank that the template writes behind </s>",
    ("diffusion_gemma", "tools"): "TRL leaves out <|tool_response>, at which the model stops",
}


def variant(name):
    """TRL's training template: another file, or the template where it has the marks itself."""
    path = FOLDER / f"{name}_training.jinja"
    text = path.read_text(encoding="utf-8") if path.exists() else source(name)
    return text if re.search(r"{%-?\s*generation", text) else None


def record_of(row, folder):
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return read_records(path).rows


def own_renderings(tokenizer, row):
    """(messages, ids) of what the tokenizer itself makes of a row, in every form it may want."""
    for parts in (False, True):
        for arguments in (dict, str):
            messages = copy.deepcopy(row["messages"])
            for message in messages:
                for call in message.get("tool_calls", ()):
                    if arguments is str:
                        call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
                if parts:
                    message["content"] = [{"type": "text", "text": message["content"]}]
            try:
                text = tokenizer.apply_chat_template(
                    messages, tokenize=False, tools=row.get("tools")
                )
            except Exception:  # the template's own
                continue
            yield messages, tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("shape", ROWS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_are_the_tokenizers_own_and_the_mask_is_that_of_trl(tmp_path, name, shape):
    tokenizer, row = tokenizer_for(name), ROWS[shape]
    records = record_of(row, tmp_path)
    if (name, shape) in REFUSED:
        with pytest.raises(UserError, match="rows.jsonl:1: the chat template refuses"):
            tokenise_sft(records, tokenizer, mask_prompt=True)
        return
    done = tokenise_sft(records, tokenizer, mask_prompt=True)
    tokens, mask = done[0].tokens, done[0].mask
    eos = tokenizer.eos_token_id
    if tokens[-1] == eos:  # ours, where the template writes none
        tokens, mask = tokens[:-1], mask[:-1]
    found = [
        messages
        for messages, ids in own_renderings(tokenizer, row)
        if ids in (tokens, done[0].tokens)
    ]
    assert found, tokenizer.decode(tokens)
    check_nothing_is_lost_in_silence(tokenizer, row, done)
    if (name, None) in EXCEPTIONS or (name, shape) in EXCEPTIONS or variant(name) is None:
        return
    theirs = tokenizer.apply_chat_template(
        found[0],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
        chat_template=variant(name),
        tools=row.get("tools"),
    )
    size = min(len(tokens), len(theirs["input_ids"]))
    assert theirs["input_ids"][:size] == tokens[:size]
    assert theirs["assistant_masks"][:size] == mask[:size]
    assert abs(len(theirs["input_ids"]) - len(tokens)) <= 1


def check_nothing_is_lost_in_silence(tokenizer, row, done):
    """Answers are in the mask, nothing else is, and what a template drops is said."""
    tokens, mask = done[0].tokens, done[0].mask
    trained = tokenizer.decode([t for t, bit in zip(tokens, mask, strict=True) if bit])
    rest = tokenizer.decode([t for t, bit in zip(tokens, mask, strict=True) if not bit])
    said = " ".join(what + example for _, what, example in done.notes)
    for message in row["messages"]:
        wanted = [message["content"], message.get("reasoning_content", "")]
        wanted += [call["function"]["name"] for call in message.get("tool_calls", ())]
        for text in filter(None, wanted):
            if message["role"] != "assistant":
                assert text in rest or f"drops text of a {message['role']} turn" in said
                assert text not in trained
            elif "".join(text.split()) not in "".join(trained.split()):
                assert "drops text of an assistant turn" in said


@pytest.mark.parametrize("name", NAMES)
def test_prompts_and_preferences_begin_alike(tmp_path, name):
    """What PPO gives a model is what reward models and preferences were trained on."""
    tokenizer = tokenizer_for(name)
    row = {"prompt": "what is", "chosen": "the answer", "rejected": "the hello"}
    records = record_of(row, tmp_path)
    long = {"max_length": 4096}  # cohere2 has a long system prompt
    prompts = tokenise_prompts(records, tokenizer, **long)
    pairs = tokenise_preferences(records, tokenizer, **long)
    prompt = prompts[0].tokens
    for tokens, mask in zip(pairs[0].responses, pairs[0].masks, strict=True):
        start = mask.index(1)
        if any("does not follow" in what for _, what, _ in pairs.notes):
            assert tokens[:start] == prompt[:start] and tokens[: len(prompt)] != prompt
        else:
            assert tokens[: len(prompt)] == prompt and start == len(prompt)


@pytest.mark.parametrize("name", sorted(NO_CALLS))
def test_templates_that_drop_tool_calls_are_said_to(tmp_path, name):
    done = tokenise_sft(record_of(ROWS["tools"], tmp_path), tokenizer_for(name), mask_prompt=True)
    assert ("the chat template drops text of an assistant turn", "'weather'") in [
        note[1:] for note in done.notes
    ]


@pytest.mark.parametrize("name", ["deepseek_r1_distill", "deepseekv3", "qwen3_5_nothink"])
def test_a_thought_that_only_the_prompt_opens_is_said(tmp_path, name):
    row = ROWS["thought" if name.startswith("qwen") else "single"]
    done = tokenise_sft(record_of(row, tmp_path), tokenizer_for(name))
    assert [what for _, what, _ in done.notes if "does not follow" in what]


@pytest.mark.parametrize("name", ["qwen3", "qwen3_6", "qwen3_5_think"])
def test_answers_that_change_once_turns_follow_are_said(tmp_path, name):
    done = tokenise_sft(record_of(ROWS["several"], tmp_path), tokenizer_for(name))
    assert [what for _, what, _ in done.notes if "otherwise once turns follow" in what]


def test_exceptions_are_needed():
    """No exception is left for a template that TRL no longer ships."""
    assert {name for name, _ in (*EXCEPTIONS, *REFUSED)} | NO_CALLS <= {*NAMES}
    assert len(NAMES) >= 35


@pytest.mark.parametrize("name", [name for name in NAMES if "gemma4" in name or "_gemma" in name])
def test_gemma_4_answers_two_calls_and_goes_on(tmp_path, name):
    calls = [CALL, {**CALL, "id": "c2", "function": {**CALL["function"], "name": "wind"}}]
    results = [RESULT, {**RESULT, "name": "wind", "content": "30 kn", "tool_call_id": "c2"}]
    turns = [ask("Weather?"), answer("", tool_calls=calls), *results, answer("12 degrees")]
    row = {
        "messages": [*turns, ask("Really?"), answer("so it is")],
        "tools": ROWS["tools"]["tools"],
    }
    tokenizer = tokenizer_for(name)
    made = tokenise_sft(record_of(row, tmp_path), tokenizer, mask_prompt=True)[0]
    trained = tokenizer.decode([t for t, on in zip(made.tokens, made.mask, strict=True) if on])
    for text in ("call:weather", "call:wind", "12 degrees", "so it is"):
        assert text in trained
    for text in ("12 C", "30 kn", "Weather?", "Really?"):
        assert text not in trained
