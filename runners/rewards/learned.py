"""What rewards with learned weights share: where the weights come from, batches, and the scale of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic

import torch
from PIL import Image
from torch import Tensor

from ablate.source import FieldError, choices
from runners.prompts import Prompt
from runners.rewards.pretrained import Network
from runners.rewards.protocol import Images, Reward, RewardOutput, RewardUnavailable
from runners.rewards.weights import Weights, built, find_all


@dataclass
class LearnedReward(Reward, Generic[Network]):
    """Scores are divided by `scale`.

    `folder` is used in place of the hub and holds the files of all repositories. `revision` is a commit or tag of the
    first repository, or of each that a mapping names: {repository: revision}.
    """

    version: ClassVar[str]  # of the implementation, as "pickscore-1"
    scale: float = 1.0
    batch_size: int = 32  # images at once
    folder: str | None = None
    revision: str | dict[str, str] | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "batch_size"):
            if (got := getattr(self, name)) <= 0:
                raise FieldError(name, f"got {got}, expected more than 0")
        known = [weights.repository for weights in self.needs]
        named = self.revision if isinstance(self.revision, dict) else {}
        if unknown := [repository for repository in named if repository not in known]:
            raise FieldError("revision", f"got {unknown[0]!r}, no repository of it{choices(unknown[0], known)}")
        self._network: Network | None = None
        self._fingerprint = ""

    @property
    @abstractmethod
    def needs(self) -> tuple[Weights, ...]:
        """The files that it needs of the hub."""

    @property
    def weights(self) -> tuple[Weights, ...]:
        """The files that it takes: of the folder, or of these revisions."""
        first, *_ = needs = self.needs
        given = self.revision if isinstance(self.revision, dict) else {first.repository: self.revision}
        return tuple(replace(w, folder=self.folder, revision=given.get(w.repository)) for w in needs)

    @abstractmethod
    def build(self, *folders: Path) -> Network:
        """The network, of the folders in which `weights` were found; networks of equal folders are shared."""

    @abstractmethod
    def raw(self, network: Network, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Scores [b] in the units of the papers."""

    @cached_property
    def identity(self) -> str:  # the files of a folder are read once
        scale = [] if self.scale == 1 else [f"scale={self.scale:g}"]
        return " ".join([self.version, *(weights.identity for weights in self.weights), *scale])

    def fingerprint(self) -> str:
        return self._fingerprint

    def load(self, device: str) -> None:
        if self._network is None:
            folders = find_all(self.weights)
            self._network = built(self.version, self.build, *folders)
            self._fingerprint = " ".join(w.fingerprint(folder) for w, folder in zip(self.weights, folders, strict=True))
        self._network.to(device)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        if self._network is None:
            raise RewardUnavailable(f"{self.version}: no weights are loaded; call load(device) first")
        pictures, texts = [Image.fromarray(image) for image in images], [prompt.text for prompt in prompts]
        with torch.inference_mode():
            scores = [
                self.raw(self._network, pictures[i : i + self.batch_size], texts[i : i + self.batch_size])
                for i in range(0, len(pictures), self.batch_size)
            ]
        return RewardOutput(score=torch.cat(scores).double().cpu().numpy() / self.scale)
