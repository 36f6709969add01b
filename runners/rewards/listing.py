"""`ablate rewards`: what there is, and whether it works here."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.console import Group
from rich.table import Table
from rich.text import Text

from ablate.recipe import RewardTerm
from ablate.source import FieldError, InputError
from runners.rewards import REWARDS, RewardUnavailable, load_term, reward_class
from runners.rewards.protocol import fixed_inputs


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
    """Find or download the weights of a reward, let it check itself, and show what it says of small fixed images.

    Raises InputError with the remedy where it cannot.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        reward = load_term(RewardTerm(name=name, **parameters))
        start = time.perf_counter()
        reward.load(device)
        loaded = time.perf_counter() - start
        reward.self_check()
    except (FieldError, RewardUnavailable) as error:
        raise InputError(f"reward {name}: {error}") from None
    images, prompts = fixed_inputs()
    start = time.perf_counter()
    output = reward(images, prompts)
    seconds = (time.perf_counter() - start) / len(images)
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for column in ("image", "score", *output.parts):
        table.add_column(column, justify="left" if column == "image" else "right")
    for i, what in enumerate(("grey", "a red square", "noise")):
        table.add_row(what, *(f"{values[i]:.4f}" for values in (output.score, *output.parts.values())))
    lines = [
        f"{name}: {reward.identity} {reward.fingerprint()}".strip(),
        f"loaded in {loaded:.1f} s on {device}; {seconds:.3f} s per image; self-check passed",
        f"prompt: {prompts[0].text}",
    ]
    return Group(Text("\n".join(lines)), table)


def parameters_of(settings: Iterator[tuple[str, Any]]) -> dict[str, Any]:
    """Parameters as `--set` gives them. Raises InputError for what is no parameter of a reward but of its term."""
    given = dict(settings)
    if reserved := sorted({"name", "weight", "label"} & given.keys()):
        raise InputError(f"--set {reserved[0]}=...: not a parameter of a reward")
    return given
