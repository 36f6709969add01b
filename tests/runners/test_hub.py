"""A model that is not to be had is refused before anything starts, with the remedy."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from typer.testing import CliRunner

from ablate.cli import app
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners import hub, identity

SD35 = ModelRecipe(path="stabilityai/stable-diffusion-3.5-medium", revision="abc")
GRIDS = Path(__file__).parents[2] / "grids"


class Api:
    """A hub that answers with an error, or with files of 10 bytes."""

    def __init__(self, error: Exception | None, *files: str) -> None:
        self.error, self.files = error, files

    def __call__(self) -> Api:
        return self

    def model_info(self, *_: object, **__: object) -> SimpleNamespace:
        if self.error:
            raise self.error
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file, size=10) for file in self.files])


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            GatedRepoError,
            ["is gated", "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium", "hf auth login"],
        ),
        (RevisionNotFoundError, ["has no revision 'abc'"]),
        (RepositoryNotFoundError, ["is not on the hub, or needs `hf auth login`"]),
        (
            ConnectionError,
            ["the hub cannot be reached (ConnectionError)", "its licence", "hf auth login", "or give a local folder"],
        ),
    ],
)
def test_each_problem_has_its_remedy(error: type[Exception], parts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    made = error("x") if error is ConnectionError else error("x", response=Mock())
    monkeypatch.setattr(hub, "HfApi", Api(made))
    with pytest.raises(InputError) as caught:
        hub.check_model(SD35)
    for part in ["model.path: 'stabilityai/stable-diffusion-3.5-medium'", *parts]:
        assert part in str(caught.value)


def write(folder: Path, *files: str) -> Path:
    """A folder with these files; an index of weights names two shards."""
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps({"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}))
    return folder


SHARDS = [f"diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
SINGLE = "transformer/diffusion_pytorch_model.safetensors"
SHARDED = [f"{SINGLE}.index.json", *(f"transformer/{shard}" for shard in SHARDS)]


@pytest.mark.parametrize("weights", [[SINGLE], SHARDED], ids=["one file", "shards"])
def test_what_is_there_is_not_asked_for(weights: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(AssertionError("asked")))
    hub.check_model(ModelRecipe(path="tiny"))
    folder = write(tmp_path / "abc123", "model_index.json", *weights)
    hub.check_model(ModelRecipe(path=str(folder)))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "model_index.json"))
    hub.check_model(SD35)
    assert hub.cached_commit(SD35) == "abc123"
    assert hub.cached_commit(ModelRecipe(path=str(folder))) is None


@pytest.mark.parametrize(
    ("files", "lack"),
    [
        ([], "model_index.json"),
        ([SINGLE], "model_index.json"),
        (["model_index.json"], SINGLE),
        (["model_index.json", *SHARDED[:2]], SHARDED[2]),
    ],
)
def test_a_pipeline_without_its_transformer_is_refused(
    files: list[str], lack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder, and a cache that was filled in part and cannot be filled now."""
    folder = write(tmp_path / "model", *files)
    folder.mkdir(exist_ok=True)
    with pytest.raises(InputError, match=f"has no {lack}; expected a pipeline written by save_pretrained"):
        hub.check_model(ModelRecipe(path=str(folder)))
    monkeypatch.setattr(hub, "HfApi", Api(ConnectionError("no network")))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(folder / "model_index.json"))
    with pytest.raises(InputError, match=f"has no {lack} in the cache, and the hub cannot be reached"):
        hub.check_model(SD35)


def test_every_encoder_that_is_loaded_needs_its_weights(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "model", SINGLE, "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors"
    )
    named = {name: ["library", "Class"] for name in ("vae", "text_encoder", "text_encoder_3")}
    (folder / "model_index.json").write_text(json.dumps(named | {"text_encoder_2": [None, None]}))
    hub.check_model(ModelRecipe(path=str(folder), max_sequence_length=0))
    with pytest.raises(InputError, match="has no text_encoder_3/model"):
        hub.check_model(ModelRecipe(path=str(folder)))


T5 = [f"text_encoder_3/model-0000{i}-of-00002.safetensors" for i in (1, 2)]
NOT_LOADED = ["sd3.5_medium.safetensors", "text_encoder_3/model.fp16-00001-of-00002.safetensors", "model_index.json"]


def test_a_repository_without_a_transformer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: "somewhere")
    monkeypatch.setattr(hub, "HfApi", Api(None, SINGLE, *T5))
    hub.check_model(SD35)
    monkeypatch.setattr(hub, "HfApi", Api(None, *T5, *NOT_LOADED))
    with pytest.raises(InputError, match="has no weights of a transformer on the hub"):
        hub.check_model(SD35)


def test_what_is_to_be_downloaded_is_what_is_loaded_and_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(None, SINGLE, *T5, *NOT_LOADED))
    assert hub.download_bytes(SD35) == 30
    assert hub.download_bytes(SD35.model_copy(update={"max_sequence_length": 0})) == 10
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda _, file, **__: "there" if file == SINGLE else None)
    assert hub.download_bytes(SD35) == 20
    monkeypatch.setattr(hub, "HfApi", Api(ConnectionError("no network")))
    assert hub.download_bytes(SD35) == 0
    assert hub.download_bytes(ModelRecipe(path="tiny")) == 0


def test_every_shard_of_a_local_transformer_is_part_of_its_identity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_plan(load_grid(GRIDS / "tiny.yaml")).cells[0].recipe
    folder = write(tmp_path / "model", *SHARDED)

    def identity_of() -> str:
        return identity.identify(recipe.model_copy(update={"model": ModelRecipe(path=str(folder))}))["model"]

    first = identity_of()
    assert re.fullmatch("[0-9a-f]{12}", first)
    reads = Mock(side_effect=hashlib.file_digest)
    monkeypatch.setattr(hashlib, "file_digest", reads)
    assert identity_of() == first
    assert not reads.called  # an unchanged file is read once
    for i, file in enumerate(SHARDED[1:]):
        (folder / file).write_text(f"other weights {i}")
        assert identity_of() != first
    assert reads.call_count == 2


def test_a_grid_of_a_model_that_is_nowhere_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(ConnectionError("no network")))
    result = CliRunner().invoke(app, ["run", str(GRIDS / "full.yaml"), "--results", str(tmp_path / "results")])
    assert isinstance(result.exception, InputError)  # which `main` turns into one line and exit code 2
    assert not (tmp_path / "results").exists()
