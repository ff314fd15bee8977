"""A chat: prompts in, replies out, kept as a conversation, scored and rated."""

import contextlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from chat.conversation import Conversation
from chat.keyboard import Keys, StopKey
from chat.rating import Ratings, cannot_rate
from chat.scoring import Scorer
from chat.screen import Screen, describe
from chat.settings import Settings
from chat.speaker import Reply, Speaker
from errors import UserError

ONE_KEYS = {"g": "good", "b": "bad", "s": "skip"}
TWO_KEYS = {
    "l": "left",
    "r": "right",
    "s": "skip",
    "1": "left",
    "2": "right",
    "\x1b[D": "left",
    "\x1b[C": "right",
}


class Session:
    """One speaker, or two that get the same prompts (`--compare`).

    In a comparison both see one conversation: it goes on with the reply that was rated better,
    and without a rating with the first speaker's.
    """

    def __init__(
        self,
        speakers: Sequence[Speaker],
        settings: Settings,
        screen: Screen,
        *,
        system: str | None = None,
        scorer: Scorer | None = None,
        ratings: Ratings | None = None,
        keys: Keys | None = None,
        blind: bool = False,
    ):
        """`blind`: who replies on which side changes from prompt to prompt and is not shown."""
        self.speakers, self.settings, self.screen = list(speakers), settings, screen
        self.scorer, self.ratings, self.keys = scorer, ratings, keys
        self.conversation = Conversation(system)
        self.replies_given = 0
        self._blind = random.Random(settings.seed) if blind else None
        self._rated: list[int | None] = []  # for each exchange, the number of its rating
        self._sides = [0, 1]  # the speakers on the left and on the right
        self.use_seed()

    @property
    def has_turns(self) -> bool:
        return all(speaker.prompting.has_turns for speaker in self.speakers)

    def use_seed(self) -> None:
        if self.settings.seed is not None:
            mx.random.seed(self.settings.seed)

    def start_over(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._rated = [None] * len(conversation.exchanges)

    # ----------------------------------------------------------------- one exchange

    def ask(self, prompt: str, *, stoppable: bool) -> None:
        """Show the reply to `prompt`, score and rate it, and remember the exchange.

        `stoppable`: Ctrl-C ends the reply and not the program.
        """
        messages = self.conversation.messages(prompt)
        with StopKey() if stoppable else contextlib.nullcontext(lambda: False) as stop:
            replies = self._replies(messages, stop)
        self.replies_given += 1
        if not any(reply.text.strip() for reply in replies) and stop():
            return  # stopped before there was anything to remember
        rated = None
        if self.ratings is not None:
            rated = self.rate(Shown(messages, replies, list(self._sides)), stoppable=stoppable)
        choice, number = rated if isinstance(rated, tuple) else (0, None)
        text = replies[choice].text
        self.conversation.add(prompt, text.strip() if self.has_turns else text)
        self._rated.append(number)

    def undo(self) -> str | None:
        """Take back the last exchange and its rating; returns its prompt, None without one."""
        exchange = self.conversation.undo()
        if exchange is None:
            return None
        self.take_back(self._rated.pop())
        return exchange.prompt

    def drop_last(self) -> str | None:
        """Take back the last exchange; its rating, of a reply that was given, stays."""
        exchange = self.conversation.undo()
        if exchange is None:
            return None
        self._rated.pop()
        return exchange.prompt

    def take_back(self, number: int | None) -> None:
        """Remove a rating from the file; None: there is none."""
        if number is not None and not self.ratings.take_back(number):
            self.screen.note("its rating stays in the file, which has changed since")

    def reply_to(self, prompt: str) -> "Shown":
        """The reply to a prompt that has nothing to do with the others, shown and not yet rated."""
        self.start_over(Conversation(self.conversation.system))
        messages = self.conversation.messages(prompt)
        replies = self._replies(messages, lambda: False)
        self.replies_given += 1
        return Shown(messages, replies, list(self._sides))

    def show_again(self, shown: "Shown") -> None:
        """A prompt and its replies on standard error: the output has them already."""
        self.screen.note(f"> {shown.messages[-1]['content']}")
        names = ["left: ", "right: "] if len(shown.replies) == 2 else [""]
        for name, side in zip(names, shown.sides, strict=False):
            self.screen.note(name + shown.replies[side].text.strip())

    def _replies(self, messages: list[dict], stop) -> list[Reply]:
        if len(self.speakers) == 2:
            return self._two_replies(messages, stop)
        writer = self.screen.reply_writer(continues=not self.has_turns)
        reply = self.speakers[0].reply(
            messages, self.settings, extras=self.conversation.extras, show=writer, should_stop=stop
        )
        writer.end()
        self.screen.note(describe(reply, self._scores(self.speakers[0], reply)))
        self._warn_if_long(self.speakers[0], reply)
        return [reply]

    def _two_replies(self, messages: list[dict], stop) -> list[Reply]:
        replies, notes = [], []
        for number, speaker in enumerate(self.speakers, 1):
            name = f"reply {number} of 2" if self._blind else speaker.name
            count = itertools.count(1)

            def show(_, name=name, count=count):
                self.screen.progress(f"{name}: {next(count)} tokens")

            reply = speaker.reply(
                messages,
                self.settings,
                extras=self.conversation.extras,
                show=show,
                should_stop=stop,
            )
            self.screen.progress("")
            replies.append(reply)
            notes.append(describe(reply, self._scores(speaker, reply)))
        if self._blind:
            self._blind.shuffle(self._sides)
        names = ["left", "right"] if self._blind else [s.name for s in self.speakers]
        texts = [replies[side].text for side in self._sides]
        self.screen.side_by_side(names, texts, [notes[side] for side in self._sides])
        return replies

    def _scores(self, speaker: Speaker, reply: Reply) -> dict[str, float]:
        return self.scorer(speaker, reply) if self.scorer is not None else {}

    def _warn_if_long(self, speaker: Speaker, reply: Reply) -> None:
        limit = speaker.loaded.config.get("max_position_embeddings")
        length = len(reply.prompt_tokens) + len(reply.tokens)
        if isinstance(limit, int) and length > limit:
            self.screen.note(
                f"the text has {length} tokens, the model was made for {limit}"
                + "; /reset starts over" * self.has_turns
            )

    # ----------------------------------------------------------------- rating

    def rate(
        self, shown: "Shown", *, stoppable: bool, hint: str = "", undo: bool = False
    ) -> tuple[int, int] | str | None:
        """Ask for a key and write a record.

        Returns (which reply was rated good or better, the rating's number), None if none was, or
        "undo" for the key u, where `undo` lets it be one. `hint` follows the question.
        """
        texts = self._texts(shown)
        problem = cannot_rate(texts)
        if problem is not None:
            self.screen.note(problem)
            return None
        messages = shown.messages
        prompt = messages if self.has_turns else messages[-1]["content"]
        extras = self.conversation.extras if self.has_turns else {}
        more = {"u": "undo"} if undo else {}
        if len(texts) == 1:
            question = f"good (g), bad (b) or skip (s)?{hint}"
            answer = self._key(question, ONE_KEYS | more, stoppable)
            if answer in ("skip", "undo"):
                return None if answer == "skip" else answer
            return 0, self.ratings.add_label(prompt, texts[0], answer == "good", extras)
        question = f"better: left (l), right (r), or skip (s)?{hint}"
        answer = self._key(question, TWO_KEYS | more, stoppable)
        if answer == "undo":
            return answer
        if self._blind:
            names = [self.speakers[side].name for side in shown.sides]
            self.screen.note(f"left was {names[0]}, right was {names[1]}")
        if answer == "skip":
            return None
        best = shown.sides[0 if answer == "left" else 1]
        winner = self.speakers[best].name
        return best, self.ratings.add_preference(
            prompt, texts[best], texts[1 - best], winner, extras
        )

    def can_rate(self, shown: "Shown") -> bool:
        """Whether there is anything to ask about these replies."""
        return cannot_rate(self._texts(shown)) is None

    def _texts(self, shown: "Shown") -> list[str]:
        return [r.text.strip() if self.has_turns else r.text for r in shown.replies]

    def _key(self, question: str, meanings: dict[str, str], stoppable: bool) -> str:
        """The meaning of the key; "skip" for Ctrl-C, too, where that does not end the program."""
        try:
            answer = self.keys.read(meanings, lambda: self.screen.progress(question + " "))
        except KeyboardInterrupt:
            if not stoppable:
                raise
            answer = None
        answer = answer or "skip"
        self.screen.progress("")
        said = {"skip": "not rated", "undo": "back to the one before"}
        self.screen.note(said.get(answer, f"rated: {answer}"))
        return answer


@dataclass
class Shown:
    """What a rating is about: the messages up to the prompt, and the replies to it."""

    messages: list[dict]
    replies: list[Reply]
    sides: list[int]  # of two replies, which stands on the left and on the right


def distinct_names(speakers: Sequence[Speaker]) -> None:
    """Two speakers of one name are told apart by a number."""
    if len({speaker.name for speaker in speakers}) < len(speakers):
        for number, speaker in enumerate(speakers, 1):
            speaker.name = f"{speaker.name} ({number})"


def check_system_prompt(session: Session) -> None:
    """Raises UserError where no model could be told a system prompt."""
    if not session.has_turns:
        raise UserError(
            "a system prompt needs a chat template, which this model's tokenizer does "
            "not have; it continues the text it is given"
        )
