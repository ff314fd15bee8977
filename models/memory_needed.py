"""Whether a model's weights fit the machine's memory, found out before they are read."""

import math
import os
from pathlib import Path

from errors import UserError
from models.file_checks import BITS, safetensors_header

FLOATS = ("F16", "BF16", "F32", "F64")
TYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}
GROUP_BITS = 0.5  # of a scale and a bias in float16 for each 64 weights, by weight
CGROUP = Path("/sys/fs/cgroup/memory.max")  # what a container may use


def machine_memory() -> int:
    """Bytes of memory that this process may use at most."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(memory, int(CGROUP.read_text()))
    except (OSError, ValueError):  # no container, or one without a limit ("max")
        return memory


def check_memory(folder: Path, name: str, dtype: str, quantize: int | None) -> None:
    """Raise UserError, which says what would fit, for weights larger than the memory.

    `dtype`: "stored" or a name in TYPE_BITS. Training needs more than the weights; how much is not
    known here.
    """
    tensors = [
        entry
        for file in folder.glob("model*.safetensors")
        for entry in safetensors_header(file).values()
    ]
    memory, needed = machine_memory(), weights_bytes(tensors, dtype, quantize)
    if needed <= memory:
        return
    ways = {
        "--dtype bfloat16": ("bfloat16", None),
        "--quantize 8": (dtype, 8),
        "--quantize 4": (dtype, 4),
    }
    fits = [
        f"{flag} needs {size / 1e9:.3g} GB"
        for flag, way in ways.items()
        if (size := weights_bytes(tensors, *way)) <= memory
    ]
    count = sum(math.prod(entry["shape"]) for entry in tensors)
    other = f"take a model of at most {memory / needed * count / 1e9:.2g} billion weights"
    raise UserError(
        f"{name}: its weights need {needed / 1e9:.3g} GB, and this machine has "
        f"{memory / 1e9:.3g} GB; {'; '.join(fits) or other}"
    )


def weights_bytes(tensors: list[dict], dtype: str, quantize: int | None) -> float:
    """Bytes of the arrays in safetensors headers once they are loaded as `dtype`, or quantised."""
    total = 0.0
    for entry in tensors:
        bits = BITS[entry["dtype"]]
        if entry["dtype"] in FLOATS:
            bits = TYPE_BITS.get(dtype, bits)
            if quantize is not None and len(entry["shape"]) > 1:
                bits = quantize + GROUP_BITS
        total += math.prod(entry["shape"]) * bits / 8
    return total
