"""WhatsApp's and Telegram's exports, and imessage-exporter's text."""

import json
import subprocess
import sys
from datetime import datetime

import pytest
from files import ROOT

from errors import UserError
from histories.conversations import (
    ME,
)
from histories.exporter import read_export
from histories.telegram import read_telegram
from histories.whatsapp import read_whatsapp


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# ---- WhatsApp ----------------------------------------------------------------------------------

ANDROID = """31/12/2023, 23:58 - Messages and calls are end-to-end encrypted.
31/12/2023, 23:59 - Ann: Happy new year
to all of you

and yours
01/01/2024, 00:01 - Bob: You too: really
01/01/2024, 00:02 - Bob: <Media omitted>
01/01/2024, 00:03 - Ann: This message was deleted
01/01/2024, 00:04 - Bob: Fixed <This message was edited>
01/01/2024, 00:05 - Ann: IMG-2024.jpg (file attached)
01/01/2024, 00:06 - Ann changed the subject
01/01/2024, 00:07 - Ann changed the subject from “plans: May” to “plans: June”
01/01/2024, 00:08 - Ann changed the group name from "a: b" to "c"
"""
IPHONE = (
    "\u200e[12/31/23, 11:59:58\u202fPM] Ann: \u200eMessages are encrypted.\n"
    "[12/31/23, 11:59:59\u202fPM] Ann: Happy\nnew year\n"
    "\u200e[1/1/24, 12:00:07\u202fAM] Bob: \u200e<attached: 0001-PHOTO.jpg>\n"
    "[1/1/24, 12:00:08\u202fAM] Bob: You too\u200e<This message was edited>\n"
    "[1/1/24, 12:00:09\u202fAM] Bob: \u200eYou deleted this message.\n"
    "[1/1/24, 1:00:10\u202fPM] Ann: midday\n"
)


def told(history):
    return [("me" if m.sender == ME else m.sender, m.text) for m in history.messages]


def test_an_android_export(tmp_path):
    found = read_whatsapp(write(tmp_path / "Ann.txt", ANDROID), me="Bob")
    assert told(found) == [
        ("Ann", "Happy new year\nto all of you\n\nand yours"),
        ("me", "You too: really"),
        ("me", "Fixed"),
    ]
    assert found.dropped == {"an event of the chat": 4, "attachment alone": 2, "deleted": 1}
    assert found.messages[1].time == datetime(2024, 1, 1, 0, 1)


def test_an_iphone_export_with_a_clock_of_12_hours(tmp_path):
    found = read_whatsapp(write(tmp_path / "Ann.txt", IPHONE), me="Bob")
    assert told(found) == [("Ann", "Happy\nnew year"), ("me", "You too"), ("Ann", "midday")]
    assert [m.time.hour for m in found.messages] == [23, 0, 13]
    assert found.dropped == {"a note of WhatsApp": 1, "attachment alone": 1, "deleted": 1}


@pytest.mark.parametrize(
    ("lines", "months"),
    [
        ("13.02.24, 10:00 - A: x\n14.02.24, 10:00 - B: y\n", [2, 2]),  # German
        ("2/13/24, 10:00 AM - A: x\n2/14/24, 9:00 AM - B: y\n", [2, 2]),  # US
        ("2024-02-01, 10:00 - A: x\n2024-02-03 10:00 - B: y\n", [2, 2]),  # Swedish
        ("2024/2/13 上午9:00 - A: x\n2024/2/13 下午1:00 - B: y\n", [2, 2]),  # Chinese
        ("13/2/2024, 10:00 a. m. - A: x\n13/2/2024, 1:00 p. m. - B: y\n", [2, 2]),  # Spanish
        ("01/02/24, 10:00 - A: x\n02/02/24, 10:00 - B: y\n01/03/24, 9:00 - A: z\n", [2, 2, 3]),
    ],
)
def test_the_order_of_a_date_is_found(lines, months, tmp_path):
    found = read_whatsapp(write(tmp_path / "c.txt", lines), me="A")
    assert [m.time.month for m in found.messages] == months
    assert all(9 <= m.time.hour <= 13 for m in found.messages)


