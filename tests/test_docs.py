"""The documents are true: code in them runs, the file tree is the disk's, links lead somewhere."""

import json
import re
import subprocess
import sys

import pytest
from files import ROOT

DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("*/README.md")]


@pytest.mark.parametrize("page", ["ppo.md", "group.md"])
def test_example_of_the_trainer_runs_and_learns(page):
    code = re.search(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(), re.S).group(1)
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(lines) <= 25
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    scores = [float(line.split()[1]) for line in done.stdout.splitlines()]
    assert len(scores) == 10
    assert sum(scores[-3:]) > 1.5 * sum(scores[:3])  # seen: 0.3 at the start, over 1 at the end


def test_the_table_of_the_benchmarks_is_that_of_their_results():
    result = json.loads((ROOT / "benchmarks" / "results" / "bench.json").read_text("utf-8"))
    assert len(result["rows"]) > 15
    for document in ("README.md", "docs/benchmarks.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for row in (result["header"], *result["rows"]):
            assert f"| {' | '.join(row)} |" in text, document


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document):
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.S)
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" not in target and not target.startswith("mailto:"):
            assert (document.parent / target).exists(), target


def test_the_readme_s_file_tree_is_the_disk_s():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## Files")[1].split("```")[1]
    listed, folder = set(), ""
    for line in tree.strip().splitlines():
        inside = line.startswith("  ")
        names = re.findall(r"(?<!\S)(?:[\w.-]+\.\w+|[\w-]+/|Makefile|LICENSE)(?!\S)", line)
        if not inside and names and names[0].endswith("/"):
            folder = names[0]
        listed |= {folder + name if inside else name for name in names}
    missing = {name for name in listed if not (ROOT / name).exists()}
    assert not missing
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    top = {name.partition("/")[0] + ("/" if "/" in name else "") for name in tracked.split()}
    assert {name for name in top if not name.startswith(".")} - listed == set()


def test_no_tracked_file_holds_a_conflict():
    marks = ["git", "grep", "-l", "-E", r"^(<{7}|>{7}) "]
    assert subprocess.run(marks, cwd=ROOT, capture_output=True, text=True).stdout == ""
