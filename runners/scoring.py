"""Scores of images, on a thread of their own; where a reward fails, the smallest group of images that it fails on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from PIL import Image

from runners.prompts import Prompt
from runners.rewards.groups import groups, whole_groups
from runners.rewards.protocol import Images, RewardOutput, RewardUnavailable, joined, missing

AT_ONCE = 256  # images, unless those of one prompt are more; each piece has the time limit for itself
KEPT = 24  # images of an epoch that are kept where they have no score

Score = Callable[[Images, Sequence[Prompt]], RewardOutput]
Work = SimpleQueue[tuple[Future[RewardOutput], Images, list[Prompt]] | None]


class Scorer:
    """One reward at work.

    With `meanwhile`, images are scored as they are handed over, while the caller goes on; else when the caller waits
    for them, so that the seconds of both can be told apart on a machine whose cores they share. Images of one prompt
    must follow each other, and are scored together. A reward that gives no answer for `timeout` seconds is given up:
    a thread cannot be stopped, so all that comes after is missing.
    """

    def __init__(self, reward: Score, timeout: float, *, meanwhile: bool = False) -> None:
        self._reward, self._timeout, self._meanwhile = reward, timeout, meanwhile
        self._held: list[tuple[Images, list[Prompt]]] = []  # not yet given to the thread
        self._given: list[tuple[int, Future[RewardOutput]]] = []  # with the number of images
        self._work: Work | None = None  # of a thread that lives from the first piece to `finish`
        self._given_up = ""

    def begin(self) -> None:
        """Forget what was handed over and not asked for."""
        for _, future in self._given:
            future.cancel()
        self._end()

    def hand_over(self, images: Images, prompts: Sequence[Prompt]) -> None:
        """More images [b, h, w, 3] with their prompts."""
        self._held.append((images, list(prompts)))
        if self._meanwhile:
            self._give(whole=False)

    def finish(self) -> RewardOutput:
        """The scores of all images since `begin`, in order."""
        self._give(whole=True)
        outputs = [self._wait(number, future) for number, future in self._given]
        self._end()
        return joined(outputs)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """The scores of these images."""
        self.begin()
        self.hand_over(images, prompts)
        return self.finish()

    def _give(self, *, whole: bool) -> None:
        """Give the thread what is held, but for the last prompt's images where more of them may come."""
        if not self._held:
            return
        images = np.concatenate([images for images, _ in self._held])
        prompts = [prompt for _, prompts in self._held for prompt in prompts]
        cut = len(prompts) if whole else list(groups(prompts))[-1].start
        for piece in whole_groups(prompts[:cut], AT_ONCE):
            future: Future[RewardOutput] = Future()
            self._queue().put((future, images[piece], prompts[piece]))
            self._given.append((piece.stop - piece.start, future))
        self._held = [(images[cut:], prompts[cut:])] if cut < len(prompts) else []

    def _end(self) -> None:
        if self._work is not None:
            self._work.put(None)
        self._held, self._given, self._work = [], [], None

    def _queue(self) -> Work:
        if self._work is None:
            self._work = SimpleQueue()
            # a daemon, so that a hung reward does not keep the process from ending
            threading.Thread(target=_serve, args=(self._work, self._reward), name="reward", daemon=True).start()
        return self._work

    def _wait(self, number: int, future: Future[RewardOutput]) -> RewardOutput:
        if not self._given_up:
            try:
                return future.result(self._timeout)
            except TimeoutError:
                self._given_up = f"no answer within {self._timeout:g} s"
        future.cancel()
        return missing(number, self._given_up)


def _serve(work: Work, reward: Score) -> None:
    while task := work.get():
        future, images, prompts = task
        if future.set_running_or_notify_cancel():
            future.set_result(score(reward, images, prompts))


def score(reward: Score, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
    """Scores of images; where the reward raises, of the half and the half, down to the prompts that it fails on.

    So a batch that is too large for the memory of the device is halved too.
    """
    try:
        return reward(images, prompts)
    except RewardUnavailable as error:
        return missing(len(images), str(error))
    except Exception as error:  # of somebody else's model, server or function
        cuts = [group.start for group in groups(prompts) if group.start]
        failure = f"{type(error).__name__}: {error}"
    if not cuts:
        return missing(len(images), failure)
    cut = min(cuts, key=lambda start: abs(start - len(prompts) / 2))
    return joined([score(reward, images[:cut], prompts[:cut]), score(reward, images[cut:], prompts[cut:])])


def keep_unscored(folder: Path, images: Images, prompts: Sequence[Prompt], output: RewardOutput, name: str) -> None:
    """Save the first images without a score under unscored/, and in unscored.jsonl why they have none."""
    rows = np.flatnonzero(output.missing)[:KEPT]
    if not len(rows):
        return
    target = folder / "unscored"
    target.mkdir(exist_ok=True)
    with (target / "unscored.jsonl").open("a", encoding="utf-8") as file:
        for i in rows:
            image = f"{name}-{i}.png"
            Image.fromarray(images[i]).save(target / image)
            reason = output.reasons[i] if output.reasons else "not a finite number"
            file.write(json.dumps({"image": image, "prompt": prompts[i].text, "reason": reason}) + "\n")


def why_missing(output: RewardOutput) -> str:
    """The first reason why an image has no score; empty where all have one."""
    rows = np.flatnonzero(output.missing)
    if not len(rows):
        return ""
    return (output.reasons[rows[0]] if output.reasons else "") or "not a finite number"
