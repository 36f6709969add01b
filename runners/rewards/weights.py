"""Weights of learned rewards: in a folder that the user names, or from the hub through its cache."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from runners.digest import digest, weights_sha256
from runners.rewards.protocol import RewardUnavailable

Network = TypeVar("Network")


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
            return digest_of_files(self._local())
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

    def fingerprint(self, found: Path) -> str:
        """Of the files in the folder that `find` returned."""
        return digest_of_files([path for name in self.files for path in sorted(found.glob(name))])

    def _local(self) -> list[Path]:
        folder = Path(str(self.folder))
        found = []
        for name in self.files:
            matching = sorted(folder.glob(name))
            if not matching:
                raise RewardUnavailable(f"folder {folder}: no {name} of {self.repository} in it")
            found += matching
        return found


def find_all(wanted: Sequence[Weights]) -> list[Path]:
    """The folders of all weights. Raises RewardUnavailable for all that are missing at once."""
    folders, problems = [], []
    for weights in wanted:
        try:
            folders.append(weights.find())
        except RewardUnavailable as error:
            problems.append(str(error))
    if problems:
        raise RewardUnavailable("; ".join(problems))
    return folders


def built(what: str, build: Callable[..., Network], *folders: Path) -> Network:
    """The network of some folders. Raises RewardUnavailable where they do not hold the weights of `what`."""
    try:
        return build(*folders)
    except RewardUnavailable:
        raise
    except Exception as error:  # whatever such files hold
        where = ", ".join(str(folder) for folder in dict.fromkeys(folders))
        problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise RewardUnavailable(f"{what}: not the weights it needs in {where} ({problem})") from error


def digest_of_files(paths: Sequence[Path]) -> str:
    """SHA-256 over the digests of files, 12 hex digits; the hub's cache names large files by theirs."""
    names = ((path.resolve().name, path) for path in paths)
    return digest(
        "".join(name if re.fullmatch(r"[0-9a-f]{64}", name) else weights_sha256(path) for name, path in names)
    )
