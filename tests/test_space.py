"""`--space`: which fields may take which values, and mistakes in it."""

from __future__ import annotations

from typing import Any

import optuna
import pytest

from ablate.source import InputError
from ablate.space import Dimension, parse_space


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rate=1e-5..1e-3:log", {"field": "update.learning_rate", "low": 1e-5, "high": 1e-3, "log": True}),
        ("update.max_grad_norm=0.1..1", {"field": "update.max_grad_norm", "low": 0.1, "high": 1.0}),
        ("num_points=1..4:int", {"field": "update.num_points", "low": 1, "high": 4, "integer": True}),
        (
            "num_points=1..64:log:int",
            {"field": "update.num_points", "low": 1, "high": 64, "integer": True, "log": True},
        ),
        ("group_probe=shared|independent", {"field": "update.group_probe", "values": ("shared", "independent")}),
        ("max_grad_norm=null|0.5|2", {"field": "update.max_grad_norm", "values": (None, 0.5, 2)}),
        ("objective.clip_range=0.01..0.1", {"field": "objective.clip_range", "low": 0.01, "high": 0.1}),
    ],
)
def test_a_dimension_is_an_interval_or_a_list(text: str, expected: dict[str, Any]) -> None:
    assert parse_space([text]) == (Dimension(text=text, **expected),)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("learning_rate", "expected NAME=LOW..HIGH"),
        ("learning_rat=1e-5..1e-3", "unknown field 'learning_rat', did you mean 'update.learning_rate'?"),
        ("clip_range=0.1..1", "objective.PARAMETER"),
        ("coef=0..1", "is the name of several fields; give one of advantage.coef, kl.coef"),
        ("learning_rate=1e-3..1e-5", "expected the lower end first"),
        ("learning_rate=1e-3..1e-3", "two different ends"),
        ("learning_rate=0..1e-3:log", "got 0 as the lower end, expected more than 0"),
        ("learning_rate=1e-5..inf", "got 'inf' as an end, expected a finite number"),
        ("learning_rate=a..1", "got 'a' as an end"),
        ("learning_rate=1e-5..1e-3:lgo", "unknown flag 'lgo', did you mean 'log'?"),
        ("num_points=1..2.5:int", "expected whole numbers as ends"),
        ("group_probe=shared", "two different values at least"),
        ("group_probe=shared|shared", "two different values at least"),
        ("update.betas=[0.9, 0.99]|[0.8, 0.9]", "expected numbers or words"),
        ("group_probe=shared|[", "not valid YAML"),
        ("budget.epochs=1..9:int", "'budget.epochs' cannot be tuned: it is the same for all that are compared"),
        ("device_hours=1..9", "cannot be tuned"),
        ("evaluation.split=development|evaluation", "cannot be tuned"),
        ("split=development|evaluation", "cannot be tuned"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(text: str, part: str) -> None:
    with pytest.raises(InputError) as error:
        parse_space([text])
    assert str(error.value).startswith(f"--space {text}: ")
    assert part in str(error.value)


def test_a_field_is_given_once() -> None:
    with pytest.raises(InputError, match=r"update\.learning_rate is given twice"):
        parse_space(["learning_rate=1e-5..1e-3", "update.learning_rate=1|2"])


@pytest.mark.parametrize(
    ("text", "held", "not_held"),
    [
        ("learning_rate=1e-5..1e-3", (1e-5, 2e-4, 1e-3), (1e-6, 1e-2, None, True, "wide")),
        ("num_points=1..4:int", (1, 4), (0, 5, 2.5, None)),
        ("max_grad_norm=null|0.5", (None, 0.5), (0, 1.0)),
    ],
)
def test_a_dimension_holds_its_own_values_alone(text: str, held: tuple[Any, ...], not_held: tuple[Any, ...]) -> None:
    (dimension,) = parse_space([text])
    assert [value for value in held + not_held if dimension.holds(value)] == list(held)


def test_suggested_values_lie_in_the_space() -> None:
    texts = ["learning_rate=1e-5..1e-3:log", "num_points=1..4:int", "group_probe=shared|independent"]
    space, study = parse_space(texts), optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [[dimension.suggest(trial) for dimension in space] for trial in (study.ask() for _ in range(50))]
    for dimension, values in zip(space, zip(*drawn, strict=True), strict=True):
        assert all(dimension.holds(value) for value in values)
    rates, points, probes = zip(*drawn, strict=True)
    assert sum(rate < 1e-4 for rate in rates) == pytest.approx(25, abs=10)  # half of the interval on a log scale
    assert set(points) == {1, 2, 3, 4}
    assert set(probes) == {"shared", "independent"}