@pytest.mark.parametrize(
    "begun",
    [
        "31.12.2023 klo 23.59 -",  # Finnish
        "31. 12. 2023. 23:59 -",  # Croatian
        "2023. 12. 31. 오후 11:59 -",  # Korean
        "[2023. 12. 31. 오후 11:59:00]",
        "31/12/2023 à 23:59 -",  # French
        "2023-12-31 23 h 59 -",  # Canadian French
        "31.12.2023 г., 23:59 ч. -",  # Bulgarian
        "31/12/2023, 11:59 μ.μ. -",  # Greek
        "٣١\u200f/١٢\u200f/٢٠٢٣، ١١:٥٩ م -",  # Arabic
        "31.12.2023 ÖS 11:59 -",  # Turkish
        "31/12/23, 11:59 CH -",  # Vietnamese
        "2023/12/31 晚上11:59 -",  # Chinese
        "12/31/23, 11:59\u202fPM –",  # a narrow blank that does not break
        "[12/31/23, 11:59:00\u202fPM]",
        "\u200e[12/31/23, 11:59:00 p.\u00a0m.]",
        "12/31/16, 11:59:00 PM:",  # iPhones of before 2017
    ],
)
def test_dates_and_clocks_of_other_languages(begun, tmp_path):
    [message] = read_whatsapp(write(tmp_path / "c.txt", f"{begun} A: x: y\n"), me="A").messages
    at = message.time
    assert (at.month, at.day, at.hour, at.minute) == (12, 31, 23, 59) and message.text == "x: y"


LINE = "31/12/2023, 23:59 - A: "


@pytest.mark.parametrize(
    ("text", "told_text", "reason"),
    [
        ("<Medien ausgeschlossen>", None, "attachment alone"),
        ("<Файл пропущен>", None, "attachment alone"),
        ("<Media omitted>\nlook at it", "look at it", None),
        ("\u200eIMG-1.jpg (file attached)\nlook", "look", None),
        ("IMG-1.jpg (Datei angehängt)", None, "attachment alone"),
        ("\u200eMy report.pdf (archivo adjunto)", None, "attachment alone"),
        ("look \u200e<attached: 0001-PHOTO.jpg>", "look", None),
        ("\u200e<adjunto: 0001-PHOTO.jpg>", None, "attachment alone"),
        ("google.com (the search engine)", "google.com (the search engine)", None),
        ("<3\nlove", "<3\nlove", None),
        ("<b>\nlove", "<b>\nlove", None),
        ("null", None, "attachment alone"),
        ("Данное сообщение удалено", None, "deleted"),
        ("このメッセージは削除されました。", None, "deleted"),
        ("Esta mensagem foi apagada.", None, "deleted"),
        ("so <This message was edited>", "so", None),
        ("so \u200e<Сообщение изменено>", "so", None),
        ("so \u200e<Tätä viestiä on muutettu>", "so", None),
        ("at\n10/12/2023 10:00: Dentist: card", "at\n10/12/2023 10:00: Dentist: card", None),
        ("as\n[31/12/2023, 10:00] B: said", "as\n[31/12/2023, 10:00] B: said", None),
    ],
)
def test_what_an_export_puts_in_the_place_of_something(text, told_text, reason, tmp_path):
    path = write(tmp_path / "c.txt", f"{LINE}hello\n{LINE}{text}\n{LINE}bye\n")
    found = read_whatsapp(path, me="A", order="dmy")
    assert [m.text for m in found.messages] == ["hello", *([told_text] if told_text else []), "bye"]
    assert found.dropped == ({reason: 1} if reason else {})


def test_two_of_one_name_are_two_chats(tmp_path):
    chats = [
        {"name": "Ann", "type": "personal_chat", "id": i,
         "messages": [{"id": 1, "type": "message", "date_unixtime": "1700000000", "from": "Ann",
                       "from_id": f"user{i}", "text": f"from {i}"},
                      {"id": 2, "type": "message", "date_unixtime": "1700000001", "from": "Bob",
                       "from_id": "user9", "text": "yes"}]}
        for i in (1, 2)
    ]  # fmt: skip
    export = {"personal_information": {"user_id": 9}, "chats": {"list": chats}}
    path = write(tmp_path / "result.json", json.dumps(export))
    assert [m.chat for m in read_telegram(path).messages] == ["Ann (1)"] * 2 + ["Ann (2)"] * 2


