"""Statistics against closed forms, cases by hand, and statsmodels."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import statsmodels.formula.api as smf
from scipy import stats
from scipy.special import polygamma
from simulator import AXES, Planted, curves
from statsmodels.duration.survfunc import SurvfuncRight
from statsmodels.stats.anova import anova_lm

from analysis import arrival, hacking, levels, measures, pairs, ranks
from analysis.bootstrap import bootstrap, iqm, stratified
from analysis.design import ALL, REST, design, projections
from analysis.factorial import omega_squared, shares
from analysis.moderated import _trigamma_inverse, intervals, moderate, welch_df

RNG = np.random.default_rng(0)


def runs(*rows: tuple[str, str, str, int, float]) -> pd.DataFrame:
    frame = pd.DataFrame(rows, columns=[*AXES, "seed", "final"])
    return frame.assign(axes="", configuration=frame[list(AXES)].agg(" ".join, axis=1))


# variances


def test_few_configurations_have_their_own_t() -> None:
    samples = [RNG.normal(size=3) for _ in range(7)]
    mean, low, high = intervals(samples)
    for i, sample in enumerate(samples):
        expected = stats.t.interval(0.95, 2, sample.mean(), sample.std(ddof=1) / 3**0.5)
        assert (low[i], high[i]) == pytest.approx(expected)
    assert mean == pytest.approx([sample.mean() for sample in samples])


def test_equal_variances_are_pooled_and_one_out_of_line_is_not() -> None:
    variance, df = moderate(np.array([1.0] * 10 + [500.0]), np.full(11, 2.0))
    assert variance[:10] == pytest.approx(np.ones(10))
    assert df[:10].tolist() == [20] * 10
    assert (variance[10], df[10]) == (500, 2)


def test_very_unequal_variances_stay_as_they_are() -> None:
    own = np.exp(np.linspace(-12, 12, 24))
    variance, df = moderate(own, np.full(24, 4.0))
    assert np.log(variance / own)[12:] == pytest.approx(np.zeros(12), abs=0.2)
    assert (df < 4.5).all()


def test_seeds_that_agree_have_no_interval_of_no_width() -> None:
    _, low, _ = intervals([np.array([0.5, 0.5]), np.array([0.4, 0.6])])
    assert np.isnan(low[0])
    assert low[1] < 0.4
    _, low, high = intervals([np.array([0.5, 0.5]), *RNG.normal(size=(20, 2))])
    assert high[0] - low[0] > 1  # borrowed
    grid = runs(*[("o", e, "s", seed, v) for e, v in (("a", 0.3), ("b", 0.2)) for seed in range(2)])
    assert np.isnan(pairs.levels(grid, AXES, "estimator", "final")["low"].iloc[0])


def test_one_seed_has_no_interval_and_none_no_mean() -> None:
    mean, low, high = intervals([np.array([0.5]), np.array([])])
    assert mean[0] == 0.5
    assert np.isnan([low[0], high[0], mean[1], low[1]]).all()


@pytest.mark.parametrize("x", [1e-3, 0.3, 5.0])
def test_trigamma_inverse(x: float) -> None:
    assert polygamma(1, _trigamma_inverse(x)) == pytest.approx(x)


def test_welch_degrees_of_freedom_of_equal_parts_add_up() -> None:
    assert welch_df(np.array([2.0]), np.array([1])) == pytest.approx(1)
    # the expected values of numerator and denominator for s^2 ~ chi^2_d / d: (M^2 + 2 M / d) / (M / d) - 2 = M d
    draws = RNG.chisquare(2, size=(200_000, 3)) / 2
    assert (draws.sum(1) ** 2).mean() / (draws**2 / 4).sum(1).mean() - 2 == pytest.approx(6, rel=0.02)


# bootstrap


def test_bootstrap_of_two_or_three_seeds_is_their_range() -> None:
    assert bootstrap(np.array([1.0, 3.0])) == (1, 3)
    assert bootstrap(np.array([1.0, 2.0, 6.0])) == (1, 6)


def test_bootstrap_of_four_seeds_by_enumeration() -> None:
    # The mean of a resample is its number of fours, binomial(4, 1/4): P(0) = .316, P(<= 2) = .949, P(<= 3) = .996
    low, high = bootstrap(np.array([0.0, 0.0, 0.0, 4.0]))
    assert (low, high) == (0, 3)
    _, high = bootstrap(np.array([0.0, 0.0, 0.0, 4.0]), level=0.89)
    assert high == 2


def test_bootstrap_of_many_seeds_nears_the_normal_interval() -> None:
    samples = np.random.default_rng(1).normal(size=200)
    low, high = bootstrap(samples)
    half = 1.96 * samples.std() / np.sqrt(200)
    assert [low, high] == pytest.approx([samples.mean() - half, samples.mean() + half], abs=0.02)


def test_one_seed_has_no_interval() -> None:
    assert np.isnan(bootstrap(np.array([0.5]))).all()


def test_iqm_is_the_mean_of_the_middle_half() -> None:
    assert iqm(np.array([0.0, 1, 2, 3, 4, 5, 6, 100])) == pytest.approx(3.5)
    assert iqm(np.array([1.0, 2.0, 6.0])) == pytest.approx(3)


def test_stratified_bootstrap_has_the_error_of_the_mean() -> None:
    strata = [RNG.normal(i, 1, size=3) for i in range(200)]
    mean, low, high = stratified(strata, lambda runs: runs.mean(-1))
    within = np.mean([s.var(ddof=1) for s in strata])
    assert (high - low) / 2 == pytest.approx(1.966 * (within / 600) ** 0.5, rel=0.1)
    assert mean == pytest.approx(np.concatenate(strata).mean())
    assert low < mean < high


def test_stratified_bootstrap_of_single_seeds_has_no_interval() -> None:
    _, low, high = stratified([np.array([1.0]), np.array([2.0])])
    assert np.isnan([low, high]).all()


# factorial designs


def test_sums_of_squares_are_those_of_statsmodels() -> None:
    full = pd.concat([Planted().runs.assign(final=RNG.normal(size=45))])
    full = full[full["estimator"] != "trajectory"]  # balanced
    table = anova_lm(smf.ols("final ~ objective * estimator * sampler", full).fit(), typ=2)["sum_sq"]
    means = full.groupby(list(AXES), sort=False)["final"].mean().to_numpy()
    found = {term: 3 * means @ form @ means for term, (form, _) in projections(design(full, AXES)).items()}
    for term in ("objective", "estimator", "sampler"):
        assert found[term] == pytest.approx(table[term])
    assert found["estimator x sampler"] == pytest.approx(table["estimator:sampler"])
    assert found[REST] == pytest.approx(table["objective:estimator:sampler"])


def test_type_two_with_missing_combinations_is_a_comparison_of_nested_models() -> None:
    grid = Planted().runs.assign(final=RNG.normal(size=45))
    without = smf.ols("final ~ objective * sampler", grid).fit().ssr
    both = smf.ols("final ~ objective * sampler + estimator", grid).fit().ssr
    means = grid.groupby(list(AXES), sort=False)["final"].mean().to_numpy()
    form, df = projections(design(grid, AXES))["estimator"]
    assert 3 * means @ form @ means == pytest.approx(without - both)
    assert df == 2
    assert projections(design(grid, AXES))["estimator x sampler"][1] == 1  # of 2, for trajectory x ode is missing


def test_omega_squared_is_the_textbook_s_and_blocks_leave_the_noise() -> None:
    grid = Planted().runs
    grid = grid[grid["estimator"] != "trajectory"].assign(final=RNG.normal(size=36))
    table = anova_lm(smf.ols("final ~ objective * estimator * sampler + C(seed)", grid).fit(), typ=2)
    noise, total = table.loc["Residual", "sum_sq"] / 22, table["sum_sq"].drop("C(seed)").sum()
    row = shares(grid, AXES, "final").set_index("term").loc["estimator"]
    assert row["omega2"] == pytest.approx(max(0, (table.loc["estimator", "sum_sq"] - noise) / (total + noise)))
    assert row["eta2"] == pytest.approx(table.loc["estimator", "sum_sq"] / total)
    shifted = (
        shares(grid.assign(final=grid["final"] + 10 * grid["seed"]), AXES, "final").set_index("term").loc["estimator"]
    )
    assert shifted["omega2"] == pytest.approx(row["omega2"])


def test_without_a_rest_the_interval_is_that_of_the_noncentral_f() -> None:
    _, low, high = omega_squared((60.0, 0.0, 20.0), (5, 0, 20))
    for end, probability in ((low, 0.975), (high, 0.025)):
        shift = 26 * end / (1 - end)
        assert stats.ncf.cdf((60 / 5) / (20 / 20), 5, 20, shift) == pytest.approx(probability, abs=0.006)


def test_axes_that_change_together_cannot_be_told_apart() -> None:
    grid = runs(
        *[("epg", e, s, seed, RNG.normal()) for e, s in (("elbo", "ode"), ("traj", "sde")) for seed in range(3)]
    )
    found = shares(grid, AXES, "final").set_index("term")
    assert found.loc[["estimator", "sampler"], "omega2"].isna().all()
    assert found.loc["estimator", "df"] == 0
    assert found.loc[ALL, "df"] == 1


def test_one_seed_takes_the_highest_interactions_for_noise_and_says_so() -> None:
    one = next(Planted(seeds=1).grids(1))
    shape = design(one, AXES)
    assert (shape.order, shape.replicated, shape.num_missing) == (2, False, 3)
    assert shape.noise == "interactions of three and more axes"
    found = shares(one, AXES, "final").set_index("term")
    assert found.loc["seeds", "df"] == 2  # 14 - (2 + 2 + 1) - (4 + 2 + 1)
    assert REST not in found.index
    two = one.drop_duplicates(["objective", "estimator"])
    assert design(two, AXES).noise == "all interactions"


# pairs and levels


def test_pairs_differ_in_nothing_else() -> None:
    grid = runs(
        *[("grpo", "a", "sde", seed, v) for seed, v in enumerate((0.5, 0.7))],
        *[("grpo", "b", "sde", seed, v) for seed, v in enumerate((0.4, 0.5))],
        *[("epg", "a", "sde", seed, v) for seed, v in enumerate((0.9, 0.9))],  # without a partner
    )
    row = pairs.levels(grid, AXES, "estimator", "final").iloc[0]
    assert (row["pairs"], row["difference"]) == (1, pytest.approx(0.15))
    half = stats.t.ppf(0.975, 1) * np.std([0.1, 0.2], ddof=1) / 2**0.5
    assert (row["low"], row["high"]) == pytest.approx((0.15 - half, 0.15 + half))
    assert row["probability"] == pytest.approx(3.5 / 4)


def test_who_wins_every_time_may_still_lose_the_next() -> None:
    grid = runs(*[("grpo", e, "sde", seed, v + seed) for e, v in (("a", 10.0), ("b", 0.0)) for seed in range(3)])
    row = pairs.levels(grid, AXES, "estimator", "final").iloc[0]
    assert (row["probability"], row["probability_high"]) == (1, 1)
    assert 0.5 < row["probability_low"] < 0.8


def test_levels_are_compared_where_all_of_them_are() -> None:
    grid = Planted().runs.assign(final=lambda f: f["expected"])
    assert set(levels.shared(grid, AXES, "estimator")["sampler"]) == {"sde"}
    assert set(levels.shared(grid, AXES, "sampler")["estimator"]) == {"simple", "adaptive"}
    assert len(levels.shared(grid, AXES, "objective")) == len(grid)
    found = levels.means(grid, AXES, "estimator", "final").set_index("level")
    assert found["mean"].tolist() == pytest.approx([0.5, 0.53, 0.58])
    profile = levels.profiles(grid, AXES, "estimator")
    half = profile[(profile["tau"] > 0.54) & (profile["tau"] < 0.57)].groupby("level")["share"].mean()
    assert half.to_dict() == {"trajectory": 0, "simple": 0, "adaptive": 1}


# time to target


def test_crossing_is_linear_between_evaluations() -> None:
    x, value = np.array([0.0, 1, 2, 3]), np.array([0.2, 0.4, 0.8, 0.3])
    assert arrival.crossing(x, value, 0.5) == pytest.approx(1.25)
    assert arrival.crossing(x, value, 0.2) == 0
    assert np.isinf(arrival.crossing(x, value, 0.81))


def test_kaplan_meier_is_that_of_statsmodels() -> None:
    time = np.array([1.0, 2, 2, 3, 4, 5, 6])
    arrived = np.array([True, True, False, True, False, True, False])
    steps, left = arrival.survival(time, arrived)
    oracle = SurvfuncRight(time, arrived.astype(int))
    assert steps.tolist() == [1, 2, 3, 5]
    assert left == pytest.approx(oracle.surv_prob[np.isin(oracle.surv_times, steps)])
    # 1 + 6/7 + 5/7 + (5/7 3/4) 2 + (5/7 3/4 1/2) 1
    assert arrival.restricted_mean(time, arrived, 6) == pytest.approx(1 + 6 / 7 + 5 / 7 + 15 / 14 + 15 / 56)


def test_what_diverged_never_arrives_and_what_failed_is_censored() -> None:
    cells, metrics = curves(
        runs(*[("a", "e", "s", seed, 0) for seed in range(3)]).assign(status=["done", "diverged", "failed"]),
        np.array([[0.2, 0.6, 0.8], [0.2, 0.3, 0.3], [0.2, 0.3, 0.3]]),
        np.array([0.0, 1.0, 2.0]),
    )
    times = arrival.arrivals(cells, metrics, "eval/accuracy", 0.6, "device_hours")
    assert times["time"].tolist() == [1, np.inf, 2]
    assert times["arrived"].tolist() == [True, False, False]
    row = arrival.times_to_target(times, 2.0).iloc[0]
    assert (row["arrived"], row["never"], row["n"]) == (1, 1, 3)
    assert row["time"] == pytest.approx((1 + 2 + 2) / 3)


def test_pseudo_values_without_early_censoring_are_restricted_times() -> None:
    time, arrived = np.array([1.0, 2, 3, 4]), np.array([True, True, True, False])
    assert arrival.pseudo_values(time, arrived, 3.5) == pytest.approx([1, 2, 3, 3.5])


def test_a_configuration_that_never_arrives_is_a_bound() -> None:
    rows = [("a", 1.0, True), ("a", 1.2, True), ("b", 5.0, False), ("b", 5.0, False)]
    times = pd.DataFrame(rows, columns=["estimator", "time", "arrived"])
    times = times.assign(objective="o", sampler="s", axes="", configuration=times["estimator"], status="done", seed=0)
    assert arrival.horizon(times) == 5
    frame = arrival.times_to_target(times, 5.0)
    assert frame["bound"].tolist() == [False, True]
    assert frame["ratio"].iloc[1] == pytest.approx(5 / 1.1)
    assert np.isnan(frame["high"].iloc[1])
    ratio = arrival.ratios(times, AXES, "estimator", 5.0)
    assert ratio[["first", "second", "bound"]].to_numpy().tolist() == [["b", "a", True]]


def test_area_is_the_mean_height_up_to_the_common_budget() -> None:
    x, value = np.array([0.0, 1, 3]), np.array([0.0, 1, 1])
    assert measures.area(x, value, 2.0) == pytest.approx(0.75)
    assert measures.area(x, value, 4.0) == pytest.approx(3.5 / 4)
    cells, metrics = curves(runs(("a", "e", "s", 0, 0)).assign(status="done"), value[None], x)
    found = measures.areas(cells, metrics, "eval/accuracy").iloc[0]
    assert found["area"] == pytest.approx(2.5 / 3)
    assert found["best"] == metrics.loc[metrics["metric"] == "eval/accuracy", "value"].max()


# ranks


def test_rank_stability_of_curves_that_cross() -> None:
    """Three configurations; at the start c leads, at the end a: tau is -1 there, and the regret what c lacks."""
    grid = runs(*[(name, "e", "s", seed, 0) for name in "abc" for seed in range(2)]).assign(status="done")
    start, end = np.repeat([0.1, 0.2, 0.3], 2), np.repeat([0.9, 0.8, 0.7], 2)
    cells, metrics = curves(grid, np.stack([start, start, end], 1), np.array([0.0, 1.0, 10.0]))
    found = ranks.stability(cells, metrics, "eval/accuracy", shares=(0.1, 0.9)).set_index("share")
    assert found["tau"].tolist() == [-1, 1]
    assert found["regret"].tolist() == pytest.approx([0.2, 0])
    assert found.loc[0.1, "x"] == 1


def test_rank_stability_is_uncertain_where_seeds_are_noise() -> None:
    grid = pd.concat([runs(*[(f"o{i}", "e", "s", seed, 0) for seed in range(3)]) for i in range(20)], ignore_index=True)
    level = np.repeat(np.linspace(0, 1, 20), 3)[:, None] * np.array([0, 0.5, 1])
    for noise, widest in ((0.01, 0.15), (0.5, 0.9)):
        value = level + noise * np.random.default_rng(1).normal(size=level.shape)
        row = ranks.stability(*curves(grid.assign(status="done"), value, np.array([0.0, 1, 2])), "eval/accuracy",
                              shares=(0.5,)).iloc[0]  # fmt: skip
        assert row["low"] <= row["tau"] <= row["high"]
        assert row["high"] - row["low"] < widest
    assert row["tau"] < 0.8


# reward hacking


def panel(changes: dict[str, float], rises: bool = True, se: float = 0.02) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One cell of 20 epochs, with its panel before and after."""
    cells, metrics = curves(
        runs(("a", "e", "s", 0, 0)).assign(status="done"),
        (np.linspace(0.2, 0.8 if rises else 0.2, 21) + 0.01 * (-1.0) ** np.arange(21))[None],
        np.arange(21.0),
    )
    metrics["metric"] = "rollout/score"
    row = {"id": "c0", "device_hours": 0.0, "nfe": 0.0}
    extra = [
        {**row, "epoch": epoch, "metric": f"eval/{kind}/{name}", "value": value}
        for name, change in changes.items()
        for epoch, at in ((0, 0.5), (20, 0.5 + change))
        for kind, value in (("panel", at), ("panel_se", se))
    ]
    return cells, pd.concat([metrics, pd.DataFrame(extra)], ignore_index=True)


def test_hacking_is_a_rising_reward_and_a_falling_panel() -> None:
    noise = 0.02 * 2**0.5
    threshold = stats.norm.isf(0.025 / 2) * noise  # two measures
    found = hacking.hacked(hacking.changes(*panel({"sharpness": -1.01 * threshold, "purity": -0.99 * threshold})))
    assert found["measures"].tolist() == ["sharpness"]
    assert hacking.hacked(hacking.changes(*panel({"sharpness": -0.3}, rises=False))).empty
    assert hacking.hacked(hacking.changes(*panel({"sharpness": 0.3}))).empty


def test_without_noise_nothing_is_flagged() -> None:
    cells, metrics = panel({"sharpness": -0.3})
    changed = hacking.changes(cells, metrics[~metrics["metric"].str.contains("panel_se")])
    assert changed["noise"].isna().all()
    assert not changed["falls"].any()
    assert hacking.changes(cells, metrics[metrics["metric"] == "rollout/score"]).empty
