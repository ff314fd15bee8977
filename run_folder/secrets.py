"""Keeps tokens out of everything that a run writes down or says."""

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from run_folder.run_config import REDACTED

# "stop_token" and its like are text that a model writes, not a secret.
SECRET_NAME = re.compile(
    r"(^|_)(secret|password|passwd|credentials?|key|apikey|auth|"
    r"(?<!bos_)(?<!eos_)(?<!pad_)(?<!unk_)(?<!mask_)(?<!stop_)token(?!_format))(_|$)",
    re.IGNORECASE,
)
IN_URL = re.compile(r"(?<=://)[^/@\s]+(?=@)")
IN_QUERY = re.compile(r"(://[^\s?]+\?)\S+")  # a service's key often stands behind its "?"
# A shorter value than this would blot out ordinary words.
SHORTEST = 8


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The values of environment variables whose names say that they are secret, longest first."""
    values = [value for name, value in environment.items() if SECRET_NAME.search(name)]
    # Messages are put on one line, so a key of several lines is looked for in that form too.
    found = {form for value in values for form in (value.strip(), " ".join(value.split()))}
    return sorted((form for form in found if len(form) >= SHORTEST), key=len, reverse=True)


def redact(value: Any, secrets: list[str] | None = None, name: str = "") -> Any:
    """The same value with secrets replaced: by the option's name, by content, and in URLs."""
    secrets = secret_values() if secrets is None else secrets
    if isinstance(value, dict):
        return {key: redact(item, secrets, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, secrets, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if SECRET_NAME.search(name.replace("-", "_")):
        return REDACTED
    for secret in secrets:
        value = value.replace(secret, REDACTED)
        if "..." in value:  # a message that was shortened in the middle of a secret
            for end in range(len(secret) - 1, SHORTEST - 1, -1):
                value = value.replace(f"{secret[:end]}...", f"{REDACTED}...")
    return IN_QUERY.sub(rf"\1{REDACTED}", IN_URL.sub(REDACTED, value))


def tell(message: str) -> None:
    """Print a line for people (``note: ...``, ``warning: ...``) on standard error, redacted.

    Every such line that holds more than fixed words goes through here, errors included, or is a
    warning of Python's, which ``run_main`` treats alike.
    """
    print(" ".join(redact(message).split()), file=sys.stderr, flush=True)
