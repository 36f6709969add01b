"""Whether a model can be had, before anything is started for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners.identity import model_path, transformer_files

INDEX = "model_index.json"
LOCAL = "or give a local folder written by save_pretrained as model.path"


def check_model(recipe: ModelRecipe) -> None:
    """Look for the pipeline's index and the transformer's weights in its folder or the cache, else ask the hub.

    Raises InputError with the remedy if they are not to be had.
    """
    folder = Path(model_path(recipe.path))
    if folder.exists():
        if lack := _lack(folder):
            raise InputError(
                f"model.path: folder {recipe.path!r} has no {lack}; expected a pipeline written by save_pretrained"
            )
        return
    cached = _snapshot(recipe)
    if cached is not None and not _lack(cached):
        return
    name, page = f"model.path: {recipe.path!r}", f"https://huggingface.co/{recipe.path}"
    try:
        HfApi().model_info(recipe.path, revision=recipe.revision, timeout=10)
        hf_hub_download(recipe.path, INDEX, revision=recipe.revision)
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its licence at {page}, then `hf auth login`; {LOCAL}") from None
    except RevisionNotFoundError:
        raise InputError(f"{name} has no revision {recipe.revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is not on the hub, or needs `hf auth login`; expected a hub id, {LOCAL}") from None
    except Exception as error:  # of whatever HTTP client the hub's library has
        where = f"{'has no ' + _lack(cached) if cached else 'is not'} in the cache, and the hub cannot be reached"
        steps = f"accept its licence at {page} if it asks for one, `hf auth login`, `hf download {recipe.path}`"
        raise InputError(f"{name} {where} ({type(error).__name__}): where it can, {steps}; {LOCAL}") from None


def cached_commit(recipe: ModelRecipe) -> str | None:
    """The commit that the cache holds for a recipe's revision; None for a local folder, or without a cache."""
    folder = None if Path(model_path(recipe.path)).exists() else _snapshot(recipe)
    return folder.name if folder else None


def _snapshot(recipe: ModelRecipe) -> Path | None:
    """The folder of the cache that holds a pipeline of the hub; it may lack files."""
    index = try_to_load_from_cache(recipe.path, INDEX, revision=recipe.revision)
    return Path(index).parent if isinstance(index, str) else None


def _lack(folder: Path) -> str:
    """The first file that a pipeline's folder lacks of its index and its transformer; empty where all are there."""
    if not (folder / INDEX).exists():
        return INDEX
    return next((str(file.relative_to(folder)) for file in transformer_files(folder) if not file.exists()), "")
