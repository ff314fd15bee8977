"""Arrays with JSON descriptions in .npz and .safetensors files; small text files beside them.

Everything is written aside, read back and then renamed. No pickle is ever read.
"""

import json
from pathlib import Path

import mlx.core as mx

from errors import UserError
from models.adapter_description import CONFIG_KEY
from models.file_checks import check_npz, safetensors_header
from models.written_arrays import save_arrays
from safe_files import replacing, synced_sum, write_checked


def write_arrays(path: Path, arrays: dict[str, mx.array], described: dict) -> None:
    """Write `arrays` and JSON-able descriptions to .safetensors or .npz: whole or not at all.

    Raises UserError where `path` is a link, and the OSError or RuntimeError of a disk that refuses.
    """
    with replacing(path) as aside:
        fill(aside, arrays, described)


def fill(file: Path, arrays: dict[str, mx.array], described: dict) -> None:
    """Arrays and descriptions into a new file, on the disk and read back."""
    texts = {name: json.dumps(value) for name, value in described.items()}
    if file.suffix == ".npz":
        arrays = {
            k: a.astype(mx.float32) if a.dtype == mx.bfloat16 else a for k, a in arrays.items()
        }
        arrays |= {k: mx.array(list(v.encode()), dtype=mx.uint8) for k, v in texts.items()}
        save_arrays(file, arrays, {})
    else:
        save_arrays(file, arrays, {"format": "mlx", **texts})
    synced_sum(file)


def read_arrays(path: Path) -> tuple[dict[str, mx.array], dict]:
    """(arrays, descriptions) of a .safetensors or .npz file. No pickle is ever read."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    (check_npz if path.suffix == ".npz" else safetensors_header)(path)
    try:
        if path.suffix == ".npz":
            arrays = dict(mx.load(str(path)))
            described = {
                k: json.loads(bytes(arrays.pop(k).tolist()).decode())
                for k in list(arrays)
                if k == CONFIG_KEY
            }
            return arrays, described
        arrays, metadata = mx.load(str(path), return_metadata=True)
        described = {k: json.loads(v) for k, v in metadata.items() if v.startswith("{")}
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return arrays, described


def write_json(path: Path, value: dict) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all; raises what `write_arrays` does."""
    with replacing(path) as aside:
        write_checked(aside, text)
