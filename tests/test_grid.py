"""Bad input is one line that says what was got, what is allowed, the nearest match, file and line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.recipe import Recipe, recipe_fields
from ablate.source import InputError
from runners.identity import identify

GRID = """\
# line 1
name: g
recipe: little
axes:
  objective: [grpo]
  estimator: [{name: elbo, weight: simple}]
  sampler: [ode]
seeds: [0, 1]
override:
  budget: {epochs: 2}
"""
RECIPE = """\
# line 1
reward: scenes
rollout:
  num_groups: 24
update:
  updates_per_epoch: 3
  learning_rate: 1.0e-4
budget: {device_hours: 0.1}
"""


@pytest.fixture
def grid(tmp_path: Path) -> Path:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "little.yaml").write_text(RECIPE)
    (tmp_path / "g.yaml").write_text(GRID)
    return tmp_path / "g.yaml"


def changed(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


def problem(grid: Path, settings: dict[str, Any] | None = None) -> str:
    """The message about a grid, with its folder left out; one line without a library's own phrases."""
    with pytest.raises(InputError) as caught:
        make_plan(load_grid(grid, settings), identify)
    message = str(caught.value).replace(f"{grid.parent}/", "")
    assert "\n" not in message
    assert not re.search(r"Value error|[Ii]nput should|pydantic|\bvalid (list|string|integer|number)", message), message
    return message


def test_the_grid_of_these_tests_is_right(grid: Path) -> None:
    assert len(make_plan(load_grid(grid), identify).cells) == 2


