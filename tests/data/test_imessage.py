"""Reading a Mac's messages: a row for every rule, in a database that is open elsewhere."""

import json
import os
import sqlite3
import stat
import subprocess
import sys

import pytest
from files import ROOT
from message_database import MessageDatabase, archive, edits, retracted

from errors import UserError
from histories.conversations import ME, Limits, make_rows, ratings_of
from histories.imessage import apple_time, archived_text, message_text, read_database

SCRIPT = [sys.executable, str(ROOT / "data" / "imessage.py")]


@pytest.fixture
def database(tmp_path):
    made = MessageDatabase(tmp_path / "chat.db")
    yield made
    made.close()


def texts(history):
    return [(m.sender == ME, m.text) for m in history.messages]


def run(*words, cwd=ROOT, **options):
    return subprocess.run(
        [*SCRIPT, *map(str, words)], capture_output=True, text=True, cwd=cwd, **options
    )


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("length", [0, 1, 127, 128, 255, 256, 40_000])
def test_an_archived_text_of_any_length_is_read(length):
    assert archived_text(archive("x" * length)) == "x" * length


@pytest.mark.parametrize("text", ["héllo 🎉", "a\nb", "🧑‍🧑‍🧒 " * 50])
def test_an_archived_text_of_any_characters_is_read(text):
    assert archived_text(archive(text)) == text.strip()


@pytest.mark.parametrize("data", [b"", b"junk", archive("x" * 300)[:80], b"\x04\x0bstreamtyped"])
def test_a_damaged_archive_is_no_text_and_no_error(data):
    assert archived_text(data) is None


def test_the_body_comes_before_the_text_and_the_last_edit_after_both():
    assert message_text("old", archive("new"), None) == ("new", "")
    assert message_text("old", b"junk", None) == ("old", "")
    assert message_text(None, None, edits("one", "two")) == ("two", "")
    assert message_text(None, None, retracted()) == ("", "unsent")
    assert message_text("\ufffc", None, None) == ("", "attachment alone")
    assert message_text(None, archive("\ufffc"), None) == ("", "attachment alone")
    assert message_text(None, b"junk", None) == ("", "undecodable")
    assert message_text(None, None, b"not a plist") == ("", "without text")
    assert message_text("see \ufffcthis\ufffd", None, None) == ("see this", "")


def test_seconds_and_nanoseconds_are_told_apart():
    assert apple_time(500_000_000) == apple_time(500_000_000 * 10**9)
    assert apple_time(0).year == 2001


def test_messages_in_the_wal_are_read(database):
    ann = database.person("+1 (555) 010-2030")
    chat = database.chat(ann)
    database.message(chat, None, handle=ann, attributedBody=archive("in the log"))
    assert database.path.with_name("chat.db-wal").stat().st_size > 0
    with sqlite3.connect(f"file:{database.path}?immutable=1", uri=True) as main_file_alone:
        assert not main_file_alone.execute("SELECT * FROM sqlite_master").fetchall()
    found = read_database(database.path)
    assert [(m.sender, m.text) for m in found.messages] == [("+15550102030", "in the log")]


def test_what_is_no_message_is_left_out_and_counted(database):
    ann, bob = database.person("ann@example.org"), database.person("+15550100")
    chat, group = database.chat(ann), database.chat(ann, bob, name="group")
    hello = database.message(chat, "hello", handle=ann)
    database.message(
        chat, "Loved “hello”", associated_message_type=2000, associated_message_guid=f"p:0/{hello}"
    )
    database.message(chat, "x", associated_message_type=3000, associated_message_guid=hello)
    database.message(chat, "\ufffc", associated_message_type=1000)
    database.message(chat, None, item_type=2, handle=ann)
    database.message(chat, None, group_action_type=1, handle=ann)
    database.message(chat, "game", balloon_bundle_id="com.apple.messages.MSMessageExtension:x")
    database.message(
        chat, "https://example.org", balloon_bundle_id="com.apple.messages.URLBalloonProvider"
    )
    database.message(chat, "\ufffc")
    database.message(chat, None, message_summary_info=retracted())
    database.message(chat, "gone", date_retracted=5)
    database.message(chat, None, message_summary_info=edits("frist", "first"))
    database.message(chat, None, attributedBody=b"\x04junk")
    database.message(group, "all of you", handle=bob)
    database.connection.execute("INSERT INTO message (guid, text) VALUES ('lost', 'lost')")
    database.connection.commit()
    found = read_database(database.path)
    assert texts(found) == [
        (False, "hello"),
        (True, "https://example.org"),
        (True, "first"),
    ]
    assert found.dropped == {
        "a tapback": 2,
        "a sticker or another attachment to a message": 1,
        "an event of the chat": 2,
        "of an app": 1,
        "attachment alone": 1,
        "unsent": 2,
        "undecodable": 1,
        "in a group": 1,
        "in no chat": 1,
    }
    with_groups = read_database(database.path, groups=True)
    assert [m.text for m in with_groups.messages if m.chat in with_groups.groups] == ["all of you"]


