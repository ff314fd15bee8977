"""The exception that is meant for the person at the terminal, and that of a lost worker."""

MEMORY_ADVICE = (
    "lower --batch-size, --mini-batch-size or the sequence length, or add --grad-checkpoint or, "
    "with MLX, --quantize 4"
)


class UserError(Exception):
    """Something the user can put right: a bad file, row, flag or model.

    The message is one line, ``WHERE: what is wrong and what would be right``. Scripts print it
    as ``error: MESSAGE`` on standard error and exit with status 2; no traceback.
    """


class Lost(Exception):
    """Another worker is gone in the middle of something that all do together."""
