"""Files of arrays that are read back before they get their name.

MLX can lose the error of a write that failed (``mx.savez`` closes its zip file all the same), and
the file then loads with an array less or zeros in one.
"""

import errno
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten

from errors import UserError
from models.file_checks import check_npz, safetensors_header
from safe_files import NOT_WHOLE


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