IN_THE_GRID = {
    "unknown key": ("name: g", "name: g\nnotes: x", 3, ["notes: unknown key", "Allowed: name, recipe, axes"]),
    "misspelt key": ("seeds:", "sead:", 8, ["sead", "did you mean 'seeds'?", "override"]),
    "key that is no word": ("seeds:", "5: x\nseeds:", 8, ["got 5", "expected a word"]),
    "key that is a list": ("seeds:", "? [a]\n: x\nseeds:", 8, ["got a collection", "expected a word"]),
    "repeated key": ("seeds:", "name: h\nseeds:", 8, ['duplicate key "name"']),
    "repeated nested key": ("{epochs: 2}", "{epochs: 2, epochs: 3}", 10, ['duplicate key "epochs"']),
    "not YAML": ("[grpo]", "[grpo", 6, ["not valid YAML", "starts in line 5"]),
    "tab": ("  sampler", "\tsampler", 7, ["not valid YAML"]),
    "two documents": ("seeds:", "---\nseeds:", 8, ["expected a single document"]),
    "foreign tag": ("grpo", "!!python/name:os.system x", 5, ["not valid YAML"]),
    "control character": ("grpo", "gr\0po", 5, ["not valid YAML"]),
    "value that holds itself": ("[grpo]", "&a [*a]", 5, ["refers to itself"]),
    "misspelt component": ("grpo", "grop", 5, ["objective 'grop'", "did you mean 'grpo'?", "reinforce", "dpo"]),
    "component that is a number": ("grpo", "5", 5, ["got 5", "expected a name or a mapping"]),
    "component without a name": ("[grpo]", "[{clip: 1}]", 5, ['got {"clip": 1}', "with 'name'"]),
    "unknown parameter": ("weight:", "wieght:", 6, ["no parameter 'wieght'", "did you mean 'weight'?", "sigma_law"]),
    "declared, not a parameter": ("weight: simple", "shown: x", 6, ["no parameter 'shown'"]),
    "impossible parameter": ("simple", "simpel", 6, ["got 'simpel'", "did you mean 'simple'?", "adaptive", "path_kl"]),
    "text for a number": ("grpo", "{name: grpo, clip_range: abc}", 5, ["clip_range", "got 'abc'", "a number"]),
    "true for a number": ("grpo", "{name: grpo, clip_range: true}", 5, ["clip_range", "got true", "a number"]),
    "no finite number": ("grpo", "{name: grpo, clip_range: .nan}", 5, ["clip_range", "got nan", "finite"]),
    "refused by the component": ("[ode]", "[{name: mixed, window: 0}]", 7, ["mixed", "at least 1"]),
    "no such module": ("grpo", "no_such_module:X", 5, ["'no_such_module:X' cannot be imported"]),
    "no such class": ("grpo", "ablate.objectives.grpo:GRP", 5, ["does not exist", "did you mean 'GRPO'?", "GSPO"]),
    "class of another kind": ("grpo", "numpy:ndarray", 5, ["'numpy:ndarray' is no dataclass"]),
    "class of another axis": ("grpo", "ablate.samplers.ode:ODE", 5, ["no 'needs'", "objectives/protocol.py"]),
    "no class": ("grpo", "'json:'", 5, ["expected 'module:Class'"]),
    "empty axis": ("[grpo]", "[]", 5, ["axes.objective", "empty", "at least one"]),
    "axis of null": ("[grpo]", "", 5, ["axes.objective", "got null", "expected a list"]),
    "axis without brackets": ("[grpo]", "grpo", 5, ["axes.objective", "got 'grpo'", "expected a list"]),
    "missing axis": ("  sampler: [ode]\n", "", 4, ["'sampler' is missing", "recipe 'little' has no method"]),
    "misspelt axis": ("sampler:", "smapler:", 7, ["unknown axis", "did you mean 'sampler'?", "kl.*"]),
    "value twice": ("[grpo]", "[grpo, grpo]", 5, ["axes.objective.1", "'grpo' twice"]),
    "value twice, once spelled out": ("[grpo]", "[grpo, {name: grpo, clip_range: 0.001}]", 5, ["'grpo'", "twice"]),
    "number twice": ("seeds:", "  kl.coef: [0, 0.0]\nseeds:", 8, ["axes.kl.coef.1", "twice"]),
    "misspelt recipe axis": ("seeds:", "  kl.ceof: [0]\nseeds:", 8, ["unknown axis", "'kl.coef'?"]),
    "misspelt group": ("seeds:", "  kll.coef: [0]\nseeds:", 8, ["unknown axis", "did you mean 'kl.coef'?", "update.*"]),
    "axis below a field": ("seeds:", "  kl.coef.x: [0]\nseeds:", 8, ["unknown axis", "Allowed: kl.coef"]),
    "axis of a group": ("seeds:", "  rollout: [0]\nseeds:", 8, ["is a group of fields", "rollout.num_steps"]),
    "impossible axis value": ("seeds:", "  kl.coef:\n  - 0\n  - -1\nseeds:", 10, ["kl.coef.1", "got -1", "at least 0"]),
    "misspelt axis value": (
        "seeds:",
        "  advantage.scale: [btach]\nseeds:",
        8,
        ["mean 'batch'?", "none, group"],
    ),
    "short pair": ("seeds:", "  update.betas: [[0.9, 0.9], [0.5]]\nseeds:", 8, ["update.betas.1", "more values"]),
    "axis that does not divide": ("seeds:", "  rollout.num_groups: [3, 4]\nseeds:", 8, ["num_groups.1", "multiple of"]),
    "axis of unknown rewards": ("seeds:", "  reward: [scenes, sceens]\nseeds:", 8, ["'sceens'", "mean 'scenes'?"]),
    "axis that is overridden": ("seeds:", "  budget.epochs: [1]\nseeds:", 11, ["override.budget.epochs", "is an axis"]),
    "seed twice": ("[0, 1]", "[0, 1, 0]", 8, ["seeds.2", "got 0 twice"]),
    "negative seed": ("[0, 1]", "[0, -1]", 8, ["seeds.1", "got -1", "at least 0"]),
    "fraction of a seed": ("[0, 1]", "[0, 1.5]", 8, ["seeds.1", "got 1.5", "whole number"]),
    "true as a seed": ("[0, 1]", "[true, 2]", 8, ["seeds.0", "got true", "whole number"]),
    "no seeds": ("[0, 1]", "[]", 8, ["no seeds", "at least one"]),
    "one seed without brackets": ("[0, 1]", "3", 8, ["seeds", "got 3", "expected a list"]),
    "missing recipe": ("little", "litle", 3, ["no recipe 'litle'", "did you mean 'little'?", "Allowed: awm, "]),
    "missing recipe file": ("little", "other/little.yaml", 3, ["no such file: other/little.yaml"]),
    "recipe that is a number": ("little", "5", 3, ["recipe: got 5", "expected text"]),
    "name with a slash": ("name: g", "name: a/b", 2, ["got 'a/b'", "Allowed: letters, digits"]),
    "name of the mirror": ("name: g", "name: mlflow.db", 2, ["got 'mlflow.db': results/ keeps something else"]),
    "name of its pictures": ("name: g", "name: MLartifacts", 2, ["got 'MLartifacts': results/ keeps something else"]),
    "name of a tuning": ("name: g", "name: g-tune", 2, ["got 'g-tune': results/ keeps something else"]),
    "name of a parent": ("name: g", "name: ..", 2, ["got '..'", "Allowed: letters, digits"]),
    "misspelt group to override": ("budget:", "budgte:", 10, ["override.budgte", "did you mean 'budget'?", "kl"]),
    "misspelt field to override": ("epochs", "epoch", 10, ["override.budget.epoch", "'epochs'?", "device_hours"]),
    "text for a count": ("epochs: 2", "epochs: abc", 10, ["budget.epochs", "got 'abc'", "a whole number"]),
    "quoted count": ("epochs: 2", "epochs: '2'", 10, ["budget.epochs", "got '2'", "a whole number"]),
    "true for a count": ("epochs: 2", "epochs: true", 10, ["budget.epochs", "got true", "a whole number"]),
    "count of zero": ("epochs: 2", "epochs: 0", 10, ["budget.epochs", "got 0", "at least 1"]),
    "infinite": ("{epochs: 2}", "{epochs: 2}\n  kl: {coef: .inf}", 11, ["kl.coef", "got Infinity", "finite"]),
    "not below one": ("{epochs: 2}", "{epochs: 2}\n  evaluation: {ema_decay: 1}", 11, ["got 1", "less than 1"]),
    "value for a group": ("{epochs: 2}", "5", 10, ["override.budget", "got 5", "a mapping"]),
    "list of overrides": ("\n  budget: {epochs: 2}", " [1]", 9, ["override", "got [1]", "a mapping"]),
    "budget without end": ("{epochs: 2}", "{device_hours: null}", 10, ["override.budget", "epochs or device_hours"]),
    "does not divide": ("{epochs: 2}", "{epochs: 2}\n  rollout: {num_groups: 25}", 11, ["25", "updates_per_epoch = 3"]),
    "unknown reward": ("{epochs: 2}", "{epochs: 2}\n  reward: scnes", 11, ["'scnes'", "did you mean 'scenes'?"]),
    "no file of prompts": ("{epochs: 2}", "{epochs: 2}\n  prompts: {train: x.txt}", 11, ["x.txt", "built in: scenes"]),
}


