"""Scores of images, on a thread of their own; where a reward fails, the fewest images that it fails on have none."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ablate.record import write_atomic
from runners.prompts import Prompt
from runners.rewards.groups import groups, whole_groups
from runners.rewards.protocol import Images, RewardOutput, RewardUnavailable, joined, missing

AT_ONCE = 256  # images, unless those of one prompt are more; each piece has the time limit for itself
KEPT = 24  # images that are saved at a time where they have no score
KEPT_IN_ALL = 240

Work = SimpleQueue["tuple[Future[Any], Callable[[], Any]] | None"]

hung: list[str] = []  # rewards of this process that were given up: their threads cannot be stopped


class Score(Protocol):
    """A reward, or several as one."""

    @property
    def compares(self) -> bool: ...

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput: ...


class Scorer:
    """One reward at work, one piece after the other.

    With `meanwhile`, images are scored as they are handed over, while the caller goes on; else when the caller waits
    for them, so that the seconds of both can be told apart on a machine whose cores they share. Images of one prompt
    must follow each other, and are scored together. A reward that gives no answer for `timeout` seconds is given up:
    a thread cannot be stopped, so all that comes after is missing. `device` is that of the thread.
    """

    def __init__(self, reward: Score, timeout: float, *, meanwhile: bool = False, device: str = "cpu") -> None:
        self._reward, self._timeout, self._meanwhile, self._device = reward, timeout, meanwhile, device
        self._held: list[tuple[Images, list[Prompt]]] = []  # not yet given to the thread
        self._given: list[tuple[int, Future[RewardOutput]]] = []  # with the number of images
        self._work: Work | None = None
        self._given_up = ""

    def begin(self) -> None:
        """Forget what was handed over and not asked for."""
        for _, future in self._given:
            future.cancel()
        self._held, self._given = [], []

    def hand_over(self, images: Images, prompts: Sequence[Prompt]) -> None:
        """More images [b, h, w, 3] with their prompts."""
        self._held.append((images, list(prompts)))
        if self._meanwhile:
            self._give(whole=False)

    def finish(self) -> RewardOutput:
        """The scores of all images since `begin`, in order."""
        self._give(whole=True)
        outputs = [self._wait(number, future) for number, future in self._given]
        self._given = []
        return joined(outputs)

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """The scores of these images."""
        self.begin()
        self.hand_over(images, prompts)
        return self.finish()

    def check(self, work: Callable[[], None]) -> None:
        """Do something with the reward within the time limit. Raises RewardUnavailable past it."""
        try:
            self._submit(work).result(self._timeout)
        except TimeoutError:
            self._give_up()
            raise RewardUnavailable(self._given_up) from None

    def _give(self, *, whole: bool) -> None:
        """Give the thread what is held, but for the last prompt's images where more of them may come."""
        if not self._held:
            return
        images = np.concatenate([images for images, _ in self._held])
        prompts = [prompt for _, prompts in self._held for prompt in prompts]
        cut = len(prompts) if whole else list(groups(prompts))[-1].start
        for piece in whole_groups(prompts[:cut], AT_ONCE):
            work = _scoring(self._reward, images[piece], prompts[piece])
            self._given.append((piece.stop - piece.start, self._submit(work)))
        self._held = [(images[cut:], prompts[cut:])] if cut < len(prompts) else []

    def _submit(self, work: Callable[[], Any]) -> Future[Any]:
        if self._work is None:
            self._work = SimpleQueue()
            weakref.finalize(self, self._work.put, None)
            # a daemon, so that a hung reward does not keep the process from ending
            threading.Thread(target=_serve, args=(self._work, self._device), name="reward", daemon=True).start()
        future: Future[Any] = Future()
        self._work.put((future, work))
        return future

    def _wait(self, number: int, future: Future[RewardOutput]) -> RewardOutput:
        if not self._given_up:
            try:
                return future.result(self._timeout)
            except TimeoutError:
                self._give_up()
        future.cancel()
        return missing(number, self._given_up)

    def _give_up(self) -> None:
        self._given_up = f"no answer within {self._timeout:g} s"
        hung.append(self._given_up)


def _scoring(reward: Score, images: Images, prompts: Sequence[Prompt]) -> Callable[[], RewardOutput]:
    return lambda: score(reward, images, prompts)


def _serve(queue: Work, device: str) -> None:
    if device.startswith("cuda"):
        import torch  # noqa: PLC0415  (plans import this module and no torch)

        torch.cuda.set_device(device)  # of this thread, for rewards that say only "cuda"
    while task := queue.get():
        future, work = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            future.set_result(work())
        except BaseException as error:  # SystemExit too: somebody waits
            future.set_exception(error if isinstance(error, Exception) else RuntimeError(repr(error)))
        del task, future, work  # images, before the next ones come


def score(reward: Score, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
    """Scores of images; where the reward raises, of the half and the half, down to the images that it fails on.

    So a batch that is too large for the memory of the device is halved too. A reward that compares images of a prompt
    gets these together.
    """
    try:
        return reward(images, prompts)
    except RewardUnavailable as error:
        return missing(len(images), str(error))
    except (Exception, SystemExit) as error:  # of somebody else's model, server or function
        failure = str(error) if isinstance(error, RuntimeError) else f"{type(error).__name__}: {error}"
    cuts = [group.start for group in groups(prompts)] if reward.compares else range(len(prompts))
    inner = [cut for cut in cuts if cut]
    if not inner:
        return missing(len(images), failure)
    cut = min(inner, key=lambda start: abs(start - len(prompts) / 2))
    return joined([score(reward, images[:cut], prompts[:cut]), score(reward, images[cut:], prompts[cut:])])


def keep_unscored(
    folder: Path, images: Sequence[Images], prompts: Sequence[Prompt], output: RewardOutput, name: str
) -> None:
    """Name the images of some batches that have no score in unscored/<name>.jsonl, and save the first of them."""
    rows = np.flatnonzero(output.missing).tolist()
    if not rows:
        return
    everything, target = np.concatenate(images), folder / "unscored"
    target.mkdir(exist_ok=True)
    lines = []
    room = min(KEPT, KEPT_IN_ALL - len(list(target.glob("*.png"))))
    for number, row in enumerate(rows):
        line = {"image": f"{name}-{row}.png", "prompt": prompts[row].text, "reason": output.reason(row)}
        lines.append(json.dumps(line) + "\n")
        if number < room:
            Image.fromarray(everything[row]).save(target / f"{name}-{row}.png")
    write_atomic(target / f"{name}.jsonl", "".join(lines))


def why_missing(output: RewardOutput) -> str:
    """The first reason why an image has no score; empty where all have one."""
    rows = np.flatnonzero(output.missing).tolist()
    return output.reason(rows[0]) if rows else ""
