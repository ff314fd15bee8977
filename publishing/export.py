"""Writes what fuse.py makes: one function for each form, each checked before it gets its name."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from errors import UserError
from models.adapter_files import is_single_file, read_adapter, read_json, save_adapter
from models.comparing import Difference, all_logits, compare_logits, compare_scores
from models.load import DEFAULT_MODEL, LoadedModel, load_model
from models.model_folders import check_free, new_file, new_folder, stored_dtype, write_model
from models.parts import Parts
from models.reward_model import load_reward_model, save_reward_head
from models.soft_tokenizer import add_soft_prompt
from models.soft_vocabulary import FusedPrompt
from publishing.card import MARK, Facts, write_card
from publishing.run_facts import read_run

# In float32 a fused model is its unfused one up to the order of sums; more is a fault.
TOLERANCE = 1e-3
GGUF_NAME = "model.gguf"
LIKELY = 1e-6  # a virtual token this probable is worth a warning


@dataclass
class CardChoices:
    """What the person at the terminal decides about the model card."""

    name: str  # USER/NAME, or that of the folder
    run: Path | None = None
    license: str | None = None


@dataclass
class Exported:
    """What was written and what can be done with it."""

    messages: list[str] = field(default_factory=list)
    next_commands: list[str] = field(default_factory=list)


@dataclass
class Check:
    """The sequences that the unfused model was run on, and what it gave."""

    sequences: list[list[int]]
    expected: list


def export(
    parts: Parts,
    path: Path,
    form: str,
    check: Check,
    card: CardChoices,
    *,
    force: bool = False,
    dequantize: bool = False,
) -> Exported:
    """Write `parts` to `path` as `form` (model, adapter, peft, classifier, gguf).

    Raises UserError, with nothing written, for what the form cannot hold and when the result does
    not compute what the parts did.
    """
    if form == "adapter":
        return _export_adapter(parts, path, card, force)
    if form == "peft":
        return _export_peft(parts, path, check, card, force)
    _refuse_early(parts, form, dequantize)
    done = Exported()
    requantized = bool(parts.adapters) and parts.bits is not None and not dequantize
    if requantized:
        done.messages.append(
            f"note: the base has {parts.bits}-bit weights, and the sum is rounded to them again; "
            f"--dequantize avoids that, in about {16 / parts.bits:.0f} times the size"
        )
    prompt = parts.fuse(dequantize=dequantize)
    if prompt:
        done.messages.append(_about_prompt(prompt))
    exact = not requantized and stored_dtype(parts.base) == "float32"
    write = {"model": _export_model, "classifier": _export_classifier, "gguf": _export_gguf}[form]
    write(parts, path, check, card, force=force, exact=exact, prompt=prompt, done=done)
    return done


def _refuse_early(parts: Parts, form: str, dequantize: bool) -> None:
    """What needs no fusing to be known."""
    if form == "classifier" and parts.reward_model is None:
        raise UserError("--format classifier is for reward models; this one has no reward head")
    if form == "model" and parts.reward_model is not None and not parts.tunings:
        from models.classifiers import is_classifier

        if is_classifier(parts.base.path):
            raise UserError(f"{parts.base.path}: a classifier of transformers is read as it is; "
                            "give it as --reward_model")  # fmt: skip
    if form == "gguf":
        if parts.reward_model is not None:
            raise UserError("GGUF: has no place for a reward head")
        if parts.prompt is not None:
            raise UserError("GGUF: has no way to put a soft prompt in front of every text")
    if dequantize and parts.bits is None:
        raise UserError("--dequantize has no effect: the base is not quantised")


def _about_prompt(prompt: FusedPrompt) -> str:
    chance = np.exp(prompt.highest)
    text = (f"soft prompt: {len(prompt.ids)} tokens added to the vocabulary; the model writes one "
            f"with a probability of at most {chance:.0e}")  # fmt: skip
    if chance > LIKELY:
        text += "\nnote: that is not never; transformers is told to forbid them, mlx-lm cannot be"
    return text


# ---------------------------------------------------------------------------- fused forms


def _export_model(parts, path, check, card, *, force, exact, prompt, done) -> None:
    with new_folder(path, force=force) as folder:
        write_model(folder, parts.base)
        if prompt:
            add_soft_prompt(folder, parts.base.tokenizer, prompt.ids)
        if parts.reward_model is not None:
            save_reward_head(folder, parts.reward_model)
        difference = _compare(folder, parts, check, prompt, exact)
        done.messages.append(difference)
        kind = "model" if parts.reward_model is None else "reward"
        write_card(folder, _facts(kind, parts, card, difference))
    if parts.reward_model is None:
        done.next_commands = [
            f"python talk_to_model.py --model {path}",
            f"python ppo_training.py --model {path} --ground_truth_reward",
        ]
    else:
        done.next_commands = [f"python ppo_training.py --model MODEL --reward_model {path}"]


def _export_classifier(parts, path, check, card, *, force, exact, prompt, done) -> None:
    from models.classifiers import write_classifier

    with new_folder(path, force=force) as folder:
        constant = write_classifier(folder, parts.base, parts.reward_model)
        if prompt:
            add_soft_prompt(folder, parts.base.tokenizer, prompt.ids)
        difference = _compare(folder, parts, check, prompt, exact)
        done.messages.append(difference)
        if constant:
            done.messages.append(
                f"note: transformers' form has no constant, so scores there are {constant:+.4g} "
                "away from ours, all by the same; this program adds it again (reward_offset)"
            )
        write_card(folder, _facts("classifier", parts, card, difference))
    done.next_commands = [f"python ppo_training.py --model MODEL --reward_model {path}"]


def _export_gguf(parts, path, check, card, *, force, exact, prompt, done) -> None:
    from models.gguf import check_gguf

    check_gguf(parts.base)
    if path.suffix == ".gguf":
        with new_file(path, force=force) as scratch:
            done.messages.append(_make_gguf(scratch / path.name, scratch, parts))
    else:
        with new_folder(path, force=force) as folder:
            done.messages.append(_make_gguf(folder / GGUF_NAME, folder, parts))
            write_card(folder, _facts("gguf", parts, card, None))
    file = path if path.suffix == ".gguf" else path / GGUF_NAME
    done.next_commands = [f"llama-cli -m {file} -p Hello"]


def _make_gguf(file: Path, folder: Path, parts: Parts) -> str:
    """Write a GGUF file; the converter reads the tokenizer from a model folder, for a while."""
    from models.gguf import write_gguf

    scratch = folder / "model"
    scratch.mkdir()
    write_model(scratch, parts.base)
    change = write_gguf(file, scratch, parts.base)
    shutil.rmtree(scratch)
    return f"largest change of a weight in the GGUF file: {change:.1e}"


def _compare(folder: Path, parts: Parts, check: Check, prompt, exact: bool) -> str:
    """Load what was written; one line on how far it is from the unfused parts."""
    if parts.reward_model is not None:
        scores = load_reward_model(folder, dtype=parts.working).score(check.sequences)
        difference, what = compare_scores(check.expected, scores), "scores"
    else:
        loaded = load_model(folder, dtype=parts.working)
        prefix = prompt.ids if prompt else ()
        logits = all_logits(loaded.model, check.sequences, prefix)
        difference, what = compare_logits(check.expected, logits), "logits"
    _refuse_broken(difference, what, check.expected, exact)
    return f"largest difference in {what}, fused against unfused: {difference}"


def _refuse_broken(difference: Difference, what: str, expected: Sequence, exact: bool) -> None:
    size = max(1.0, max(float(np.abs(part).max()) for part in expected))
    if not np.isfinite(difference.largest) or (exact and difference.largest > TOLERANCE * size):
        raise UserError(f"the result does not compute what the unfused model does: {what} differ "
                        f"by {difference.largest:.1e}; nothing was written")  # fmt: skip


# ---------------------------------------------------------------------------- adapters


def _export_adapter(parts: Parts, path: Path, card: CardChoices, force: bool) -> Exported:
    (tuning,) = parts.tunings
    base = parts.base.name
    if is_single_file(path):
        check_free(path, force, suffix=path.suffix)
        save_adapter(path, tuning, parts.base.model, base)
        if parts.reward_model is not None:
            save_reward_head(path, parts.reward_model)
        return Exported([_arrays_changed(path, tuning)])
    with new_folder(path, force=force) as folder:
        save_adapter(folder, tuning, parts.base.model, base)
        if parts.reward_model is not None:
            save_reward_head(folder, parts.reward_model)
        message = _arrays_changed(folder, tuning)
        write_card(folder, _facts("adapter", parts, card, None))
    command = f"mlx_lm.generate --model {parts.base.path} --adapter-path {path} --prompt Hello"
    usable = tuning.kind != "prompt" and parts.reward_model is None
    return Exported([message], [command] if usable else [])


def _arrays_changed(path: Path, tuning) -> str:
    """Read an adapter back and say how far its arrays are from those in memory."""
    written, _ = read_adapter(path)
    expected = tuning.arrays()
    if written.keys() != expected.keys():
        raise UserError(f"{path}: was not written whole")
    changes = [float(abs(written[name] - array).max()) for name, array in expected.items()]
    return f"largest change of a weight in the adapter: {max(changes):.1e}"


def _export_peft(parts, path: Path, check: Check, card: CardChoices, force: bool) -> Exported:
    from models.interop import load_peft_adapter, save_peft_adapter

    if parts.reward_model is not None:
        raise UserError("a PEFT adapter has no place for a reward head; --format classifier does")
    (tuning,) = parts.tunings
    base = parts.base.name
    with new_folder(path, force=force) as folder:
        save_peft_adapter(folder, tuning, base, parts.base.path)
        loaded = load_peft_adapter(parts.base.model, folder)
        logits = all_logits(parts.base.model, check.sequences, loaded.prefix)
        loaded.deactivate()
        difference = compare_logits(check.expected, logits)
        _refuse_broken(difference, "logits", check.expected, parts.bits is None)
        write_card(folder, _facts("peft", parts, card, None))
    return Exported([f"largest difference in logits, PEFT's form against ours: {difference}"])


# ---------------------------------------------------------------------------- cards


def _facts(kind: str, parts: Parts, card: CardChoices, difference: str | None) -> Facts:
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


def card_of_folder(folder: Path, card: CardChoices) -> None:
    """Write a card for a folder that is there already, from what its files tell.

    A card that was not written by this program is left alone. UserError where that would make
    choices about the card ineffective.
    """
    file = folder / "README.md"
    if file.exists() and MARK not in file.read_text(encoding="utf-8", errors="replace"):
        if card.run or card.license:
            raise UserError(f"{file}: was not written by fuse.py and is left as it is; edit it, or "
                            "delete it for a new one")  # fmt: skip
        return
    if file.exists() and not (card.run or card.license):
        return
    write_card(folder, _facts_of_folder(folder, card))


def _facts_of_folder(folder: Path, card: CardChoices) -> Facts:
    from models.classifiers import is_classifier
    from models.interop import is_peft_adapter

    descriptions: list[dict] = []
    kind, base, quantized, pooling = "model", None, False, None
    if (folder / "config.json").exists():
        quantized = "quantization" in read_json(folder / "config.json")
        if (folder / "reward_head.safetensors").exists():
            kind = "reward"
        elif is_classifier(folder):
            kind, pooling = "classifier", "last"
    else:
        kind = "peft" if is_peft_adapter(folder) else "adapter"
        descriptions = [read_adapter(folder)[1]]
        base = descriptions[0].get("model")
    license_name = card.license or license_in_card(folder / "README.md")
    run = read_run(card.run) if card.run else None
    return Facts(kind, card.name, base, license_name, descriptions, [1.0] * len(descriptions), run,
                 quantized, pooling)  # fmt: skip
