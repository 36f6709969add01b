"""The documentation is true: its tables, its grids, its links, and its components, which are run."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gaussian_flow import GaussianFlow
from pydantic import BaseModel
from ruamel.yaml import YAML

from ablate.cli import app
from ablate.components import build
from ablate.flow import diffusers_sigmas
from ablate.forecast import plan_json
from ablate.grid import load_grid
from ablate.plan import Plan, make_plan
from ablate.recipe import Recipe
from ablate.record import Ledger, Status
from ablate.rollout import Evaluation, Rollout, take
from ablate.seeding import streams

ROOT = Path(__file__).parents[1]
PAGES = {page.name: page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))}
BUILT_IN = {"objective": "[grpo]", "estimator": "[elbo]", "sampler": "[sde]"}
FLOW = GaussianFlow()


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
    assert [phase for phase in Ledger.model_fields if f"`cost/{phase}`" not in page] == []


@pytest.mark.parametrize("page", PAGES)
def test_names_of_recipe_fields_and_commands_exist(page: str) -> None:
    groups = "|".join(name for name in Recipe.model_fields if any(p.startswith(f"{name}.") for p, _ in fields(Recipe)))
    named = set(re.findall(rf"`((?:{groups})\.\w+)[`:=]", PAGES[page]))
    assert named - {path for path, _ in fields(Recipe)} <= {"rollout.py", "kl.py"}
    commands = {command.name or command.callback.__name__ for command in app.registered_commands}
    assert set(re.findall(r"`ablate (\w+)", PAGES[page])) <= commands


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


# components


@pytest.fixture
def examples(grids: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The components of docs/adding.md as modules that can be imported, one grid for each."""
    monkeypatch.syspath_prepend(str(grids))
    for code, usage in zip(blocks("adding.md", "python"), blocks("adding.md", "yaml"), strict=True):
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
        (c["rollout_forwards"], c["forwards"], c["backwards"]) for c in plan_json(planned(examples, axis), 1)["cells"]
    ]
    assert calls[0] == calls[1]


def test_the_objective_keeps_its_contracts(examples: Path) -> None:
    objective = example(examples, "objective")
    f = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    evaluation = Evaluation(
        log_prob=f,
        old_log_prob=f.detach().clone() if "old" in objective.needs else None,
        reference_log_prob=f.detach().clone() if "reference" in objective.needs else None,
        advantage=torch.tensor([1.0, -1.0, 0.0, 0.0], dtype=torch.float64),
        group=torch.tensor([0, 0, 1, 1]),
    )
    loss, metrics = objective(evaluation)
    assert loss.shape == ()
    assert all(value.shape == () and not value.requires_grad for value in metrics.values())
    (gradient,) = torch.autograd.grad(loss, f)
    assert (gradient[0] < 0).all()  # a step against it makes the better sample likelier
    assert (gradient[1] > 0).all()
    assert (gradient[2:] == 0).all()
    halves = [objective(take(evaluation, rows))[0] for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(loss, sum(halves) / 2)


def sampled(sampler: Any, samples: range = range(3)) -> Rollout:
    own = streams(0, "rollout", samples=samples)
    noise = own.normal([6], torch.empty((), dtype=torch.float64))
    return sampler.sample(FLOW.velocity, noise, sigmas=diffusers_sigmas(8), epoch=0, streams=own)


def test_the_estimator_keeps_its_contracts(examples: Path) -> None:
    estimator = example(examples, "estimator")
    rollout = sampled(example(examples, "sampler"))
    for num_points, k in ((3, 3), (None, 7)):
        probe, again = (
            estimator.probe(rollout, num_points=num_points, streams=streams(1, samples=range(3))) for _ in range(2)
        )
        velocity = FLOW.velocity(probe.x.flatten(0, 1), probe.sigma.flatten()).reshape(probe.x.shape)
        value = estimator.log_prob(velocity, probe)
        assert value.shape == probe.sigma.shape == (3, k)
        assert value.isfinite().all()
        assert torch.equal(probe.x, again.x)
        part = take(probe, slice(1, 2), slice(0, 2))
        torch.testing.assert_close(estimator.log_prob(velocity[1:2, :2], part), value[1:2, :2])
        assert {field.name for field in dataclasses.fields(probe)} >= {"x", "sigma", "rollout_velocity"}


def test_the_sampler_keeps_its_contracts(examples: Path) -> None:
    sampler = example(examples, "sampler")
    assert sampler.problem(8) is None
    rollout = sampled(sampler)
    assert rollout.x0.shape == (3, 6)
    assert rollout.x0.isfinite().all()
    assert torch.equal(rollout.x0, sampled(sampler).x0)
    torch.testing.assert_close(rollout.x0[1:2], sampled(sampler, range(1, 2)).x0)
    steps = rollout.transitions
    assert steps is not None
    assert steps.x.shape == (3, 8, 6)
    s, following = steps.sigma, diffusers_sigmas(8)[1:]
    torch.testing.assert_close(steps.std, sampler.noise_level * (s - following).sqrt())
