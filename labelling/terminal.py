"""Labelling with the keys of a terminal, as the chat rates."""

import shutil
import time
from typing import Any

from chat.keyboard import Keys
from chat.screen import Screen
from errors import UserError
from labelling.desk import Desk
from labelling.items import Choice, Item, note_problem, said
from labelling.progress import time_left
from run_folder.output import printable

LEFT_RIGHT = {"l": 0, "r": 1, "\x1b[D": 0, "\x1b[C": 1}
GOOD_BAD = {"g": 0, "b": 1}
COMMON = {"t": "tie", "=": "tie", "s": "skip", "u": "undo", "n": "note", "q": "quit"}
RANK_KEYS = "1, 2, ... the best, then the best of the rest"
PAIR_KEYS = "l or 1 left, r or 2 right"
MORE_KEYS = "t tie, s skip, u undo, n note, q quit; each label is on disk when it is said"
WAIT_SECONDS = 0.1  # between looks for new samples; nobody presses a key meanwhile


class Leave(Exception):
    """The person has had enough."""


class Undo(Exception):
    """Back to the item before, or to the beginning of this one."""


class Terminal:
    """Shows items one after the other until all are labelled or the person leaves."""

    def __init__(self, desk: Desk, screen: Screen, keys: Keys):
        self.desk, self.screen, self.keys = desk, screen, keys
        self._note, self._begun = "", False  # of the item that is shown

    def run(self) -> None:
        """Raises UserError where sampling has failed and nothing is left to label."""
        places = RANK_KEYS if self.desk.ranked else PAIR_KEYS
        self.screen.note(f"keys: {places}, {MORE_KEYS}")
        try:
            while (item := self._next()) is not None:
                self._one(item)
        except Leave:
            pass

    def _next(self) -> Item | None:
        """The next item, waited for; None once all are labelled."""
        waits = False
        while True:
            self.desk.poll()
            item, sampler = self.desk.current(), self.desk.sampler
            if item is not None or self.desk.finished:
                if waits:
                    self.screen.progress("")
                return item
            if sampler is None or sampler.problem:
                raise UserError(sampler.problem if sampler else "nothing is left to sample")
            waits = True
            self.screen.progress("the replies are being sampled ...")
            time.sleep(WAIT_SECONDS)

    def _one(self, item: Item) -> None:
        self._show(item)
        self._note, self._begun, started = "", False, time.monotonic()
        try:
            ranks = self._ranks(item)
            aspects = {}
            for name in self.desk.aspects if ranks is not None else ():
                aspects[name] = self._aspect(item, name)
        except Undo:
            if self._begun:
                self.screen.note("asked again")
            elif self.desk.undo():
                self.screen.note("back to the one before; its label is taken back")
            else:
                self.screen.note("there is no label to take back")
            return
        seconds = time.monotonic() - started
        self.desk.label(item.id, Choice(ranks, aspects, self._note, seconds))
        self.screen.note(self._told(ranks))

    def _told(self, ranks: list[int] | None) -> str:
        if ranks is None:
            return "skipped"
        if len(ranks) == 1:
            return f"labelled: {('good', 'bad')[ranks[0]]}"
        if len(set(ranks)) == 1:
            return "labelled: tie"
        if len(ranks) == 2:
            return f"labelled: {('left', 'right')[ranks.index(0)]}"
        places = sorted(range(len(ranks)), key=ranks.__getitem__)
        parts = [str(places[0] + 1)]
        for before, place in zip(places, places[1:], strict=False):
            parts += ["=" if ranks[before] == ranks[place] else ">", str(place + 1)]
        return f"labelled: {' '.join(parts)}"

    # ----------------------------------------------------------------- what is shown

    def _show(self, item: Item) -> None:
        self.screen.note("")
        for who, what in said(item.prompt):
            self.screen.note(f"> {who + ': ' if who else ''}{what}")
        texts = item.shown
        if len(texts) == 2:
            self.screen.side_by_side(["left", "right"], texts, ["", ""])
            return
        for place, text in enumerate(texts, 1):
            head = f"[{place}]\n" if len(texts) > 1 else ""
            print(head + printable(text.strip()), file=self.screen.out, flush=True)

    def _question(self, asks: str) -> str:
        """What is asked and where it stands, on one line: a second one would stay on the screen."""
        text = f"{asks}? {self.desk.done} of {self.desk.total} done"
        left = time_left(self.desk.seconds_left())
        whole = f"{text}, {left} " if left else f"{text} "
        return whole if len(whole) < shutil.get_terminal_size().columns else f"{text} "

    # ----------------------------------------------------------------- what is asked

    def _ranks(self, item: Item) -> list[int] | None:
        """Ranks by place; None for skip."""
        count = len(item.replies)
        if count == 1:
            answer = self._ask("good (g), bad (b)", GOOD_BAD, {"t", "="})
            return None if answer == "skip" else [answer]
        ranks, rank, left = [0] * count, 0, list(range(count))
        while len(left) > 1:
            what = "better" if count == 2 else ("best" if rank == 0 else "best of the rest")
            answer = self._ask(f"{what}: {self._names(left, count)}", self._places(left, count))
            if answer == "skip":
                return None
            if answer == "tie":
                break
            ranks[answer] = rank
            left.remove(answer)
            rank += 1
        for place in left:
            ranks[place] = rank
        return ranks

    def _aspect(self, item: Item, name: str) -> int | None:
        count = len(item.replies)
        every = list(range(count))
        meanings = self._places(every, count)
        question = f"{'more' if count == 2 else 'most'} {name}: {self._names(every, count)}"
        answer = self._ask(question, meanings, {"s"})
        return None if answer == "tie" else answer

    @staticmethod
    def _names(left: list[int], count: int) -> str:
        if count == 2:
            return "left (l), right (r)"
        return ", ".join(str(place + 1) for place in left)

    @staticmethod
    def _places(left: list[int], count: int) -> dict[str, Any]:
        digits = {str(place + 1): place for place in left}
        return digits | (LEFT_RIGHT if count == 2 else {})

    def _ask(self, question: str, places: dict[str, Any], without: set[str] = frozenset()) -> Any:
        """The meaning of a key: a place, "tie" or "skip"; keys of COMMON `without` these."""
        meanings = places | {k: v for k, v in COMMON.items() if k not in without}
        more = ", tie (t)" * ("t" not in without) + ", skip (s)" * ("s" not in without)
        text = self._question(question + more)
        while True:
            answer = self.keys.read(meanings, lambda: self.screen.progress(text))
            self.screen.progress("")
            if answer is None or answer == "quit":
                raise Leave
            if answer == "undo":
                raise Undo
            if answer != "note":
                self._begun = True
                return answer
            note = self.keys.line(lambda: self.screen.progress("note: ")).strip()
            if problem := note_problem(note):
                self.screen.note(f"the note {problem}, and is not kept; n writes another")
            else:
                self._note = note