def test_a_date_that_can_be_read_in_two_ways_is_asked_for(tmp_path):
    path = write(tmp_path / "c.txt", "01/02/24, 10:00 - A: x\n03/04/24, 10:00 - B: y\n")
    with pytest.raises(UserError, match="--date-order dmy or mdy"):
        read_whatsapp(path, me="A")
    assert read_whatsapp(path, me="A", order="mdy").messages[0].time.month == 1


def test_an_order_that_does_not_fit_is_refused(tmp_path):
    path = write(tmp_path / "c.txt", "13/02/24, 10:00 - A: x\n")
    with pytest.raises(UserError, match="13/2/24 is no date in the order mdy"):
        read_whatsapp(path, me="A", order="mdy")


def test_who_i_am_is_asked_for_by_name(tmp_path):
    path = write(tmp_path / "c.txt", ANDROID)
    for me, wrong in ((None, "--me NAME is needed"), ("Bobby", "no message is from Bobby")):
        with pytest.raises(UserError, match=f"{wrong}.*; it is one of: Bob, Ann"):
            read_whatsapp(path, me=me)


@pytest.mark.parametrize("text", ["", "hello\n", "2024 was fine\n"])
def test_another_file_is_one_line(text, tmp_path):
    with pytest.raises(UserError, match="no line of a WhatsApp export"):
        read_whatsapp(write(tmp_path / "c.txt", text), me="A")


def test_three_who_write_are_a_group(tmp_path):
    lines = "".join(
        f"{d}/02/24, 10:00 - {who}: x\n" for d, who in ((13, "A"), (14, "B"), (15, "C"))
    )
    found = read_whatsapp(write(tmp_path / "c.txt", lines), me="A")
    assert found.groups == {"c"}


# ---- Telegram ----------------------------------------------------------------------------------


def telegram(*messages, kind="personal_chat", name="Ann"):
    filled = [
        {"id": i, "type": "message", "date_unixtime": str(1_700_000_000 + i * 60), **m}
        for i, m in enumerate(messages)
    ]
    return {"name": name, "type": kind, "id": 5, "messages": filled}


TELEGRAM = telegram(
    {"type": "service", "actor": "Ann", "action": "phone_call", "text": ""},
    {"from": "Ann", "from_id": "user1", "text": ["see ", {"type": "link", "text": "a.org"}, "!"]},
    {"from": "Bob", "from_id": "user2", "text": "yes", "edited": "2023-11-14T22:20:00"},
    {"from": "Bob", "from_id": "user2", "text": "", "photo": "(File not included.)"},
    {"from": "Bob", "from_id": "user2", "text": "look", "photo": "photos/1.jpg"},
    {"from": "Bob", "from_id": "user2", "text": "theirs", "forwarded_from": "Eve"},
    {"from": "Bob", "from_id": "user2", "text": "gif", "via_bot": "@gif"},
)


def test_a_chat_of_telegram(tmp_path):
    path = write(tmp_path / "result.json", json.dumps(TELEGRAM))
    found = read_telegram(path, me="Bob")
    assert told(found) == [("Ann", "see a.org!"), ("me", "yes"), ("me", "look")]
    assert found.dropped == {
        "an event of the chat": 1,
        "attachment alone": 1,
        "forwarded": 1,
        "written by a bot": 1,
    }
    assert told(read_telegram(path, me="user2")) == told(found)
    with pytest.raises(UserError, match="--me NAME is needed: one of Ann, Bob"):
        read_telegram(path)
    with pytest.raises(UserError, match="no message is from Zoe"):
        read_telegram(path, me="Zoe")


def test_everything_of_telegram_knows_who_i_am(tmp_path):
    group = telegram(
        {"from": "Eve", "from_id": "user3", "text": "hi"}, kind="private_group", name="us"
    )
    whole = {"personal_information": {"user_id": 2}, "chats": {"list": [TELEGRAM, group]}}
    path = write(tmp_path / "result.json", json.dumps(whole))
    found = read_telegram(path)
    assert len(found.messages) == 3 and found.dropped["in a group"] == 1
    assert len(read_telegram(path, groups=True).messages) == 4


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', "[" * 100_000, '{"messages": 3}'])
def test_another_json_is_one_line(text, tmp_path):
    with pytest.raises(UserError, match="result.json: (cannot read|not an export)"):
        read_telegram(write(tmp_path / "result.json", text), me="A")


