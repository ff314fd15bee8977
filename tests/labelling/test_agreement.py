"""label.py --report: figures against slow and obvious versions, and against the noise put in."""

import fast_blas  # noqa: F401  isort: skip

import json
import random
import re

import numpy as np
import pytest
from PIL import Image

import label
from labelling.agreement import agreement, kappa_interval, make_report, read_labels, share
from labelling.report import report_lines


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(number: int, chosen: str, **more) -> dict:
    """A choice between two texts of the prompt `number`: "a" or "b"."""
    other = "b" if chosen == "a" else "a"
    texts = {name: f" {name}{number} " + name * (3 + number % 5) for name in "ab"}
    return {"prompt": f"p{number}", "chosen": texts[chosen], "rejected": texts[other]} | more


def tie(number: int, **more) -> dict:
    row = pair(number, "a")
    return {"prompt": row["prompt"], "responses": [row["chosen"], row["rejected"]]} | {
        "tie": True,
        **more,
    }


def slow_kappa(one: list, other: list) -> float:
    """Cohen (1960), as it is written there."""
    n = len(one)
    seen = sum(a == b for a, b in zip(one, other, strict=True)) / n
    chance = sum(one.count(v) * other.count(v) for v in {*one, *other}) / n**2
    return (seen - chance) / (1 - chance)


def test_pairs_meet_whatever_their_sides_and_forms(tmp_path):
    people = [pair(0, "a"), pair(1, "b"), tie(2), pair(3, "a"), pair(4, "a"), pair(5, "b")]
    people = [row | {"labeller": "anna"} for row in people]
    judged = [pair(n, c) for n, c in ((5, "b"), (4, "b"), (3, "a"), (0, "a"), (9, "a"))]
    for row in judged:
        row |= {"margin": 0.7, "judge": {"p": 0.67, "principle": "x", "orders_agree": True}}
    messages = judged[2]  # the same pair, as messages
    messages["prompt"] = [{"role": "user", "content": messages["prompt"]}]
    for name in ("chosen", "rejected"):
        messages[name] = [{"role": "assistant", "content": messages[name].strip()}]
    judged.append(pair(2, "a", margin=None, judge={"p": 0.5, "orders_agree": False}))
    files = [write(tmp_path / "a.jsonl", people), write(tmp_path / "b.jsonl", judged)]
    found = make_report([read_labels(path) for path in files])
    anna, judge = found["labellers"]
    assert (anna["name"], anna["choices"], anna["ties"]) == ("anna", 5, 1)
    assert (judge["name"], judge["choices"], judge["ties"]) == ("judge", 5, 1)
    (both,) = found["agreement"]
    assert both["pairs"] == 5 and both["same"]["share"] == 0.8 and both["opposite"] == 1
    assert judge["orders"] == share([True] * 5 + [False])


def test_kappa_is_cohen_s(tmp_path):
    draw = random.Random(0)
    for n in (40, 200):
        rows = [[pair(i, draw.choice("ab")) for i in range(n)] for _ in range(2)]
        for some in rows:
            for i in range(0, n, 9):
                some[i] = tie(i)
        paths = [write(tmp_path / f"{k}.jsonl", some) for k, some in enumerate(rows)]
        one, other = (read_labels(path)[0] for path in paths)
        found = agreement(one, other)
        keys = list(one.verdicts)
        a, b = ([x.verdicts[key].better for key in keys] for x in (one, other))
        assert found["kappa"] == pytest.approx(slow_kappa(a, b), abs=1e-12)
        # The bootstrap of the table is that of the pairs, drawn one by one; 2000 draws each leave
        # an end of the interval uncertain by about 0.01.
        generator, drawn = np.random.default_rng(1), []
        for _ in range(2000):
            some = generator.integers(0, n, n)
            drawn.append(slow_kappa([a[i] for i in some], [b[i] for i in some]))
        assert found["low"] == pytest.approx(np.quantile(drawn, 0.025), abs=0.04)
        assert found["high"] == pytest.approx(np.quantile(drawn, 0.975), abs=0.04)


