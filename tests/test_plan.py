"""The full product is planned or excluded with a reason; ids depend on the cell alone; costs follow from the parts."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from ablate.components import build
from ablate.forecast import Speed, plan_json, plan_table, read_bench
from ablate.grid import load_grid
from ablate.passes import Passes, passes
from ablate.plan import Cell, Plan, make_plan
from ablate.record import Ledger
from ablate.source import InputError
from runners.identity import identify

GRIDS = Path(__file__).parents[1] / "grids"
RECIPE = "rollout: {num_steps: 10}\nupdate: {updates_per_epoch: 2}\nbudget: {epochs: 5}\n"
GRID = """\
name: g
recipe: little
axes:
  objective: OBJECTIVE
  estimator: ESTIMATOR
  sampler: SAMPLER
AXES
seeds: SEEDS
override: OVERRIDE
"""


@pytest.fixture
def planned(tmp_path: Path) -> Any:
    (tmp_path / "recipes").mkdir()

    def plan(
        objective: str = "[grpo]",
        estimator: str = "[elbo]",
        sampler: str = "[sde]",
        axes: str = "",
        seeds: str = "[0]",
        override: str = "{}",
        recipe: str = RECIPE,
    ) -> Plan:
        (tmp_path / "recipes" / "little.yaml").write_text(recipe)
        text = GRID.replace("OBJECTIVE", objective).replace("ESTIMATOR", estimator).replace("SAMPLER", sampler)
        text = text.replace("AXES", f"  {axes}" if axes else "").replace("SEEDS", seeds).replace("OVERRIDE", override)
        (tmp_path / "g.yaml").write_text(text)
        return make_plan(load_grid(tmp_path / "g.yaml"))

    return plan


GOLDEN = ["grpo-elbo-simple-sde-s0-9d50a9cf", "grpo-trajectory-sde-s0-b7a1de70"]


def ids(plan: Plan) -> set[str]:
    return {cell.id for cell in plan.cells}


@pytest.mark.parametrize("name", ["tiny", "full"])
def test_the_product_is_44_cells_and_4_exclusions_with_a_reason(name: str) -> None:
    plan = make_plan(load_grid(GRIDS / f"{name}.yaml"), identify)
    legal = {(c.objective, c.estimator, c.sampler) for c in plan.cells}
    excluded = {(e.objective, e.estimator, e.sampler): e.reason for e in plan.excluded}
    assert (len(legal), len(excluded)) == (44, 4)
    estimators = ["trajectory", "elbo-simple", "elbo-path_kl", "elbo-adaptive"]
    product = itertools.product(["grpo", "gspo", "reinforce", "dpo"], estimators, ["sde", "ode", "mixed"])
    assert legal | set(excluded) == set(product)
    for (_, estimator, sampler), reason in excluded.items():
        assert (estimator, sampler) == ("trajectory", "ode")
        assert reason == "trajectory needs transition densities, and ode leaves none: use sde or elbo"
    assert len(plan.cells) == 44 * 3 == len(ids(plan))


@pytest.mark.parametrize("path", sorted(GRIDS.rglob("*.yaml")), ids=lambda p: p.stem)
def test_every_grid_and_recipe_plans_and_begins_with_a_comment(path: Path, tmp_path: Path) -> None:
    assert path.read_text().startswith("# ")
    if path.parent.name == "recipes":
        shutil.copytree(path.parent, tmp_path / "recipes")
        axes = "axes: {objective: [grpo], estimator: [elbo], sampler: [ode]}"
        what = f"cells: [{{recipe: {path.stem}}}]" if "\nmethod:" in path.read_text() else axes
        (tmp_path / "g.yaml").write_text(f"name: g\nrecipe: {path.stem}\n{what}\nseeds: [0]\n")
        path = tmp_path / "g.yaml"
    plan = make_plan(load_grid(path), identify)
    assert plan.cells
    for cell in plan.cells:
        assert passes(cell).nfe > 0
        assert Cell.model_validate_json(cell.model_dump_json()) == cell


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("rollout: {guidance_scale: 2}", "rollout and update need the same guidance_scale"),
        ("rollout: {num_steps: 3}", "a window of 3 steps does not fit before the last of 3 steps"),
    ],
)
def test_a_recipe_can_make_a_combination_impossible(planned: Any, setting: str, reason: str) -> None:
    plan = planned(estimator="[trajectory]", sampler="[mixed, sde]", override=f"{{{setting}}}")
    assert any(reason in e.reason for e in plan.excluded)
    assert len(plan.cells) + len(plan.excluded) == 2


@pytest.mark.parametrize(
    ("objective", "estimator", "sampler", "override", "reason"),
    [
        (
            "grpo_guard",
            "elbo",
            "sde",
            "{}",
            "needs the steps of a rollout, their mean and deviation, and elbo has none",
        ),
        ("d3po", "elbo", "sde", "{}", "use estimator trajectory"),
        ("nft", "trajectory", "sde", "{}", "regresses on velocities at noised final samples"),
        ("grpo", "trajectory", "ode", "{}", "needs transition densities, and ode leaves none"),
        ("grpo", "trajectory", "cps", "{}", "the steps of cps are not meant to have one: use cps_distance"),
        ("grpo", "trajectory", "{name: mixed, step: cps}", "{}", "use cps_distance"),
        ("grpo", "trajectory", "{name: dpm_sde, order: 2}", "{}", "and dpm_sde leaves none"),
        ("grpo", "elbo", "{name: mixed, window: 10}", "{}", "a window of 10 steps does not fit before the last of 10"),
        ("grpo", "elbo", "dance", "{rollout: {num_steps: 1}}", "needs at least 2 steps, got 1"),
        ("nft", "{name: elbo, pool: mean}", "ode", "{}", "use one with pool each"),
        ("rloo", "elbo", "ode", "{}", "is defined by advantage.centre: leave_one_out, and the recipe has mean"),
        ("dr_grpo", "elbo", "ode", "{advantage: {scale: batch}}", "advantage.scale: none, and the recipe has batch"),
        ("grpo", "elbo", "sde", "{kl: {coef: 1, kind: gaussian_step}}", "compares the Gaussians of a rollout's steps"),
        ("grpo", "elbo", "sde", "{update: {group_probe: stratified}}", "draws from the rollout's own levels"),
        ("dpo", "{name: elbo, weight: path_kl}", "sde", "{update: {group_probe: stratified}}", "at the same probe"),
        ("tempflow", "{name: trajectory, pool: sum}", "sde", "{}", "takes each point by itself"),
        ("grpo", "elbo", "ode", "{rollout: {noise: group}}", "all images of a prompt are the same under ode"),
        ("grpo", "elbo", "{name: mixed, policy: branch}", "{}", "set rollout.noise to group"),
        (
            "rloo",
            "elbo",
            "ode",
            "{advantage: {centre: leave_one_out, clip: 5}}",
            "advantage.clip: null, and the recipe",
        ),
    ],
)
def test_bad_choices_are_explained(
    planned: Any, objective: str, estimator: str, sampler: str, override: str, reason: str
) -> None:
    plan = planned(f"[{objective}]", f"[{estimator}]", f"[{sampler}]", override=override)
    assert not plan.cells
    assert reason in plan.excluded[0].reason
    assert re.match(f"no combination is possible\n.*: {re.escape(plan.excluded[0].reason)}", plan.without_cells())


@pytest.mark.parametrize(
    ("objective", "estimator", "sampler"),
    [
        ("grpo_guard", "trajectory", "dance"),
        ("grpo", "trajectory", "{name: cps, use_density: true}"),
        ("grpo", "cps_distance", "cps"),
        ("grpo", "elbo", "{name: dpm_sde, order: 2}"),
        ("grpo", "trajectory", "{name: mixed, window: 9}"),
    ],
)
def test_their_remedies_are_possible(planned: Any, objective: str, estimator: str, sampler: str) -> None:
    assert planned(f"[{objective}]", f"[{estimator}]", f"[{sampler}]").cells


# ids


def test_ids_are_those_of_the_released_version(planned: Any) -> None:
    """A changed id trains every finished cell again. If that is meant (a new recipe field), change these."""
    plan = planned(estimator="[{name: elbo, weight: simple}, trajectory]", recipe=RECIPE)
    assert [cell.id for cell in plan.cells] == GOLDEN


def test_an_id_does_not_depend_on_the_rest_of_the_grid(planned: Any) -> None:
    alone = planned(objective="[dpo]", sampler="[ode]", seeds="[1]")
    first = planned(objective="[dpo, grpo]", sampler="[ode, sde]", seeds="[0, 1]")
    last = planned(objective="[gspo, dpo]", estimator="[trajectory, elbo]", sampler="[sde, ode]", seeds="[2, 1]")
    assert ids(alone) < ids(first)
    assert ids(alone) < ids(last)
    assert ids(planned(axes="kl.coef: [0.5]")) < ids(planned(axes="kl.coef: [0, 0.5]"))


def test_a_default_spelled_out_is_the_same_cell(planned: Any) -> None:
    assert ids(planned("[grpo]")) == ids(planned("[{name: grpo}]")) == ids(planned("[{name: grpo, clip_range: 1e-3}]"))
    assert ids(planned()) == ids(planned(override="{kl: {coef: 0}, advantage: {coef: 1}}"))
    assert ids(planned(override="{kl: {coef: 0.5}}")) == ids(planned(axes="kl.coef: [0.5]"))


def test_whatever_changes_the_result_changes_the_id(planned: Any) -> None:
    plans = [
        planned(),
        planned(seeds="[1]"),
        planned("[{name: grpo, clip_range: 2.0e-3}]"),
        planned("[gspo]"),
        planned(override="{kl: {coef: 0.5}}"),
        planned(override="{budget: {epochs: 6}}"),
    ]
    assert len(set.union(*map(ids, plans))) == len(plans)


def test_the_versions_of_reward_and_model_are_in_the_id() -> None:
    grid = load_grid(GRIDS / "tiny.yaml")
    one, other = (make_plan(grid, lambda _, v=version: {"reward": v}).cells[0] for version in ("a", "b"))
    assert one.id != other.id
    versions = identify(grid.parts[0].recipe_with({}))
    assert versions["reward"] == "scenes-1"
    assert len(versions["model"]) == 12


def test_no_two_seeds_or_settings_share_a_folder(planned: Any) -> None:
    plan = planned(axes="kl.coef: [0, 1e-4]", seeds="[0, 1, 2]")
    assert len(ids(plan)) == 6
    assert [cell.axes for cell in plan.cells] == [{"kl.coef": 0}] * 3 + [{"kl.coef": 1e-4}] * 3
    assert [cell.recipe.kl.coef for cell in plan.cells[::3]] == [0, 1e-4]


def test_labels_show_what_is_off_its_default_and_tell_values_apart(planned: Any) -> None:
    plan = planned(sampler="[sde, {name: sde, noise_level: 0.3}]")
    assert [cell.sampler for cell in plan.cells] == ["sde", "sde noise_level=0.3"]
    assert [build("sampler", cell.components["sampler"]).noise_level for cell in plan.cells] == [0.7, 0.3]


# costs


@pytest.mark.parametrize(
    ("components", "override", "expected"),
    [
        # forwards of the rollout, of old and reference policies and for coupling, and backwards
        (("reinforce", "elbo", "ode"), "{}", (10, 0, 9)),
        (("grpo", "elbo", "ode"), "{}", (10, 4.5, 9)),  # old is current in the first of two updates
        (("grpo", "elbo", "ode"), "{old_policy: {rate: 0.001, limit: 0.5}}", (10, 9, 9)),
        (("grpo", "trajectory", "sde"), "{}", (10, 0, 9)),  # its old answers are recorded, its last step is not scored
        (("grpo", "trajectory", "mixed"), "{}", (10, 0, 3)),
        (("gspo", "elbo", "ode"), "{update: {updates_per_epoch: 1}}", (10, 0, 9)),
        (("gspo", "elbo", "ode"), "{update: {updates_per_epoch: 1, micro_batch_size: 8}}", (10, 9, 9)),
        (("dpo", "elbo", "ode"), "{rollout: {group_size: 3}}", (10, 9, 9)),
        (("dpo", "elbo", "ode"), "{rollout: {group_size: 4}}", (10, 18, 9)),  # 32 // 9 samples hold no group of 4
        (("reinforce", "elbo", "ode"), "{kl: {coef: 0.1}}", (10, 9, 9)),
        (("dpo", "elbo", "ode"), "{rollout: {group_size: 3}, kl: {coef: 0.1}}", (10, 9, 9)),  # one reference for both
        (("reinforce", "elbo", "ode"), "{rollout: {guidance_scale: 2}}", (20, 0, 9)),
        (("grpo", "elbo", "ode"), "{update: {guidance_scale: 2}}", (10, 9, 18)),
        (("reinforce", "elbo", "ode"), "{update: {num_points: 3}}", (10, 0, 3)),
        (("reinforce", "trajectory", "mixed"), "{update: {num_points: 5}}", (10, 0, 3)),
        (("reinforce", "elbo", "ode"), "{update: {num_points: 30}}", (10, 0, 10)),  # the grid has ten levels
        (("reinforce", "{name: elbo, weight: path_kl}", "ode"), "{update: {num_points: 30}}", (10, 0, 30)),
    ],
)
def test_the_forward_plan_is_minimal(
    planned: Any, components: tuple[str, str, str], override: str, expected: tuple[float, float, float]
) -> None:
    (cell,) = planned(*(f"[{part}]" for part in components), override=override).cells
    rollout, forward, backward = expected
    assert passes(cell) == Passes(rollout=rollout, forward=forward, backward=backward)


def test_a_backward_counts_as_much_in_the_plan_as_in_the_ledger() -> None:
    assert Passes(rollout=10, forward=4, backward=9).nfe == Ledger(forwards=14, backwards=9).nfe == 41


def test_json_is_what_other_tools_rely_on(planned: Any) -> None:
    plan = planned(estimator="[elbo, trajectory]", sampler="[ode]", axes="kl.coef: [0.5]", seeds="[0, 1]")
    document = json.loads(json.dumps(plan_json(plan, None)))
    assert (document["format"], document["grid"], len(document["cells"])) == (1, "g", 2)
    assert document["cells"][1] == {
        "id": plan.cells[1].id,
        "objective": "grpo",
        "estimator": "elbo-adaptive",
        "sampler": "ode",
        "seed": 1,
        "axes": {"kl.coef": 0.5},
        "rollout_forwards": 10,
        "forwards": 13.5,
        "backwards": 9,
        "device_hours": None,
    }
    assert document["excluded"] == [
        {
            "objective": "grpo",
            "estimator": "trajectory",
            "sampler": "ode",
            "axes": {"kl.coef": 0.5},
            "reason": "trajectory needs transition densities, and ode leaves none: use sde or elbo",
        }
    ]
    kept = json.loads(plan.to_json())
    assert [cell["id"] for cell in kept["cells"]] == [cell["id"] for cell in document["cells"]]
    assert kept["excluded"] == document["excluded"]


@pytest.mark.parametrize(
    ("budget", "rate", "hours"),
    [
        ("{epochs: 5}", None, None),
        ("{epochs: 5}", 10.0, 5 * 48 * 24 * (10 + 27) / 10 / 3600),
        ("{epochs: 5, device_hours: 0.25}", None, 0.25),
        ("{epochs: 5, device_hours: 0.25}", 10.0, 0.25),
        ("{epochs: 5, device_hours: 100}", 10.0, 5 * 48 * 24 * (10 + 27) / 10 / 3600),
    ],
)
def test_device_hours_end_with_whichever_budget_comes_first(
    planned: Any, budget: str, rate: float | None, hours: float | None
) -> None:
    plan = planned("[reinforce]", override=f"{{budget: {budget}}}")
    assert plan_json(plan, speed_of(rate))["cells"][0]["device_hours"] == pytest.approx(hours)


def speed_of(rate: float | None) -> Speed | None:
    return None if rate is None else Speed(seconds_per_call=1 / rate)


def test_a_bench_forecasts_hours_and_disk(planned: Any, tmp_path: Path) -> None:
    plan = planned("[reinforce]", override="{budget: {epochs: 5}}")
    measured = {"seconds_per_call": 0.1, "seconds_per_image": 2.0, "trained_bytes": 2**30, "efficiency": 0.9}
    (tmp_path / "bench.json").write_text(json.dumps(measured))
    speed = read_bench(tmp_path / "bench.json")
    hours = 5 * 48 * 24 * ((10 + 27) * 0.1 + 2) / 3600
    assert plan_json(plan, speed)["cells"][0]["device_hours"] == pytest.approx(hours)
    console = Console(width=100)
    with console.capture() as captured:
        console.print(plan_table(plan, speed))
    weights = len(plan.cells)
    assert f"Disk: {weights} GiB for the weights of all cells, and 10 GiB for the two checkpoints" in captured.get()
    (tmp_path / "bench.json").write_text("{}")
    with pytest.raises(InputError, match="not the result of `ablate bench"):
        read_bench(tmp_path / "bench.json")


def shown(plan: Plan, rate: float | None, width: int = 80) -> str:
    console = Console(width=width)
    with console.capture() as captured:
        console.print(plan_table(plan, speed_of(rate), width))
    return captured.get()


def test_the_plan_is_readable_in_80_columns(planned: Any) -> None:
    estimators = "[{name: elbo, weight: path_kl}, {name: elbo, weight: adaptive}, trajectory]"
    axes = "kl.coef: [0, 1e-4]\n  update.learning_rate: [1e-4, 3e-5]"
    text = shown(planned("[reinforce]", estimators, "[mixed, ode]", axes, "[0, 1]"), 200.0)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = [line.split() for line in text.splitlines()]
    for axes in ("kl.coef=0, update.learning_rate=0.0001", "kl.coef=0.0001, update.learning_rate=3e-05"):
        assert axes.split() in rows
    header = ["objective", "estimator", "sampler", "seeds", "rollout", "no", "grad", "grad", "hours"]
    assert rows.count(header) == 4
    assert [row[:4] for row in rows].count(["reinforce", "elbo-path_kl", "mixed", "2"]) == 4
    assert "40 cells: 20 combinations, 2 seeds." in text
    assert "4 combinations are excluded:" in text
    assert "trajectory needs transition densities, and ode leaves none: use sde or elbo:" in text
    assert "reinforce x trajectory x ode (4 settings)" in text
    assert "device-hours in all" in text


def test_long_labels_break_between_parameters_and_lose_nothing(planned: Any) -> None:
    objective = "[grpo, {name: grpo, clip_range: 0.00025}]"
    estimator = "[elbo, {name: elbo, sigma_law: uniform}]"
    sampler = "[mixed, {name: mixed, window: 4, policy: progressive, epochs_per_place: 7}]"
    text = shown(planned(objective, estimator, sampler), None)
    words = "clip_range=0.00025 elbo-adaptive sigma_law=uniform window=4 policy=progressive epochs_per_place=7"
    assert set(words.split()) <= set(text.split())
    assert "--rate CALLS_PER_SECOND" in text
    assert "1 seed." in text


def test_an_exclusion_by_name_covers_every_value_of_that_name(planned: Any) -> None:
    exclude = "{}\nexclude: [{objective: grpo, reason: x}]"
    plan = planned(objective="[grpo, {name: grpo, clip_range: 0.2}, epg]", override=exclude)
    assert {cell.objective for cell in plan.cells} == {"epg"}


def test_an_exclusion_names_an_outside_component_as_the_axis_does(planned: Any) -> None:
    exclude = "{}\nexclude: [{objective: 'ablate.objectives.paper:EPG', reason: x}]"
    plan = planned(objective="[grpo, 'ablate.objectives.paper:EPG']", override=exclude)
    assert {cell.objective for cell in plan.cells} == {"grpo"}


def test_a_grid_can_leave_combinations_out_with_a_reason(tmp_path: Path) -> None:
    plan = make_plan(load_grid(GRIDS / "quickstart.yaml"))
    combinations = dict.fromkeys((c.estimator, c.sampler) for c in plan.cells)
    assert list(combinations) == [("elbo-adaptive", "ode"), ("trajectory", "sde")]
    assert [(e.estimator, e.sampler) for e in plan.excluded] == [("elbo-adaptive", "sde"), ("trajectory", "ode")]
    assert "to keep it short" in plan.excluded[0].reason

    text = (GRIDS / "quickstart.yaml").read_text().replace("recipe: tiny", f"recipe: {GRIDS}/recipes/tiny")
    path = tmp_path / "grid.yaml"
    path.write_text(
        text.replace("tiny-scenes", "tiny-scenes.yaml").replace("sampler: sde, reason", "sampler: sdee, reason")
    )
    line = next(i for i, words in enumerate(path.read_text().splitlines(), 1) if "sdee" in words)
    with pytest.raises(InputError, match=f"grid.yaml:{line}: exclude.0: fits no combination"):
        make_plan(load_grid(path))


def test_presets_are_rows_of_one_table_where_there_is_room() -> None:
    plan = make_plan(load_grid(GRIDS / "baselines.yaml"), identify)
    narrow = shown(plan, 1000.0)
    assert narrow.count("objective") == 14
    assert "recipe=flow-grpo-fast" in narrow
    text = shown(plan, 1000.0, width=140)
    assert text.count("objective") == 1
    rows = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert rows["recipe"][:4] == ["recipe", "objective", "estimator", "sampler"]
    assert rows["diffusion-nft"][:3] == ["diffusion-nft", "nft", "elbo-adaptive"]
    assert "14 combinations" in text
