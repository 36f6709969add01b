"""What rewards with learned weights share: where the weights come from, batches, and the scale of training."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Generic

import torch
from PIL import Image
from torch import Tensor

from ablate.source import FieldError
from runners.prompts import Prompt
from runners.rewards.pretrained import Network
from runners.rewards.protocol import Images, Reward, RewardOutput, RewardUnavailable
from runners.rewards.weights import Weights


@dataclass
class LearnedReward(Reward, Generic[Network]):
    """Scores are divided by `scale`.

    `folder` is used in place of the hub and holds the files of all repositories; `revision` is that of the first one.
    """

    version: ClassVar[str]  # of the implementation, as "pickscore-1"
    scale: float = 1.0
    batch_size: int = 32  # images at once
    folder: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        for name in ("scale", "batch_size"):
            if (got := getattr(self, name)) <= 0:
                raise FieldError(name, f"got {got}, expected more than 0")
        self._network: Network | None = None
        self._fingerprint = ""

    @property
    @abstractmethod
    def weights(self) -> tuple[Weights, ...]:
        """The files it needs."""

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
            folders = self._find()
            try:
                self._network = self.build(*folders)
            except Exception as error:  # whatever such files hold
                where = ", ".join(str(folder) for folder in dict.fromkeys(folders))
                what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                raise RewardUnavailable(f"{self.version}: not the weights it needs in {where} ({what})") from error
            self._fingerprint = " ".join(weights.fingerprint() for weights in self.weights)
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

    def _find(self) -> list[Path]:
        """The folders of all weights. Raises RewardUnavailable for all that are missing at once."""
        folders, problems = [], []
        for weights in self.weights:
            try:
                folders.append(weights.find())
            except RewardUnavailable as error:
                problems.append(str(error))
        if problems:
            raise RewardUnavailable("; ".join(problems))
        return folders
