"""Group-relative advantages (Shao et al. 2024, arXiv 2402.03300, sec. 4.1; names of the fields in the docs)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ablate.recipe import AdvantageRecipe

EPSILON = 1e-4  # added to standard deviations, as Flow-GRPO does


def advantages(
    reward: Tensor, group: Tensor, recipe: AdvantageRecipe, weights: Sequence[float] | None = None
) -> Tensor:
    """A = coef (R - centre) / scale, clipped; reward [b], or r rewards [b, r] with weights [r], and group [b] -> [b].

    transform: `win_rate` replaces a reward by the share of its group that it beats (Pref-GRPO, Wang et al. 2025, arXiv
    2508.20751). several: how r rewards become one: `sum`, weighted; `normalised`, each centred and scaled by itself
    before the weighted sum (GDPO, arXiv 2601.05242); `whitened`, each brought to mean 0 and deviation 1 over the batch
    before the weighted sum. centre: `mean` of the group, or `leave_one_out`, that of the n - 1 others: n / (n - 1)
    times as much (RLOO, Ahmadian et al. 2024, arXiv 2402.14740, sec. 2.3). scale: `none` 1, `group` the group's
    standard deviation, `batch` that of all rewards (both population form, plus 1e-4). whiten: the result is brought to
    mean 0 and deviation 1 over the batch (GDPO's last step). A group of equal rewards has advantage 0 but for `whiten`,
    which shifts all alike.
    """
    _, index = torch.unique(group, return_inverse=True)
    each = reward[:, None] if reward.ndim == 1 else reward  # [b, r]
    weight = each.new_tensor([1.0] * each.shape[1] if weights is None else list(weights))
    if recipe.transform == "win_rate":
        each = win_rate(each, index)
    if recipe.several == "whitened":
        each = _whitened(each)
    if recipe.several == "normalised":
        advantage = recipe.coef * (_centred_and_scaled(each, index, recipe) @ weight)
    else:
        advantage = recipe.coef * _centred_and_scaled((each @ weight)[:, None], index, recipe)[:, 0]
    if recipe.whiten:
        advantage = _whitened(advantage)
    return advantage if recipe.clip is None else advantage.clamp(-recipe.clip, recipe.clip)


def win_rate(reward: Tensor, index: Tensor) -> Tensor:
    """The share of the others of its group that a sample beats, ties counting half; [b, r] -> [b, r]."""
    same = (index[:, None] == index[None]).to(reward)  # [b, b]
    wins = torch.stack([((r[:, None] - r[None]).sign() * same).sum(1) for r in reward.T], 1)
    others = same.sum(1, keepdim=True) - 1
    return 0.5 + 0.5 * wins / others.clamp_min(1)


def _centred_and_scaled(reward: Tensor, index: Tensor, recipe: AdvantageRecipe) -> Tensor:
    count = torch.bincount(index).to(reward)[:, None]  # [groups, 1]

    def group_mean(values: Tensor) -> Tensor:
        sums = values.new_zeros(len(count), values.shape[1]).index_add_(0, index, values)
        return (sums / count)[index]

    lowest = reward.new_full((len(count), reward.shape[1]), torch.inf)
    lowest = lowest.scatter_reduce_(0, index[:, None].expand_as(reward), reward, "amin")[index]
    above = reward - lowest  # so that rounding of the mean gives equal rewards no advantage
    centred = above - group_mean(above)
    if recipe.scale == "group":
        centred = centred / (group_mean(centred**2).sqrt() + EPSILON)
    elif recipe.scale == "batch":
        centred = centred / (reward.std(0, correction=0) + EPSILON)
    return centred * (count / (count - 1))[index] if recipe.centre == "leave_one_out" else centred


def _whitened(values: Tensor) -> Tensor:
    """Mean 0 and standard deviation 1 over the batch, column by column."""
    return (values - values.mean(0)) / (values.std(0, correction=0) + EPSILON)
