"""Where the facts on a model card come from: the parts that were fused, or a folder's files."""

from dataclasses import dataclass
from pathlib import Path

from errors import UserError
from models.adapter_description import read_json
from models.adapter_files import read_adapter
from models.load import DEFAULT_MODEL, LoadedModel
from models.parts import Parts
from publishing.card import MARK, Facts
from publishing.run_facts import read_run
from publishing.scoring_code import scoring_code


@dataclass
class CardChoices:
    """What the person at the terminal decides about the model card."""

    name: str  # USER/NAME, or that of the folder
    run: Path | None = None
    license: str | None = None


def facts_of_parts(
    kind: str,
    parts: Parts,
    card: CardChoices,
    difference: str | None = None,
    *,
    scoring: str | None = None,
    constant: float = 0.0,
) -> Facts:
    """Facts on a result made of `parts`; `difference` is the line that the comparison gave."""
    weights = iter(parts.weights)
    return Facts(
        kind=kind,
        name=card.name,
        base=parts.base.name,
        license=card.license or license_of(parts.base),
        adapters=parts.descriptions,
        weights=[next(weights) if t.kind in ("lora", "dora") else 1.0 for t in parts.tunings],
        run=read_run(card.run) if card.run else None,
        quantized="quantization" in parts.base.config,
        pooling=parts.reward_model.pooling if parts.reward_model else None,
        scoring=scoring,
        constant=constant,
        difference=difference and difference.partition(": ")[2],
    )


def license_of(base: LoadedModel) -> str | None:
    """The licence that the base model's own card states; the embedded model is under MIT."""
    if base.path.resolve() == DEFAULT_MODEL.resolve():
        return "mit"
    return license_in_card(base.path / "README.md")


def license_in_card(file: Path) -> str | None:
    from huggingface_hub import ModelCard

    try:
        found = ModelCard.load(file).data.license if file.is_file() else None
    except Exception:  # a card is prose by strangers; a broken header states no licence
        return None
    return found if isinstance(found, str) else None


def facts_of_folder(folder: Path, card: CardChoices) -> Facts | None:
    """Facts for the card of a folder that is there already, from what its files tell; None to leave
    its card as it is.

    A card that was not written by this program is left alone. UserError where that would make
    choices about the card ineffective.
    """
    file = folder / "README.md"
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        if card.run or card.license:
            raise UserError(
                f"{file}: was not written by fuse.py and is left as it is; edit it, or "
                "delete it for a new one"
            )
        return None
    if file.exists() and not (card.run or card.license):
        return None
    return _read_facts(folder, card)


def _read_facts(folder: Path, card: CardChoices) -> Facts:
    from models.adapter_description import is_peft_adapter
    from models.classifiers import OFFSET, is_classifier, reading_in

    descriptions: list[dict] = []
    kind, base, quantized, pooling = "model", None, False, None
    scoring, constant = None, 0.0
    if (folder / "config.json").exists():
        quantized = "quantization" in read_json(folder / "config.json")
        if (folder / "reward_head.safetensors").exists():
            kind = "reward"
        elif is_classifier(folder):
            kind, pooling = "classifier", "last"
            scoring = scoring_code(folder, reading_in(folder))
            constant = float(read_json(folder / "config.json").get(OFFSET, 0.0))
    else:
        kind = "peft" if is_peft_adapter(folder) else "adapter"
        descriptions = [read_adapter(folder)[1]]
        base = descriptions[0].get("model")
    license_name = card.license or license_in_card(folder / "README.md")
    run = read_run(card.run) if card.run else None
    return Facts(
        kind,
        card.name,
        base,
        license_name,
        descriptions,
        [1.0] * len(descriptions),
        run,
        quantized,
        pooling,
        scoring,
        constant,
    )