@pytest.mark.parametrize("case", IN_THE_GRID)
def test_a_mistake_in_a_grid_is_named_with_its_line(grid: Path, case: str) -> None:
    old, new, line, parts = IN_THE_GRID[case]
    changed(grid, old, new)
    message = problem(grid)
    assert message.startswith(f"g.yaml:{line}: ")
    for part in parts:
        assert part in message


IN_THE_RECIPE = {
    "misspelt group": ("rollout:", "rolout:", 3, ["rolout: unknown key", "did you mean 'rollout'?", "advantage"]),
    "too few candidates": ("num_groups: 24", "group_size: 4\n  candidates: 3", 5, ["rollout.candidates", "at least"]),
    "weight of a reward": ("reward: scenes", "reward: {scenes: a}", 2, ["reward: got", "names with weights as in"]),
    "no reward": ("reward: scenes", "reward: {}", 2, ["reward: got {}", "expected a name"]),
    "misspelt field": ("num_groups", "num_group", 4, ["rollout.num_group", "did you mean 'num_groups'?", "group_size"]),
    "impossible value": ("1.0e-4", "-1.0e-4", 7, ["update.learning_rate", "got -0.0001", "more than 0"]),
    "devices that cannot share": ("24", "24\ndevices: 5", 4, ["which 5 devices cannot share", "take 4 or 8 devices"]),
    "does not divide": ("24", "25", 4, ["rollout.num_groups", "25", "a multiple of update.updates_per_epoch = 3"]),
    "unknown reward": ("scenes", "geneval", 2, ["reward", "'geneval'", "Allowed: scenes"]),
    "not YAML": ("{device_hours: 0.1}", "{device_hours", 9, ["not valid YAML"]),
    "empty": (RECIPE, "", 1, ["an empty file", "a mapping"]),
}


