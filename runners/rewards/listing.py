"""`ablate rewards`: what there is, and whether it works here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ablate.recipe import RewardTerm
from ablate.source import FieldError, InputError
from runners.rewards import REWARDS, RewardUnavailable, load_term, reward_class
from runners.rewards.protocol import checked


def listing() -> Table:
    """All built-in rewards with what they need, in which units they score, and where they come from."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in ("reward", "scores", "units", "weights", "licence", "memory", "source"):
        table.add_column(name, overflow="fold", justify="right" if name == "memory" else "left")
    for name in REWARDS:
        kind = reward_class(name)
        about, what = kind.about, kind.__doc__.split("\n\n")[0].split("; ")[0]
        memory = f"{about.gibibytes:g} GiB" if about.gibibytes else ""
        row = (name, " ".join(what.split()), about.units, about.weights, about.licence, memory, about.source)
        table.add_row(*row)
    return table


def check(name: str, parameters: Mapping[str, Any]) -> Group:
    """Find or download the weights of a reward, let it check itself, and show what it says of its small fixed images.

    Raises InputError with the remedy where it cannot, or where an image has no finite score.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward = load_term(RewardTerm(name=name, **parameters))
        start = time.perf_counter()
        checked(name, lambda: reward.load(device))
        loaded = time.perf_counter() - start
        checked(name, reward.self_check)
        images, prompts = reward.check_inputs()
        start = time.perf_counter()
        output = checked(name, lambda: reward(images, prompts))
    except FieldError as error:
        raise InputError(f"reward {name}: {error}") from None
    except RewardUnavailable as error:
        raise InputError(str(error)) from None
    seconds = (time.perf_counter() - start) / len(images)
    for i in np.flatnonzero(output.missing).tolist():
        why = (output.reasons[i] if output.reasons else "") or f"got {output.score[i]}, expected a finite number"
        raise InputError(f"reward {name}: image {i + 1} of {len(images)} has no score: {why}")
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for column in ("image", "score", *output.parts, "prompt"):
        table.add_column(column, justify="left" if column == "prompt" else "right")
    for i, prompt in enumerate(prompts):
        values = (f"{of_images[i]:.4f}" for of_images in (output.score, *output.parts.values()))
        table.add_row(str(i + 1), *values, prompt.text)
    lines = [
        f"{name}: {reward.identity} {reward.fingerprint()}".strip(),
        f"loaded in {loaded:.1f} s on {device}; {seconds:.3f} s per image; self-check passed",
    ]
    return Group(Text("\n".join(lines)), table)


def parameters_of(settings: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Parameters as `--set` gives them. Raises InputError for what is no parameter of a reward but of its term."""
    given = dict(settings)
    if reserved := sorted({"name", "weight", "label"} & given.keys()):
        raise InputError(f"--set {reserved[0]}=...: not a parameter of a reward")
    return given
