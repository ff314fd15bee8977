"""Files from strangers are looked at before a library reads them; nothing in them is ever run.

What is refused: pickles inside .npz, safetensors headers that do not agree with their file (the
rules of the safetensors format, https://github.com/huggingface/safetensors), links that lead out
of a folder, and shard names with directories in them.

And whether weights fit the memory of the machine is found out before they are read.
"""

import json
import math
import os
import zipfile
from pathlib import Path

from numpy.lib import format as npy

from errors import UserError
from safe_files import check_inside

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "I64": 64,
    "U64": 64,
    "F64": 64,
    "C64": 64,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
}


def safetensors_header(file: Path) -> dict[str, dict]:
    """Name -> {"dtype", "shape", "data_offsets"} of a .safetensors file, checked against its size.

    Raises UserError for a header that is broken or that lies.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                raise ValueError(f"its header claims {length} bytes, and the file has {size}")
            header = json.loads(stream.read(length), object_pairs_hook=_without_doubles)
        header.pop("__metadata__", None)
        _check_ranges(header, size - 8 - length)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{file}: not a sound safetensors file: {error}") from None
    return header


def _without_doubles(pairs: list) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def _check_ranges(header: dict, size: int) -> None:
    """Raise ValueError unless the arrays fill the `size` bytes of data one after the other."""
    expected = 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        shape, bits = entry["shape"], BITS.get(entry["dtype"])
        if bits is None:
            raise ValueError(f"{name} has the unknown type {entry['dtype']!r}")
        if any(type(n) is not int or n < 0 for n in (*shape, start, end)):
            raise ValueError(f"{name} has a shape or place that is no list of counts")
        if start != expected or end < start or (end - start) * 8 != math.prod(shape) * bits:
            raise ValueError(f"{name} {tuple(shape)} {entry['dtype']} cannot lie at {start}:{end}")
        expected = end
    if expected != size:
        raise ValueError(f"its arrays end at {expected}, and it has {size} bytes of data")


def check_npz(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of an .npz file; UserError for pickles in it, or anything but arrays."""
    shapes = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                with archive.open(member) as stream:
                    shape = _check_npy(member.filename, stream, member.file_size)
                shapes[member.filename.removesuffix(".npy")] = shape
    except (zipfile.BadZipFile, EOFError, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{file}: not a sound .npz file: {error}") from None
    return shapes


def _check_npy(name: str, stream, size: int) -> tuple[int, ...]:
    readers = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
    if not name.endswith(".npy"):
        raise ValueError(f"{name} is no array")
    version = npy.read_magic(stream)
    if version not in readers:
        raise ValueError(f"{name} has version {version} of the .npy format")
    shape, _, dtype = readers[version](stream)
    if dtype.hasobject:
        raise ValueError(f"{name} holds pickled Python objects, which could run code when read")
    if stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"{name} {shape} {dtype} does not fill its {size} bytes")
    return shape


def read_config(path: Path) -> dict:
    """The config.json of a model folder. Raises UserError where it is missing or broken."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: not a model folder: config.json is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise UserError(f'{file}: "model_type" is missing; is this the config of a model?')
    return config


def check_folder(path: Path, name: str, trust_remote_code: bool) -> None:
    """Raise UserError unless a model folder is whole, sound and asks for no code of its own."""
    check_model_files(path)
    check_depth(read_config(path), path)
    for file in ("config.json", "tokenizer_config.json"):
        if not trust_remote_code:
            refuse_code(path / file)
    if not list(path.glob("model*.safetensors")):
        hint = ""
        if (path / "adapter_config.json").exists():
            hint = "; this is an adapter: give its base as --model and the adapter beside it"
        elif list(path.glob("*.bin")):
            hint = "; pickled *.bin weights can run code and are not read: convert them"
        raise UserError(f"{name}: no model*.safetensors in the folder{hint}")


def refuse_code(file: Path) -> None:
    """Raise UserError where a JSON file of a model asks to run code that came with it."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{file}: holds no JSON object")
    for key in ("model_file", "auto_map"):
        if key in settings:
            raise UserError(
                f"{file}: asks to run code of its own ({key}); "
                "give --trust-remote-code if you trust it"
            )


def check_model_files(folder: Path) -> None:
    """Check every JSON and weight file in a model folder. Raises UserError for the first fault."""
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".model", ".jinja", ".txt"):
            check_inside(file, folder)
            if not file.is_file():  # a pipe would be waited for without end
                raise UserError(f"{file}: is no regular file")
        if file.name.startswith("model") and file.suffix == ".safetensors":
            safetensors_header(file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        for shard in set(_weight_map(index).values()):
            if not isinstance(shard, str) or Path(shard).name != shard:
                raise UserError(f"{index}: names the shard {shard!r}, which is no file name")


def check_depth(config: dict, folder: Path) -> None:
    """Raise UserError for a config.json that asks for more layers than the folder has arrays.

    Layers are made one by one before they are compared with the file, and that can take for ever.
    """
    places = (config, config.get("text_config"))
    layers = [c.get(name) for c in places if isinstance(c, dict) for name in LAYER_COUNTS]
    arrays = sum(len(safetensors_header(file)) for file in folder.glob("model*.safetensors"))
    for count in layers:
        if arrays and isinstance(count, int | float) and count > arrays:
            raise UserError(
                f"{folder / 'config.json'}: asks for {count:g} layers, and all weights "
                f"together are {arrays} arrays"
            )


def _weight_map(index: Path) -> dict:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{index}: cannot be read: {error!r}") from None
    if not isinstance(found, dict):
        raise UserError(f"{index}: weight_map is no object")
    return found


# ------------------------------------------------------------------------------ memory


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
