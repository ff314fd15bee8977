"""Writes what fuse.py makes: one function for each form, each checked before it gets its name.

A training script leaves the same beside its adapter (`write_fused`).
"""

import shlex
import shutil
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from errors import UserError
from models.adapter_description import REWARD_HEAD
from models.adapter_files import is_single_file, read_adapter, save_adapter
from models.comparing import Difference, all_logits, check_sequences, compare_logits, compare_scores
from models.family_names import about_transformers, check_names
from models.load import DEFAULT_MODEL, load_model
from models.model_folders import check_free, new_file, new_folder, stored_dtype, write_model
from models.parts import Parts, load_parts
from models.reward_model import load_reward_model, save_reward_head
from models.soft_prompt import find_embedding
from models.soft_vocabulary import FusedPrompt, add_soft_prompt
from publishing.card import write_card
from publishing.card_facts import CardChoices, facts_of_parts
from publishing.scoring_code import scoring_code, write_bos
from run_folder.console import command
from safe_files import sweep

# ------------------------------------------------------------------------------ comparison


# In float32 a fused model is its unfused one up to the order of sums; more is a fault.
TOLERANCE = 1e-3


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

    @classmethod
    def of(cls, parts: Parts) -> Self:
        """What `parts` compute before they are fused."""
        vocabulary = find_embedding(parts.base.model)[2].weight.shape[0]
        sequences = check_sequences(parts.base.tokenizer, vocabulary)
        return cls(sequences, parts.outputs(sequences))


def refuse_broken(difference: Difference, what: str, expected: Sequence, exact: bool) -> None:
    """Raise UserError where a result is not finite or, if `exact`, not what was expected."""
    size = max(1.0, max(float(np.abs(part).max()) for part in expected))
    if not np.isfinite(difference.largest) or (exact and difference.largest > TOLERANCE * size):
        raise UserError(
            f"the result does not compute what the unfused model does: {what} differ "
            f"by {difference.largest:.1e}; nothing was written"
        )


# ------------------------------------------------------------------------------ adapters


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


# ------------------------------------------------------------------------------ models


GGUF_NAME = "model.gguf"
LIKELY = 1e-6  # a virtual token this probable is worth a warning


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
        return export_adapter(parts, path, card, force)
    if form == "peft":
        return export_peft(parts, path, check, card, force)
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
            raise UserError(
                f"{parts.base.path}: a classifier of transformers is read as it is; "
                "give it as --reward_model"
            )
    if form == "gguf":
        if parts.reward_model is not None:
            raise UserError("GGUF: has no place for a reward head")
        if parts.prompt is not None:
            raise UserError("GGUF: has no way to put a soft prompt in front of every text")
    if dequantize and parts.bits is None:
        raise UserError("--dequantize has no effect: the base is not quantised")


def _about_prompt(prompt: FusedPrompt) -> str:
    chance = np.exp(prompt.highest)
    text = (
        f"soft prompt: {len(prompt.ids)} tokens added to the vocabulary; the model writes one "
        f"with a probability of at most {chance:.0e}"
    )
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
        check_names(folder, parts.base)
        difference = _compare(folder, parts, check, prompt, exact)
        done.messages += [difference, *about_transformers(parts.base)]
        kind = "model" if parts.reward_model is None else "reward"
        write_card(folder, facts_of_parts(kind, parts, card, difference))
    if parts.reward_model is None:
        done.next_commands = [
            command("talk_to_model.py", model=path),
            command("ppo_training.py", *reward_for(parts), model=path),
        ]
    else:
        done.next_commands = [command("ppo_training.py", model="MODEL", reward_model=path)]


def reward_for(parts: Parts) -> list[str]:
    """Flags of a reward: the digits score for the digits model alone."""
    if parts.base.path.resolve() == DEFAULT_MODEL.resolve():
        return ["--ground-truth-reward"]
    return ["--reward-function", "FILE.py:NAME"]


def _export_classifier(parts, path, check, card, *, force, exact, prompt, done) -> None:
    from models.classifiers import write_classifier

    with new_folder(path, force=force) as folder:
        constant = write_classifier(folder, parts.base, parts.reward_model)
        if prompt:
            add_soft_prompt(folder, parts.base.tokenizer, prompt.ids)
        reading = parts.reward_model.reading
        write_bos(folder, reading)
        difference = _compare(folder, parts, check, prompt, exact)
        done.messages.append(difference)
        if constant:
            done.messages.append(
                f"note: transformers' form has no constant, so scores there are {constant:+.4g} "
                "away from ours, all by the same; this program adds it again (reward_offset)"
            )
        code = scoring_code(folder, reading)
        facts = facts_of_parts(
            "classifier", parts, card, difference, scoring=code, constant=constant
        )
        write_card(folder, facts)
    done.next_commands = [command("ppo_training.py", model="MODEL", reward_model=path)]


def _export_gguf(parts, path, check, card, *, force, exact, prompt, done) -> None:
    from models.gguf import check_gguf

    check_gguf(parts.base)
    if path.suffix == ".gguf":
        with new_file(path, force=force) as scratch:
            done.messages.append(_make_gguf(scratch / path.name, scratch, parts))
    else:
        with new_folder(path, force=force) as folder:
            done.messages.append(_make_gguf(folder / GGUF_NAME, folder, parts))
            write_card(folder, facts_of_parts("gguf", parts, card))
    file = path if path.suffix == ".gguf" else path / GGUF_NAME
    done.next_commands = [shlex.join(["llama-cli", "-m", str(file), "-p", "Hello"])]


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
    refuse_broken(difference, what, check.expected, exact)
    return f"largest difference in {what}, fused against unfused: {difference}"


# ------------------------------------------------------------------------------ after training


def write_fused(args: Namespace, run: Path) -> list[str]:
    """Fuse what a run saved to --save-file into --fused-dir, as fuse.py does; print what it says.

    The base is read once more, so that the result has the types it is stored in. Returns commands
    to go on with. Raises UserError, with --fused-dir not written, where the result is not what was
    trained.
    """
    path = Path(args.fused_dir).expanduser()
    parts = load_parts(
        args.model,
        [args.save_file],
        [1.0],
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        any_base=args.any_base,
        tokenizer=args.tokenizer,
    )
    force = bool(args.resume or args.overwrite)  # which was checked when the run began
    done = export(parts, path, "model", Check.of(parts), CardChoices(path.name, run), force=force)
    print("\n".join([*done.messages, f"wrote {args.fused_dir}"]))
    return done.next_commands
