"""What tells contents apart in identities and records: the first digits of a SHA-256."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

DIGITS = 12  # hexadecimal


def digest(content: bytes | str) -> str:
    """Of bytes, or of text in UTF-8: 12 hexadecimal digits."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:DIGITS]


def file_digest(path: Path) -> str:
    """Of a file's content: 12 hexadecimal digits."""
    return _sha256(path)[:DIGITS]


def weights_sha256(path: Path) -> str:
    """The whole SHA-256 of a large file, read once per process while its size and its time stay the same."""
    resolved = path.resolve()
    status = resolved.stat()
    return _sha256_of_version(resolved, (status.st_size, status.st_mtime_ns))


@cache
def _sha256_of_version(path: Path, version: tuple[int, int]) -> str:  # noqa: ARG001  (a key of the cache)
    return _sha256(path)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
