"""Whether a model can be had, before anything is started for it."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners.identity import model_path

INDEX = "model_index.json"
LOCAL = "or give a local folder written by save_pretrained as model.path"


def check_model(recipe: ModelRecipe) -> None:
    """Ask the cache or the hub for the pipeline's index. Raises InputError with the remedy if it is not to be had."""
    if Path(model_path(recipe.path)).exists():
        return
    if isinstance(try_to_load_from_cache(recipe.path, INDEX, revision=recipe.revision), str):
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
        where = "is not in the cache, and the hub cannot be reached"
        steps = f"accept its licence at {page} if it asks for one, `hf auth login`, `hf download {recipe.path}`"
        raise InputError(f"{name} {where} ({type(error).__name__}): where it can, {steps}; {LOCAL}") from None
