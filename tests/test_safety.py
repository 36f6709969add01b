"""Grids and results are data: reading one runs no code, leads nowhere else, and carries no secrets."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.plugins import import_plugin, trust
from ablate.record import Record, Status, read_cell, read_plan
from ablate.secrets import is_secret, redacted
from ablate.source import InputError
from runners import checkpoint
from runners.identity import identify
from runners.mlflow_writer import cell_params
from runners.prompts import Prompt
from runners.rewards import RewardOutput, load_reward
from runners.scoring import keep_unscored
from runners.sweep import freeze

ROOT = Path(__file__).parents[1]
GRID = """\
name: study
recipe: tiny-scenes
axes: {{objective: [{objective}], estimator: [{{name: elbo, weight: simple}}], sampler: [ode]}}
seeds: [0]
override: {override}
"""
MODULE = """\
from dataclasses import dataclass
from pathlib import Path
from ablate.objectives.paper import EPG
Path(__file__).with_name("imported").touch()
@dataclass(frozen=True, kw_only=True)
class Mine(EPG):
    shown = ("label",)
    label: str = "plain"
def score(images, prompts):
    return images.mean((1, 2, 3))
def blabbing(images, prompts):
    import logging, os, warnings
    token = os.environ["LAB_TOKEN"]
    print("the token is", token)
    logging.getLogger("lab").error("https://ann:%s@lab/score answers 401", token)
    raise RuntimeError(f"401 for {token}")
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a grid, and in a folder beside it a module that leaves a mark when it is imported."""
    (tmp_path / "recipes").symlink_to(ROOT / "grids" / "recipes")
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "mine.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    write(tmp_path)
    return tmp_path


def write(folder: Path, objective: str = "'mine:Mine'", override: str = "{}") -> Path:
    path = folder / "grid.yaml"
    path.write_text(GRID.format(objective=objective, override=override))
    return path


def imported(home: Path) -> bool:
    return bool(list(home.glob("**/imported")))


def ablate(home: Path, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the folder of the module, as its own process."""
    code = f"import sys; sys.path[0] = {str(ROOT)!r}; from ablate.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=home / "code",
        env={key: value for key, value in os.environ.items() if key != "ABLATE_PLUGINS"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


# modules


def test_a_module_elsewhere_is_not_imported_and_the_message_names_the_option(home: Path) -> None:
    ended = ablate(home, "plan", home / "grid.yaml")
    assert (ended.returncode, len(ended.stderr.splitlines())) == (2, 1)
    for part in ("grid.yaml:3", "'mine:Mine' cannot be imported", "--allow-plugins", "ABLATE_PLUGINS"):
        assert part in ended.stderr
    assert not imported(home)


@pytest.mark.parametrize("way", ["option", "variable", "beside the grid"])
def test_a_module_is_imported_with_permission(home: Path, way: str) -> None:
    if way == "beside the grid":
        (home / "code" / "mine.py").rename(home / "mine.py")
    words = ["--allow-plugins"] if way == "option" else []
    environment = {"ABLATE_PLUGINS": str(home / "code")} if way == "variable" else {}
    ended = ablate(home, "plan", home / "grid.yaml", *words, **environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "mine.Mine-plain" in ended.stdout
    assert imported(home)


def test_a_module_on_the_path_of_python_is_not_installed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(home / "code"))
    with pytest.raises(InputError, match=r"must not be imported: .*mine.py is not installed .* --allow-plugins"):
        import_plugin("mine")
    assert not imported(home)
    trust(home / "code")
    assert import_plugin("mine").Mine


def test_a_trusted_folder_takes_nobodys_name(home: Path) -> None:
    (home / "code" / "numpy.py").write_text(MODULE)
    (home / "code" / "json.py").write_text(MODULE)
    trust(home / "code")
    assert "ndarray" in dir(import_plugin("numpy"))
    with pytest.raises(InputError, match="must not be imported"):
        import_plugin("json")
    assert not imported(home)


def test_a_folder_of_results_is_no_package(home: Path) -> None:
    (home / "code" / "results").mkdir()
    (home / "code" / "results" / "evil.py").write_text(MODULE)
    trust(home / "code")
    with pytest.raises(InputError, match=r"no module of a file, nor a package"):
        import_plugin("results.evil")
    assert not imported(home)


@pytest.mark.parametrize("name", ["os:system", "subprocess:call", "builtins:eval", "pickle:loads", "runpy:run_path"])
def test_functions_of_python_itself_are_no_rewards(name: str) -> None:
    with pytest.raises(ValueError, match=r"must not be imported|cannot be imported"):
        load_reward(name)


# a folder of results that somebody has sent


@pytest.fixture
def sent(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Results with a cell of the module, which this machine's user has not permitted."""
    planned = make_plan(load_grid(write(home, "epg")), identify)
    (cell,) = planned.cells
    named = cell.components["objective"].model_copy(update={"name": "mine:Mine"})
    recipe = cell.recipe.model_copy(update={"reward": "mine:score"})
    changed = cell.model_copy(update={"components": {**cell.components, "objective": named}, "recipe": recipe})
    folder = home / "code" / "study"
    freeze(folder, planned, "name: study\n")
    (folder / cell.id / "cell.json").write_text(changed.model_dump_json())
    (folder / cell.id / "attempts.jsonl").write_text('{"started": 1.5, "host": "x"}\n')
    (folder / cell.id / "metrics.jsonl").write_text(
        '{"epoch": 0, "update": 0, "device_hours": 0.0, "nfe": 0, "eval/score": 0.5}\n'
    )
    return folder / cell.id


@pytest.mark.parametrize("command", ["report", "sync"])
def test_reading_results_imports_nothing(home: Path, sent: Path, command: str) -> None:
    ended = ablate(home, command, sent.parent)
    assert (ended.returncode, imported(home)) == (0, False), ended.stderr


def test_training_a_sent_cell_needs_permission(home: Path, sent: Path) -> None:
    ended = ablate(home, "cell", sent)
    assert (ended.returncode, imported(home)) == (1, False)
    assert "--allow-plugins" in ended.stdout


def test_evaluating_a_sent_cell_needs_permission(home: Path, sent: Path) -> None:
    (sent / "weights").mkdir()
    (sent / "record.json").write_text(Record(id=sent.name, status=Status.DONE, seed=0).model_dump_json())
    ended = ablate(home, "eval", sent.parent, "--reward", "mine:score")
    assert (ended.returncode, imported(home)) == (2, False)
    assert "--allow-plugins" in ended.stderr


@pytest.mark.parametrize("id", ["../../elsewhere", "/etc", "..", ".", "a/b", "a\\b", "a\nb", "", "x" * 300])
def test_ids_lead_nowhere(sent: Path, id: str) -> None:
    for path, read in ((sent / "cell.json", read_cell), (sent.parent / "plan.json", read_plan)):
        written = path.read_text()
        data = json.loads(written)
        (data["cells"][0] if "cells" in data else data)["id"] = id
        path.write_text(json.dumps(data))
        with pytest.raises(InputError, match=f"{path.name}.*id"):
            read(path.parent)
        path.write_text(written)


def test_a_parameter_that_is_a_path_leads_nowhere(home: Path) -> None:
    trust(home / "code")
    objective = "{name: 'mine:Mine', label: '../../../elsewhere/\\n[x]'}"
    (cell,) = make_plan(load_grid(write(home, objective))).cells
    assert cell.id.startswith("mine.Mine-.._.._.._elsewhere_")
    assert read_back(cell).id == cell.id


def read_back(cell: Cell) -> Cell:
    return Cell.model_validate_json(cell.model_dump_json())


@pytest.mark.parametrize("label", ["../../../elsewhere", "/etc/x", "a/b", "..", "", "a\nb", "[red]", "x" * 200])
@pytest.mark.parametrize("key", ["reward", "evaluation"])
def test_a_label_that_is_a_path_is_refused(home: Path, label: str, key: str) -> None:
    terms = json.dumps([{"name": "jpeg", "label": label}])
    override = f"{{reward: {terms}}}" if key == "reward" else f"{{evaluation: {{panel: {terms}}}}}"
    with pytest.raises(InputError, match=r"grid.yaml:5: .*got '.*', expected at most 100 letters"):
        load_grid(write(home, "epg", override))


@pytest.mark.parametrize("name", ["../elsewhere", "..", "a/b", "/etc/x", ".hidden", "a\\b", "x" * 200])
def test_a_grid_whose_name_is_a_path_is_refused(home: Path, name: str) -> None:
    grid = write(home, "epg")
    grid.write_text(grid.read_text().replace("name: study", f"name: {json.dumps(name)}"))
    with pytest.raises(InputError, match=r"grid.yaml:1: name: got .* Allowed: letters, digits"):
        load_grid(grid)


class Payload:
    """What a pickle can do."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (str(self.path), "w")


def test_a_checkpoint_runs_no_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint").mkdir()
    torch.save({"epoch": Payload(tmp_path / "imported")}, tmp_path / "checkpoint" / "state.pt")
    torch.save(["no", "state"], tmp_path / "checkpoint" / "before.pt")
    with pytest.raises(InputError, match="no intact checkpoint"):
        checkpoint.read_newest(tmp_path, torch.device("cpu"))
    assert capsys.readouterr().err.count("is damaged and left out") == 2
    assert not (tmp_path / "imported").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("epoch", -1), ("metrics_bytes", None), ("cost", {"lost": "x"}), ("pending", [1])]
)
def test_a_checkpoint_with_values_that_no_cell_has_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, value: object
) -> None:
    """Its digest is right: somebody has made it so."""
    numbers = {"epoch": 1, "update": 1, "metrics_bytes": 9, "target_reached": False}
    state = {name: {} for name in checkpoint.KEYS} | numbers
    for name, content in (("state.pt", state | {key: value}), ("before.pt", state)):
        path = tmp_path / "checkpoint" / name
        path.parent.mkdir(exist_ok=True)
        torch.save(content, path)
        path.write_bytes(path.read_bytes() + hashlib.sha256(path.read_bytes()).digest())
    assert checkpoint.read_newest(tmp_path, torch.device("cpu")) == state
    assert "state.pt is damaged and left out" in capsys.readouterr().err


# secrets

WORD = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("{reward: [{name: 'mine:score', api_key: WORD}]}", "override.reward.0.api_key"),
        ("{reward: [{name: remote, url: 'https://ann:WORD@host'}]}", "override.reward.0.url"),
        ("{reward: [{name: remote, url: 'https://host/?token=WORD'}]}", "override.reward.0.url"),
        ("{evaluation: {panel: [{name: 'mine:score', headers: {Authorization: WORD}}]}}", "headers.Authorization"),
        ("{model: {path: 'https://WORD@huggingface.co/x'}}", "override.model.path"),
    ],
)
def test_a_secret_in_a_grid_is_refused_and_not_repeated(home: Path, override: str, line: str) -> None:
    with pytest.raises(InputError) as refused:
        load_grid(write(home, "epg", override.replace("WORD", WORD)))
    assert f"{line}: looks like a secret" in str(refused.value)
    assert "grid.yaml:5" in str(refused.value)
    assert WORD not in str(refused.value)


def test_a_secret_in_a_setting_is_refused_and_not_repeated(home: Path) -> None:
    with pytest.raises(InputError, match=r"--set reward\.token: looks like a secret") as refused:
        load_grid(write(home, "epg"), {"reward": {"name": "remote", "token": WORD}})
    assert WORD not in str(refused.value)


def test_a_token_of_the_environment_is_refused_in_a_grid(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", WORD)
    with pytest.raises(InputError, match="looks like a secret"):
        load_grid(write(home, "epg", f"{{prompts: {{train: 'x{WORD}'}}}}"))


def test_names_of_variables_are_no_secrets(home: Path) -> None:
    override = "{reward: [{name: remote, url: 'https://host:8400/a', token_env: ABLATE_REWARD_TOKEN}]}"
    assert load_grid(write(home, "epg", override))


def test_a_record_holds_no_token_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", WORD)
    said = f"ConnectionError: https://ann:secret@host/?api_key=x{WORD} answered {WORD}"
    record = Record(id="a", status=Status.FAILED, message=said, seed=0)
    assert record.message == "ConnectionError: https://***@host/?api_key=*** answered ***"


def test_a_token_that_a_reward_prints_logs_and_raises_is_in_no_file(home: Path) -> None:
    sizes = "rollout: {num_groups: 3, group_size: 2, num_steps: 3}, evaluation: {num_prompts: 3, num_steps: 2}"
    grid = write(home, "epg", f"{{reward: 'mine:blabbing', budget: {{epochs: 1}}, {sizes}}}")
    ended = ablate(home, "run", grid, "--attempts", 1, "--allow-plugins", LAB_TOKEN=WORD, PYTHONPATH=str(ROOT))
    assert ended.returncode == 1
    results = home / "code" / "results"
    (record,) = results.glob("study/*/record.json")
    assert "401 for ***" in json.loads(record.read_text())["message"]
    log = (record.parent / "log.txt").read_text()
    assert "the token is ***" in log
    assert "https://***@lab/score answers 401" in log
    written = [path for path in results.rglob("*") if path.is_file()]
    assert results / "mlflow.db" in written
    assert [path for path in written if WORD.encode() in path.read_bytes()] == []
    assert WORD not in ended.stdout + ended.stderr


@pytest.mark.parametrize(
    "name", ["OPENAI_KEY", "MY_AUTH", "GITHUB_PAT", "AZURE_STORAGE_KEY", "DB_PASS", "SMTP_PWD", "KEY", "GPG_PASSPHRASE"]
)
def test_variables_with_common_names_of_secrets_are_hidden(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, WORD)
    assert redacted(f"401 for x{WORD}") == "401 for x***"


def test_ordinary_variables_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (key := tmp_path / "id_ed25519").touch()
    monkeypatch.setenv("SSH_KEY", str(key))
    monkeypatch.setenv("PWD", "/work/somewhere")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/run/agent.socket")
    monkeypatch.setenv("MONKEY", "banana-banana")
    monkeypatch.setenv("COMPAT", "windows-1252")
    monkeypatch.setenv("BYPASS", "localhost,example")
    monkeypatch.setenv("HAS_KEY", "1")
    monkeypatch.setenv("USE_AUTH", "enabled")
    text = f"1 {key} /work/somewhere /run/agent.socket banana-banana windows-1252 localhost,example enabled"
    assert redacted(text) == text


def test_a_password_that_is_a_word_is_hidden_as_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", "postgres")
    assert redacted("postgresql://host refused postgres") == "postgresql://host refused ***"


def test_a_secret_that_begins_as_another_one_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", WORD)
    monkeypatch.setenv("B_TOKEN", f"{WORD}-more")
    assert redacted(f"{WORD}-more") == "***"


@pytest.mark.parametrize(("name", "value", "secret"), [
    ("openai_key", WORD, True),
    ("hf_pat", "hf_Abc123defg", True),
    ("passphrase", "correct horse", True),
    ("sort_key", "brightness", False),
    ("key", "short1", False),
    ("pattern", "stripes-1234", False),
    ("second_pass", "", False),
])  # fmt: skip
def test_keys_of_a_document_are_secrets_if_their_values_look_so(name: str, value: str, secret: bool) -> None:
    assert is_secret(name, value) == secret


def test_reasons_of_images_without_a_score_hold_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAB_TOKEN", WORD)
    nothing = RewardOutput(score=np.array([np.nan]), reasons=(f"401 for {WORD}",))
    keep_unscored(tmp_path, [np.zeros((1, 8, 8, 3), np.uint8)], [Prompt(text="a clock")], nothing, "epoch-1")
    written = (tmp_path / "unscored" / "epoch-1.jsonl").read_text()
    assert json.loads(written)["reason"] == "401 for ***"


def test_params_of_a_cell_hold_no_secret(sent: Path) -> None:
    cell = read_cell(sent)
    recipe = cell.recipe.model_validate(
        {**cell.recipe.model_dump(), "reward": [{"name": "mine:score", "token": WORD}, "jpeg"]}
    )
    params = cell_params(cell.model_copy(update={"recipe": recipe}))
    assert not [value for value in params.values() if WORD in value]


@pytest.mark.parametrize("text", ["a @ b", "https://host/path@2", "x://", "mail ann@host", "https://host?keys=1"])
def test_other_texts_stay_as_they_are(text: str) -> None:
    assert redacted(text) == text or "keys" in text
