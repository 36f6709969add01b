"""Whether a model can be had, before anything is started for it."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from ablate.recipe import ModelRecipe
from ablate.source import InputError, parse_json, read_text
from runners.identity import model_path, weight_files

INDEX = "model_index.json"
TRANSFORMER = "transformer"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
LOCAL = "or give a local folder written by save_pretrained as model.path"


def check_model(recipe: ModelRecipe) -> None:
    """Look for the pipeline's index and all of its weights in its folder or the cache, else ask the hub.

    Raises InputError with the remedy if they are not to be had.
    """
    folder = Path(model_path(recipe.path))
    if folder.exists():
        if lack := _lack(folder, recipe):
            raise InputError(
                f"model.path: folder {recipe.path!r} has no {lack}; expected a pipeline written by save_pretrained"
            )
        return
    cached = _snapshot(recipe)
    if cached is not None and not _lack(cached, recipe):
        return
    name, page = f"model.path: {recipe.path!r}", f"https://huggingface.co/{recipe.path}"
    try:
        there = _on_hub(recipe)
        hf_hub_download(recipe.path, INDEX, revision=recipe.revision)
    except GatedRepoError:
        raise InputError(f"{name} is gated: accept its licence at {page}, then `hf auth login`; {LOCAL}") from None
    except RevisionNotFoundError:
        raise InputError(f"{name} has no revision {recipe.revision!r}") from None
    except RepositoryNotFoundError:
        raise InputError(f"{name} is not on the hub, or needs `hf auth login`; expected a hub id, {LOCAL}") from None
    except Exception as error:  # of whatever HTTP client the hub's library has
        where = (
            f"{'has no ' + _lack(cached, recipe) if cached else 'is not'} in the cache, and the hub cannot be reached"
        )
        steps = f"accept its licence at {page} if it asks for one, `hf auth login`, `hf download {recipe.path}`"
        raise InputError(f"{name} {where} ({type(error).__name__}): where it can, {steps}; {LOCAL}") from None
    if not any(file.startswith(f"{TRANSFORMER}/") for file in there):
        raise InputError(f"{name} has no weights of a {TRANSFORMER} on the hub; expected a pipeline of diffusers")


def download_bytes(recipe: ModelRecipe) -> int:
    """What the cache lacks of a pipeline's weights; 0 where the hub cannot be asked."""
    if Path(model_path(recipe.path)).exists():
        return 0
    try:
        there = _on_hub(recipe)
    except Exception:  # of whatever HTTP client the hub's library has; `check_model` says what to do
        return 0
    return sum(
        size
        for file, size in there.items()
        if not isinstance(try_to_load_from_cache(recipe.path, file, revision=recipe.revision), str)
    )


def cached_commit(recipe: ModelRecipe) -> str | None:
    """The commit that the cache holds for a recipe's revision; None for a local folder, or without a cache."""
    folder = None if Path(model_path(recipe.path)).exists() else _snapshot(recipe)
    return folder.name if folder else None


def _on_hub(recipe: ModelRecipe) -> dict[str, int]:
    """Bytes of the files with weights that a pipeline loads, as the hub lists them."""
    info = HfApi().model_info(recipe.path, revision=recipe.revision, files_metadata=True, timeout=10)
    return {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if file.rfilename.split("/")[0] in _parts(recipe) and re.fullmatch(r"[^.]+\.safetensors", file.rfilename)
    }


def _parts(recipe: ModelRecipe) -> list[str]:
    """The parts of SD 3.5 that have weights and are loaded."""
    return [TRANSFORMER, "vae", *(name for name in ENCODERS if recipe.max_sequence_length or name != ENCODERS[-1])]


def _snapshot(recipe: ModelRecipe) -> Path | None:
    """The folder of the cache that holds a pipeline of the hub; it may lack files."""
    index = try_to_load_from_cache(recipe.path, INDEX, revision=recipe.revision)
    return Path(index).parent if isinstance(index, str) else None


def _lack(folder: Path, recipe: ModelRecipe) -> str:
    """The first file that a pipeline's folder lacks of its index and its weights; empty where all are there.

    Raises InputError for an index that cannot be read.
    """
    if not (folder / INDEX).exists():
        return INDEX
    index = parse_json(read_text(folder / INDEX), str(folder / INDEX))
    parts = [part for part in _parts(recipe) if part == TRANSFORMER or index.get(part, [None])[0]]
    files = [file for part in parts for file in weight_files(folder / part)]
    return next((str(file.relative_to(folder)) for file in files if not file.exists()), "")
