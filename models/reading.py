"""How a reward model reads a text: by which template, and in what a text ends that has ended.

A reward model scores a text by what stands at its end, so training, PPO, score.py, the chat, the
exported model and its card have to end texts alike. What they end in is recorded as token ids.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MARK = "@@the answer stands here@@"  # stands in for an answer, to see what a template adds


@dataclass(frozen=True)
class Reading:
    """What is recorded beside a reward head.

    `ending`: the token ids behind a response that ended by itself. None, as in models from before
    it was recorded: EOS, behind whatever else the text ends in.
    """

    ending: tuple[int, ...] | None = None
    prompt_template: str | None = None
    token_format: str = "standard"
    plain: bool = False  # texts as they are, although the tokenizer has a chat template
    turns: bool = False  # a text that asks is a user turn, although no chat template writes it
    joint: str = ""  # the blank between prompt and answer where both are texts

    def description(self) -> dict[str, Any]:
        """The entries that differ from the defaults, JSON-able."""
        found = {"prompt_template": self.prompt_template, "plain": self.plain or None}
        found |= {"turns": self.turns or None, "joint": self.joint or None}
        found["ending"] = None if self.ending is None else list(self.ending)
        found["token_format"] = self.token_format if self.token_format != "standard" else None
        return {name: value for name, value in found.items() if value is not None}

    @classmethod
    def described(cls, description: dict[str, Any]) -> "Reading":
        """What `description` made, from whatever holds its entries."""
        ending = description.get("ending")
        return cls(
            None if ending is None else tuple(int(i) for i in ending),
            description.get("prompt_template"),
            description.get("token_format", "standard"),
            bool(description.get("plain", False)),
            bool(description.get("turns", False)),
            str(description.get("joint", "")),
        )


def trained_reading(
    tokenizer: Any,
    *,
    plain: bool = False,
    turns: bool = False,
    joint: str = "",
    prompt_template: str | None = None,
    token_format: str = "standard",
) -> Reading:
    """What a reward model is trained with; `plain`: on rows that are texts, without a template.
    `turns`: on rows that are all made of turns; `joint`: what answers that are texts begin with.

    As TRL 1.16's RewardTrainer: a conversation ends as the chat template writes it, with nothing
    more; any other text ends in EOS.
    """
    token_format = token_format.replace("-", "_")
    tail = template_tail(tokenizer)
    if plain or prompt_template is not None or token_format != "standard" or tail is None:
        # `plain` is worth recording only where a template could have been used.
        plain = plain and tail is not None
        turns = turns and not plain and prompt_template is None
        return Reading((end_id(tokenizer),), prompt_template, token_format, plain, turns, joint)
    return Reading(tuple(tail))


def imported_reading(tokenizer: Any, config: dict[str, Any]) -> Reading:
    """Of a classifier in transformers' form that records no ending.

    That of TRL, but for what this program exported before it recorded one, whose only label is
    called "reward" (TRL's is "LABEL_0").
    """
    if list((config.get("id2label") or {}).values()) == ["reward"]:
        return Reading()
    return trained_reading(tokenizer)


class Ending:
    """Puts texts of one tokenizer in a reading's form, whatever they end in so far."""

    def __init__(self, tokenizer: Any, reading: Reading):
        self.eos = end_id(tokenizer)
        self.wanted = reading.ending
        tail = tuple(template_tail(tokenizer) or ())
        self.special = special = set(tokenizer.all_special_ids) | _special_added(tokenizer)
        # Such as <|im_end|>, without the line break: where an answer may stop.
        turns = [tail[: i + 1] for i, token in enumerate(tail) if token in special]
        eos = [(i,) for i in eos_ids(tokenizer)]
        known = {end for start in (tail, *turns, ()) for end in (start, *(start + e for e in eos))}
        known.add(self.wanted or ())
        self.known = sorted(known - {()}, key=len, reverse=True)

    def ends(self, tokens: Sequence[int]) -> bool:
        """Whether a text ends in any of the ways in which texts of this tokenizer end."""
        return any(tuple(tokens[-len(end) :]) == end for end in self.known)

    def bare(self, tokens: Sequence[int]) -> list[int]:
        """The text without its ending."""
        tokens = list(tokens)
        for end in self.known:
            if tuple(tokens[-len(end) :]) == end:
                return tokens[: len(tokens) - len(end)]
        return tokens

    def put(self, tokens: Sequence[int], ended: bool = True) -> list[int]:
        """The text with the recorded ending where it `ended`, else as it is."""
        tokens = list(tokens)
        if not ended:
            return tokens
        if self.wanted is None:
            return tokens if tokens[-1:] == [self.eos] else [*tokens, self.eos]
        return self.bare(tokens) + list(self.wanted)


def template_tail(tokenizer: Any) -> list[int] | None:
    """The token ids that a chat template writes behind an answer; None without a template."""
    has_one = getattr(tokenizer, "has_chat_template", None)
    if not (getattr(tokenizer, "chat_template", None) is not None if has_one is None else has_one):
        return None
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    parts = [{**turn, "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    for messages in (turns, parts):
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False)
        except Exception:  # whatever the template's own code raises; rows will say it
            continue
        if MARK in text:
            return list(tokenizer.encode(text.partition(MARK)[2], add_special_tokens=False))
    return None


def eos_ids(tokenizer: Any) -> set[int]:
    """Every EOS of a tokenizer; mlx-lm's wrapper may have several."""
    several = getattr(tokenizer, "eos_token_ids", None)
    several = several if isinstance(several, set | list | tuple) else ()
    return {*several, tokenizer.eos_token_id} - {None}


def end_id(tokenizer: Any) -> int:
    """The EOS that is put behind a text."""
    eos = tokenizer.eos_token_id
    return min(eos_ids(tokenizer)) if eos is None else eos


def _special_added(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {i for i, token in added.items() if token.special}
