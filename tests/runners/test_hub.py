"""A model that is not to be had is refused before anything starts, with the remedy."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from typer.testing import CliRunner

from ablate.cli import app
from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners import hub

SD35 = ModelRecipe(path="stabilityai/stable-diffusion-3.5-medium", revision="abc")
GRIDS = Path(__file__).parents[2] / "grids"


class Api:
    """A hub that answers with an error, or not at all."""

    def __init__(self, error: Exception | None) -> None:
        self.error = error

    def __call__(self) -> Api:
        return self

    def model_info(self, *_: object, **__: object) -> None:
        if self.error:
            raise self.error


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


def test_what_is_there_is_not_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(AssertionError("asked")))
    hub.check_model(ModelRecipe(path="tiny"))
    hub.check_model(ModelRecipe(path=str(tmp_path)))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: "somewhere")
    hub.check_model(SD35)


def test_a_grid_of_a_model_that_is_nowhere_starts_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HfApi", Api(ConnectionError("no network")))
    result = CliRunner().invoke(app, ["run", str(GRIDS / "full.yaml"), "--results", str(tmp_path / "results")])
    assert isinstance(result.exception, InputError)  # which `main` turns into one line and exit code 2
    assert not (tmp_path / "results").exists()
