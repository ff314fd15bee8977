"""Answers that a judge has criticised and written anew (Bai et al. 2022, section 3)."""

from collections.abc import Sequence
from typing import Any

from data_utils import Record
from errors import UserError
from rewards.comparisons import answer_text, question_text
from rewards.constitution import Principle
from rewards.judge import Judge, Unanswered, critique_text, revision_text
from rewards.scored_rows import answer_of, prompt_of


def revisions(
    judge: Judge, cases: Sequence[tuple[int, Record, Principle]]
) -> list[tuple[dict[str, Any], bool]]:
    """(row, whether it is a revision) for each (number, record with an answer, principle)."""
    texts = [
        (question_text(prompt_of(r), r.extras), answer_text(answer_of(r)), p) for _, r, p in cases
    ]
    critiques = judge.write([critique_text(*text) for text in texts])
    open_ones = [i for i, found in enumerate(critiques) if not isinstance(found, Unanswered)]
    asked = [revision_text(texts[i][0], texts[i][1], critiques[i], texts[i][2]) for i in open_ones]
    written = dict(zip(open_ones, judge.write(asked), strict=True))
    return [
        _row(case, critiques[i], written.get(i, critiques[i]), judge.name)
        for i, case in enumerate(cases)
    ]


def _row(case, critique, revision, by: str) -> tuple[dict[str, Any], bool]:
    number, record, principle = case
    about = {"row": number, "principle": principle.name, "by": by}
    row = {"prompt": prompt_of(record)}
    if not isinstance(revision, Unanswered) and (not revision.strip() or "\0" in revision):
        revision = Unanswered("the judge wrote nothing, or a NUL character")
    if isinstance(revision, Unanswered):
        row |= {"answer": answer_of(record), **record.extras}
        return row | {"judge": about | {"why": revision.why}}, False
    about |= {"answer": answer_of(record), "critique": critique}
    return row | {"completion": revision, **record.extras, "revision": about}, True


def earlier_revisions(
    labels: Any, answers: Sequence[Any], principles: Sequence[Principle], by: str
) -> set[int]:
    """Numbers of the answers that were revised before. UserError for rows of another input."""
    found = set()
    for line, row in enumerate(labels.rows, 1):
        about = row.get("revision")
        number = about.get("row") if isinstance(about, dict) else None
        if isinstance(number, int) and 0 <= number < len(answers):
            record = answers[number].record
            wanted = (prompt_of(record), answer_of(record), principles[number].name, by)
            if (
                row.get("prompt"),
                *(about.get(n) for n in ("answer", "principle", "by")),
            ) == wanted:
                found.add(number)
                continue
        raise UserError(
            f"{labels.path}:{line}: is no revision of this input by this judge; --force begins "
            "anew, --output names another file"
        )
    return found
