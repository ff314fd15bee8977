"""label.py killed while labels are sent: none is lost, none is there twice."""

import fast_blas  # noqa: F401  isort: skip

import http.client
import json
import os
import random
import signal
import sys
import threading
from pathlib import Path

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


# ------------------------------------------------------------------------------ what samples


def sampling_process(server) -> int:
    """The number of the process that samples."""
    pid = server.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = [c for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
    return int(found[0])


def next_item(server):
    """The next state with an item, or with a reason why there is none."""
    while True:
        state = server.ask("state")[1]
        if state["item"] or state["problem"] or state["finished"]:
            return state


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="the shim is for Linux")
def test_a_sampler_that_is_killed_is_told_of_and_goes_on_at_the_next_start(tmp_path):
    prompts = [json.dumps({"prompt": f"{i} {i + 1}"}) + "\n" for i in range(90)]
    (tmp_path / "prompts.jsonl").write_text("".join(prompts))
    words = ("--batch-size", "4", "--max-new-tokens", "24")
    with Server(tmp_path, *words) as server:
        os.kill(sampling_process(server), signal.SIGKILL)
        number = 0
        while (state := next_item(server))["item"]:
            body = {"id": f"label-{number:06d}", "pair": state["item"]["pair"], "ranks": [0, 1]}
            assert server.ask("label", body)[0] == 200
            number += 1
        assert "has ended with status -9; start again to go on" in state["problem"]
        code, out, err = server.end()
    assert code == 2 and err.splitlines()[-1].startswith("error: the process that samples has")
    assert len(rows_of(tmp_path)) == number < 90
    # Then the labeller is killed while it samples: its child ends its batch and gives way.
    with Server(tmp_path, *words) as server:
        next_item(server)
        server.process.kill()
    with Server(tmp_path, *words) as server:
        samples = tmp_path / "labels.samples.jsonl"
        while samples.read_bytes().count(b"\n") < 91:
            server.ask("state")
        assert server.end()[0] == 0
    killed = [json.loads(row) for row in samples.read_text().splitlines()[1:]]
    assert len({row["pair"] for row in killed}) == len(killed) == 90
    samples.unlink()  # never killed: the same replies
    (tmp_path / "labels.jsonl").unlink(missing_ok=True)
    with Server(tmp_path, *words) as server:
        while not samples.exists() or samples.read_bytes().count(b"\n") < 91:
            server.ask("state")
    assert [json.loads(row) for row in samples.read_text().splitlines()[1:]] == killed
