"""A reward of the user's own: `module:function`, a function of images and prompts."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from runners.digest import file_digest
from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput


@dataclass
class FunctionReward(Reward):
    """`function(images, prompts, **parameters)` returns scores [b], or a `RewardOutput`.

    The file it stands in is part of the identity: a change of it is another reward. Raises ValueError for a function
    that does not exist, or that does not take these parameters.
    """

    about: ClassVar[About] = About(units="the function's", source="yours")
    compares: ClassVar[bool] = True  # it may
    name: str
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        path, _, attribute = self.name.partition(":")
        try:
            module = importlib.import_module(path)
        except Exception as error:  # whatever the file of a user does when it is run
            raise ValueError(f"{self.name!r} cannot be imported: {type(error).__name__}: {error}") from None
        self._function = getattr(module, attribute, None)
        if not callable(self._function):
            raise ValueError(f"{self.name!r} is no function of {path}")
        try:
            inspect.signature(self._function).bind(None, None, **self.parameters)
        except TypeError as error:
            raise ValueError(f"{self.name}(images, prompts, ...): {error}") from None
        file = inspect.getsourcefile(module)
        self._digest = file_digest(Path(file)) if file else "built-in"

    @property
    def identity(self) -> str:
        given = "".join(f" {key}={value}" for key, value in sorted(self.parameters.items()))
        return f"{self.name}@{self._digest}{given}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        assert self._function is not None
        found = self._function(images, prompts, **self.parameters)
        return found if isinstance(found, RewardOutput) else RewardOutput(score=np.asarray(found, float))
