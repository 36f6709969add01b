"""Secrets: what looks like one, and texts without them. Grids, results and logs are shared; tokens are not."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator

from ablate.source import InputError, Location, Source, dotted

NAMED = re.compile(
    r"(token|password|passwd|passphrase|secret|api_?key|access_?key|private_?key|credential|authorization)s?$",
    re.IGNORECASE,
)
MAYBE_NAMED = re.compile(r"(^|_)(key|pat|auth|pass)$|_pwd$", re.IGNORECASE)  # PWD is where we are
TOKEN = re.compile(r"(?=.*\d)\S{8,}")  # what a value with such a name is in a document, if it is a secret
IN_URL = re.compile(r"(?<=://)[^/\s]+@|(?<=[?&])([\w-]*(?:token|passw|secret|key)\w*=)[^&\s]+", re.IGNORECASE)
SHORTEST = 8  # characters of a value in the environment that is looked for in texts; shorter ones are in many words


def redacted(text: str) -> str:
    """A text without passwords of URLs, and without the values of environment variables that are named as secrets."""
    for value in sorted(_secrets_of_environment(), key=len, reverse=True):  # one may begin as another does
        word = rf"\b{value}\b" if value.isalpha() else re.escape(value)  # password `postgres` is not in postgresql://
        text = re.sub(word, "***", text) if value in text else text
    return IN_URL.sub(lambda found: f"{found[1]}***" if found[1] else "***@", text)


def _secrets_of_environment() -> Iterator[str]:
    for name, value in os.environ.items():
        named = len(value) >= SHORTEST and (NAMED.search(name) or MAYBE_NAMED.search(name))
        if named and not ("/" in value and os.path.exists(os.path.expanduser(value))):  # where a key is, is none
            yield value


class _Redacting(io.TextIOWrapper):
    def write(self, text: str) -> int:
        return super().write(redacted(text))


@contextlib.contextmanager
def redacted_output() -> Iterator[None]:
    """Within this block, what Python code of this process prints has stars in place of secrets."""
    printed, said = (_Redacting(stream.buffer, "utf-8", "backslashreplace", line_buffering=True) for stream in _open())
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(said):
            yield
    finally:
        for stream in (printed, said):
            stream.detach()  # flushes it, and leaves the one below open


def _open() -> Iterator[io.TextIOWrapper]:
    for stream in (sys.stdout, sys.stderr):
        assert isinstance(stream, io.TextIOWrapper)
        stream.flush()
        yield stream


def is_secret(name: str, value: object) -> bool:
    """Whether a value is a secret by its name, or holds one."""
    if not isinstance(value, str) or not value:
        return False
    named = NAMED.search(name) or (MAYBE_NAMED.search(name) and TOKEN.fullmatch(value))
    return bool(named) or redacted(value) != value


def without_secrets(name: str, value: object) -> object:
    """A value of JSON with stars in place of secrets."""
    if isinstance(value, dict):
        return {key: without_secrets(str(key), inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [without_secrets(name, inner) for inner in value]
    return "***" if is_secret(name, value) else value


def refuse_secrets(source: Source) -> None:
    """Raise InputError at the line of a document's first secret, which is not repeated."""
    for location in _secrets("", source.data, ()):
        raise source.error(location, EXPLAINED)


def refuse_secret_setting(path: str, value: object) -> None:
    """The same for a value of --set."""
    for location in _secrets(path.rpartition(".")[2], value, (path,)):
        raise InputError(f"--set {dotted(location)}: {EXPLAINED}")


EXPLAINED = (
    "looks like a secret, and would be written into results that are shared; keep it in an environment variable "
    "(remote rewards take its name as token_env, a function of your own can read it)"
)


def _secrets(name: str, value: object, location: Location) -> Iterator[Location]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _secrets(str(key), inner, (*location, key))
    elif isinstance(value, list):
        for i, inner in enumerate(value):
            yield from _secrets(name, inner, (*location, i))
    elif is_secret(name, value):
        yield location
