"""Where labelling stands: which item is next, what is done, and how long the rest takes. No MLX.

The terminal and the page do the same through it, from one thread.
"""

import uuid
from collections.abc import Sequence
from statistics import median
from typing import Any

from errors import UserError
from labelling.items import Choice, Item, check_choice, make_item
from labelling.label_file import LabelFile
from labelling.records import kind_of, label_row
from labelling.sample_file import LEFT_OUT, SampleFile
from labelling.sampler import Sampler

RECENT = 20  # labels whose time tells how long the rest takes


class Desk:
    """A set of items, their samples as they come, and the file of labels."""

    def __init__(
        self,
        ids: Sequence[str],
        samples: SampleFile,
        labels: LabelFile,
        sampler: Sampler | None,
        *,
        models: Sequence[dict[str, Any]],
        labeller: str,
        aspects: Sequence[str] = (),
        ranked: bool = False,
        seed: int = 0,
    ):
        self.ids, self.samples, self.labels, self.sampler = list(ids), samples, labels, sampler
        self.models, self.labeller, self.aspects = models, labeller, list(aspects)
        # Two labellers see other sides, or a habit of the left one would look like agreement.
        self.ranked, self.shuffle = ranked, f"{seed} {labeller}"
        self.items: dict[str, Item] = {}
        self.same: set[str] = set()  # items whose replies are all the same: nothing to ask
        self.left_out: set[str] = set()  # items whose prompt was refused
        self.labelled = {row["pair"] for row in labels.rows}
        self.session: list[str] = []  # ids of the labels given since the start
        for row in samples.rows.values():
            self._take(row)

    # ----------------------------------------------------------------- samples

    def _take(self, row: dict[str, Any]) -> None:
        if row.get(LEFT_OUT):
            self.left_out.add(row["pair"])
        elif (item := make_item(row, self.shuffle)) is None:
            self.same.add(row["pair"])
        else:
            self.items[item.id] = item

    def poll(self) -> None:
        """Take in what has been sampled since."""
        if self.sampler is not None:
            self.sampler.poll()
        for row in self.samples.poll():
            self._take(row)

    # ----------------------------------------------------------------- where it stands

    @property
    def total(self) -> int:
        """Items that can be labelled, as far as that is known."""
        return len(self.ids) - len(self.same) - len(self.left_out)

    @property
    def done(self) -> int:
        return len(self.labelled)

    @property
    def finished(self) -> bool:
        return self.done >= self.total

    def current(self) -> Item | None:
        """The first item without a label; None where there is none or it is not sampled yet."""
        for id in self.ids:
            if id in self.items and id not in self.labelled:
                return self.items[id]
        return None

    def seconds_left(self) -> float | None:
        """What the rest takes at the pace of the last labels; None before there is a pace."""
        times = [row["seconds"] for row in self.labels.rows[-RECENT:] if "seconds" in row]
        return median(times) * max(0, self.total - self.done) if times else None

    # ----------------------------------------------------------------- labels

    def label(self, item_id: str, choice: Choice, label_id: str | None = None) -> bool:
        """Write a label; it is on the disk when this returns.

        The same `label_id` a second time changes nothing: a request that is sent again, as its
        answer got lost. False where the item has a label of another id: another page was faster.
        """
        label_id = label_id or uuid.uuid4().hex
        if item_id in self.labelled:
            return any(r["label_id"] == label_id for r in self.labels.rows if r["pair"] == item_id)
        if item_id not in self.items:
            raise UserError(f"{item_id}: there is no such item to label")
        item = self.items[item_id]
        check_choice(choice, item, self.aspects)
        row = label_row(
            item,
            choice,
            label_id=label_id,
            labeller=self.labeller,
            models=self.models,
            ranked=self.ranked,
        )
        self.labels.append(row)
        self.labelled.add(item_id)
        self.session.append(label_id)
        return True

    def last_label(self) -> str | None:
        """The id of the label that undo would take back."""
        return self.labels.rows[-1]["label_id"] if self.labels.rows else None

    def undo(self, label_id: str | None = None) -> bool:
        """Take the last label back; its item is the next again. False where there is none.

        With `label_id` only that one, so that a request sent again takes back no second label.
        """
        if label_id is not None and label_id != self.last_label():
            return False
        row = self.labels.take_back()
        if row is None:
            return False
        self.labelled.discard(row["pair"])
        if row["label_id"] in self.session:
            self.session.remove(row["label_id"])
        return True

    def summary(self) -> str:
        """One line for the end."""
        counts = self.labels.counts()
        parts = [f"{counts['choice']} choices", f"{counts['tie']} ties"]
        parts.append(f"{counts['skipped']} skipped")
        total = sum(counts.values())
        return f"{self.labels.path}: {total} labels ({', '.join(parts)}), {len(self.session)} new"


def check_labels(labels: LabelFile, ids: Sequence[str], models: Sequence[dict], aspects) -> None:
    """Raise UserError where a file holds labels of other prompts, models or aspects."""
    known = set(ids)
    for number, row in enumerate(labels.rows, 1):
        where = f"{labels.path}: row {number}"
        if row["pair"] not in known:
            raise UserError(
                f"{where} is a label of another prompt set; name another file with --output"
            )
        if any(model not in models for model in row.get("models", [])):
            raise UserError(
                f"{where} is a label of another model or other sampling; name another file with "
                "--output"
            )
        asked = list(row.get("aspects", {}))
        if kind_of(row) != "skipped" and asked != list(aspects):
            asks = f"the aspects {', '.join(asked)}" if asked else "no aspects"
            raise UserError(f"{where} was labelled with {asks}: give the same, or another --output")
