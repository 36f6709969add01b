"""What the axes hold; how they look is for eyes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from written import Writer

from ablate.record import Status
from analysis import effects
from analysis.dumbbells import dumbbells
from analysis.figures import drawings
from analysis.heatmap import heatmap
from analysis.load import Results, load
from analysis.overview import choose, overview, spread
from analysis.panels import panels
from analysis.sample_grid import sample_grid, sheets
from analysis.share_bars import share_bars
from analysis.strip import strip
from analysis.study import study
from analysis.style import hours_unit, nfe_unit, palette

ODE, SDE, IMPOSSIBLE = ("epg", "elbo-adaptive", "ode"), ("epg", "trajectory", "sde"), ("epg", "trajectory", "ode")
ACCURACY = "eval/accuracy"


def texts(figure: Figure) -> str:
    return "\n".join(text.get_text() for ax in figure.axes for text in ax.texts)


def little(write: Writer) -> Results:
    """Two seeds of one configuration, a failed and a missing one, and an excluded combination."""
    write.cell(ODE, 0, {0: 0.2, 10: 0.59})
    write.cell(ODE, 1, {0: 0.2, 10: 0.61})
    write.cell(SDE, 0, {0: 0.2, 5: 0.3}, Status.FAILED)
    write.cell(SDE, 1, None)
    write.exclude(IMPOSSIBLE)
    return load(write.plan())


def table(results: Results) -> object:
    return effects.summary(results.cells, results.metrics, ACCURACY)


def test_heat_map_hatches_what_is_excluded_and_nothing_else(write: Writer) -> None:
    results = little(write)
    figure = heatmap(results, table(results), ACCURACY)
    ode, sde = figure.axes[:2]
    assert (ode.get_title(), sde.get_title()) == ("ode", "sde")
    patches = [p for p in ode.patches if isinstance(p, Rectangle)]
    assert [(p.get_gid(), bool(p.get_hatch()), p.get_xy()) for p in patches] == [
        ("cell", False, (0, 0)),
        ("excluded", True, (1, 0)),
    ]
    assert not any(p.get_hatch() for p in sde.patches)
    assert "no densities" in figure.legends[0].get_texts()[-1].get_text()


def test_heat_map_says_value_interval_and_n_or_what_happened(write: Writer) -> None:
    results = little(write)
    ode, sde = heatmap(results, table(results), ACCURACY).axes[:2]
    assert [t.get_text() for t in ode.texts] == ["0.600", "[0.473, 0.727]\nn = 2"]
    assert [t.get_text() for t in sde.texts] == ["1 failed\n1 not started", "not in\nthe grid"]


def test_panels_are_closed_with_the_reason_and_state_n(write: Writer) -> None:
    results = little(write)
    figure = panels(results, ACCURACY, hours_unit(results))
    assert len(figure.axes) == 4  # ode, sde x elbo, trajectory
    by_panel = ["\n".join(t.get_text() for t in ax.texts) for ax in figure.axes]
    assert "n = 2" in by_panel[0]
    assert "no densities" in by_panel[1]
    assert figure.axes[1].patch.get_hatch()
    assert "not in the grid" in by_panel[2]
    assert not figure.axes[2].patch.get_hatch()
    assert "n = 0; 1 failed; 1 not started" in by_panel[3]
    assert len(figure.axes[0].collections) == 1  # the band
    assert len(figure.axes[3].lines) == 3  # the failed strand, its end, the base


def test_overview_labels_every_configuration_with_n(write: Writer) -> None:
    results = little(write)
    figure = overview(results, table(results), ACCURACY, hours_unit(results))
    assert figure.axes[0].get_title("left") == "Held-out accuracy against device time"
    shown = texts(figure)
    for text in ("epg · elbo-adaptive · ode", "0.600 [0.473, 0.727], n = 2", "1 failed, 1 not started", "0.200"):
        assert text in shown


def test_one_seed_has_no_band_and_says_so(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5})
    results = load(write.plan())
    figure = overview(results, table(results), ACCURACY, hours_unit(results))
    assert len(figure.axes[0].collections) == 0
    assert "0.500, n = 1" in texts(figure)
    assert "no interval" in texts(figure)


def test_overview_of_a_large_grid_takes_the_best_and_says_how(write: Writer) -> None:
    for i in range(13):
        write.cell((f"o{i}", "trajectory", "sde"), 0, {0: 0.2, 10: 0.3 + i / 100})
    results = load(write.plan())
    shown, words = choose(effects.summary(results.cells, results.metrics, ACCURACY))
    assert list(shown["objective"]) == ["o12"]
    assert "best of 13 configurations" in words


@pytest.mark.parametrize(
    ("hours", "device", "label"),
    [
        (0.1, "cuda:0", "GPU-hours"),
        (0.1, "cpu", "device-hours"),
        (0.01, "cuda:0", "GPU-minutes"),
        (0.001, "cpu", "device-seconds"),
    ],
)
def test_the_time_axis_is_called_what_it_is(write: Writer, hours: float, device: str, label: str) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5}, hours=hours, device=device)
    unit = hours_unit(load(write.plan()))
    assert unit.label.startswith(label)
    assert 10 * hours / unit.size == pytest.approx({"hours": 1, "minutes": 6, "seconds": 36}[label.split("-")[1]])


def test_mixed_devices_are_not_called_gpu(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5}, device="cuda:0")
    write.cell(SDE, 0, {0: 0.2, 10: 0.5}, device="cpu")
    assert hours_unit(load(write.plan())).label.startswith("device-hours")


def test_nfe_is_scaled(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5})
    unit = nfe_unit(load(write.plan()))
    assert (unit.size, unit.label) == (1e3, "NFE (thousand network calls)")


def test_each_metric_has_its_figures_and_absent_ones_none(write: Writer) -> None:
    write.cell(ODE, 0, {0: 0.2, 10: 0.5}, score=False)
    assert names(load(write.plan())) == ["overview", "time-to-target", *HEAT_AND_CURVES]


HEAT_AND_CURVES = ["heatmap-accuracy", "curves-accuracy-hours", "curves-accuracy-nfe"]


def names(results: Results) -> list[str]:
    return [drawing.name for drawing in drawings(results, study(results, ACCURACY, hours_unit(results)))]


def test_claims_have_figures_where_there_is_something_to_claim(write: Writer) -> None:
    """Three estimators by two learning rates, two seeds; a panel that training does not see; samples of one cell."""
    for i, estimator in enumerate(("a", "b", "c")):
        for rate in (1e-4, 1e-3):
            for seed in range(2):
                curve = {0: 0.2, 5: 0.3 + 0.1 * i, 10: 0.4 + 0.1 * i + 0.01 * seed}
                folder = write.cell(
                    ("epg", estimator, "sde"), seed, curve, axes={"update.learning_rate": rate}, score=False
                )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    panel = [line | {"eval/panel/sharpness": 0.5 - 0.02 * i} for i, line in enumerate(lines)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in panel))
    (folder / "samples").mkdir()
    for name in ("before", "after"):
        Image.new("RGB", (600, 400)).save(folder / "samples" / f"{name}.png")
    results = load(write.plan())
    assert names(results) == [
        *("overview", "effects", "levels", "time-to-target", "strip-update.learning_rate"),
        *("hacking", "ranks", "samples"),
        *HEAT_AND_CURVES,
    ]
    found = study(results, ACCURACY, hours_unit(results))
    assert found.axes == ("estimator", "update.learning_rate")
    effects_figure = share_bars(found)
    assert [label.get_text() for label in effects_figure.axes[0].get_yticklabels()] == [
        *("estimator", "update.learning_rate", "estimator x update.learning_rate", "seeds")
    ]
    (line,) = [line for line in strip(found, "update.learning_rate").axes[0].lines if line.get_label() == "c"]
    assert line.get_xydata().tolist() == pytest.approx(np.array([[1e-4, 0.605], [1e-3, 0.605]]))
    tile_rows = [ax.images[0].get_array().shape for ax in sample_grid(sheets(results, found.table)).axes]
    assert tile_rows == [(100, 600, 3), (100, 600, 3)]  # the base model and the one configuration with samples


def test_colours_differ_however_many_there_are() -> None:
    for n in (2, 7, 20):
        assert len(set(palette([str(i) for i in range(n)]).values())) == n


def test_labels_spread_only_where_they_collide() -> None:
    assert spread(np.array([0.1, 0.5, 0.9]), 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert spread(np.array([0.1, 0.5, 0.5]), 0.2) == pytest.approx([0.1, 0.4, 0.6])
    assert spread(np.array([1.0, 1.0]), 0.2) == pytest.approx([0.8, 1.0])


def listed(write: Writer) -> Results:
    for seed, final in enumerate((0.54, 0.56)):
        write.cell(
            ("grpo", "trajectory", "sde"), seed, {0: 0.2, 1: final}, axes={"recipe": "flow-grpo", "kl.coef": 0.1}
        )
    write.cell(("epg", "elbo-adaptive", "ode"), 0, {0: 0.2, 1: 0.4}, axes={"recipe": "paper-epg", "kl.coef": 0.0})
    write.cell(("nft", "elbo-adaptive", "ode"), 0, axes={"recipe": "diffusion-nft", "kl.coef": 0.0})
    return load(write.plan(listed=True))


def test_combinations_that_are_listed_have_a_row_each_and_no_heat_map(write: Writer) -> None:
    results = listed(write)
    assert names(results) == ["overview", "time-to-target", "results-accuracy", "results-score"]
    figure = dumbbells(table(results), "eval/accuracy")
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == [
        "flow-grpo",
        "paper-epg",
        "diffusion-nft",
    ]
    assert "0.550 [0.423, 0.677], n = 2" in texts(figure)
    assert "1 not started" in texts(figure)


def test_listed_combinations_are_named_by_what_tells_them_apart(write: Writer) -> None:
    for guidance in (1.0, 4.5):
        write.cell(("epg", "trajectory", "sde"), axes={"rollout.guidance_scale": guidance, "kl.coef": 0.1})
    write.cell(("epg", "elbo-adaptive", "sde"), axes={"rollout.guidance_scale": 1.0, "kl.coef": 0.1})
    assert load(write.plan(listed=True)).cells["configuration"].tolist() == [
        "epg · trajectory · sde · rollout.guidance_scale=1.0",
        "epg · trajectory · sde · rollout.guidance_scale=4.5",
        "epg · elbo-adaptive · sde",
    ]


def test_presets_with_the_same_recipe_are_named_by_their_components(write: Writer) -> None:
    for objective, recipe in (("grpo", "flow-grpo"), ("gspo", "flow-grpo"), ("epg", "paper-epg")):
        write.cell((objective, "trajectory", "sde"), axes={"recipe": recipe})
    names = load(write.plan(listed=True)).cells["configuration"].tolist()
    assert names == ["flow-grpo · grpo", "flow-grpo · gspo", "paper-epg"]
