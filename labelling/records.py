"""Labels as rows that training scripts read as they are, with who, when and which model. No MLX."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from labelling.items import Choice, Item, Text

OURS = {"pair", "label_id", "labeller"}  # what every row of ours has


def label_row(
    item: Item,
    choice: Choice,
    *,
    label_id: str,
    labeller: str,
    models: Sequence[dict[str, Any]],
    ranked: bool,
) -> dict[str, Any]:
    """A preference record; of a `ranked` file a list of responses with scores; of one reply an
    unpaired record.

    A tie and a skipped item have `responses` and "tie" or "skipped", which no reader of preferences
    takes for one. Lists about responses (models, ended, shown) have their order: chosen, rejected,
    or that of `responses`. `shown`: the place of each on the screen.
    """
    places = list(range(len(item.order)))
    if choice.ranks is not None:
        places.sort(key=lambda place: choice.ranks[place])  # stable: a tie in the order shown
    replies = [item.replies[item.order[place]] for place in places]
    texts = [answer(item.prompt, reply.text) for reply in replies]
    row: dict[str, Any] = {"prompt": item.prompt}
    if choice.ranks is None:
        row |= {"responses": texts, "skipped": True}
    elif len(texts) == 1:
        row |= {"completion": texts[0], "label": choice.ranks == [0]}
    elif choice.tied:
        row |= {"responses": texts, "tie": True}
    elif ranked:
        ranks = [choice.ranks[place] for place in places]
        row |= {"responses": texts, "scores": [max(ranks) - rank for rank in ranks]}
    else:
        row |= {"chosen": texts[0], "rejected": texts[1]}
    row |= item.extras
    row |= {
        "labeller": labeller,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": [models[reply.model] for reply in replies],
        "ended": [reply.ended for reply in replies],
        "shown": places,
    }
    if choice.seconds is not None:
        row["seconds"] = round(choice.seconds, 1)
    if choice.aspects and choice.ranks is not None:
        row["aspects"] = {
            name: "tie" if place is None else places.index(place)
            for name, place in choice.aspects.items()
        }
    if choice.note:
        row["note"] = choice.note
    return row | {"pair": item.id, "label_id": label_id}


def answer(prompt: Text, text: str) -> Text:
    """A response in the form of its prompt, text or messages."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def kind_of(row: dict[str, Any]) -> str:
    """choice, tie or skipped."""
    if row.get("skipped") is True:
        return "skipped"
    return "tie" if row.get("tie") is True else "choice"
