"""Rewards `judge` and `unified-reward`: a vision-language model behind a chat endpoint, asked for a score in words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, ClassVar

import numpy as np

from ablate.source import choices
from runners.digest import digest
from runners.prompts import Prompt
from runners.rewards.http import SHOWN, Failure, HttpReward
from runners.rewards.png import to_data_url
from runners.rewards.protocol import About, Images, RewardOutput, RewardUnavailable

READ = 20_000  # characters at the end of an answer, more than any that was thought over
SCORE = """\
You are given a text caption and a generated image based on that caption. \
Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, \
including clarity, detail preservation, color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""

# in Markdown or not; as a whole number with its decimals, and neither as a share of anything but 5 nor in per cent
FINAL_SCORE = (
    r"(?i)Final Score[\s*_:]*:[\s*_]*(\d{1,9}(?:\.\d{1,9})?)(?!\d|\.\d|\s*%|\**\s*(?:/|out of)\s*(?!5(?![\d.]*\d))\d)"
)


@dataclass(kw_only=True)
class ChatReward(HttpReward):
    """Questions about images to `model` at `url`, an OpenAI-compatible address such as http://127.0.0.1:8000/v1.

    `template` is the question, with {prompt} in it; `pattern` a regular expression whose one group is the answer, where
    it matches last.
    """

    remedy: ClassVar[str] = "start a server of chat completions there (vLLM, SGLang), then run the same command again"
    model: str
    template: str
    pattern: str
    max_tokens: int = 1024
    concurrency: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if "{prompt}" not in self.template:
            raise ValueError("template: expected a text with {prompt} in it")
        try:
            self._pattern = re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"pattern: {self.pattern!r} is no regular expression: {error}") from None
        if self._pattern.groups != 1:
            raise ValueError(f"pattern: got {self._pattern.groups} groups in {self.pattern!r}, expected one")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens: got {self.max_tokens}, expected at least 1")

    @property
    def question(self) -> str:
        """Of the question, and of how the answer is read."""
        return digest("\n".join((self.template, self.pattern, str(self.max_tokens))))

    def load(self, device: str) -> None:
        """Ask whether the server has the model."""
        answer = self.ask_once("/models")
        listed = answer.get("data") if isinstance(answer, dict) else None
        names = [str(m.get("id"))[:SHOWN] for m in listed if isinstance(m, dict)] if isinstance(listed, list) else []
        if self.model not in names:
            raise RewardUnavailable(f"{self.url}: has no model {self.model!r}{choices(self.model, names[:20])}")

    def self_check(self) -> None:
        """Ask about small fixed images, once: one answer at least must be readable."""
        output = self(*self.check_inputs())
        if output.missing.all():
            raise RewardUnavailable(
                f"{self.identity}: no answer about three test images can be read: {output.reasons[0]}"
            )

    def replies(
        self, images: Images, questions: Sequence[tuple[tuple[int, ...], str]]
    ) -> list[re.Match[str] | Failure]:
        """What `pattern` finds in the answers to questions, each about the images of some indices and their prompt."""
        url = cache(lambda i: to_data_url(images[i]))

        def request(about: tuple[int, ...], prompt: str) -> dict[str, Any]:
            pictures = [{"type": "image_url", "image_url": {"url": url(i)}} for i in about]
            text = {"type": "text", "text": self.template.replace("{prompt}", prompt)}
            return {
                "model": self.model,
                "messages": [{"role": "user", "content": [*pictures, text]}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            }

        answers = self.ask("/chat/completions", [partial(request, about, prompt) for about, prompt in questions])
        return [answer if isinstance(answer, Failure) else self._found(answer) for answer in answers]

    def _found(self, answer: Any) -> re.Match[str] | Failure:
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            content = None
        if not isinstance(content, str):
            return Failure(reason=f"{self.url}: an answer without choices[0].message.content")
        found = list(self._pattern.finditer(content[-READ:]))
        if not found:
            end = " ".join(content[-READ:].split())[-SHOWN:]
            return Failure(reason=f"{self.url}: nothing like {self.pattern!r} in the answer that ends {end!r}")
        return found[-1]


@dataclass(kw_only=True)
class JudgeReward(ChatReward):
    """The number that a model's answer holds, divided by `scale`.

    An answer without one, or with one outside `lowest` to `highest`, is missing.
    """

    about: ClassVar[About] = About(units="the judge's, over scale", source="yours", weights="on the server")
    template: str = SCORE
    pattern: str = FINAL_SCORE
    lowest: float = 1.0
    highest: float = 5.0
    scale: float = 5.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scale <= 0:
            raise ValueError(f"scale: got {self.scale:g}, expected more than 0")
        if self.lowest >= self.highest:
            raise ValueError(f"lowest: got {self.lowest:g}, expected less than highest, {self.highest:g}")

    @property
    def identity(self) -> str:
        return f"judge-1 {self.model} {self.question} {self.lowest:g}..{self.highest:g} scale={self.scale:g}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        replies = self.replies(images, [((i,), prompt.text) for i, prompt in enumerate(prompts)])
        scores, reasons = zip(*(self._score(reply) for reply in replies), strict=True)
        return RewardOutput(score=np.array(scores), reasons=reasons if any(reasons) else ())

    def _score(self, reply: re.Match[str] | Failure) -> tuple[float, str]:
        """The score, and why it is missing."""
        if isinstance(reply, Failure):
            return np.nan, reply.reason
        try:
            score = float(reply[1])
        except (TypeError, ValueError):  # a group that took no part, or text
            score = np.nan
        if not self.lowest <= score <= self.highest:
            expected = f"expected {self.lowest:g} to {self.highest:g}"
            return np.nan, f"{self.url}: got {str(reply[1])[:SHOWN]!r} as a score, {expected}"
        return score / self.scale, ""


@dataclass(kw_only=True)
class UnifiedReward(JudgeReward):
    """UnifiedReward's score of 1 to 5, over 5, asked as Flow-GRPO asks."""

    about: ClassVar[About] = About(
        units="0.2 to 1: the score of 1 to 5, over 5",
        source="Wang et al. 2025 (arXiv 2503.05236); question of Flow-GRPO's rewards.py",
        weights="on the server: CodeGoat24/UnifiedReward-7b-v1.5",
    )
    model: str = "UnifiedReward-7b-v1.5"
    template: str = "<image>\n" + SCORE
