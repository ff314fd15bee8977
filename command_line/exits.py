"""How every script ends: an exit status, and one line on stderr for people. Loads no MLX."""

import errno
import os
import re
import signal
import sys
import time
import warnings
from collections.abc import Callable

import waiting
from command_line.meeting import enter_group, refuse_group
from distributed.line import Absent
from distributed.membership import LOST, member
from errors import MEMORY_ADVICE, Lost, UserError
from run_folder.console import Wait
from run_folder.output import errors, lost_output, open_outputs
from run_folder.secrets import clean, tell
from run_folder.stopping import AGAIN

# No fault of the program's, also where no file is named: the disk is full or read-only, or too many
# files are open.
SYSTEM_ERRORS = (errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.EMFILE, errno.ENFILE)
LONGEST_NAME = 1000
OUT_OF_MEMORY = re.compile(
    "out of memory|unable to allocate|insufficient memory|attempting to allocate", re.IGNORECASE
)


def run_main(
    main: Callable[[], int | None], *, workers: bool = False, tidies: bool = False
) -> None:
    """Run a script's ``main`` and exit: 2 and one line for what the user can put right.

    Any other exception is a bug and keeps its traceback. ``workers``: the script may be one of
    several that train together; they meet first. ``tidies``: SIGTERM and a hangup end it as Ctrl-C
    does.
    """
    if tidies:
        stop_at_signals()
    warnings.formatwarning = one_line_warning
    sys.unraisablehook = say_unraisable
    open_outputs(clean)
    waiting.watch_with(Wait)
    try:
        if workers:
            enter_group()
        else:
            refuse_group()
        code = main() or 0
        sys.stdout.flush()
        if (wrong := lost_output()) is not None:
            code = complain(f"standard output: cannot write: {wrong.strerror}")
    except UserError as wrong:
        code = complain(str(wrong))
    except Lost:
        code = complain_of_loss()
    except Absent as wrong:
        code = complain(str(wrong), LOST) if str(wrong) else LOST
    except KeyboardInterrupt as stopped:
        code = complain("interrupted", 128 + (stopped.args[0] if stopped.args else signal.SIGINT))
    except OSError as wrong:
        if wrong.filename is None and wrong.errno not in SYSTEM_ERRORS:
            raise
        more = "; a higher limit helps (ulimit -n)" if wrong.errno == errno.EMFILE else ""
        where = f"{named(wrong.filename)}: " if wrong.filename is not None else ""
        code = complain(f"{where}{wrong.strerror}{more}")
    except (RuntimeError, MemoryError) as wrong:
        if not (isinstance(wrong, MemoryError) or OUT_OF_MEMORY.search(str(wrong))):
            raise
        code = complain(f"out of memory ({wrong}): {MEMORY_ADVICE}")
    sys.exit(code)


def stop_at_signals() -> None:
    """SIGTERM and a hangup end the script as Ctrl-C does, so that nothing half-written stays.

    One that is ignored (nohup) stays so. A second one ends the process at once.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def stop(number: int, _: object) -> None:
    """A handler that ends the script; `run_main` knows the signal by the exception."""
    time.sleep(AGAIN)  # the same one again is raised in here, once
    signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt(number)


def named(path: str | bytes | int | None) -> str | None:
    """The name of the file that an OSError is about, as text."""
    return short_name(path) if isinstance(path, str | bytes | os.PathLike) else None


def short_name(path: str | bytes | os.PathLike) -> str:
    """A file's name for a message: the ends of one that is too long for any file."""
    name = os.fsdecode(path)
    return name if len(name) <= LONGEST_NAME else f"{name[:40]}...{name[-40:]}"


def one_line_warning(message, category, filename, lineno, line=None) -> str:
    """A warning for people in one line; one about code says where, as Python does."""
    place = "" if category is UserWarning else f"{filename}:{lineno}: {category.__name__}: "
    return clean(f"warning: {place}{message}") + "\n"


def say_unraisable(found) -> None:
    """What Python says of an exception that nobody can catch, but for one that is said already.

    A zip file that could not be written complains once more when it goes.
    """
    if getattr(found.object, "__qualname__", None) != "ZipFile.__del__":
        sys.__unraisablehook__(found)


def complain(message: str, code: int = 2) -> int:
    """Print ``error: MESSAGE`` as one redacted line on standard error; return the exit status.

    Of several workers that fail alike one says it.
    """
    said = message if member() is None else member().error(message)
    if said is not None:
        tell(f"error: {said}", errors())
    return code


def complain_of_loss() -> int:
    """The end of a worker that lost another one."""
    if (said := member().lost()) is not None:
        tell(f"error: {said}", errors())
    return LOST
