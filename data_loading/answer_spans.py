"""Which characters of a rendered conversation are answers, and what its template did to them."""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from data_loading.chat_templates import MARK, THOUGHTS, ChatTemplate, Span, Turns, shared_length
from data_loading.messages import TRAIN_KEYS, BadRow, Message, is_trained
from data_loading.values import shorten

OTHERWISE = "the chat template writes an answer otherwise once turns follow"
OPENED = "the prompt of an answer ends in what the answer in the row does not follow"

Note = tuple[str, str]  # what the person should know, and an example of it

KNOWN_KEYS = {"role", "content", "tool_call_id", *THOUGHTS, *TRAIN_KEYS}
_TAG_BEGUN = re.compile(r"<[^<>\s]*\Z")
_THOUGHT_OPENED = re.compile(r"<think>\s*(</think>\s*)?\Z")
# What may end a turn, otherwise in the middle of a conversation than at its end.
_END = re.compile(r"(\s|<[^<>\s]*>)+\Z")


@dataclass
class Rendered:
    """The text of a row as the model sees it, and whose characters are whose."""

    text: str
    answers: list[Span]  # trained with --mask-prompt: without their header, with their end
    untrained: list[Span] = field(default_factory=list)  # turns that the row says not to train
    notes: list[Note] = field(default_factory=list)


def render_conversation(
    chat: ChatTemplate, messages: list[Message], extras: dict[str, Any], first: int = 0
) -> Rendered:
    """A conversation through the chat template; the answers are those from message `first` on.

    In a whole conversation (`first` 0) a thought that the prompt of an answer opens is trained with
    it, as TRL's training templates mark it; behind a prompt of its own an answer begins where the
    prompt ends.

    What a template loses or changes of a turn is in the notes. BadRow where it refuses the
    conversation, or shows no trace of an answer.
    """
    turns = chat.turns(messages, extras)
    made = Rendered(turns.text, [], notes=unread_fields(chat, messages, extras))
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            made.notes += lost_text(message, turns.text)
            if not is_trained(message) and turns.spans[i] is not None:
                made.untrained.append(turns.spans[i])
            continue
        if i < first and is_trained(message):
            continue
        spans, notes = _answer(chat, messages, extras, turns, i, whole=first == 0)
        if not is_trained(message):
            made.untrained += spans
        elif i >= first:
            made.answers += [span for span in spans if span[0] < span[1]]
            made.notes += notes
    return made


def render_prompt(chat: ChatTemplate, messages: list[Message], extras: dict[str, Any]) -> Rendered:
    """What an answer to a conversation follows."""
    made = Rendered(chat.prompt(messages, extras), [])
    made.notes = unread_fields(chat, messages, extras)
    for message in messages:
        if message["role"] != "assistant":
            made.notes += lost_text(message, made.text)
    return made


# One answer ------------------------------------------------------------------------------------


def _answer(
    chat: ChatTemplate,
    messages: list[Message],
    extras: dict[str, Any],
    turns: Turns,
    i: int,
    whole: bool,
) -> tuple[list[Span], list[Note]]:
    """The characters of the answer `messages[i]`, and what the template did to it."""
    if turns.spans[i] is None:
        raise BadRow(f"the chat template leaves out message {i}, an answer")
    text, (start, end) = turns.text, turns.spans[i]
    turn, last = start, i == len(messages) - 1
    start, notes = _start(chat, messages, extras, turns, i, whole)
    if last:
        end = len(text)
    else:
        alone = chat.turns(messages[: i + 1], extras)
        if alone.spans[i] is None:
            raise BadRow(f"the chat template leaves out message {i}, an answer, at the end")
        here, there = text[start:end], alone.text[alone.spans[i][0] + start - turn :]
        following = turns.spans[i + 1]
        if following is None or following[0] == following[1]:  # written into this turn
            end = start + shared_length(here, there)
        elif _bare(here) != _bare(there):
            what = f"{_differing(there, here)} becomes {_differing(here, there)}"
            notes = [(OTHERWISE, what)]
    lost = lost_text(messages[i], text[start:end])
    if lost:
        notes = [note for note in notes if note[0] != OTHERWISE]
    if turns.generation is not None:
        inside = [span for span in turns.generation if turn <= span[0] < end]
        return inside, lost
    return [(start, end)], lost + notes


