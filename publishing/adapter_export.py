"""Adapters on their own: in mlx-lm's layout, as one file, or in PEFT's form."""

from pathlib import Path

from errors import UserError
from models.adapter_description import REWARD_HEAD
from models.adapter_files import is_single_file, read_adapter, save_adapter
from models.comparing import all_logits, compare_logits
from models.model_folders import check_free, new_folder
from models.parts import Parts
from models.reward_model import save_reward_head
from publishing.card import write_card
from publishing.card_facts import CardChoices, facts_of_parts
from publishing.checks import Check, Exported, refuse_broken
from safe_files import sweep


def export_adapter(parts: Parts, path: Path, card: CardChoices, force: bool) -> Exported:
    (tuning,) = parts.tunings
    if is_single_file(path):
        check_free(path, force, suffix=path.suffix)
        sweep(path)
        head = REWARD_HEAD if parts.reward_model is not None else None
        save_adapter(path, tuning, parts.base, head=head)
        if parts.reward_model is not None:
            save_reward_head(path, parts.reward_model)
        return Exported([_arrays_changed(path, tuning)])
    with new_folder(path, force=force) as folder:
        save_adapter(folder, tuning, parts.base)
        if parts.reward_model is not None:
            save_reward_head(folder, parts.reward_model)
        message = _arrays_changed(folder, tuning)
        write_card(folder, facts_of_parts("adapter", parts, card))
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


def export_peft(parts, path: Path, check: Check, card: CardChoices, force: bool) -> Exported:
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
        refuse_broken(difference, "logits", check.expected, parts.bits is None)
        write_card(folder, facts_of_parts("peft", parts, card))
    return Exported([f"largest difference in logits, PEFT's form against ours: {difference}"])
