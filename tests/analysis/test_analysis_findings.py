"""What a report says in words, and what it says beside published numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from written import Writer

from ablate.record import Status
from ablate.source import InputError
from analysis.effect_tables import effect_tables, in_words
from analysis.findings import findings
from analysis.load import Results, load
from analysis.published import Published, compare, load_published
from analysis.study import study
from analysis.style import hours_unit
from runners.rewards import REWARDS

PUBLISHED = Path(__file__).parents[2] / "results" / "published"
ACCURACY = "eval/accuracy"


def grid(write: Writer) -> Results:
    """Two objectives that do not differ, two estimators that do, three seeds; one seed diverges."""
    for i, objective in enumerate(("epg", "grpo")):
        for estimator, gain in (("elbo-adaptive", 0.4), ("trajectory", 0.1)):
            for seed in range(3):
                final = 0.2 + gain + 0.004 * ((seed + i + (gain > 0.2) * seed) % 3 - 1)
                status = Status.DIVERGED if (objective, estimator, seed) == ("grpo", "trajectory", 2) else Status.DONE
                write.cell((objective, estimator, "sde"), seed, {0: 0.2, 5: 0.2 + gain / 2, 10: final}, status)
    write.exclude(("dpo", "trajectory", "ode"))
    return load(write.plan())


def said(results: Results) -> str:
    return "\n".join(findings(results, study(results, ACCURACY, hours_unit(results))))


def test_findings_name_the_axis_that_explains_and_how_much(write: Writer) -> None:
    text = said(grid(write))
    assert "Of the variance of the final value (held-out accuracy), estimator explains 100 % [100, 100]" in text
    assert ", objective 0 % [0, 0]" in text
    assert "estimator: elbo-adaptive ends +0.300 [" in text
    assert "over 2 pairs of configurations that differ in nothing else" in text
    assert "best configuration, chosen after the fact): reached by 6 of 12 cells" in text
    assert "estimator: to the target, trajectory at least 2 times as long as elbo-adaptive." in text
    assert "3 seeds." in text


def test_findings_on_axes_that_change_together_say_so(write: Writer) -> None:
    for estimator, sampler, gain in (("elbo", "ode", 0.4), ("trajectory", "sde", 0.1)):
        for seed in range(2):
            write.cell(("epg", estimator, sampler), seed, {0: 0.2, 10: 0.2 + gain + 0.01 * seed})
    text = said(load(write.plan()))
    assert "estimator and sampler change together: their effects cannot be told apart" in text
    assert "estimator explains" not in text


def test_one_seed_is_said_to_be_one(write: Writer) -> None:
    for i, objective in enumerate("abc"):
        for estimator in ("x", "y"):
            write.cell((objective, estimator, "sde"), 0, {0: 0.2, 10: 0.3 + 0.1 * i + 0.05 * (estimator == "x")})
    assert "One seed each: what counts as noise is all interactions" in said(load(write.plan()))


def test_effects_are_tables_too(write: Writer) -> None:
    results = grid(write)
    tables = effect_tables(results, study(results, ACCURACY, hours_unit(results)))
    assert set(tables) == {"effects", "levels", "pairs", "ranks", "time-to-target", "nfe-to-target", "ratios"}
    words = in_words(tables["effects"])
    assert list(words["term"]) == ["objective", "estimator", "objective x estimator", "all axes together", "seeds"]
    assert words["final value"].str.contains(r"% \[").all()
    assert tables["time-to-target"]["never"].sum() == 1


def test_published_rows_have_their_measured_value_beside_them(write: Writer) -> None:
    comparison = compare(grid(write), "design", load_published(PUBLISHED)["design"])
    assert comparison is not None
    shown = comparison.shown.set_index(["objective", "likelihood", "sampler"])
    assert shown.loc[("EPG", "trajectory", "SDE"), ["GenEval", "PickScore"]].tolist() == ["0.92", "21.39"]
    assert shown.loc[("EPG", "trajectory", "SDE"), "GenEval here"].startswith("0.300 [")
    assert shown.loc[("EPG", "ELBO", "SDE"), "GenEval here"].startswith("0.600 [")
    assert shown.loc[("PAR", "ELBO", "ODE"), "GenEval here"] == ""
    assert "**0.600 [" in comparison.markdown()  # its paired difference to the other row excludes 0
    assert r"\textbf{0.600 [" in comparison.latex()
    assert "SDE, guidance$^{7}$" in comparison.latex()
    assert comparison.notes[5].startswith("Here: model tiny, reward scenes, 600 held-out prompts, 3 seeds;")


def test_best_is_bold_only_where_the_interval_supports_it(write: Writer) -> None:
    for estimator, finals in (("elbo-adaptive", (0.6, 0.5)), ("trajectory", (0.55, 0.5))):
        for seed, final in enumerate(finals):
            write.cell(("epg", estimator, "sde"), seed, {0: 0.2, 10: final})
    comparison = compare(load(write.plan()), "design", load_published(PUBLISHED)["design"])
    assert comparison is not None
    assert "**" not in comparison.markdown()


def test_rows_of_another_guidance_are_not_taken_for_theirs(write: Writer) -> None:
    for guidance in (1.0, 4.5):
        write.cell(
            ("epg", "trajectory", "sde"), 0, {0: 0.2, 10: guidance / 10}, axes={"rollout.guidance_scale": guidance}
        )
    comparison = compare(load(write.plan()), "design", load_published(PUBLISHED)["design"])
    assert comparison is not None
    assert comparison.shown["GenEval here"].tolist()[:2] == ["0.100, n = 1", "0.450, n = 1"]


def test_every_published_number_has_its_place() -> None:
    tables = load_published(PUBLISHED)
    assert set(tables) == {"design", "methods"}
    for published in tables.values():
        measured = [name.removeprefix("eval/panel/") for name in published.columns.values()]
        assert measured[0] == "eval/accuracy"
        assert set(measured[1:]) <= REWARDS.keys()
        assert published.source.startswith("arXiv 2602.04663")
        assert published.protocol
        assert {len(row.values) for row in published.rows} == {len(published.columns)}
        assert {tuple(row.names) for row in published.rows} == {tuple(published.rows[0].names)}
    assert [row.values[0] for row in tables["design"].rows] == [0.92, 0.95, 0.90, 0.96, 0.96, 0.96, 0.94, 0.96, 0.94]
    assert tables["design"].rows[5].values[1:] == tables["methods"].rows[8].values[2:]  # the paper's own row, in both


def test_a_grid_without_such_rows_has_no_such_table(write: Writer) -> None:
    write.cell(("mine", "trajectory", "sde"), 0, {0: 0.2, 10: 0.3})
    assert compare(load(write.plan()), "design", load_published(PUBLISHED)["design"]) is None


def test_a_damaged_published_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("title: A table\n")
    with pytest.raises(InputError, match=r"x.yaml:1: source: is required"):
        load_published(tmp_path)
    assert Published.model_fields["source"].is_required()