@pytest.mark.parametrize(
    "noise", [0.1, *(pytest.param(e, marks=pytest.mark.long) for e in (0.0, 0.3))]
)
def test_figures_match_the_noise_put_in(tmp_path, noise):
    """Two that turn a fair truth over with probability e agree in (1 - e)^2 + e^2 of the pairs, and
    kappa is (1 - 2e)^2; the 95% intervals hold both in 19 of 20 cases, here in at least 34 of 40
    (of which 5 in 40 outside has a chance of 1.4%, and the seeds are fixed)."""
    same, kappa = (1 - noise) ** 2 + noise**2, (1 - 2 * noise) ** 2
    held = {"same": 0, "kappa": 0}
    for seed in range(40):
        draw = random.Random(seed)
        truth = [draw.choice("ab") for _ in range(150)]
        files = []
        for name in ("anna", "ben"):
            turned = ["ba"["ab".index(t)] if draw.random() < noise else t for t in truth]
            rows = [pair(i, t, labeller=name) for i, t in enumerate(turned)]
            files.append(read_labels(write(tmp_path / f"{name}.jsonl", rows)))
        (both,) = make_report(files, seed)["agreement"]
        held["same"] += both["same"]["low"] <= same + 1e-12 and same <= both["same"]["high"] + 1e-12
        held["kappa"] += both["low"] - 1e-12 <= kappa <= both["high"] + 1e-12
    assert min(held.values()) >= 34, held


def test_kappa_of_one_verdict_throughout_is_none(tmp_path):
    rows = [tie(i) for i in range(5)]
    one, other = (read_labels(write(tmp_path / f"{k}.jsonl", rows))[0] for k in "xy")
    assert agreement(one, other)["kappa"] is None
    low, high = kappa_interval(np.array([[5, 0, 0], [0, 0, 0], [0, 0, 0]]), 0)
    assert np.isnan(low) and np.isnan(high)


def test_intervals_of_shares_are_wilson_s():
    """Table of Newcombe (1998): 81 of 263 gives 0.2553 to 0.3662, 0 of 20 gives 0 to 0.1611."""
    assert share([True] * 81 + [False] * 182) == {
        "share": pytest.approx(81 / 263),
        "low": pytest.approx(0.2553, abs=5e-5),
        "high": pytest.approx(0.3662, abs=5e-5),
        "of": 263,
    }
    none = share([False] * 20)
    assert none["low"] == 0  # not a rounding error below it, which would be shown as -0%
    assert all(
        share([False] * n)["low"] == 0 and share([True] * n)["high"] <= 1 for n in range(1, 40)
    )
    assert none["high"] == pytest.approx(0.1611, abs=5e-5)
    assert share([]) is None


def test_place_and_length_sway_a_labeller_who_is_swayed(tmp_path):
    left = [pair(i, "ab"[i % 2], shown=[0, 1], labeller="left") for i in range(40)]
    longer = [pair(i, "a", labeller="longer", shown=[i % 2, 1 - i % 2]) for i in range(40)]
    for row in longer:
        row["chosen"] += " and much more"
    (one,) = read_labels(write(tmp_path / "left.jsonl", left))
    (two,) = read_labels(write(tmp_path / "longer.jsonl", longer))
    swayed, other = make_report([[one], [two]])["labellers"]
    assert swayed["first"]["share"] == 1 and swayed["first"]["low"] > 0.9
    assert swayed["longer"] is None  # all texts of a pair are as long
    assert other["longer"]["share"] == 1 and other["first"]["share"] == 0.5
    (unknown,) = read_labels(write(tmp_path / "no.jsonl", [pair(0, "a"), tie(1)]))
    assert make_report([[unknown]])["labellers"][0]["first"] is None


def test_a_ranked_list_is_all_its_pairs(tmp_path):
    texts = [" one", " two2", " three"]
    row = {"prompt": "p", "responses": texts, "scores": [1, 1, 0], "shown": [2, 0, 1]}
    pairs = [
        {"prompt": "p", "chosen": texts[2], "rejected": texts[0]},
        {"prompt": "p", "chosen": texts[1], "rejected": texts[2]},
        {"prompt": "p", "responses": texts[:2], "tie": True},
    ]
    (one,) = read_labels(write(tmp_path / "ranked.jsonl", [row]))
    (other,) = read_labels(write(tmp_path / "pairs.jsonl", pairs))
    assert len(one.verdicts) == 3 and {*one.verdicts} == {*other.verdicts}
    found = agreement(one, other)
    assert found["same"]["share"] == pytest.approx(2 / 3) and found["opposite"] == 1
    first = sorted(v.first for v in one.verdicts.values() if v.first is not None)
    assert first == [False, True]  # one (third) and two (first) over three (second)


