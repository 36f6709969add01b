"""Who may import whom; and no branch on a component's name outside its table."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import requires
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ablate.estimators import ESTIMATORS
from ablate.objectives import OBJECTIVES
from ablate.samplers import SAMPLERS

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("ablate", "runners", "analysis")
    for path in sorted((ROOT / package).rglob("*.py"))
}
TORCH_FREE = [f"ablate.{name}" for name in ("source", "recipe", "grid", "plan", "record", "forecast", "cli")]
TORCH_FREE += [name for name in MODULES if name.split(".")[0] == "analysis"]
TORCH_FREE += ["runners.prompts", "runners.identity", "runners.sweep", "runners.tracking"]
NAMES = {*OBJECTIVES, *ESTIMATORS, *SAMPLERS}
AXES = ["ablate.objectives", "ablate.estimators", "ablate.samplers"]


def imported(module: str) -> Iterator[str]:
    """All modules that a module names in its imports, wherever in the file."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(module: str, packages: list[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def test_all_modules_are_looked_at() -> None:
    assert {"ablate.cli", "ablate.objectives", "runners.rewards.rules", "analysis.load"} <= MODULES.keys()
    assert "ablate.plan.make_plan" in imported("ablate.cli")


def test_plans_records_and_reports_import_no_torch() -> None:
    code = f"import importlib, sys; [importlib.import_module(m) for m in {TORCH_FREE}]; print('torch' in sys.modules)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert ended.stdout == "False\n"


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, ["ablate"]) and m != "ablate.cli"])
def test_ablate_knows_neither_runners_nor_analysis(module: str) -> None:
    assert not [name for name in imported(module) if within(name, ["runners", "analysis"])]


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, ["runners", "analysis"])])
def test_runners_and_analysis_do_not_know_each_other_nor_the_command_line(module: str) -> None:
    other = {"runners": "analysis", "analysis": "runners"}[module.partition(".")[0]]
    assert not [name for name in imported(module) if within(name, [other, "ablate.cli"])]


@pytest.mark.parametrize("module", [m for m in MODULES if within(m, AXES)])
def test_objectives_estimators_and_samplers_do_not_know_each_other(module: str) -> None:
    others = [axis for axis in AXES if not within(module, [axis])]
    effects = ["ablate.grid", "ablate.plan", "ablate.record", "ablate.recipe"]
    assert not [name for name in imported(module) if within(name, others + effects)]


@pytest.mark.parametrize("module", MODULES)
def test_no_branch_on_the_name_of_a_component(module: str) -> None:
    """Neither by a variable (`sampler == "x"`), nor by a name of today's tables (`kind in ("grpo", "gspo")`)."""
    text = MODULES[module].read_text()
    assert not re.search(r"(objective|estimator|sampler)(\.name)? *(==|!=) *[\"']", text)
    for node in ast.walk(ast.parse(text)):
        compared = [*getattr(node, "comparators", ()), getattr(node, "pattern", None)] if node else []
        words = [n for part in compared if part for n in ast.walk(part) if isinstance(n, ast.Constant)]
        assert not [f"line {word.lineno}" for word in words if word.value in NAMES]


def test_nothing_brings_torchvision() -> None:
    """Beside a CPU build of torch it breaks the import of transformers."""
    waiting = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    required: set[str] = set()
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in required and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            required.add(name)
            waiting += requires(name) or []
    assert {"torch", "rapidocr", "opencv-python-headless"} <= required  # all the way down
    assert "torchvision" not in required
    assert find_spec("torchvision") is None
