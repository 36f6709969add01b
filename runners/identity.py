"""What a cell depends on beyond its files: the versions of the reward and of a local model. Torch-free."""

from __future__ import annotations

import hashlib
from importlib import resources
from pathlib import Path

from ablate.recipe import Recipe
from ablate.source import InputError, choices
from runners.rewards import REWARDS


def identify(recipe: Recipe) -> dict[str, str]:
    """Names of the reward's implementation and of the model's weights; part of every cell id.

    Raises InputError for a reward that does not exist or prompt files that are not there.
    """
    if recipe.reward not in REWARDS:
        raise InputError(f"unknown reward {recipe.reward!r}{choices(recipe.reward, REWARDS)}")
    for file in (recipe.prompts.train, recipe.prompts.evaluation):
        if file not in (None, "scenes") and not Path(str(file)).is_file():
            raise InputError(f"prompts: no such file: {file}; built in: scenes")
    return {"reward": REWARDS[recipe.reward]().identity, "model": _model(recipe.model.path)}


def model_path(path: str) -> str:
    """Where `from_pretrained` finds a recipe's model."""
    return str(resources.files("runners.tiny") / "model") if path == "tiny" else path


def _model(path: str) -> str:
    weights = Path(model_path(path)) / "transformer" / "diffusion_pytorch_model.safetensors"
    if not weights.exists():  # on the hub, where the recipe's revision identifies it
        return path
    return hashlib.sha256(weights.read_bytes()).hexdigest()[:12]