def test_a_person_s_addresses_are_one_chat_and_no_message_comes_twice(database):
    number = database.person("+15550100", person="P1")
    sms = database.person("+1 555-0100", person="P1", service="SMS")
    mail = database.person("Ann@Example.org", person="P1")
    chats = [database.chat(handle, name=str(handle)) for handle in (number, sms, mail)]
    for chat, handle in zip(chats, (number, sms, mail), strict=True):
        database.message(chat, f"from {handle}", handle=handle)
    twice = database.connection.execute("SELECT max(ROWID) FROM message").fetchone()[0]
    database.insert("chat_message_join", chat_id=chats[0], message_id=twice)
    found = read_database(database.path)
    assert [len(m) for m in found.chats().values()] == [3]
    assert found.dropped == {"the same message again": 1}


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (2, 1, 0), (1, 2, 0)])
def test_an_address_whose_other_service_knows_no_person_is_that_person_too(order, database):
    handles = [("ann@example.org", "P1", "iMessage"), ("+1 555 0100", "P1", "iMessage")]
    handles.append(("+15550100", None, "SMS"))
    other = database.person("+15550199", person="P2")
    for number in order:
        address, person, service = handles[number]
        handle = database.person(address, person, service)
        database.message(database.chat(handle, name=f"{number}"), f"from {number}", handle=handle)
    database.message(database.chat(other, name="other"), "of another", handle=other)
    assert sorted(map(len, read_database(database.path).chats().values())) == [1, 3]


@pytest.mark.parametrize(
    ("raw", "text"),
    [(b"caf\xc3", "caf"), (b"\xff\xfe ok", "ok"), (b"a\xf0\x9f\x8e b", "a b")],
)
def test_a_text_of_torn_characters_costs_these_alone(raw, text, database):
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    guid = database.message(chat, "x", handle=ann)
    database.message(chat, "whole", handle=ann)
    database.connection.execute(
        "UPDATE message SET text = CAST(? AS TEXT) WHERE guid = ?", (raw, guid)
    )
    database.connection.commit()
    assert texts(read_database(database.path)) == [(False, text), (False, "whole")]


@pytest.mark.parametrize("date", ["soon", -(10**11), b"\x01"])
def test_a_message_without_a_time_is_counted(date, database):
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    database.message(chat, "lost", handle=ann, date=date)
    database.message(chat, "kept", handle=ann)
    found = read_database(database.path)
    assert texts(found) == [(False, "kept")]
    assert found.dropped == {"without a time": 1}


def test_an_old_database_without_the_newer_columns_is_read(tmp_path):
    path = tmp_path / "old.db"
    with sqlite3.connect(path) as old:
        old.executescript(
            "CREATE TABLE handle (ROWID INTEGER PRIMARY KEY, id TEXT, service TEXT);"
            "CREATE TABLE chat (ROWID INTEGER PRIMARY KEY, guid TEXT, chat_identifier TEXT);"
            "CREATE TABLE chat_handle_join (chat_id INTEGER, handle_id INTEGER);"
            "CREATE TABLE chat_message_join (chat_id INTEGER, message_id INTEGER);"
            "CREATE TABLE message (ROWID INTEGER PRIMARY KEY, guid TEXT, text TEXT, date INTEGER,"
            " is_from_me INTEGER, handle_id INTEGER);"
            "INSERT INTO handle VALUES (1, '+15550100', 'SMS');"
            "INSERT INTO chat VALUES (1, 'g', '+15550100');"
            "INSERT INTO chat_handle_join VALUES (1, 1);"
            "INSERT INTO message VALUES (1, 'm', 'hi', 400000000, 0, 1);"
            "INSERT INTO chat_message_join VALUES (1, 1);"
        )
    assert [m.text for m in read_database(path).messages] == ["hi"]


def test_tapbacks_of_the_other_one_rate_my_messages(database):
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    mine = [database.message(chat, f"joke {i}") for i in range(4)]
    for message, kinds in zip(mine, ([2000], [2002], [2001, 3001], [2004]), strict=True):
        for kind in kinds:
            database.message(
                chat,
                "x",
                handle=ann,
                associated_message_type=kind,
                associated_message_guid=f"p:0/{message}",
            )
    found = read_database(database.path, tapbacks=True)
    assert {r.key: r.good for r in found.ratings} == {mine[0]: True, mine[1]: False}
    assert found.dropped["a tapback that is neither good nor bad"] == 1


