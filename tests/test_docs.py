"""The documentation is true: its tables, its grids, its links, and its components, which are run."""

from __future__ import annotations

import importlib
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from ruamel.yaml import YAML
from typer.testing import CliRunner

from ablate import catalogue
from ablate.cli import app
from ablate.components import build
from ablate.contracts import check_estimator, check_objective, check_sampler, roll_out, scene, velocity_at
from ablate.estimators.elbo import ELBO
from ablate.forecast import plan_json
from ablate.grid import load_grid
from ablate.objectives.paper import EPG
from ablate.plan import Plan, make_plan
from ablate.plugins import trust
from ablate.probe_rows import BiasRow, GradientRow, LevelRow, LikelihoodRow, Measured
from ablate.recipe import Recipe
from ablate.record import Ledger, Status
from ablate.samplers.sde import DDIM
from runners.rewards import load_reward
from runners.rewards.protocol import fixed_inputs

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
BUILT_IN = {"objective": "[grpo]", "estimator": "[elbo]", "sampler": "[sde]"}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.MULTILINE | re.DOTALL)


def fields(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted paths of the recipe's fields with their defaults."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from fields(inner, f"{path}{name}.")
        else:
            yield path + name, list(info.default) if isinstance(info.default, tuple) else info.default


# tables


def test_every_recipe_field_is_in_the_table_with_its_default() -> None:
    table = PAGES["grids.md"].split("<!-- recipe")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `([\w.]+)` \| `(.+?)` \| \S", table, re.MULTILINE)
    yaml = YAML(typ="safe", pure=True)
    assert {path: yaml.load(default) for path, default in rows} == dict(fields(Recipe))
    assert len(rows) == len(list(fields(Recipe)))


def test_every_status_and_every_phase_of_the_ledger_is_explained() -> None:
    page = PAGES["grids.md"]
    assert [status for status in Status if f"| `{status}` |" not in page] == []
    assert [phase for phase in Ledger.phases() if f"`cost/{phase}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_of_recipe_fields_and_commands_exist(page: str) -> None:
    groups = "|".join(name for name in Recipe.model_fields if any(p.startswith(f"{name}.") for p, _ in fields(Recipe)))
    named = set(re.findall(rf"`((?:{groups})\.\w+)[`:=]", PAGES[page]))
    assert named - {path for path, _ in fields(Recipe)} <= {"rollout.py", "kl.py"}
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    commands |= {group.name for group in app.registered_groups}
    assert set(re.findall(r"`ablate ([\w-]+)", PAGES[page])) <= commands


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in link]
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []


# grids


@pytest.fixture
def grids(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "grids" / "recipes", tmp_path / "recipes")
    return tmp_path


def test_the_grid_in_the_docs_plans(grids: Path) -> None:
    (grids / "clip.yaml").write_text(blocks("grids.md", "yaml")[0])
    plan = make_plan(load_grid(grids / "clip.yaml"))
    assert (len(plan.cells), len(plan.excluded)) == (54, 6)
    assert {"grpo clip_range=0.0001", "grpo", "epg"} == {cell.objective for cell in plan.cells}


def test_the_page_of_methods_is_that_of_the_docstrings() -> None:
    assert PAGES["methods.md"] == catalogue.markdown(), "run: ablate list --markdown > docs/methods.md"


def test_every_component_is_listed_with_formula_source_needs_and_level() -> None:
    result = CliRunner().invoke(app, ["list"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    for table in catalogue.TABLES.values():
        for entry in catalogue.entries(table):
            assert re.search(rf"^{entry.name} ", result.output, re.MULTILINE)
            assert entry.source.split("(")[0].strip()[:40] in " ".join(result.output.split())
    assert "needs: old; level: term; " in result.output


def test_one_table_can_be_listed() -> None:
    result = CliRunner().invoke(app, ["list", "samplers"], env={"COLUMNS": "200"})
    assert re.findall(r"^(objectives|estimators|samplers|regularisers)", result.output, re.MULTILINE) == ["samplers"]
    assert "did you mean 'samplers'?" in str(CliRunner().invoke(app, ["list", "sampler"]).exception)


def test_the_listed_presets_in_the_docs_plan(grids: Path) -> None:
    (grids / "presets.yaml").write_text(blocks("grids.md", "yaml")[1])
    plan = make_plan(load_grid(grids / "presets.yaml"))
    assert [(cell.objective, cell.axes) for cell in plan.cells if cell.seed == 0] == [
        ("grpo", {"kl.coef": 0.04}),
        ("gspo", {"kl.coef": 0}),
    ]
    assert all(cell.recipe.model.path == "tiny" for cell in plan.cells)


# components


@pytest.fixture
def examples(grids: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The components of docs/adding.md as modules that can be imported, one grid for each."""
    trust(grids)
    modules = [code for code in blocks("adding.md", "python") if code.startswith("# my_")]
    for code, usage in zip(modules, blocks("adding.md", "yaml"), strict=True):
        assert len(code.splitlines()) <= 21, "the file's name and 20 lines"
        module = re.findall(r"# (\w+)\.py", code)[0]
        (grids / f"{module}.py").write_text(code)
        monkeypatch.delitem(sys.modules, module, raising=False)
        axis = usage.split(":")[0]
        axes = {**BUILT_IN, axis: usage.removeprefix(f"{axis}:").strip()}
        lines = [f"  {name}: {values}" for name, values in axes.items()]
        (grids / f"{axis}.yaml").write_text(
            "\n".join(["name: example", "recipe: tiny-scenes", "seeds: [0]", "axes:", *lines]) + "\n"
        )
    importlib.invalidate_caches()
    return grids


def planned(examples: Path, axis: str) -> Plan:
    return make_plan(load_grid(examples / f"{axis}.yaml"))


def example(examples: Path, axis: str) -> Any:
    """The component from outside, built as a cell's process builds it."""
    outside = [c.components[axis] for c in planned(examples, axis).cells if ":" in c.components[axis].name]
    return build(axis, outside[0])


@pytest.mark.parametrize("axis", BUILT_IN)
def test_examples_plan_beside_the_built_in_ones(axis: str, examples: Path) -> None:
    plan = planned(examples, axis)
    outside = [cell for cell in plan.cells if cell.components[axis].name.startswith(f"my_{axis}:")]
    assert len(plan.cells) == 2
    assert f"my_{axis}." in outside[0].id


@pytest.mark.parametrize("axis", ["objective", "estimator", "sampler"])
def test_examples_have_a_forecast(axis: str, examples: Path) -> None:
    calls = [
        (c["rollout_forwards"], c["forwards"], c["backwards"])
        for c in plan_json(planned(examples, axis), None)["cells"]
    ]
    assert calls[0] == calls[1]


@pytest.mark.parametrize(
    ("axis", "check"), [("objective", check_objective), ("estimator", check_estimator), ("sampler", check_sampler)]
)
def test_examples_keep_their_contracts(axis: str, check: Callable[[Any], None], examples: Path) -> None:
    check(example(examples, axis))


def test_the_outside_objective_is_epg_until_a_weight_is_truncated(examples: Path) -> None:
    kind = type(example(examples, "objective"))
    s = scene(EPG(), advantage=torch.arange(12, dtype=torch.float64))
    epg, same, truncated = (replace(s, objective=o).gradient() for o in (EPG(), kind(c=1e9), kind(c=1.0001)))
    torch.testing.assert_close(same, epg)
    assert not torch.allclose(truncated, epg)


def test_the_outside_estimator_is_the_x0_error_weighted_by_the_clipped_snr(examples: Path) -> None:
    estimator = type(example(examples, "estimator"))(c=1e9)
    probe = scene(EPG(), estimator=estimator).probe
    velocity = velocity_at(probe) + 0.1
    s = probe.sigma
    expected = ((1 - s) / s) ** 2 * ELBO(weight="x0").log_prob(velocity, probe)
    torch.testing.assert_close(estimator.log_prob(velocity, probe), expected)


def test_the_outside_sampler_is_ddim_at_eta_sqrt_2(examples: Path) -> None:
    kind = type(example(examples, "sampler"))
    torch.testing.assert_close(roll_out(kind(eta=2**0.5)).x0, roll_out(DDIM(eta=1)).x0)


def test_the_outside_reward_scores_red_images(examples: Path) -> None:
    (usage,) = (text for text in blocks("adding.md", "yaml") if text.startswith("reward:"))
    recipe = Recipe.model_validate({**YAML(typ="safe", pure=True).load(usage), "budget": {"epochs": 1}})
    rewards = load_reward(recipe.reward)
    assert rewards.weights == {"my_reward:redness": 0.5, "jpeg": 1}
    images, prompts = fixed_inputs()
    red, grey = np.zeros_like(images[0]) + np.array([204, 51, 0], np.uint8), images[0]
    scores = rewards.rewards["my_reward:redness"](np.stack([red, grey]), prompts[:2]).score
    assert scores == pytest.approx([0.6**2, 0])


def test_the_component_of_the_readme_keeps_its_contracts() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    check_objective(namespace["SoftClip"]())


@pytest.mark.parametrize("kind", [GradientRow, LevelRow, BiasRow, LikelihoodRow])
def test_every_column_of_a_probe_is_explained_as_in_its_code(kind: type[Measured]) -> None:
    section = PAGES["probe.md"].split("## Files")[1]
    own = section.split(f"`{kind.file}`")[1].split("\n\n`")[0]
    for name, field in kind.model_fields.items():
        where = section if name in Measured.model_fields else own
        assert f"| `{name}` | {' '.join((field.description or '').split())} |" in where
