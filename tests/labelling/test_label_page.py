"""The page of label.py by HTTP: who is answered, what is told, what is written."""

import fast_blas  # noqa: F401  isort: skip

import json
import signal
import socket

import pytest
from label_setup import REPLIES, Server, rows_of, write_samples

from labelling.markdown import to_html


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    write_samples(folder, [REPLIES] * 12, "--aspects", "helpful")
    return folder


@pytest.fixture(scope="module")
def server(folder):
    with Server(folder, "--aspects", "helpful") as started:
        yield started


def label(server, **more):
    pair = server.ask("state")[1]["item"]["pair"]
    body = {"id": "abcdefgh", "pair": pair, "ranks": [0, 1], "aspects": {"helpful": 0}}
    return server.ask("label", body | more)


def test_only_this_machine_and_only_with_the_token(server):
    port = int(server.address.split(":")[2].partition("/")[0])
    others = {info[4][0] for info in socket.getaddrinfo(socket.gethostname(), None)}
    for address in others - {"127.0.0.1", "127.0.1.1", "::1"}:
        with pytest.raises(OSError):
            socket.create_connection((address, port), timeout=2).close()
    token = server.address.rstrip("/").rpartition("/")[2]
    assert len(token) >= 32
    for wrong in ("", "x" * 32, token[:-1], token + "x", "é"):
        address = f"http://127.0.0.1:{port}/{wrong and wrong.encode('idna').decode()}/"
        for path, body in (("", None), ("state", None), ("page.js", None), ("label", {})):
            status, answer = server.ask(path, body, address=address)
            assert status == 404 and token not in str(answer)


def test_another_name_another_page_and_a_plain_form_are_refused(server):
    port = server.address.split(":")[2].partition("/")[0]
    assert server.ask("state", headers={"Host": "evil.example"})[0] == 421
    assert server.ask("state", headers={"Host": f"evil.example:{port}"})[0] == 421
    assert server.ask("state", headers={"Host": f"localhost:{port}"})[0] == 200
    assert label(server)[0] == 200
    body = {"id": "abcdefgi", "pair": server.ask("state")[1]["item"]["pair"], "ranks": None}
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        assert server.ask("label", body, headers)[0] == 403
        assert server.ask("undo", {"id": "abcdefgh"}, headers)[0] == 403
        assert server.ask("stop", {}, headers)[0] == 403
    assert server.ask("state")[1]["done"] == 1
    assert server.ask("label", body, {"Origin": f"http://127.0.0.1:{port}"})[0] == 200