def _start(
    chat: ChatTemplate,
    messages: list[Message],
    extras: dict[str, Any],
    turns: Turns,
    i: int,
    whole: bool,
) -> tuple[int, list[Note]]:
    """Where the answer begins behind its header: what a prompt ends with is not part of it."""
    text, (turn, end) = turns.text, turns.spans[i]
    if i == 0:
        shown = chat.turns([{"role": "assistant", "content": MARK}], extras)
        place = shown.spans[0][0] if shown.spans[0] else 0
        header = shown.text[place:].partition(MARK)[0]
        return turn + shared_length(text[turn:end], header) * bool(header.strip()), []
    asked = chat.prompt(messages[:i], extras)
    if text.startswith(asked):
        return min(max(turn, len(_unopened(asked, whole))), end), []
    # Turns before are written otherwise than when the answer was asked for, or this one is.
    asking = chat.turns(messages[:i], extras, ask=True)
    here, there = turns.spans[i - 1], asking.spans[i - 1]
    here, there = (here[0], there[0]) if here and there else (0, 0)
    shared = len(_TAG_BEGUN.sub("", text[here : here + shared_length(text[here:], asked[there:])]))
    start = min(max(turn, here + len(_unopened(text[here : here + shared], whole))), end)
    if not (rest := asked[there + shared :]):
        return start, []
    return start, [(OPENED, shorten(rest))]


def _unopened(asked: str, whole: bool) -> str:
    """A prompt without the thought that it opens: in a conversation that is part of the answer."""
    return _THOUGHT_OPENED.sub("", asked) if whole else asked


def _bare(answer: str) -> str:
    return _END.sub("", answer)


def _differing(one: str, other: str) -> str:
    """The stretch of a text in which it differs from another, short."""
    start = shared_length(one, other)
    end = shared_length(one[start:][::-1], other[start:][::-1])
    return shorten(one[start : len(one) - end])


# What a template leaves out ------------------------------------------------------------------


def lost_text(message: Message, shown: str) -> list[Note]:
    """Notes on what `shown` lacks of a message: text, thoughts, the name of a tool call."""
    texts = [message["content"]]
    if message["role"] == "assistant":
        texts += [message[key] for key in THOUGHTS if isinstance(message.get(key), str)]
        functions = [call.get("function", call) for call in message.get("tool_calls") or ()]
        texts += [f["name"] for f in functions if isinstance(f.get("name"), str)]
    notes = []
    for text in dict.fromkeys(texts):
        if missing := _missing(text, shown):
            article = "an" if message["role"] == "assistant" else "a"
            what = f"the chat template drops text of {article} {message['role']} turn"
            notes.append((what, shorten(missing)))
    return notes


def _missing(text: str, shown: str) -> str:
    """The part of a text that another lacks, spacing aside; "" where it is all there."""
    if text.strip() in shown:
        return ""
    squeezed = _squeeze(shown)
    if _squeeze(text) in squeezed or _squeeze(json.dumps(text)[1:-1]) in squeezed:
        return ""
    thought, tag, answer = text.rpartition("</think>")
    if tag and _squeeze(answer) in squeezed:
        bare = _squeeze(thought).partition("<think>")
        return "" if bare[1] and bare[2] and bare[2] in squeezed else thought + tag
    return text


def _squeeze(text: str) -> str:
    return re.sub(r"\s+", "", text)


def unread_fields(
    chat: ChatTemplate, messages: list[Message], extras: dict[str, Any]
) -> list[Note]:
    """Notes on keys of messages, and fields of the row, that the template never names."""
    source = chat.source(extras)
    if source is None:
        return []
    keys = dict.fromkeys(key for message in messages for key in message if key not in KNOWN_KEYS)
    notes = [
        ("the chat template does not read a key of a message", key)
        for key in keys
        if key not in source
    ]
    names = [name for name in extras if name != "chat_template_kwargs"]
    names += extras.get("chat_template_kwargs", {})
    notes += [
        ("the chat template does not read a field of the row", name)
        for name in names
        if name not in source
    ]
    return notes
