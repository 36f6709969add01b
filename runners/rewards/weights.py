"""Weights of learned rewards: in a folder that the user names, or from the hub through its cache."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from runners.rewards.protocol import RewardUnavailable

READ_AT_ONCE = 2**24


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Files of a repository on the hub, or of a local folder with the same files in it."""

    repository: str
    files: tuple[str, ...]  # patterns, as `hf download --include` takes them
    revision: str | None = None
    folder: str | None = None  # in place of the hub

    @property
    def identity(self) -> str:
        """What a cell id holds of them: a local folder's content, or the repository and revision."""
        if self.folder is not None:
            return digest(self._local())
        return f"{self.repository}@{self.revision or 'main'}"

    def find(self) -> Path:
        """The folder with the files, downloaded where they are not on the disk yet.

        Raises RewardUnavailable, saying what to put where.
        """
        if self.folder is not None:
            self._local()
            return Path(self.folder)
        try:
            found = snapshot_download(self.repository, revision=self.revision, allow_patterns=list(self.files))
        except (OSError, HfHubHTTPError, LocalEntryNotFoundError) as error:
            include = " ".join(f"--include '{name}'" for name in self.files)
            raise RewardUnavailable(
                f"weights of {self.repository} are neither in the cache nor to be had "
                f"({type(error).__name__}): where there is a network, run `hf download {self.repository} {include}"
                f"{f' --revision {self.revision}' if self.revision else ''} --local-dir FOLDER`, "
                "and name the folder in the grid, as in {name: ..., folder: FOLDER}"
            ) from None
        return Path(found)

    def fingerprint(self) -> str:
        """Of the files that `find` returns."""
        folder = self.find()
        return digest([path for name in self.files for path in sorted(folder.glob(name))])

    def _local(self) -> list[Path]:
        folder = Path(str(self.folder))
        found = []
        for name in self.files:
            matching = sorted(folder.glob(name))
            if not matching:
                raise RewardUnavailable(f"folder {folder}: no {name} of {self.repository} in it")
            found += matching
        return found


def digest(paths: Sequence[Path]) -> str:
    """SHA-256 over the digests of files, 12 hex digits; the hub's cache names large files by theirs."""
    whole = hashlib.sha256()
    for path in paths:
        name = path.resolve().name
        whole.update((name if re.fullmatch(r"[0-9a-f]{64}", name) else _sha256(path)).encode())
    return whole.hexdigest()[:12]


def _sha256(path: Path) -> str:
    content = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            content.update(part)
    return content.hexdigest()
