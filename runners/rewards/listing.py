"""`ablate rewards`: what there is, and whether it works here."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ablate.recipe import RewardTerm
from ablate.source import FieldError, InputError
from runners.prompts import Prompt
from runners.rewards import REWARDS, RewardOutput, RewardUnavailable, load_reward, reward_class


def listing() -> Table:
    """All built-in rewards with what they need, in which units they score, and where they come from."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    table.add_column("reward", no_wrap=True)
    table.add_column("scores, units; weights, licence, memory; source", overflow="fold")
    for name in REWARDS:
        kind = reward_class(name)
        about, what = kind.about, " ".join(kind.__doc__.split("\n\n")[0].split("; ")[0].split()).rstrip(".")
        memory = f"{about.gibibytes:g} GiB" if about.gibibytes else ""
        needs = ", ".join(filter(None, (about.weights, about.licence, memory)))
        table.add_row(Text(name, style="bold"), Text(f"{what}. Units: {about.units}."))
        if about.weights != "none":
            table.add_row("", Text(f"Weights: {needs}"))
        table.add_row("", Text(about.source, style="dim"))
    return table


def check(name: str, parameters: Mapping[str, Any]) -> Group:
    """Find or download the weights of a reward, let it check itself, and show what it says of its small fixed images.

    Raises InputError with the remedy where it cannot, or where no image has a score.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward = load_reward((RewardTerm(name=name, **parameters),))
        images, prompts = reward.rewards[name].check_inputs()
        start = time.perf_counter()
        reward.load(device)
        loaded = time.perf_counter() - start
        reward.self_check()
        start = time.perf_counter()
        output = reward(images, prompts)
    except (FieldError, RewardUnavailable, RuntimeError) as error:
        problem = str(error).removeprefix(f"reward {name}: ").removeprefix(f"{name}: ")
        raise InputError(f"reward {name}: {' '.join(problem.split())}") from None
    seconds = (time.perf_counter() - start) / len(images)
    if output.missing.all():
        raise InputError(f"reward {name}: no image has a score: {output.reason(0)}")
    lines = [
        f"{name}: {reward.identities[name]}",
        f"loaded in {loaded:.1f} s on {device}; {seconds:.3f} s per image; self-check passed",
    ]
    if output.missing.any():
        lines.append(f"{output.missing.sum()} of {len(images)} images have no score")
    return Group(Text("\n".join(lines)), _scores(output, prompts))


def _scores(output: RewardOutput, prompts: Sequence[Prompt]) -> Table:
    """A row for each image, with the reason where it failed or has no score."""
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    words = ("prompt", "reason")
    for column in ("image", "score", *output.parts, *words):
        table.add_column(column, justify="left" if column in words else "right")
    for i, prompt in enumerate(prompts):
        numbers = (float(values[i]) for values in (output.score, *output.parts.values()))
        shown = ("missing" if math.isnan(number) else f"{number:.4f}" for number in numbers)
        table.add_row(str(i + 1), *shown, *(Text(text) for text in (prompt.text, output.reason(i))))
    return table


def parameters_of(settings: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Parameters as `--set` gives them. Raises InputError for what is no parameter of a reward but of its term."""
    given = dict(settings)
    if reserved := sorted({"name", "weight", "label"} & given.keys()):
        raise InputError(f"--set {reserved[0]}=...: not a parameter of a reward")
    return given