# ---- imessage-exporter -------------------------------------------------------------------------

EXPORTED = """May 17, 2022  5:29:42 PM (Read by them after 2 minutes)
Me
Hello world
second line

May 17, 2022 10:30:00 PM
+15550100
Hi
Tapbacks:
    Loved by Me
    May 17, 2022 10:31:00 PM
    Me
    an indented reply

May 17, 2022 10:31:00 PM
Me
This message responded to an earlier message.
a reply

May 17, 2022 10:32:00 PM
Me
/Users/me/Library/Messages/Attachments/a/IMG_1.heic

May 17, 2022 10:33:00 PM
Me
This message was deleted from the conversation!

May 17, 2022 10:34:00 PM
+15550100
frist
Edited 5 seconds later: first

"""


def test_the_text_of_imessage_exporter(tmp_path):
    write(tmp_path / "+15550100.txt", EXPORTED)
    found = read_export(tmp_path)
    assert told(found) == [
        ("me", "Hello world\nsecond line"),
        ("+15550100", "Hi"),
        ("me", "a reply"),
        ("+15550100", "first"),
    ]
    assert found.dropped == {"attachment alone": 1, "deleted": 1}
    assert found.messages[0].time == datetime(2022, 5, 17, 17, 29, 42)


@pytest.mark.parametrize(
    ("body", "text", "reason"),
    [
        ("Sent with love, Ann", "Sent with love, Ann", None),
        ("Sent with Confetti\nhurray", "hurray", None),
        ("hurray\nSent with Invisible Ink", "hurray", None),
        ("one\nEdited 1 minute, 3 seconds later: two\nthree", "two\nthree", None),
        ("a\nEdited 1 second later: b\nEdited 2 hours later: c", "c", None),
        ("Edited the photos later: see", "Edited the photos later: see", None),
        ("she unsent a message to me, why?", "she unsent a message to me, why?", None),
        ("kept\nYou unsent this message part 1 hour, 49 minutes after sending!", "kept", None),
        ("You unsent this message part 5 seconds after sending!", None, "unsent"),
        ("+15550100 unsent a message!", None, "unsent"),
        ("def f():\n    return 1\n\n    # so", "def f():\n    return 1\n\n    # so", None),
        ("x\n    y\n    May 17, 2022 10:31:00 PM\n    Me\n    reply", "x\n    y", None),
    ],
)
def test_lines_of_the_exporter_are_told_from_those_of_a_person(body, text, reason, tmp_path):
    write(tmp_path / "+15550100.txt", f"May 17, 2022  5:29:42 PM\n+15550100\n{body}\n\n")
    found = read_export(tmp_path)
    assert told(found) == ([("+15550100", text)] if text else [])
    assert found.dropped == ({reason: 1} if reason else {})


def test_an_export_in_another_language_or_without_files_is_one_line(tmp_path):
    with pytest.raises(UserError, match="holds no .txt file"):
        read_export(tmp_path)
    write(tmp_path / "a.txt", "17. Mai 2022  17:29:42\nIch\nHallo\n")
    with pytest.raises(UserError, match="English text form"):
        read_export(tmp_path)


def test_the_script_on_whatsapp_says_what_was_left_out(tmp_path):
    lines = ANDROID + "".join(
        f"0{2 + i}/01/2024, 0{i}:0{j} - {'Ann' if j % 2 else 'Bob'}: text {i} {j}\n"
        for i in range(6)
        for j in range(1, 9)
    )
    chat = write(tmp_path / "Chat with Ann.txt", lines)
    done = subprocess.run(
        [
            sys.executable,
            "data/imessage.py",
            "--whatsapp",
            chat,
            "--me",
            "Bob",
            "--output-dir",
            tmp_path / "out dir",
        ],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "left out, attachment alone: 2" in done.stdout
    assert "python sft.py --train --data" in done.stdout and "'" in done.stdout
