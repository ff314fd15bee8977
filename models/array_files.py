"""Arrays with JSON descriptions in .npz and .safetensors files; small text files beside them.

Everything is written aside and then renamed. No pickle is ever read.
"""

import json
import os
from pathlib import Path

import mlx.core as mx

from errors import UserError
from models.adapter_description import CONFIG_KEY
from models.file_checks import check_npz, safetensors_header


def write_arrays(path: Path, arrays: dict[str, mx.array], described: dict) -> None:
    """Write `arrays` and JSON-able descriptions to .safetensors or .npz, aside and then renamed."""
    aside = path.with_name(f".{path.stem}.writing{path.suffix}")
    arrays = dict(sorted(arrays.items()))  # the order is part of the bytes
    if path.suffix == ".npz":
        arrays = {k: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a
                  for k, a in arrays.items()}  # fmt: skip
        texts = {k: mx.array(list(json.dumps(v).encode()), dtype=mx.uint8)
                 for k, v in described.items()}  # fmt: skip
        mx.savez(str(aside), **arrays, **texts)
    else:
        metadata = {"format": "mlx", **{k: json.dumps(v) for k, v in described.items()}}
        mx.save_safetensors(str(aside), arrays, metadata=metadata)
    with open(aside, "rb") as file:
        os.fsync(file.fileno())  # on the disk before it takes the name of what was there
    os.replace(aside, path)


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict]:
    """(arrays, descriptions) of a .safetensors or .npz file. No pickle is ever read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    (check_npz if path.suffix == ".npz" else safetensors_header)(path)
    try:
        if path.suffix == ".npz":
            arrays = dict(mx.load(str(path)))
            described = {k: json.loads(bytes(arrays.pop(k).tolist()).decode())
                         for k in list(arrays) if k == CONFIG_KEY}  # fmt: skip
            return arrays, described
        arrays, metadata = mx.load(str(path), return_metadata=True)
        described = {k: json.loads(v) for k, v in metadata.items() if v.startswith("{")}
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return arrays, described


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small text file aside, then rename it."""
    aside = path.with_name(f".{path.name}.writing")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
