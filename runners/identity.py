"""What a cell depends on beyond its recipe: the reward's version, a local model, prompt files. Torch-free."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

from ablate.recipe import PromptsRecipe, Recipe, RewardSpec
from ablate.source import FieldError, InputError, choices
from runners.digest import file_digest
from runners.prompts import BUILT_IN, load_prompts, read_prompts
from runners.rewards import RewardUnavailable, WeightedSum, load_reward


def identify(recipe: Recipe) -> dict[str, str]:
    """Names of the reward's implementation, the model's weights and prompt files; part of every cell id.

    Raises FieldError for a reward or a local model that does not exist, for a reward that is given up before its own
    limit, or for prompt files that cannot be used.
    """
    panel = recipe.evaluation.panel
    return {
        "reward": _reward(recipe.reward, "reward", recipe.scoring.timeout),
        **({"panel": _reward(panel, "evaluation.panel", recipe.scoring.timeout)} if panel else {}),
        "model": _model(recipe.model.path),
        **_prompts(recipe.prompts),
    }


def _reward(spec: RewardSpec, field: str, timeout: float) -> str:
    try:
        reward = load_reward(spec, field)
        _check_patience(reward, field, timeout)
        return reward.identity
    except RewardUnavailable as error:  # a folder that is named and has no weights in it
        raise FieldError(field, str(error)) from None


def _check_patience(reward: WeightedSum, field: str, timeout: float) -> None:
    """Raises FieldError where rewards that end by themselves, one after the other, are given up before they do."""
    limits = [(name, r.patience) for name, r in reward.rewards.items() if r.patience is not None]
    if (together := sum(seconds for _, seconds in limits)) >= timeout:
        names = " and ".join(f"{name!r}" for name, _ in limits)
        raise FieldError(
            field,
            f"max_seconds: got {together:g} s of {names}, expected less than scoring.timeout, {timeout:g} s: "
            "past it they are given up until the cell is resumed; raise scoring.timeout or lower max_seconds",
        )


def _prompts(recipe: PromptsRecipe) -> dict[str, str]:
    """Hashes of the files that prompts are taken from, or what a built-in source calls itself."""
    hashes: dict[str, str] = {}
    files = {"train": recipe.train, "evaluation": recipe.evaluation}
    if recipe.train in BUILT_IN:
        try:
            identity = load_prompts(recipe).identity
        except InputError as error:
            raise FieldError("prompts.evaluation", str(error).removeprefix("prompts.evaluation: ")) from None
        hashes |= {"prompts.train": identity} if identity else {}
        files = {"evaluation": recipe.evaluation} if recipe.evaluation else {}
    for part, file in files.items():
        if file is None:
            missing = f"got {recipe.train!r} without prompts.evaluation, a file of prompts that are not trained on"
            raise FieldError("prompts.train", missing)
        try:
            read_prompts(Path(file))
        except InputError as error:
            builtin = f"; built in: {', '.join(BUILT_IN)}" if part == "train" and not Path(file).exists() else ""
            raise FieldError(f"prompts.{part}", f"{error}{builtin}") from None
        hashes[f"prompts.{part}"] = file_digest(Path(file))
    return hashes


def model_path(path: str) -> str:
    """Where `from_pretrained` finds a recipe's model."""
    return str(resources.files("runners.tiny") / "model") if path == "tiny" else path


def is_hub_id(path: str) -> bool:
    """Whether a model's path has the form of a hub id, owner/name."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", path))


def _model(path: str) -> str:
    folder = Path(model_path(path))
    if not folder.exists() and not is_hub_id(path):
        expected = "expected `tiny`, a folder written by save_pretrained, or a hub id like owner/name"
        raise FieldError("model.path", f"got {path!r}, {expected}{choices(path, ['tiny'])}")
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    if not weights.exists():  # on the hub, where the recipe's revision identifies it
        return path
    return file_digest(weights)
