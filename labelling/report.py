"""The report on labels as lines for a terminal. No MLX."""

from collections.abc import Sequence
from typing import Any

FEW = 30  # labels below which an interval is too wide to say much


def report_lines(found: dict[str, Any]) -> list[str]:
    """Counts and time, agreement, biases: what `make_report` found."""
    labellers = found["labellers"]
    lines = table(
        ["labeller", "choices", "ties", "skipped", "seconds a label"],
        [
            [
                one["name"],
                str(one["choices"]),
                share_of(one["ties"], one["choices"] + one["ties"]),
                str(one["skipped"]),
                time_of(one),
            ]
            for one in labellers
        ],
    )
    again = [one for one in labellers if one["again"]]
    lines += [f"{one['name']}: {one['again']} pairs twice; the last label counts" for one in again]
    lines += ["", *agreement_lines(found)]
    lines += [
        "",
        *table(
            ["preferred, ties left out", "shown first", "longer", "a judge's two orders agree"],
            [
                [one["name"], *(percent(one[name]) for name in ("first", "longer", "orders"))]
                for one in labellers
            ],
        ),
    ]
    return lines


def agreement_lines(found: dict[str, Any]) -> list[str]:
    if len(found["labellers"]) < 2:
        return [
            "agreement: one labeller; labels of the same pairs by a second one or by judge.py say "
            "how far to trust these"
        ]
    if not found["agreement"]:
        return ["agreement: the labellers share no pair (the same prompt and the same two texts)"]
    rows = [
        [
            f"{one['one']} and {one['other']}",
            str(one["pairs"]),
            percent(one["same"], count=False),
            kappa(one),
            str(one["opposite"]),
        ]
        for one in found["agreement"]
    ]
    lines = table(["agreement", "pairs", "the same", "Cohen's kappa", "opposite"], rows)
    if min(one["pairs"] for one in found["agreement"]) < FEW:
        lines.append(f"note: below {FEW} shared pairs the intervals are wide; label more of them")
    return lines


def kappa(one: dict[str, Any]) -> str:
    if one["kappa"] is None:
        return "- (one verdict throughout)"
    return f"{one['kappa']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"


def percent(share: dict[str, float] | None, count: bool = True) -> str:
    """``53% [44%, 61%] of 120``: a share with its 95% interval."""
    if share is None:
        return "-"
    text = f"{share['share']:.1%} [{share['low']:.0%}, {share['high']:.0%}]"
    return text + f" of {share['of']}" * count


def share_of(count: int, total: int) -> str:
    return f"{count} ({count / total:.0%})" if total else "0"


def time_of(one: dict[str, Any]) -> str:
    if one["median_seconds"] is None:
        return "-"
    return f"{one['median_seconds']:.1f} (median), {sum(one['seconds']) / 60:.0f} min in all"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns as wide as their widest cell."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (head, *rows)
    ]
