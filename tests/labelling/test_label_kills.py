"""label.py killed while labels are sent: none is lost, none is there twice."""

import fast_blas  # noqa: F401  isort: skip

import http.client
import random
import threading

import pytest
from label_setup import REPLIES, Server, rows_of, write_samples

GONE = (OSError, http.client.HTTPException, ValueError)  # what a killed server looks like
MOST = 12  # labels between two kills
SECONDS = 0.005  # a label takes about 2 ms: a kill falls before, into or behind one of the next two


class Sender:
    """A page that knows what it was told is saved, and sends again what it was not told of."""

    def __init__(self):
        self.saved: dict[str, str] = {}  # item -> id of its label, once the server has said so
        self.undone: set[str] = set()  # ids of labels that were to be taken back
        self.waiting: tuple[str, str] | None = None  # item, id: sent, and not answered yet
        self.number = 0

    def send(self, server, kill_after: int, seconds: float) -> None:
        """Labels, and now and then an undo, until all are there or the server is killed."""
        self.settle_undo(server)
        for count in range(10**6):
            if count == kill_after:
                threading.Timer(seconds, server.process.kill).start()
            if self.waiting is None:
                item = server.ask("state")[1]["item"]
                if item is None:
                    return
                self.waiting = (item["pair"], f"label-{self.number:06d}")
                self.number += 1
            pair, id = self.waiting
            status, told = server.ask("label", {"id": id, "pair": pair, "ranks": [0, 1]})
            assert status == 200 and not told["problem"], told
            self.saved[pair], self.waiting = id, None
            if self.number % 5 == 0 and id not in self.undone:
                self.undone.add(id)
                del self.saved[pair]
                server.ask("undo", {"id": id})

    def settle_undo(self, server) -> None:
        """An undo whose answer got lost was done or was not; ask for it again."""
        last = server.ask("state")[1]["last"]
        if last in self.undone:
            server.ask("undo", {"id": last})


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
def test_killed_at_random_while_labels_are_sent(tmp_path, kills):
    items = (MOST + 3) * kills
    write_samples(tmp_path, [REPLIES] * items)
    draw, sender = random.Random(kills), Sender()
    for killed in range(kills + 1):
        last = killed == kills
        with Server(tmp_path) as server:
            try:
                sender.send(server, -1 if last else draw.randrange(MOST), draw.uniform(0, SECONDS))
                assert last, "all was labelled before the kill: the test needs more items"
            except GONE:
                assert not last
        rows = rows_of(tmp_path)  # every line is whole
        there = {row["pair"]: row["label_id"] for row in rows}
        assert len(there) == len(rows) == len({row["label_id"] for row in rows}), "one is doubled"
        lost = {pair: id for pair, id in sender.saved.items() if there.get(pair) != id}
        assert not lost, "the page was told that these are saved"
        known = {*sender.saved.values(), *sender.undone, *(sender.waiting or ())}
        assert {*there.values()} <= known, "nobody gave these"
    assert len(rows) == len(sender.saved) == items
