"""The tokenizer's chat template: the text it makes of messages, and which of it is whose turn.

Turns are found by marks that a copy of the template writes where its loop takes the next message.
The text is always that of the template itself; the copy only says where turns begin.
"""

import functools
import itertools
import json
import re
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import jinja2

from data_loading.messages import BadRow, Message
from data_loading.values import shorten

Span = tuple[int, int]  # characters of a text, from and up to

MARK = "@@the answer stands here@@"  # stands in for a content, to see what a template adds
CALL = "name_of_the_call"  # likewise, for a tool call and its argument
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys that hold an answer's thoughts
TURN = "turn_of_the_row"  # the key by which the copy of a template tells messages apart
OPEN, CLOSE = "\ue000", "\ue001"  # around a mark; characters for private use
_MARKS = re.compile(f"{OPEN}([^{CLOSE}]*){CLOSE}")


@dataclass
class Turns:
    """A rendered conversation: whose turn stands where, None for messages without a place."""

    text: str
    spans: list[Span | None]  # of each message
    generation: list[Span] | None  # inside {% generation %}; None where the template has no such


class ChatTemplate:
    """The chat template of one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer or mlx-lm's wrapper of one, with a chat template.
        options: further arguments of the template, such as enable_thinking.
    """

    def __init__(self, tokenizer: Any, options: dict[str, Any] | None = None) -> None:
        self.tokenizer, self.options = tokenizer, options or {}
        self._call_forms: dict[bool, tuple[Any, type]] = {}  # with empty contents, without

    # What a row gives ------------------------------------------------------------------------

    def render(self, messages: list[Message], extras: dict[str, Any], *, ask: bool = False) -> str:
        """The text of a conversation; with `ask` up to where its next answer begins.

        `extras` are further fields of the row for the template, such as tools and documents.
        BadRow where the template refuses them.
        """
        return self._apply(self._suited(messages, extras), extras, ask)

    def source(self, extras: dict[str, Any]) -> str | None:
        """The template as text; None where the tokenizer has Python code in its place."""
        if getattr(self.tokenizer, "_chat_template", None) is not None:  # of mlx-lm's wrapper
            return None
        try:
            return self.tokenizer.get_chat_template(None, tools=extras.get("tools"))
        except (ValueError, AttributeError):
            return None

    def prompt(self, messages: list[Message], extras: dict[str, Any]) -> str:
        """The text that an answer to `messages` follows: with its header, whoever writes that."""
        asked = self.render(messages, extras, ask=True)
        if asked != self.render(messages, extras):
            return asked
        # The template knows no generation prompt; where it writes an answer shows the header.
        answered = self.render([*messages, {"role": "assistant", "content": MARK}], extras)
        before = answered.partition(MARK)[0]
        header = before.removeprefix(asked)
        return before if before.startswith(asked) and header.strip() else asked

    def turns(self, messages: list[Message], extras: dict[str, Any], *, ask: bool = False) -> Turns:
        """The text and the place of every turn in it."""
        suited = self._suited(messages, extras)
        text = self._apply(suited, extras, ask)
        source = self.source(extras)
        marked = source and marked_source(source)
        if marked and OPEN not in text:
            numbered = [{**message, TURN: i} for i, message in enumerate(suited)]
            try:
                written = self._apply(numbered, extras, ask, marked)
            except BadRow:  # a template that reads all keys of a message
                written = ""
            found = read_marks(written, len(messages))
            if found is not None and found.text == text:
                return found
        return Turns(text, self._spans_by_prefix(suited, extras, text), None)

    def _spans_by_prefix(
        self, messages: list[Message], extras: dict[str, Any], text: str
    ) -> list[Span | None]:
        """Places of turns where the text of fewer turns is the beginning of that of more."""
        ends = [0]
        for count in range(1, len(messages) + 1):
            upto = self._apply(messages[:count], extras, False)
            if not text.startswith(upto) or len(upto) < ends[-1]:
                raise BadRow(
                    "the chat template writes a turn otherwise once turns follow, and "
                    "where each begins cannot be told"
                )
            ends.append(len(upto))
        return list(itertools.pairwise(ends))

    # How messages have to look for this template ------------------------------------------------

    def _suited(self, messages: list[Message], extras: dict[str, Any]) -> list[Message]:
        """The messages in the form that the template shows."""
        if any(key in message for message in messages for key in THOUGHTS):
            source = self.source(extras) or ""
            read = [key for key in THOUGHTS if re.search(rf"""[.'"]{key}\b""", source)]
            messages = [with_known_thoughts(message, read) for message in messages]
        if self._takes_parts:
            messages = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages
            ]
        if not any(message.get("tool_calls") for message in messages):
            return messages
        bare = any(m.get("tool_calls") and not m["content"] for m in messages)
        if bare not in self._call_forms:
            self._call_forms[bare] = self._form_of_calls(messages, extras)
        return [with_calls(message, *self._call_forms[bare]) for message in messages]

    def _form_of_calls(self, messages: list[Message], extras: dict[str, Any]) -> tuple[Any, type]:
        """(empty content, type of arguments) with which the template shows tool calls."""
        probes = [with_marked_calls(message) for message in messages]
        works, reason = [], None
        for form in itertools.product(("", None, ...), (dict, str)):
            try:
                text = self._apply([with_calls(m, *form) for m in probes], extras, False)
            except BadRow as error:
                reason = reason or error
                continue
            works.append(form)
            # Neither left out, nor as Python writes an object, nor as JSON within JSON.
            if text.count(CALL) >= 2 and f"'{CALL}'" not in text and f'\\"{CALL}' not in text:
                return form
        if not works:
            raise reason
        return works[0]

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether contents have to be lists of parts, as in templates of models that see images."""
        asked = [{"role": "user", "content": MARK}]
        parts = [{"role": "user", "content": [{"type": "text", "text": MARK}]}]
        return not self._shows_mark(asked) and self._shows_mark(parts)

    def _shows_mark(self, messages: list[Message]) -> bool:
        try:
            return MARK in self._apply(messages, {}, False)
        except BadRow:
            return False

    def _apply(
        self,
        messages: list[Message],
        extras: dict[str, Any],
        ask: bool,
        source: str | None = None,
    ) -> str:
        given = {**self.options, **extras, **extras.get("chat_template_kwargs", {})}
        given.pop("chat_template_kwargs", None)
        if source is not None:
            given["chat_template"] = source
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=ask, **given
            )
        except Exception as error:  # whatever the template's own code raises
            reason = shorten(str(error).partition("\n")[0], 120)
            raise BadRow(f"the chat template refuses the conversation: {reason}") from error


def with_known_thoughts(message: Message, read: list[str]) -> Message:
    """A message whose thoughts stand under the key that the template reads, if it reads one."""
    own = [key for key in THOUGHTS if key in message]
    if len(own) != 1 or not read or own[0] in read:
        return message
    return {read[0] if key == own[0] else key: value for key, value in message.items()}


def with_calls(message: Message, content: Any, arguments: type) -> Message:
    """A message with tool calls as one kind of template wants it.

    An empty `content` becomes this one (... for none at all); arguments an object or its JSON.
    """
    if not message.get("tool_calls"):
        return message
    made = {**message, "tool_calls": [_call(call, arguments) for call in message["tool_calls"]]}
    if not message["content"]:
        made["content"] = content
        if content is ...:
            del made["content"]
    return made


def _call(call: Any, arguments: type) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else {}
    if arguments is dict or not isinstance(function.get("arguments"), dict):
        return call
    written = {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}
    return {**call, "function": written} if "function" in call else written


def with_marked_calls(message: Message) -> Message:
    """A message whose tool calls have a name and an argument that are found again."""
    if not message.get("tool_calls"):
        return message
    call = {"name": CALL, "arguments": {CALL: "a"}}
    calls = [
        {**old, "function": {**old["function"], **call}} if "function" in old else {**old, **call}
        for old in message["tool_calls"]
    ]
    return {**message, "tool_calls": calls}


# The copy with marks --------------------------------------------------------------------------

_LEXER = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)


@functools.lru_cache(maxsize=64)
def marked_source(source: str) -> str | None:
    """A template that also marks where each message begins, where its loop ends, and generation.

    The loops are those over something named messages. None where there is no such loop, or the
    template is none that jinja reads.
    """
    try:
        # {%- has lost the blanks before it: one keeps it from a brace of the text, and is stripped.
        tokens = [
            (kind, " " + value if value in ("{%-", "{{-", "{#-") else value)
            for _, kind, value in _LEXER.lex(source)
        ]
    except jinja2.TemplateError:
        return None
    made: list[str] = []
    loops: list[int | None] = []  # the loops that are open; None for those that are not marked
    count = 0
    for tag in _tags(tokens):
        words = [value for kind, value in tag if kind in ("name", "operator")]
        if tag[0][0] != "block_begin" or not words:
            made += [value for _, value in tag]
            continue
        mark = ""
        if words[0] == "for":
            plain = len(words) > 3 and words[2] == "in" and "messages" in words[3]
            loops.append(count if plain else None)
            if plain:
                mark = _turn_mark(count, words[1])
                count += 1
        elif words[0] == "endfor" and loops:
            number = loops.pop()
            mark = "" if number is None else _mark(f"{number}:end")
        elif words[0] in ("generation", "endgeneration"):
            tag = [tag[0], ("name", " set turn_ = 0 "), tag[-1]]
            mark = _mark(words[0])
        made += [value for _, value in tag[:-1]]
        if mark:  # what follows the tag's end is stripped, or not, as it was
            made.append("%}" + mark + "{% set turn_ = 0 ")
        made.append(tag[-1][1])
    return "".join(made) if count else None


def _tags(tokens: list[tuple[str, str]]):
    """Tokens of a template in groups: each tag whole, anything else alone."""
    tag: list[tuple[str, str]] = []
    for token in tokens:
        tag.append(token)
        if tag[0][0] != "block_begin" or token[0] == "block_end":
            yield tag
            tag = []
    if tag:
        yield tag


def _mark(name: str) -> str:
    return "{{ '" + OPEN + name + CLOSE + "' }}"


def _turn_mark(number: int, variable: str) -> str:
    there = f"{variable} is mapping and {variable}['{TURN}'] is defined"
    name = f"'{OPEN}{number}:' ~ {variable}['{TURN}'] ~ '{CLOSE}'"
    return "{% if " + there + " %}{{ " + name + " }}{% endif %}"


def read_marks(written: str, count: int) -> Turns | None:
    """The text without its marks, and the places they say; None where they say none."""
    text, at, generation = "", 0, []
    starts: dict[str, list[tuple[int, int]]] = {}  # loop -> (message, where it begins)
    ends: dict[str, list[int]] = {}
    marked = "generation" in written and f"{OPEN}generation{CLOSE}" in written
    for mark in _MARKS.finditer(written):
        text += written[at : mark.start()]
        at = mark.end()
        loop, _, what = mark[1].partition(":")
        if loop == "generation":
            generation.append((len(text), len(text)))
        elif loop == "endgeneration":
            generation[-1] = (generation[-1][0], len(text))
        elif what == "end":
            ends.setdefault(loop, []).append(len(text))
        else:
            starts.setdefault(loop, []).append((int(what), len(text)))
    text += written[at:]
    loops = [loop for loop in starts if len(ends.get(loop, ())) == 1]
    if not loops:
        return None
    # A template may look through its messages before it writes them.
    main = max(loops, key=lambda loop: ends[loop][0] - starts[loop][0][1])
    numbers = [number for number, _ in starts[main]]
    if numbers != sorted(set(numbers)):
        return None
    places = [place for _, place in starts[main]] + ends[main]
    spans: list[Span | None] = [None] * count
    for number, span in zip(numbers, itertools.pairwise(places), strict=True):
        spans[number] = span
    return Turns(text, spans, generation if marked else None)


def shared_length(one: str, other: str) -> int:
    """How many characters two texts begin with alike."""
    return len(commonprefix([one, other]))