@pytest.mark.parametrize(
    ("said", "good"),
    [
        ([("ann", 2000), ("bob", 2002)], False),
        ([("bob", 2002), ("ann", 2000)], False),
        ([("ann", 2000), ("bob", 2002), ("bob", 3002)], True),
        ([("ann", 2002), ("bob", 2001), ("bob", 3001)], False),
        ([("ann", 2000), ("ann", 2004)], None),
        ([("ann", 2000), ("ann", 2003), ("ann", 3000)], True),
    ],
)
def test_everybody_has_one_reaction_to_a_message(said, good, database):
    handles = {name: database.person(f"{name}@example.org") for name in ("ann", "bob")}
    chat = database.chat(*handles.values())
    for number in range(10):
        database.message(chat, f"question {number}", handle=handles["ann"])
        mine = database.message(chat, f"answer {number}")
    for name, kind in said:
        about = {"associated_message_type": kind, "associated_message_guid": f"p:0/{mine}"}
        database.message(chat, "x", handle=handles[name], **about)
    found = read_database(database.path, groups=True, tapbacks=True)
    rows = make_rows(found, Limits(), valid_share=0).train
    assert [row["label"] for row in ratings_of(found, rows)] == ([] if good is None else [good])


def conversation(database, count=12):
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    keys = []
    for number in range(count):
        database.message(
            chat,
            None,
            handle=ann,
            attributedBody=archive(f"how is day {number}?"),
            wait=600 if number % 3 == 0 else 1,
        )
        keys.append(database.message(chat, f"day {number} is fine, call +1 555 010 2030"))
    return chat, ann, keys


def test_the_script_writes_rows_for_its_owner_alone(database, tmp_path):
    chat, ann, keys = conversation(database)
    database.message(
        chat, "x", handle=ann, associated_message_type=2000, associated_message_guid=keys[0]
    )
    out = tmp_path / "mine"
    done = run("--database", database.path, "--output-dir", out, "--tapbacks", "--names")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    train = rows(out / "train.jsonl")
    assert len(train) == 3 and len(rows(out / "valid.jsonl")) == 1  # 4 sessions
    assert [m["role"] for m in train[0]["messages"]] == ["user", "assistant"] * 3
    assert train[0]["messages"][1]["content"] == "day 0 is fine, call [NUMBER]"
    prompts = rows(out / "prompts_train.jsonl")
    assert len(prompts) == 9 and prompts[1]["prompt"][-1]["content"] == "how is day 1?"
    rated = rows(out / "ratings_train.jsonl")
    assert [(r["label"], r["completion"][0]["content"][:5]) for r in rated] == [(True, "day 0")]
    assert (out / ".gitignore").read_text() == "*\n"
    for path in out.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(out.stat().st_mode) == 0o700


def test_a_folder_that_git_tracks_is_refused(database, tmp_path):
    conversation(database)
    folder = tmp_path / "repository"
    folder.mkdir()
    (folder / "kept.txt").write_text("x")
    for words in (["init", "-q"], ["add", "kept.txt"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = run("--database", database.path, "--output-dir", folder)
    assert done.returncode == 2 and "git tracks files in it (kept.txt)" in done.stderr
    inside = folder / "new"
    assert run("--database", database.path, "--output-dir", inside).returncode == 0
    status = subprocess.run(["git", "status", "--porcelain"], cwd=folder, capture_output=True)
    assert b"new" not in status.stdout


@pytest.mark.parametrize("closed", ["file", "folder"])  # a Mac without the permission: both
def test_no_permission_says_how_to_get_it(database, closed):
    folder = database.path.parent
    (folder if closed == "folder" else database.path).chmod(0)
    user = os.geteuid()
    if user == 0:  # who may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match="Full Disk Access.*chat.db-wal and chat.db-shm"):
            read_database(database.path)
    finally:
        os.seteuid(user)
        folder.chmod(0o700)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda path: path.write_bytes(b"no database at all" * 400),
            "not a whole message database",
        ),
        (lambda path: path.write_bytes(b""), "no table 'handle'"),
        (lambda path: None, "no such file"),
    ],
    ids=["torn", "empty", "missing"],
)
def test_what_is_no_message_database_is_one_line(make, said, tmp_path):
    path = tmp_path / "chat.db"
    make(path)
    with pytest.raises(UserError, match=f"chat.db: .*{said}"):
        read_database(path)


def test_a_cut_database_is_one_line(database):
    conversation(database, 200)
    database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    database.close()
    data = database.path.read_bytes()
    database.path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="chat.db"):
        read_database(database.path)


def test_a_locked_database_is_one_line(tmp_path):
    path = tmp_path / "locked.db"
    held = sqlite3.connect(path, isolation_level=None)
    held.execute("CREATE TABLE handle (id TEXT)")
    held.execute("PRAGMA locking_mode=EXCLUSIVE")
    held.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match="close Messages"):
        read_database(path)
    held.close()


def test_a_chat_with_one_side_only_is_one_line(database, tmp_path):
    ann = database.person("ann@example.org")
    chat = database.chat(ann)
    for number in range(30):
        database.message(chat, f"offer {number}", handle=ann)
    done = run("--database", database.path, "--output-dir", tmp_path / "out")
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "no conversation is left of 30 messages" in done.stderr
    assert "left out, in a one-sided chat: 30" in done.stdout
