"""What a cell depends on beyond its recipe: the reward's version, a local model, prompt files. Torch-free."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

from ablate.recipe import PromptsRecipe, Recipe, RewardSpec, reward_terms
from ablate.source import FieldError, InputError, choices
from runners.digest import DIGITS, digest, file_digest, weights_sha256
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
        **({"panel": _panel(panel, recipe.scoring.timeout)} if panel else {}),
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


def _panel(panel: RewardSpec, timeout: float) -> str:
    """Each measure by itself, as they are not summed."""
    load_reward(panel, "evaluation.panel")  # refuses two of one name
    return ", ".join(_reward((term,), "evaluation.panel", timeout) for term in reward_terms(panel))


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
    weights = [file for file in weight_files(folder / "transformer") if file.exists()]
    if not weights:  # on the hub, where the recipe's revision identifies it
        return path
    digests = [weights_sha256(file)[:DIGITS] for file in weights]
    return digests[0] if len(digests) == 1 else digest("".join(digests))


def weight_files(part: Path) -> list[Path]:
    """The files that hold the weights of a pipeline's part: one, or an index and its shards; they need not exist."""
    single = part / f"{'model' if part.name.startswith('text_encoder') else 'diffusion_pytorch_model'}.safetensors"
    index = single.with_name(f"{single.name}.index.json")
    if single.exists() or not index.exists():
        return [single]
    try:
        shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise InputError(f"{index}: not an index of weights, as save_pretrained writes it") from None
    return [index, *(single.with_name(name) for name in shards)]
