"""label.py under load: how soon a file of many pairs opens, and how soon each key is answered.

    python benchmarks/label_load.py                    2,000 pairs, on the embedded model
    python benchmarks/label_load.py --pairs 200        a look

Opening: from the start of the process to the page's first pair, its Markdown rendered, all labels
but those of the measured keys being there. A key: from the request to the answer with the next
pair, the label synced in between; and the same while another process samples as fast as it can.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from side_by_side import ROOT
from tables import RESULTS, machine

KEYS = 200


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000, help="prompts in the file")
    parser.add_argument("--output", type=Path, default=RESULTS / "label_load.json")
    return parser.parse_args()


class Server:
    """label.py --web in a folder; `seconds`: until its page shows a pair, or is without one."""

    def __init__(self, folder: Path, *words: str):
        line = [sys.executable, str(ROOT / "label.py"), "--prompts", "prompts.jsonl", "--web"]
        started = time.perf_counter()
        self.process = subprocess.Popen(
            [*line, *words],
            cwd=folder,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        said = ""
        while (found := re.search(r"label at (\S+)", said)) is None:
            said += self.process.stderr.readline()
        self.address = found[1]
        self.ask("")
        self.state = self.ask("state")
        self.seconds = time.perf_counter() - started

    def ask(self, path: str, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        request = urllib.request.Request(self.address + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if path else text

    def key(self, number: int) -> float:
        """Seconds that one label takes, until the next pair is here."""
        while self.state["item"] is None:
            time.sleep(0.05)
            self.state = self.ask("state")
        body = {"id": f"label-{number:06d}", "pair": self.state["item"]["pair"], "ranks": [0, 1]}
        started = time.perf_counter()
        self.state = self.ask("label", body)
        return time.perf_counter() - started

    def end(self) -> None:
        self.ask("stop", {})
        self.process.wait()


def measure(pairs: int) -> dict[str, float]:
    """All figures, in seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [json.dumps({"prompt": f"{i % 100} {i // 100 % 100}"}) for i in range(pairs)]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
        server = Server(folder)
        busy = [server.key(n) for n in range(min(KEYS, pairs // 4))]
        samples = folder / "labels.samples.jsonl"
        while samples.read_bytes().count(b"\n") < pairs + 1:
            time.sleep(0.2)
        labelled = len(busy)
        while labelled < pairs - KEYS and server.state["item"] is not None:
            server.key(labelled)
            labelled += 1
        server.end()
        opened = []
        for _ in range(5):
            server = Server(folder)
            opened.append(server.seconds)
            server.end()
        server = Server(folder)
        keys = []
        while server.state["item"] is not None and len(keys) < KEYS:
            keys.append(server.key(labelled + len(keys)))
        server.end()
    return {
        "pairs": pairs,
        "opened_median": statistics.median(opened),
        "opened_most": max(opened),
        "key_median": statistics.median(keys),
        "key_most": max(keys),
        "key_while_sampling_median": statistics.median(busy),
        "key_while_sampling_most": max(busy),
    }


def main() -> None:
    args = arguments()
    found = measure(args.pairs)
    print(f"{found['pairs']} pairs")
    for name, what in (
        ("opened", "opened, seconds"),
        ("key", "a key, milliseconds"),
        ("key_while_sampling", "a key while sampling goes on, milliseconds"),
    ):
        scale = 1 if name == "opened" else 1000
        median, most = (scale * found[f"{name}_{kind}"] for kind in ("median", "most"))
        print(f"{what}: median {median:.3g}, most {most:.3g}")
    text = json.dumps(found | {"machine": machine()}, indent=2)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
