"""What tells one base model from another of the same shapes, and whose adapter a file holds.

An adapter is a difference to the weights it was trained on; on others it is rubbish that raises no
error. So it records a fingerprint of the model folder, which does not depend on how that is loaded.
No MLX: the PyTorch baseline writes and compares the same.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from errors import UserError
from models.file_checks import safetensors_header

DEFAULT_NAME = "data/digits_model"  # what files record as their base, wherever the project lies
DEFAULT_MODEL = Path(__file__).resolve().parent.parent / DEFAULT_NAME
KEY = "base_fingerprint"  # beside "model" in an adapter's description
QUANTIZATION = "base_quantization"  # {"bits", "group_size"} where --quantize rounded the base
LENGTH = 16  # hexadecimal digits: 64 bits, and still fit for a message
# Of each tensor, 4 kB in 8 places: 1.2 MB of a model of 16 GB in 300 tensors.
PIECES, PIECE_BYTES = 8, 512


class Base(Protocol):
    """A loaded model, of MLX or of the PyTorch baseline."""

    name: str
    fingerprint: str | None


def base_fingerprint(folder: str | Path) -> str | None:
    """A hash of names, types, shapes and a sample of the values of all tensors in a model folder.

    Neither shards, the tensors' order nor metadata count. None without ``model*.safetensors``.
    A change of a few rows of a large tensor can fall between the pieces that are read.
    """
    files = Path(folder).glob("model*.safetensors")
    hashes = sorted(found for file in files for found in _tensor_hashes(file))
    return hashlib.sha256(b"".join(hashes)).hexdigest()[:LENGTH] if hashes else None


def _tensor_hashes(file: Path) -> Iterator[bytes]:
    header = safetensors_header(file)
    with open(file, "rb") as stream:
        data = 8 + int.from_bytes(stream.read(8), "little")
        for name, entry in header.items():
            start, end = entry["data_offsets"]
            found = hashlib.sha256(json.dumps([name, entry["dtype"], entry["shape"]]).encode())
            for place, count in _pieces(end - start):
                found.update(os.pread(stream.fileno(), count, data + start + place))
            yield found.digest()


def _pieces(size: int) -> list[tuple[int, int]]:
    """(place, bytes) of evenly spaced pieces of `size` bytes, the first and the last included."""
    if size <= PIECES * PIECE_BYTES:
        return [(0, size)]
    return [(i * (size - PIECE_BYTES) // (PIECES - 1), PIECE_BYTES) for i in range(PIECES)]


def described_base(base: Base) -> dict[str, str]:
    """What an adapter's description records of the model it was trained on."""
    known = {} if base.fingerprint is None else {KEY: base.fingerprint}
    return {"model": str(base.name), **known}


def check_base(
    path: str | Path, description: dict[str, Any], base: Base, *, any_base: bool = False
) -> None:
    """Raise UserError where the adapter in `path` was trained on other weights than `base` has.

    Nothing to compare: adapters of other programs and older ones, which record no fingerprint, and
    full fine-tunes, which replace every weight.
    """
    recorded, named = description.get(KEY), description.get("model")
    if any_base or description.get("fine_tune_type") == "full":
        return
    if not isinstance(recorded, str) or base.fingerprint in (None, recorded):
        return
    override = "--any-base to use it all the same"
    if named == base.name:
        raise UserError(
            f"{path}: was trained on {named} as it was before its weights changed "
            f"(fingerprint {recorded}, now {base.fingerprint}); put them back, or give "
            f"{override}"
        )
    whose = named if isinstance(named, str) and named else "MODEL"
    raise UserError(
        f"{path}: was trained on {whose} (fingerprint {recorded}), and {base.name} "
        f"({base.fingerprint}) is another base; give --model {whose}, or "
        f"{override}"
    )


def check_quantization(
    path: str | Path, description: dict[str, Any], here: dict[str, int] | None
) -> None:
    """Warn where the adapter in `path` was trained on a base quantised otherwise than `here`.

    Only what --quantize does is recorded: a folder that is quantised has a fingerprint of its own.
    """
    if QUANTIZATION not in description or description.get("fine_tune_type") == "full":
        return
    trained = description[QUANTIZATION]
    if _bits(trained) != _bits(here):
        flag = f"--quantize {_bits(trained)}" if trained else "no --quantize"
        warnings.warn(
            f"{path}: was trained on {_in_words(trained)}, and goes on "
            f"{_in_words(here)} here, which computes something else; {flag} gives what "
            "was trained",
            stacklevel=3,
        )


def _bits(quantized: Any) -> int | None:
    return quantized.get("bits") if isinstance(quantized, dict) else None


def _in_words(quantized: Any) -> str:
    bits = _bits(quantized)
    return "weights as they are stored" if bits is None else f"weights rounded to {bits} bits"
