"""Prompts and samples for label.py, so that no model is asked; a server of its page, started."""

import json
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

from files import ROOT

import label
from command_line.label_flags import parse_arguments
from data_utils import mix_records, read_records
from labelling.items import item_ids

SCRIPT = str(ROOT / "label.py")
REPLIES = [" 22 30 36", " 21 7 36"]


def write_samples(folder: Path, replies: list[list[str]], *words: str, prompts=None) -> list[str]:
    """prompts.jsonl and labels.samples.jsonl in `folder`: `replies[i]` to prompt i. The items' ids.

    `words`: of the command line that will label them, without --prompts and --output.
    """
    prompts = prompts or [f"8 {i}" for i in range(len(replies))]
    rows = [json.dumps({"prompt": prompt}) + "\n" for prompt in prompts]
    (folder / "prompts.jsonl").write_text("".join(rows), encoding="utf-8")
    args = parse_arguments(["--prompts", str(folder / "prompts.jsonl"), *words])
    ids = item_ids(mix_records([read_records(path) for path in args.prompts]))
    lines = [{"samples_of": label.describe(args, ids, None)}]
    for id, prompt, texts in zip(ids, prompts, replies, strict=True):
        made = [
            {"text": text, "model": i % (1 + bool(args.against)), "ended": True}
            for i, text in enumerate(texts)
        ]
        lines.append({"pair": id, "extras": {}, "prompt": prompt, "replies": made})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "labels.samples.jsonl").write_text(text, encoding="utf-8")
    return ids


def line(folder: Path, *words: str) -> list[str]:
    """The command that labels what `write_samples` wrote."""
    places = ("--prompts", str(folder / "prompts.jsonl"), "--output", str(folder / "labels.jsonl"))
    return [sys.executable, SCRIPT, *places, *map(str, words)]


def rows_of(folder: Path) -> list[dict]:
    """The labels on the disk; a torn line would raise."""
    path = folder / "labels.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(one) for one in text.splitlines()]


def hear_hangups() -> None:
    """In a child: `nohup make test` hands SIGHUP down as ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Server:
    """label.py --web, started; `address` is that of its page. A context manager."""

    def __init__(self, folder: Path, *words: str, script: str | Path = SCRIPT):
        python, _, *more = line(folder, "--web", *words)
        self.process = subprocess.Popen(
            [python, str(script), *more],
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            preexec_fn=hear_hangups,
        )
        self.said = ""
        while "label at " not in self.said:
            read = self.process.stderr.readline()
            if not read:
                raise AssertionError(f"no page: {self.said}")
            self.said += read
        self.address = re.search(r"label at (\S+)", self.said)[1]

    def ask(self, path: str, body=None, headers=None, address=None) -> tuple[int, dict | str]:
        """(status, what was answered) of a request."""
        found, _, text = self.answer(path, body, headers, address)
        return found, json.loads(text) if text.startswith("{") else text

    def answer(self, path: str, body=None, headers=None, address=None):
        """(status, headers, text)."""
        data = None if body is None else json.dumps(body).encode()
        own = {"Content-Type": "application/json"} if data else {}
        given = {**own, **(headers or {})}
        request = urllib.request.Request((address or self.address) + path, data, given)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.headers, answer.read().decode()
        except urllib.error.HTTPError as wrong:
            return wrong.code, wrong.headers, wrong.read().decode()

    def end(self) -> tuple[int, str, str]:
        """Stop it as the page does: (status, standard output, standard error)."""
        self.ask("stop", {})
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
