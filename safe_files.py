"""Writing so that a stop at any moment leaves the old file or the new one, never half of one.

What is written goes to a temporary name beside its place (``.NAME.writing-PROCESS``), is synced,
read back, and renamed. ``sweep`` clears away what a killed process has left under such a name.
"""

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from errors import UserError
from waiting import busy

NOT_WHOLE = "does not hold what was written to it"
# What a file system answers that cannot swap two names (renameat2 of Linux, renamex_np of macOS).
CANNOT_SWAP = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EXDEV, errno.EPERM}
SWAP, HERE = 2, -100  # RENAME_EXCHANGE and RENAME_SWAP; AT_FDCWD


# ------------------------------------------------------------------------------ one file


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Replace ``path`` by ``content``. Raises ``UserError`` where the disk refuses, or a link."""
    with writing(path), replacing(Path(path)) as temporary:
        write_checked(temporary, content)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, atomically; NaN and infinity become null."""
    text = json.dumps(plain(value), indent=2, ensure_ascii=True, allow_nan=False)
    write_atomically(path, text + "\n")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name to write ``path`` under; it takes its place when the block ends well.

    Raises ``UserError`` where ``path`` is a link, and the ``OSError`` of a disk that refuses.
    """
    refuse_links(path)
    temporary = temporary_name(path)
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_checked(path: Path, content: str | bytes) -> None:
    """Write a file, sync it and read it back; ``OSError`` where it does not hold ``content``."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    with open(path, "w+b") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        file.seek(0)
        if file.read() != data:
            raise OSError(errno.EIO, NOT_WHOLE, str(path))


def copy_file(source: Path, target: Path) -> None:
    """Copy a file and read the copy back. No link is written through: see ``refuse_links``."""
    refuse_links(target)
    shutil.copyfile(source, target)
    if synced_sum(target) != synced_sum(source, sync=False):
        raise OSError(errno.EIO, NOT_WHOLE, str(target))


def synced_sum(file: Path, *, sync: bool = True) -> str:
    """SHA-256 of a file as read back, after it has been synced."""
    with open(file, "rb") as opened:
        if sync:
            os.fsync(opened.fileno())
        return hashlib.file_digest(opened, "sha256").hexdigest()


def plain(value: Any) -> Any:
    """The same value in types that JSON has; NaN and infinity become None.

    Array scalars of MLX and NumPy count as numbers, arrays as lists, paths as text.
    """
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def check_place(path: str | Path, longest: str | None = None) -> None:
    """``UserError`` where nothing can be written at ``path``: asked before hours of work for it.

    Made and removed is a file under the temporary name of ``path``, or of ``longest`` beside it;
    folders above that were missing go too.
    """
    path = Path(path).expanduser()
    with writing(path):
        refuse_links(path)
        missing = [folder for folder in path.parents if not folder.exists()]
        temporary = temporary_name(path.with_name(longest or path.name))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "xb"):
                pass
            temporary.unlink()
        finally:
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()


# ------------------------------------------------------------------------------ folders


def put_folder_in_place(aside: Path, path: Path) -> None:
    """Give a finished folder its name; one that is there is replaced without a moment of neither.

    A file system that cannot swap two names has such a moment; ``sweep`` mends what a kill leaves
    of it.
    """
    if not os.path.lexists(path):
        os.rename(aside, path)
    elif swap(aside, path):
        shutil.rmtree(aside, ignore_errors=True)
    else:
        old = temporary_name(path, "old")
        os.rename(path, old)
        os.rename(aside, path)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(path.parent)


@contextlib.contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A new folder beside ``path`` to write into; it takes its place when the block ends well."""
    sweep(path)
    aside = temporary_name(path)
    try:
        aside.mkdir(parents=True)
        yield aside
        with busy("writing"):
            sync_tree(aside)
        put_folder_in_place(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def swap(one: Path, other: Path) -> bool:
    """Swap two names in one step; False, with nothing done, where the system has no such step."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin":
        call, arguments = getattr(library, "renamex_np", None), (*names, SWAP)
    else:
        call = getattr(library, "renameat2", None)
        arguments = (HERE, names[0], HERE, names[1], SWAP)
    if call is None:
        return False
    if call(*arguments) == 0:
        return True
    code = ctypes.get_errno()
    if code in CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(other))


def sync_tree(folder: Path) -> None:
    """Put every file of a folder on the disk, so that none is empty behind its new name."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def sync_folder(folder: str | Path) -> None:
    """Make renames in a folder survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------ left-overs


