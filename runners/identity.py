"""What a cell depends on beyond its recipe: the reward's version, a local model, prompt files. Torch-free."""

from __future__ import annotations

import hashlib
import re
from importlib import resources
from pathlib import Path

from ablate.recipe import PromptsRecipe, Recipe
from ablate.source import FieldError, InputError, choices
from runners.prompts import read_prompts
from runners.rewards import load_reward


def identify(recipe: Recipe) -> dict[str, str]:
    """Names of the reward's implementation, the model's weights and prompt files; part of every cell id.

    Raises FieldError for a reward or a local model that does not exist, or prompt files that cannot be used.
    """
    panel = [load_reward(name, "evaluation.panel").identity for name in recipe.evaluation.panel]
    return {
        "reward": load_reward(recipe.reward).identity,
        **({"panel": ", ".join(panel)} if panel else {}),
        "model": _model(recipe.model.path),
        **_prompts(recipe.prompts),
    }


def _prompts(recipe: PromptsRecipe) -> dict[str, str]:
    """Hashes of the files that prompts are taken from; built-in ones change with the reward."""
    if recipe.train == "scenes":
        return {}
    hashes = {}
    for part, file in (("train", recipe.train), ("evaluation", recipe.evaluation)):
        if file is None:
            missing = f"got {recipe.train!r} without prompts.evaluation, a file of prompts that are not trained on"
            raise FieldError("prompts.train", missing)
        try:
            read_prompts(Path(file))
        except InputError as error:
            builtin = "; built in: scenes" if part == "train" and not Path(file).exists() else ""
            raise FieldError(f"prompts.{part}", f"{error}{builtin}") from None
        hashes[f"prompts.{part}"] = _digest(Path(file))
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
    return _digest(weights)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
