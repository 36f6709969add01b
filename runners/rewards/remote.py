"""Reward `remote`: a reward on another machine; the protocol is in docs/rewards.md, a server in reward_server.py."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ablate.source import shown
from runners.prompts import Prompt
from runners.rewards.groups import whole_groups
from runners.rewards.http import SHOWN, Failure, HttpReward
from runners.rewards.png import to_base64
from runners.rewards.protocol import About, Images, RewardOutput, RewardUnavailable, joined, missing

MAX_PARTS = 16
MAX_IDENTITY = 200  # characters


@dataclass(kw_only=True)
class RemoteReward(HttpReward):
    """Scores of a server that is asked for whole groups, together at most `batch_size` images where these fit.

    The server says which reward it has; with `expect`, it must be that one.
    """

    compares: ClassVar[bool] = True  # the server's reward may
    about: ClassVar[About] = About(units="the server's", source="the server's", weights="on the server")
    remedy: ClassVar[str] = "start it (`ablate reward-server`), then run the same command again"
    batch_size: int = 32
    expect: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size < 1:
            raise ValueError(f"batch_size: got {self.batch_size}, expected at least 1")
        self._served = self.expect or ""

    @property
    def identity(self) -> str:
        return f"remote-1 {self.expect or self.url}"

    def load(self, device: str) -> None:
        """Ask the server which reward it has."""
        answer = self.ask_once("/identity")
        identity = answer.get("identity") if isinstance(answer, dict) else None
        if not isinstance(identity, str) or not 0 < len(identity) <= MAX_IDENTITY:
            raise RewardUnavailable(f"{self.url}/identity: got {shown(answer)}, expected {{'identity': ...}}")
        self._check(identity)

    def fingerprint(self) -> str:
        return self._served

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        parts = list(whole_groups(prompts, self.batch_size))
        answers = self.ask("/score", [partial(_request, images[part], prompts[part]) for part in parts])
        return joined([self._output(a, part.stop - part.start) for a, part in zip(answers, parts, strict=True)])

    def _output(self, answer: Any, number: int) -> RewardOutput:
        """An answer as scores of so many images; missing as far as it is none."""
        if isinstance(answer, Failure):
            return missing(number, answer.reason)
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or not isinstance(answer.get("identity"), str):
            return missing(number, f"{self.url}: got {shown(answer)}, expected {{'identity': ..., 'scores': [...]}}")
        self._check(answer["identity"])
        if len(scores) != number:
            return missing(number, f"{self.url}: got {len(scores)} scores for {number} images")
        score = _numbers(scores)
        given = _listed(answer.get("reasons"), number)
        reasons = [text[:SHOWN] if isinstance(text, str) else "" for text in given]
        for i in np.flatnonzero(np.isnan(score)):
            reasons[i] = reasons[i] or f"{self.url}: got {shown(scores[i])}, expected a finite number"
        return RewardOutput(
            score=score, parts=_parts(answer.get("parts"), number), reasons=tuple(reasons) if any(reasons) else ()
        )

    def _check(self, identity: str) -> None:
        """Raises RewardUnavailable where the server has another reward than before."""
        if self._served and identity != self._served:
            raise RewardUnavailable(
                f"{self.url}: has the reward {shown(identity)}, expected {shown(self._served)}; "
                "start the server with that one, or a new cell"
            )
        self._served = identity


def _request(images: Images, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {"images": [to_base64(image) for image in images], "prompts": [asdict(prompt) for prompt in prompts]}


def _numbers(values: Sequence[Any]) -> NDArray[np.float64]:
    """Numbers of JSON; NaN for whatever is no finite one."""
    return np.array([_number(value) for value in values])


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return np.nan
    try:
        return float(value) if np.isfinite(float(value)) else np.nan
    except OverflowError:
        return np.nan


def _listed(values: Any, number: int) -> list[Any]:
    return values if isinstance(values, list) and len(values) == number else [None] * number


def _parts(parts: Any, number: int) -> Mapping[str, NDArray[np.float64]]:
    """What the server records beside the scores, where it has names for curves."""
    if not isinstance(parts, dict):
        return {}
    named = {name: values for name, values in parts.items() if re.fullmatch(r"[\w-]{1,40}", name) and name != "score"}
    return {name: _numbers(_listed(values, number)) for name, values in [*named.items()][:MAX_PARTS]}
