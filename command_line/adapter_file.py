"""The adapter that training goes on with, and where the new one is written. No MLX.

The file says what is trained; flags that ask for something else are refused before any model is
loaded, and the default learning rate is that of the file's kind.
"""

import argparse
import math
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from command_line.rules import flag_of, shown_value
from command_line.shared_flags import LORA_ONLY, adapter_description, model_options
from errors import UserError
from models.adapter_description import FILE_SUFFIXES, VALUE_HEAD, head_path, read_description

KIND_FLAGS = {"fine_tune_type", "prompt_tuning"}


def settle_adapter(
    args: argparse.Namespace, file: str | None, rates: Mapping[str, float], ignore: str = ""
) -> str:
    """What will be trained: the kind that flags ask for or that `file` holds.

    Fills in ``args.learning_rate`` from `rates`, by kind. Raises UserError for flags that ask for
    another adapter than `file` holds; `ignore` names one that may differ.
    """
    there = adapter_description(args) if file is None else read_description(file)
    kind = there.get("fine_tune_type", "lora")
    if not isinstance(kind, str) or kind not in rates:
        raise UserError(
            f"{file}: its adapter configuration is not usable: fine_tune_type "
            f'"{kind}" is none of {", ".join(rates)}'
        )
    if file is not None:
        refuse_other_adapter(args, file, there, ignore=(ignore,))
    if args.learning_rate is None:
        args.learning_rate = rates[kind]
    return kind


def refuse_other_adapter(
    args: argparse.Namespace,
    file: str,
    there: Mapping[str, Any],
    *,
    blocks: int | None = None,
    ignore: Collection[str] = (),
) -> None:
    """UserError where a flag that the user gave asks for another adapter than `file` holds.

    `there` describes it, in the form of adapter_config.json; what it leaves out is not compared.
    `blocks`: of the model, once that is loaded: --lora-layers may ask for more than there are.
    """
    asked, kind = adapter_description(args), there.get("fine_tune_type", "lora")
    if asked["fine_tune_type"] != kind and KIND_FLAGS & args.explicit:
        raise UserError(f"{file}: holds {kind}, not {asked['fine_tune_type']}")
    if kind not in ("lora", "dora"):
        for name in LORA_ONLY:
            if name in args.changed:
                raise UserError(f"{flag_of(name)} has no effect: {file} holds {kind}, not lora")
    for name, want, have in differences(args, asked, there, blocks):
        # Both spellings of the factor are compared as the one that the file records.
        given = {name, "lora_alpha", "rslora"} if name == "lora_scale" else {name}
        if given & args.explicit and name not in ignore:
            raise UserError(
                f"{flag_of(name)} {shown_value(want)}: {file} has {shown_value(have)}; "
                "leave the flag out, or start anew"
            )


def make_tuning(args: argparse.Namespace, loaded: Any, file: str | None, ignore: Collection = ()):
    """What is trained on a loaded model: that of `file`, or what the adapter flags ask for.

    Raises UserError where flags ask for another adapter than `file` holds; `ignore`: that may.
    """
    from models.adapter_files import attach, load_adapter

    if file is None:
        return attach(loaded.model, adapter_description(args))
    tuning = load_adapter(loaded, file, any_base=args.any_base)
    blocks = len(loaded.model.layers)
    refuse_other_adapter(args, file, tuning.description(blocks), blocks=blocks, ignore=ignore)
    return tuning


def load_copy(args: argparse.Namespace):
    """The model once more, for full fine-tuning to be compared with; --reference-quantize."""
    from models.load import load_model

    options = model_options(args) | {"quantize": args.reference_quantize}
    return load_model(options.pop("model"), **options)


def differences(args: argparse.Namespace, asked: Mapping, there: Mapping, blocks: int | None):
    """(name of the flag, value asked for, value in the file) of all that is not the same."""
    tokens, own = there.get("num_prompt_tokens"), there.get("lora_parameters")
    if tokens is not None and args.num_prompt_tokens != tokens:
        yield "num_prompt_tokens", args.num_prompt_tokens, tokens
    if not isinstance(own, dict) or "lora_parameters" not in asked:
        return
    wanted = dict(asked["lora_parameters"])
    rank = own.get("rank", args.lora_rank)
    if rank != args.lora_rank:
        yield "lora_rank", args.lora_rank, rank
    if args.lora_alpha is not None and isinstance(rank, int) and rank > 0:
        wanted["scale"] = args.lora_alpha / rank ** (0.5 if args.rslora else 1)
    for name in ("scale", "dropout"):
        have = own.get(name)
        if isinstance(have, int | float) and not math.isclose(wanted[name], have, rel_tol=1e-6):
            yield f"lora_{name}", wanted[name], have
    keys = own.get("keys")
    if args.lora_keys and isinstance(keys, list) and not same_keys(args.lora_keys, keys):
        yield "lora_keys", args.lora_keys, keys
    layers = there.get("num_layers")
    if blocks is not None and isinstance(layers, int):
        want, have = (n if 0 < n < blocks else blocks for n in (args.lora_layers, layers))
        if want != have:
            yield "lora_layers", args.lora_layers, layers


def same_keys(asked: list[str], there: list) -> bool:
    """Whether paths in a block, or their last parts, name just the layers `there`."""
    named = [{path for path in map(str, there) if f".{path}".endswith(f".{key}")} for key in asked]
    return all(named) and set().union(*named) == set(map(str, there))


def refuse_other_head(args: argparse.Namespace, file: str) -> None:
    """UserError for --value-head-init-std where `file` has a value head beside it."""
    head = head_path(file, VALUE_HEAD)
    if "value_head_init_std" in args.changed and head.exists():
        raise UserError(
            f"--value-head-init-std {args.value_head_init_std:g} has no effect: the "
            f"value head of {head} is used; leave the flag out"
        )


def refuse_other_pooling(args: argparse.Namespace, file: str, have: str) -> None:
    """UserError for another --pooling than the reward head beside `file` was trained with."""
    if "pooling" in args.explicit and args.pooling != have:
        raise UserError(f"--pooling {args.pooling}: {file} has been trained with {have}")


def check_save_file(path: str | None) -> None:
    """UserError where no adapter can be written to --save-file: before training, not after it."""
    if path is None:
        return
    if not path.strip():
        raise UserError(
            "--save-file: the name is empty; give a .npz or .safetensors file, or a folder"
        )
    place = Path(path)
    single = place.suffix in FILE_SUFFIXES
    if place.is_dir() if single else (place.exists() and not place.is_dir()):
        there = "a folder" if single else "a file, and neither .npz nor .safetensors"
        raise UserError(f"--save-file {path}: is {there}; give another name")
    if (place / "manifest.json").exists():
        raise UserError(f"--save-file {path}: is a checkpoint of a run; give another name")
    above = next(folder for folder in place.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise UserError(f"--save-file {path}: {above} is no folder")