def temporary_name(path: Path, what: str = "writing") -> Path:
    """Where this process writes ``path`` before it is renamed; ``what``: writing or old."""
    return path.with_name(f".{path.stem}.{what}-{os.getpid()}{path.suffix}")


TEMPORARY = re.compile(r"\.(.+)\.(tmp|writing|old)-(\d+)(\.[^.]+)?")


MOST_OPTIONS = 16 << 20  # bytes of a file of options; /dev/zero never ends


def read_small(path: str | Path, encoding: str = "utf-8") -> str:
    """The text of a file that a person writes by hand.

    Raises ``OSError`` where it cannot be read or is larger than any such file, and
    ``UnicodeDecodeError`` where it is no text.
    """
    with open(path, "rb") as file:
        data = file.read(MOST_OPTIONS + 1)
    if len(data) > MOST_OPTIONS:
        raise OSError(errno.EFBIG, f"it is larger than {MOST_OPTIONS >> 20} MB", str(path))
    return data.decode(encoding)


def sweep(path: Path, *, all_names: bool = False, heads: bool = False) -> None:
    """Clear away what dead processes left of ``path``; ask before this process writes it itself.

    A folder that one of them had renamed, and not yet replaced, gets its name back. With
    ``all_names``: what they left of anything in the folder ``path``. With ``heads``: also of files
    beside ``path`` whose names go on behind its own ("out.npz", "out.value_head.safetensors").
    """
    folder = path if all_names else path.parent
    try:
        found = [(there, TEMPORARY.fullmatch(there.name)) for there in folder.iterdir()]
    except OSError:
        return
    for there, fits in found:
        if fits is None or is_alive(int(fits[3])):
            continue
        place = folder / (fits[1] + (fits[4] or ""))
        beside = heads and place.name.startswith(f"{path.stem}.")
        if not (all_names or place == path or beside):
            continue
        with contextlib.suppress(OSError):
            if fits[2] == "old" and not os.path.lexists(place):
                os.rename(there, place)
            elif there.is_dir() and not there.is_symlink():
                shutil.rmtree(there)
            else:
                there.unlink()


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder among the system's temporary ones, for as long as the block lasts.

    What killed processes left there under ``name`` is cleared away first.
    """
    for there in Path(tempfile.gettempdir()).glob(f"mlx-rlhf-{name}-*-*"):
        process = there.name.split("-")[3]
        if process.isdecimal() and not is_alive(int(process)):
            shutil.rmtree(there, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"mlx-rlhf-{name}-{os.getpid()}-") as folder:
        yield Path(folder)


def is_alive(process: int) -> bool:
    """Whether a process of that number, other than this one, is running."""
    if process == os.getpid():  # numbers come again, in containers soon
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


# ------------------------------------------------------------------------------ links


def refuse_links(path: str | Path, folder: str | Path | None = None) -> None:
    """``UserError`` where ``path``, or a folder between ``folder`` and it, is a symbolic link.

    Every writer and copier of run and output folders asks it. ``folder`` (default: the one that
    holds ``path``) and what is above may be links.
    """
    path = Path(path)
    folder = path.parent if folder is None else Path(folder)
    for below in (path, *path.parents):
        if below == folder:
            return
        if below.is_symlink():
            raise UserError(
                f"{below}: is a symbolic link, to {os.readlink(below)}, and nothing is written or "
                "copied through one; put the file or folder itself there"
            )


def refuse_links_below(folder: Path, *, may_stay_inside: bool = False) -> None:
    """``refuse_links`` for all that a folder holds; ``may_stay_inside``: but for links that do."""
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if may_stay_inside:
                check_inside(Path(place, name), folder)
            else:
                refuse_links(Path(place, name), folder)


def check_inside(file: Path, folder: Path) -> None:
    """Raise UserError for a link that leads out of `folder` (the hub's cache links to blobs/)."""
    real, root = file.resolve(), folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    if not any(real.is_relative_to(place) for place in allowed):
        raise UserError(
            f"{file}: is a link that leads out of its folder, to {real}; put the file itself there"
        )


# ------------------------------------------------------------------------------ errors


@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Turn what the disk answers (full, read-only, gone) into a ``UserError`` naming ``path``."""
    try:
        yield
    except OSError as wrong:
        raise UserError(f"{path}: cannot write: {wrong.strerror or wrong}") from wrong