@pytest.mark.parametrize("case", IN_THE_RECIPE)
def test_a_mistake_in_a_recipe_is_named_with_its_file_and_line(grid: Path, case: str) -> None:
    old, new, line, parts = IN_THE_RECIPE[case]
    changed(grid.parent / "recipes" / "little.yaml", old, new)
    message = problem(grid)
    assert message.startswith(f"recipes/little.yaml:{line}: ")
    for part in parts:
        assert part in message


def test_a_recipe_that_comes_with_ablate_is_found_from_anywhere_after_those_beside_the_grid(grid: Path) -> None:
    changed(grid, "recipe: little", "recipe: tiny-scenes")
    assert load_grid(grid).parts[0].recipe_with({}).update.learning_rate == 5e-4
    (grid.parent / "recipes" / "tiny-scenes.yaml").write_text(RECIPE)
    assert load_grid(grid).parts[0].recipe_with({}).update.learning_rate == 1e-4


def test_a_recipe_needs_a_budget(grid: Path) -> None:
    changed(grid, "override:\n  budget: {epochs: 2}\n", "")
    changed(grid.parent / "recipes" / "little.yaml", "budget: {device_hours: 0.1}\n", "")
    assert problem(grid) == "recipes/little.yaml:1: budget: is required"


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("kl.ceof", 1, ["unknown field", "did you mean 'kl.coef'?"]),
        ("objective", "dpo", ["unknown field", "kl.*"]),
        ("kl", 1, ["is a group of fields", "kl.coef"]),
        ("kl.coef", -1, ["got -1", "at least 0"]),
        ("kl.coef", None, ["got null", "a number"]),
        ("update.betas", [0.9], ["got [0.9]", "more values"]),
        ("rollout.num_groups", 25, ["25", "updates_per_epoch = 3"]),
        ("update.updates_per_epoch", 5, ["num_groups = 24", "updates_per_epoch = 5"]),
        ("reward", "scens", ["'scens'", "did you mean 'scenes'?"]),
        ("prompts.train", "x.txt", ["x.txt: no such file", "built in: scenes"]),
        ("model.path", "./my-modl", ["'./my-modl'", "expected `tiny`"]),
        ("update.betas", [1.5, 0.9], ["got 1.5", "less than 1"]),
    ],
)
def test_a_mistake_in_a_setting_names_the_setting_and_no_file(
    grid: Path, field: str, value: object, parts: list[str]
) -> None:
    message = problem(grid, {field: value})
    assert message.startswith(f"--set {field}={value}: ")
    assert ".yaml" not in message
    for part in parts:
        assert part in message


def test_a_setting_that_is_an_axis_is_refused_and_not_dropped(grid: Path) -> None:
    changed(grid, "seeds:", "  kl.coef: [0, 0.5]\nseeds:")
    message = problem(grid, {"kl.coef": 1})
    assert message == "--set kl.coef=1: is an axis of g.yaml (0, 0.5); --only kl.coef=VALUE keeps one"


def test_two_mistakes_are_two_lines(grid: Path) -> None:
    changed(grid, "epochs: 2", "epochs: 0, device_hours: -1")
    with pytest.raises(InputError) as caught:
        load_grid(grid)
    first, second = str(caught.value).splitlines()
    assert "epochs" in first
    assert "device_hours" in second


