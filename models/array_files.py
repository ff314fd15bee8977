"""Arrays with JSON descriptions in .npz and .safetensors files; small text files beside them.

Everything is written aside, read back and then renamed: MLX can lose the error of a write that
failed (``mx.savez`` closes its zip file all the same), and the file then loads with an array less
or zeros in one. No pickle is ever read.
"""

import errno
import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from errors import UserError
from models.adapter_description import CONFIG_KEY
from models.file_checks import check_npz, safetensors_header
from safe_files import NOT_WHOLE, replacing, synced_sum, write_checked

# ------------------------------------------------------------------------------ written


def save_arrays(file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str]) -> None:
    """Write arrays to .npz (with no metadata) or .safetensors and compare what the file holds.

    The bytes are the same for the same arrays in any order. Raises ``OSError`` where the file does
    not hold them, and MLX's ``RuntimeError`` where it noticed itself.
    """
    arrays = dict(sorted(arrays.items()))  # MLX lays names out in hash order of their arrival
    if file.suffix == ".npz":
        mx.savez(str(file), **arrays)
    else:
        mx.save_safetensors(str(file), arrays, metadata=dict(metadata))
    check_written(file, arrays, metadata)


def check_written(
    file: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """``OSError`` unless a file holds just these arrays: names, types, shapes and every bit.

    One array is read at a time, so that a model needs no memory for two of it.
    """
    broken = OSError(errno.EIO, NOT_WHOLE, str(file))
    try:
        (check_npz if file.suffix == ".npz" else safetensors_header)(file)
        if file.suffix == ".npz":
            there, about = mx.load(str(file)), {}
        else:
            there, about = mx.load(str(file), return_metadata=True)
        for name in arrays:
            if not same_bits(there.pop(name), arrays[name]):
                raise broken
    except (UserError, KeyError, RuntimeError, ValueError) as wrong:
        raise broken from wrong
    if there or about != dict(metadata if metadata is not None else about):
        raise broken


def same_bits(one: mx.array, other: mx.array) -> bool:
    """Whether type, shape and every bit are the same; NaN equals itself."""
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    if one.dtype == mx.bool_ or not one.size:
        return bool(mx.array_equal(one, other))
    return bool(mx.array_equal(*(a.reshape(-1).view(mx.uint8) for a in (one, other))))


def save_weights(folder: Path, model) -> None:
    """mlx-lm's ``save_model``, read back."""
    from mlx_lm.utils import save_model

    save_model(folder, model)
    expected = dict(tree_flatten(model.parameters()))
    for shard in sorted(folder.glob("model*.safetensors")):
        try:
            names = safetensors_header(shard)
        except UserError:
            raise OSError(errno.EIO, NOT_WHOLE, str(shard)) from None
        check_written(shard, {name: expected.pop(name) for name in names if name in expected})
    if expected:
        raise OSError(errno.EIO, NOT_WHOLE, str(folder))


# ------------------------------------------------------------------------------ descriptions


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
