"""Keeps tokens out of everything that a run writes down or says."""

import functools
import json
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

from run_folder.output import printable
from run_folder.run_config import REDACTED

# Parts of a name, at "_", "-" or a capital, that make its value a secret...
SECRET_WORD = re.compile(
    r"secrets?|passwords?|passwd|pwd|pass|passphrases?|passcodes?|credentials?|creds?|keys?|auth|"
    r"tokens?|pats?|bearer|cookies?|"
    r"\w*(secret|password|passwd|passphrase|token|tokens|apikey|accesskey|secretkey|privatekey)|"
    r"(db|my|pg|sql|mysql|redis|smtp|user|root|admin|ssh|sudo)(pass|pwd)"
)
# ... and names that have one and no secret: text that a model writes, counts, layers.
NO_SECRET = re.compile(
    r"(bos|eos|pad|unk|mask|stop|sep|cls|special|image)_token|token_format|(^|lora_|sort_)keys|^(old)?pwd$|"
    r"(max|min|num|new|prompt|total|batch|stop|special|count|per|completion|context)_(new_)?tokens?"
)
IN_URL = re.compile(
    r"(?<=://)(?:[^\s/?#]*|[^\s/?#@:]*:(?!\d+(?:[/?#]|$))\S*)(?=@)"  # to the last "@"
)
IN_QUERY = re.compile(r"(://[^\s?]+\?)\S+")  # a service's key often stands behind its "?"
# A shorter value than this would blot out ordinary words; it is hidden where it stands as a secret:
# in an option that is named like one, or in front of a URL's "@".
SHORTEST = 4
# A value shorter than this is hidden where no letter goes on: "digits", and not in "digits_model".
ANYWHERE = 8
ORDINARY = {"true", "false", "none", "null", "auto", "default"}


def is_secret_name(name: str) -> bool:
    """Whether a variable or an option of this name holds a secret: ``GH_PAT``, ``apiKey``."""
    snake = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()
    words = re.split(r"[^a-z]+", NO_SECRET.sub("", re.sub(r"[^a-z0-9]+", "_", snake)))
    return any(SECRET_WORD.fullmatch(word) for word in words)


def secret_values(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The values of environment variables whose names say that they are secret, longest first.

    Also what stands in front of the "@" of a URL in any variable.
    """
    return list(values_of(tuple(environment.items())))


@functools.lru_cache(maxsize=4)
def values_of(environment: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    values = [value for name, value in environment if is_secret_name(name)]
    for _, value in environment:
        for found in IN_URL.findall(value):
            user, _, password = found.partition(":")
            values += [found, password or user]
    found = {form for value in values for form in forms(value)}
    kept = (form for form in found if len(form) >= SHORTEST and form.lower() not in ORDINARY)
    return tuple(sorted(kept, key=len, reverse=True))


def forms(value: str) -> set[str]:
    """A value as it may turn up: on one line, in JSON, as Python shows it, in a URL."""
    value = value.strip()
    escaped = {json.dumps(value, ensure_ascii=ascii)[1:-1] for ascii in (True, False)}
    in_url = {quote(value, safe, errors="replace") for safe in ("", "/")} | {unquote(value)}
    plus = quote_plus(value, errors="replace")
    return {value, " ".join(value.split()), repr(value)[1:-1], plus} | escaped | in_url


def redact(value: Any, secrets: list[str] | None = None, name: str = "") -> Any:
    """The same value with secrets replaced: by the option's name, by content, and in URLs."""
    secrets = secret_values() if secrets is None else secrets
    if isinstance(value, dict):
        return {key: redact(item, secrets, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [redact(item, secrets, name) for item in value]
    if not isinstance(value, str) or not value:
        return value
    if is_secret_name(name):
        return REDACTED
    for secret in secrets:
        if len(secret) < ANYWHERE:
            value = re.sub(rf"(?<!\w){re.escape(secret)}(?!\w)", REDACTED, value)
            continue
        value = value.replace(secret, REDACTED)
        if "..." in value:  # a message that was shortened in the middle of a secret
            for end in range(len(secret) - 1, ANYWHERE - 1, -1):
                value = value.replace(f"{secret[:end]}...", f"{REDACTED}...")
    return IN_QUERY.sub(rf"\1{REDACTED}", IN_URL.sub(REDACTED, value))


def tell(message: str, stream: TextIO | None = None) -> None:
    """Print a line for people (``note: ...``, ``warning: ...``) on standard error, cleaned."""
    print(" ".join(clean(message).split()), file=stream or sys.stderr, flush=True)


def clean(text: str) -> str:
    """What may be shown of a text: no secrets, no control characters."""
    return printable(redact(text))