@pytest.mark.parametrize(
    ("content", "line", "part"),
    [
        (b"", 1, "got an empty file"),
        (b"# nothing\n", 1, "got an empty file"),
        (b"- a\n- b\n", 1, 'got ["a", "b"]'),
        (b"hello\n", 1, "got 'hello'"),
        (b"\x89PNG\r\n", 1, "got the byte 0x89, expected UTF-8"),
        (GRID.encode() + b"# caf\xe9\n", 11, "got the byte 0xe9, expected UTF-8"),
    ],
)
def test_a_file_that_is_no_grid(grid: Path, content: bytes, line: int, part: str) -> None:
    grid.write_bytes(content)
    message = problem(grid)
    assert message.startswith(f"g.yaml:{line}: ")
    assert part in message


def test_a_missing_file_names_the_nearest_one(grid: Path) -> None:
    assert problem(grid.with_name("gg.yaml")) == "gg.yaml: no such file, did you mean 'g.yaml'? Allowed: g.yaml"
    assert "no such file" in problem(grid.parent / "nowhere" / "g.yaml")


def test_a_folder_names_the_grids_in_it(grid: Path) -> None:
    with pytest.raises(InputError, match=r": is a folder, expected a file such as .*g\.yaml$"):
        load_grid(grid.parent)


def test_a_byte_order_mark_and_merged_mappings_are_read(grid: Path) -> None:
    text = GRID.replace("{name: elbo, weight: simple}", "&a {name: elbo}, {<<: *a, weight: simple}")
    grid.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert len(make_plan(load_grid(grid)).cells) == 4


def test_the_override_and_then_the_setting_win(grid: Path) -> None:
    def epochs(**settings: object) -> int | None:
        return (
            load_grid(grid, {k.replace("__", "."): v for k, v in settings.items()})
            .parts[0]
            .recipe_with({})
            .budget.epochs
        )

    assert epochs() == 2
    assert epochs(budget__epochs=7) == 7


