"""Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, sec. 4.1; names of the fields in the docs)."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.recipe import AdvantageRecipe

EPSILON = 1e-4  # added to standard deviations, as Flow-GRPO does


def advantages(reward: Tensor, group: Tensor, recipe: AdvantageRecipe) -> Tensor:
    """A = coef (R - centre) / scale, clipped; reward and group [b] -> [b], in the dtype of `reward`.

    centre: `mean` of the group, or `leave_one_out`, that of the n - 1 others: n / (n - 1) times as much (RLOO,
    Ahmadian et al. 2024, arXiv 2402.14740, sec. 3.3). scale: `none` 1, `group` the group's standard deviation, `batch`
    that of all rewards (both population form, plus 1e-4). A group of equal rewards has advantage 0 under every scale.
    """
    _, index = torch.unique(group, return_inverse=True)
    count = torch.bincount(index).to(reward)

    def group_mean(values: Tensor) -> Tensor:
        return (torch.zeros_like(count).index_add_(0, index, values) / count)[index]

    lowest = torch.full_like(count, torch.inf).scatter_reduce_(0, index, reward, "amin")[index]
    above = reward - lowest  # so that rounding of the mean gives equal rewards no advantage
    centred = above - group_mean(above)
    if recipe.scale == "group":
        centred = centred / (group_mean(centred**2).sqrt() + EPSILON)
    elif recipe.scale == "batch":
        centred = centred / (reward.std(correction=0) + EPSILON)
    if recipe.centre == "leave_one_out":
        centred = centred * (count / (count - 1))[index]
    scaled = recipe.coef * centred
    return scaled if recipe.clip is None else scaled.clamp(-recipe.clip, recipe.clip)
