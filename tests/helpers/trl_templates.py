"""The chat templates that TRL ships, and rows for them; no names without TRL."""

import copy
import importlib.util
import re
from pathlib import Path

from tiny_tokenizers import tiny_tokenizer

SPEC = importlib.util.find_spec("trl")
FOLDER = Path(SPEC.origin if SPEC else "trl").parent / "chat_templates"
NAMES = sorted(p.stem for p in FOLDER.glob("*.jinja") if not p.stem.endswith("_training"))
CALL = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Rome"}},
}
CITY = {"type": "object", "properties": {"city": {"type": "string", "description": "A city."}}}
TOOL = {
    "name": "weather",
    "description": "The weather.",
    "parameters": {**CITY, "required": ["city"]},
}


def ask(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


SYSTEM = {"role": "system", "content": "be brief"}
RESULT = {"role": "tool", "name": "weather", "content": "12 C", "tool_call_id": "c1"}
THOUGHT = "<think>\nTwo and two.\n</think>\n\n4"
ROWS = {
    "single": {"messages": [ask("what is"), answer("the answer")]},
    "several": {"messages": [ask("what"), answer("the answer"), ask("hello"), answer("world")]},
    "system": {"messages": [SYSTEM, ask("what"), answer("the answer")]},
    "thought": {"messages": [ask("2+2?"), answer("4", reasoning_content="Two and two.")]},
    "thought in text": {"messages": [ask("2+2?"), answer(THOUGHT)]},
    "tools": {
        "messages": [ask("Weather?"), answer("", tool_calls=[CALL]), RESULT, answer("12 degrees")],
        "tools": [{"type": "function", "function": TOOL}],
    },
}


def source(name):
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def tokenizer_for(name):
    """A tokenizer that has what the template writes as special tokens, as the model's has."""
    made = copy.deepcopy(tiny_tokenizer(bos=False))
    pattern = r"<[|｜][^<>\s]*>|<[^<>\s]*[|｜]>|<(?:start|end)_of_\w+>"
    special = sorted(set(re.findall(pattern, source(name))))
    made.add_special_tokens({"additional_special_tokens": special})
    made.chat_template = source(name)
    return made
