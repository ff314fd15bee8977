"""Before a script's own command line is read: it may be one of several workers, and they meet.

Loads no MLX.
"""

import atexit
import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

from distributed.membership import TIMEOUT, enter, given
from distributed.place import RANK, TERMINAL, place
from errors import UserError
from run_folder.output import mute, say_on
from run_folder.run_config import run_folder_of


def enter_group() -> None:
    """Meet the other workers, where this process is one of several; all but worker 0 are mute.

    The run that is resumed needs to be on worker 0's disk alone: the others take its options from
    there. Raises UserError and Absent as `distributed.line.meet` does.
    """
    try:
        found = place()
    except UserError:
        if os.environ.get(RANK, "0") != "0":
            raise SystemExit(2) from None  # worker 0 reads the same file, and says it
        raise
    if found is None:
        return
    from data_utils import now

    if found.rank:
        mute()
    elif TERMINAL in os.environ:
        say_on(int(os.environ[TERMINAL]))
    words = sys.argv[1:]
    resumed = last_word(words, "--resume")
    config = config_text(resumed) if resumed is not None and found.rank == 0 else None
    try:
        enter(timeout_of(words), {"date": now(), "config": config})
    except UserError:
        if found.rank:
            raise SystemExit(2) from None  # worker 0 says it
        raise
    if resumed is not None and found.rank and config_text(resumed) is None:
        sys.argv[1:] = in_a_copy(words, resumed, given("config"))


def refuse_group() -> None:
    """UserError where this process was started as one of several, by a script that works alone."""
    if (found := place()) is None:
        return
    if found.rank:
        raise SystemExit(2)  # worker 0 says it
    raise UserError(
        f"{Path(sys.argv[0]).name} works alone, and this is one of {found.size} processes that "
        "were started together: start it without mlx.launch"
    )


def last_word(words: list[str], flag: str) -> str | None:
    """The value of a flag that stands on the command line in full."""
    found = None
    for place_, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name.replace("_", "-") == flag:
            found = value if equals else (words[place_ + 1 : place_ + 2] or [None])[0]
    return found


def timeout_of(words: list[str]) -> float:
    """--worker-timeout before anything is parsed; one that is no number is refused later."""
    with contextlib.suppress(TypeError, ValueError):
        return float(last_word(words, "--worker-timeout"))
    return TIMEOUT


def config_text(resumed: str) -> str | None:
    """The text of the config.json of the run that --resume names; None where it is not here."""
    with contextlib.suppress(UserError, OSError):
        return (run_folder_of(resumed) / "config.json").read_text(encoding="utf-8")
    return None


def in_a_copy(words: list[str], resumed: str, config: str | None) -> list[str]:
    """The words with --resume naming a folder of this machine that holds worker 0's options."""
    if config is None:
        return words  # worker 0 has no such run, and says it
    folder = tempfile.mkdtemp(prefix="mlx-rlhf-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    Path(folder, "config.json").write_text(config, encoding="utf-8")
    return [word.replace(resumed, folder) if resumed in word else word for word in words]