def test_dotted_paths_reach_every_field_of_the_recipe() -> None:
    recipe = Recipe.model_validate({"budget": {"epochs": 1}}).model_dump()
    for path in recipe_fields():
        value: Any = recipe
        for step in path.split("."):
            value = value[step]
        assert not isinstance(value, dict)
    assert {"kl.coef", "reward", "rollout.num_steps", "budget.device_hours"} <= set(recipe_fields())


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (("[grpo]", "[grop]"), ["g.yaml:5: ", "'grop'", "did you mean 'grpo'?"]),
        (("epochs: 2", "epoch: 2"), ["g.yaml:10: ", "did you mean 'epochs'?"]),
        (("[grpo]", "[grpo"), ["g.yaml:6: not valid YAML"]),
    ],
)
def test_on_the_command_line_it_is_exit_code_2_and_no_traceback(
    grid: Path, edit: tuple[str, str], parts: list[str]
) -> None:
    changed(grid, *edit)
    command = [sys.executable, "-m", "ablate.cli", "plan", str(grid), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert len(ended.stderr.splitlines()) == 1
    assert "Traceback" not in ended.stderr
    for part in parts:
        assert part in ended.stderr


def test_prompt_files_are_checked_where_the_recipe_names_them(grid: Path) -> None:
    train, held_out = grid.parent / "train.txt", grid.parent / "held_out.jsonl"
    train.write_text("a cat\n")
    changed(grid, "{epochs: 2}", f"{{epochs: 2}}\n  prompts: {{train: {train}}}")
    assert "without prompts.evaluation" in problem(grid)
    changed(grid, f"{train}", f"{train}, evaluation: {held_out}")
    assert problem(grid).startswith("g.yaml:11: override.prompts.evaluation: held_out.jsonl: no such file")
    held_out.write_text(json.dumps({"prompt": "a dog", "tag": "x", "include": [{"class": "dog", "count": 0}]}))
    assert "held_out.jsonl:1: include.0.count: got 0, expected at least 1" in problem(grid)
    held_out.write_text(json.dumps({"prompt": "a dog"}))
    first = make_plan(load_grid(grid), identify).cells[0].id
    train.write_text("a cow\n")
    assert make_plan(load_grid(grid), identify).cells[0].id != first


# single cells

PRESET = "method: {objective: grpo, estimator: elbo, sampler: ode}\nbudget: {epochs: 2}\n"
ROWS = """\
name: g
recipe: little
cells:
  - {recipe: preset}
  - {recipe: preset, objective: epg, kl.coef: 0.1}
  - {objective: grpo, estimator: trajectory, sampler: sde, rollout.num_steps: 4}
seeds: [0, 1]
"""


@pytest.fixture
def rows(grid: Path) -> Path:
    (grid.parent / "recipes" / "preset.yaml").write_text(PRESET)
    grid.write_text(ROWS)
    return grid


def test_single_cells_have_their_recipes_methods_and_fields(rows: Path) -> None:
    plan = make_plan(load_grid(rows))
    assert [(c.objective, c.estimator, c.sampler, c.axes) for c in plan.cells if c.seed == 0] == [
        ("grpo", "elbo-adaptive", "ode", {"recipe": "preset", "kl.coef": 0.0, "rollout.num_steps": 10}),
        ("epg", "elbo-adaptive", "ode", {"recipe": "preset", "kl.coef": 0.1, "rollout.num_steps": 10}),
        ("grpo", "trajectory", "sde", {"recipe": "little", "kl.coef": 0.0, "rollout.num_steps": 4}),
    ]
    assert len(plan.cells) == 6
    assert [c.recipe.rollout.num_steps for c in plan.cells if c.seed == 0] == [10, 10, 4]
    assert plan.order["objective"] == ("grpo", "epg")


def test_a_grid_can_vary_what_a_preset_is_made_of(rows: Path) -> None:
    rows.write_text("name: g\nrecipe: preset\naxes: {estimator: [elbo, trajectory], sampler: [sde]}\nseeds: [0]\n")
    assert [(c.objective, c.estimator, c.sampler) for c in make_plan(load_grid(rows)).cells] == [
        ("grpo", "elbo-adaptive", "sde"),
        ("grpo", "trajectory", "sde"),
    ]


@pytest.mark.parametrize(
    ("old", "new", "place", "parts"),
    [
        ("{recipe: preset}", "{recipe: preste}", "g.yaml:4: cells.0.recipe", ["did you mean 'preset'?"]),
        ("recipe: little\n", "", "g.yaml:5: cells.2.recipe", ["is missing"]),
        ("{recipe: preset}", "{objective: grpo}", "g.yaml:4: cells.0", ["'estimator' is missing", "has no method"]),
        ("objective: epg", "objective: epgg", "g.yaml:5: cells.1.objective", ["did you mean 'epg'?"]),
        ("kl.coef", "kl.ceof", "g.yaml:5: cells.1.kl.ceof", ["unknown axis", "'kl.coef'?"]),
        ("kl.coef: 0.1", "kl.coef: much", "g.yaml:5: cells.1.kl.coef", ["got 'much'"]),
        (", objective: epg, kl.coef: 0.1", "", "g.yaml:5: cells.1", ["is the same cell as one before it"]),
        ("seeds:", "axes: {objective: [grpo]}\nseeds:", "g.yaml:3: cells", ["either axes or cells, got both"]),
        ("rollout.num_steps: 4", "sampler.x: 1", "g.yaml:6: cells.2.sampler.x", ["unknown axis"]),
    ],
)
def test_mistakes_in_single_cells_are_named_with_their_line(
    rows: Path, old: str, new: str, place: str, parts: list[str]
) -> None:
    changed(rows, old, new)
    message = problem(rows)
    assert message.startswith(f"{place}")
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("grpo", "preset.yaml:1: method: got 'grpo', expected a mapping with objective, estimator, sampler"),
        ("{objektive: grpo}", "expected a mapping with objective, estimator, sampler"),
        (
            "{objective: grop, estimator: elbo, sampler: ode}",
            "preset.yaml:1: method.objective: unknown objective 'grop'",
        ),
    ],
)
def test_mistakes_in_a_method_are_named_in_the_recipe(rows: Path, method: str, message: str) -> None:
    path = rows.parent / "recipes" / "preset.yaml"
    path.write_text(PRESET.replace("{objective: grpo, estimator: elbo, sampler: ode}", method))
    with pytest.raises(InputError, match=re.escape(message)):
        make_plan(load_grid(rows))