@pytest.mark.parametrize("path", ["", "page.js", "page.css", "state", "nothing", "../label.py"])
def test_every_answer_forbids_what_the_page_does_not_need(server, path):
    status, headers, text = server.answer(path)
    assert (status == 200) == (path not in ("nothing", "../label.py"))
    policy = dict(
        part.strip().partition(" ")[::2] for part in headers["Content-Security-Policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["script-src"] == "'self'"
    assert "unsafe" not in headers["Content-Security-Policy"] and "http" not in str(policy)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer" and headers["Cache-Control"] == "no-store"
    assert "http" not in text.replace(server.address, "")  # nothing is fetched from elsewhere


def test_nothing_says_which_model_wrote_what(server):
    told = json.dumps(server.ask("state")[1])
    assert "model" not in told and "digits" not in told and "order" not in told


def test_labels_and_undo(server, folder):
    before = rows_of(folder)
    told = server.ask("state")[1]
    status, after = label(server, id="first-label", note="  shorter ", seconds=3.26)
    assert status == 200 and after["done"] == told["done"] + 1
    row = rows_of(folder)[-1]  # on the disk, as the page has been told so
    assert row["pair"] == told["item"]["pair"] and row["label_id"] == "first-label"
    assert row["note"] == "shorter" and row["seconds"] == 3.3
    assert row["aspects"] == {"helpful": row["shown"].index(0)}
    # The request once more, as a page does whose answer got lost.
    again = server.ask("label", {"id": "first-label", "pair": row["pair"], "ranks": [0, 1]})[1]
    assert again["done"] == after["done"] and again["problem"] == ""
    # A second window that was slower is told so, and nothing is written.
    slow = server.ask("label", {"id": "other-label", "pair": row["pair"], "ranks": [1, 0]})[1]
    assert "another window" in slow["problem"] and len(rows_of(folder)) == len(before) + 1
    assert server.ask("undo", {"id": "first-label"})[1]["item"]["pair"] == row["pair"]
    assert server.ask("undo", {"id": "first-label"})[1]["done"] == told["done"]
    assert rows_of(folder) == before


@pytest.mark.parametrize(
    "more, why",
    [
        ({"ranks": [0]}, "2 whole numbers"),
        ({"ranks": [0, True]}, "2 whole numbers"),
        ({"ranks": [0, 2]}, "without a gap"),
        ({"ranks": "01"}, "a list"),
        ({"aspects": {}}, "helpful has no answer"),
        ({"aspects": {"helpful": 0, "kind": 1}}, "kind was not asked"),
        ({"aspects": {"helpful": 2}}, "no reply at place 2"),
        ({"aspects": {"helpful": "x"}}, "an object of places"),
        ({"pair": "nowhere"}, "no such item"),
        ({"pair": 3}, "the item is needed"),
        ({"id": "short"}, "8 to 64"),
        ({"note": "x" * 2001}, "more than 2000"),
        ({"note": "x" * 70000}, "more than 65536 bytes"),
        ({"note": 3}, "a text"),
        ({"note": "a\0b"}, "holds a NUL"),
        ({"note": "\ud800"}, "no UTF-8 text"),
        ({"id": "long-\0-enough"}, "8 to 64"),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_is_written(server, folder, more, why):
    before = rows_of(folder)
    status, answer = label(server, **{"id": "never-there"} | more)
    assert status == 400 and why in answer["problem"]
    assert rows_of(folder) == before


def test_a_body_that_is_no_object(server):
    for body in ([1], "x", 3):
        assert server.ask("label", body)[0] == 400
        assert server.ask("undo", body)[0] == 400
    assert server.ask("undo", {})[0] == 400
    assert server.ask("state", {})[0] == 405


def test_the_end_of_the_page_is_the_end_of_the_program(tmp_path):
    write_samples(tmp_path, [REPLIES] * 2)
    with Server(tmp_path) as started:
        label(started, aspects={})
        code, out, err = started.end()
    assert code == 0 and "1 labels (1 choices, 0 ties, 0 skipped), 1 new" in out
    assert "python label.py --report" in out
    with Server(tmp_path) as started:  # undo across a restart
        state = started.ask("state")[1]
        assert state["done"] == 1
        assert started.ask("undo", {"id": state["last"]})[1]["done"] == 0
    assert rows_of(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_as_soon_as_the_address_is_there(tmp_path, number):
    write_samples(tmp_path, [REPLIES] * 2)
    with Server(tmp_path) as started:
        started.process.send_signal(number)
        out, err = started.process.communicate(timeout=60)
        assert started.process.returncode == 128 + number
    assert "0 labels (0 choices" in out and "Warning" not in err and "Traceback" not in err


def test_replies_come_while_the_page_is_open(tmp_path):
    """Sampling goes on behind it, in a process of its own."""
    rows = [json.dumps({"prompt": f"8 {i}"}) + "\n" for i in range(10, 22)]
    (tmp_path / "prompts.jsonl").write_text("".join(rows))
    with Server(tmp_path, "--max-new-tokens", "8", "--batch-size", "8") as started:
        for _ in range(12):
            while started.ask("state")[1]["item"] is None:
                pass
            label(started, id=f"label-{_:04d}", aspects={})
        assert started.ask("state")[1]["finished"]
        assert started.end()[0] == 0
    assert [row["prompt"] for row in rows_of(tmp_path)] == [json.loads(r)["prompt"] for r in rows]


# ------------------------------------------------------------------------------ Markdown


def test_markdown_is_shown_and_html_is_text():
    html = to_html("# Title\n\n**bold** `a<b`\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\none\ntwo")
    for part in ("<h1>Title</h1>", "<strong>bold</strong>", "<code>a&lt;b</code>", "<td>1</td>"):
        assert part in html
    assert "one<br" in html
    assert to_html("<b>x</b> & y") == "<p>&lt;b&gt;x&lt;/b&gt; &amp; y</p>\n"
    link = to_html("[text](http://a.b/?q=1&r) <http://c.d> ![alt](http://e.f/g.png)")
    assert "<a" not in link and "<img" not in link and "href" not in link and "src" not in link
    assert 'text</span> <span class="address">(http://a.b/?q=1&amp;r)</span>' in link
    assert "[image: alt]" in link and "http://c.d" in link
    assert to_html("\x1b[31mred\x00") == "<p>[31mred</p>\n"
