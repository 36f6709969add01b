"""Which numbers of devices can share the groups of a recipe. Torch-free.

The groups of an update are dealt out whole and evenly, so num_groups x group_size, and with it the result, is the same
on any number of devices. What cannot be dealt out is refused, not rounded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ablate.source import InputError, counted

if TYPE_CHECKING:  # recipes are checked by this
    from ablate.recipe import Recipe


def possible_devices(recipe: Recipe) -> list[int]:
    """The numbers of devices that a cell can use, ascending."""
    groups = recipe.rollout.num_groups // recipe.update.updates_per_epoch  # of one update
    if recipe.rollout.resample_rounds:
        return [1]
    most = min(groups, recipe.evaluation.num_prompts)
    return [n for n in range(1, most + 1) if groups % n == 0]


def check_devices(recipe: Recipe, num_devices: int) -> None:
    """Raises InputError, with the nearest geometry that is possible, if so many devices cannot share the groups."""
    possible = possible_devices(recipe)
    if num_devices in possible:
        return
    if recipe.rollout.resample_rounds:
        raise InputError(
            f"rollout.resample_rounds = {recipe.rollout.resample_rounds} runs on one device, as which groups are kept "
            f"shows only once all are scored; got {num_devices} devices"
        )
    if (prompts := recipe.evaluation.num_prompts) < num_devices:
        raise InputError(
            f"evaluation.num_prompts = {prompts} is less than one for each of {num_devices} devices: take more prompts "
            f"or {counted(max(possible), 'device')}"
        )
    updates, num_groups = recipe.update.updates_per_epoch, recipe.rollout.num_groups
    unit = updates * num_devices
    lower, upper = num_groups // unit * unit, -(-num_groups // unit) * unit
    nearest = " or ".join(str(n) for n in dict.fromkeys((lower, upper)) if n)
    fewer = [n for n in possible if n < num_devices][-1:]
    more = [n for n in possible if n > num_devices][:1]
    *others, last = *fewer, *more
    devices = "".join(f"{n} or " for n in others) + counted(last, "device")
    raise InputError(
        f"rollout.num_groups = {num_groups} in update.updates_per_epoch = {updates} gives {num_groups // updates} "
        f"groups per update, which {num_devices} devices cannot share evenly: take {devices}, or "
        f"rollout.num_groups {nearest}"
    )