def test_marks_of_single_replies_meet_too(tmp_path):
    rows = [{"prompt": "p", "completion": f" {i}", "label": i < 5} for i in range(10)]
    turned = [row | {"label": row["label"] or row["completion"] == " 9"} for row in rows]
    files = [write(tmp_path / f"{k}.jsonl", some) for k, some in enumerate((rows, turned))]
    one, other = (read_labels(path)[0] for path in files)
    found = agreement(one, other)
    assert found["pairs"] == 10 and found["same"]["share"] == 0.9 and found["opposite"] == 1
    assert found["kappa"] == pytest.approx(slow_kappa([1] * 5 + [0] * 5, [1] * 5 + [0] * 4 + [1]))


def test_the_same_name_in_two_files_and_a_pair_twice(tmp_path):
    rows = [pair(0, "a", labeller="anna"), pair(1, "a", labeller="anna")]
    files = [write(tmp_path / "x.jsonl", [*rows, pair(0, "b", labeller="anna")])]
    files.append(write(tmp_path / "y.jsonl", rows))
    found = make_report([read_labels(path) for path in files])
    assert [one["name"] for one in found["labellers"]] == ["anna (x.jsonl)", "anna (y.jsonl)"]
    assert found["labellers"][0]["again"] == 1
    assert found["agreement"][0]["same"]["share"] == 0.5
    assert any("1 pairs twice" in one for one in report_lines(found))


def test_the_same_name_in_files_of_one_name_is_told_apart_by_their_folders(tmp_path):
    files = []
    for name in "ab":
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name / "labels.jsonl", [pair(0, "a", labeller="anna")]))
    found = make_report([read_labels(path) for path in files])
    assert [one["name"] for one in found["labellers"]] == [f"anna ({path})" for path in files]


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -4.0, 1e300, "x", True])
def test_a_time_that_no_label_took_is_left_out(tmp_path, seconds):
    path = write(tmp_path / "x.jsonl", [pair(0, "a", seconds=seconds), pair(1, "a", seconds=2.0)])
    assert read_labels(path)[0].seconds == [2.0]


def test_the_report_in_the_terminal_and_as_a_plot(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    people = [pair(i, "a", labeller="anna", seconds=4.0, shown=[0, 1]) for i in range(9)]
    people += [tie(9, labeller="anna", seconds=10.0)]
    people += [tie(10, labeller="anna") | {"skipped": True, "tie": False}]
    judged = [pair(i, "ab"[i < 3], judge={"p": 0.6, "orders_agree": i > 1}) for i in range(10)]
    write(tmp_path / "labels.jsonl", people)
    write(tmp_path / "judged.jsonl", judged)
    assert label.main(["--report", "labels.jsonl", "judged.jsonl"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^anna +9 +1 \(10%\) +1 +4\.0 \(median\), 1 min in all$", said, re.M)
    assert re.search(r"^judge +10 +0 \(0%\) +0 +-$", said, re.M)
    row = re.search(r"^anna and judge +10 +60\.0% \[(.*)%, (.*)%\] +(\S+) \[", said, re.M)
    assert (row[1], row[2]) == ("31", "83")  # Wilson's for 6 of 10
    assert "below 30 shared pairs the intervals are wide" in said
    assert re.search(r"^judge .* 80\.0% \[49%, 94%\] of 10$", said, re.M)
    assert said.endswith("wrote labels.report.png\n")
    with Image.open("labels.report.png") as image:
        assert image.width > 1000 and len(image.getcolors(1 << 24)) > 50
    rewarded = [row | {"judge": row["judge"] | {"principle": None}} for row in judged]
    write(tmp_path / "rewarded.jsonl", rewarded)  # a reward reads no order
    label.main(["--report", "rewarded.jsonl", "--plot", "alone.png"])
    assert re.search(r"^judge +- +- +-$", capsys.readouterr().out, re.M)
    assert label.main(["--report", "labels.jsonl", "--plot", "alone.png"]) == 0
    assert "one labeller; labels of the same pairs" in capsys.readouterr().out
    write(tmp_path / "other.jsonl", [pair(99, "a")])
    label.main(["--report", "labels.jsonl", "other.jsonl", "--plot", "alone.png"])
    assert "share no pair" in capsys.readouterr().out
