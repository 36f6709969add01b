"""Stop rules: what they are, what they refuse, and when they are fulfilled."""

from __future__ import annotations

import pytest

from ablate.source import InputError
from ablate.stop_rule import StopRule


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("reward >= 0.95", StopRule("rollout/score", ">=", 0.95)),
        ("accuracy>.5", StopRule("eval/accuracy", ">", 0.5)),
        (" train/kl  <  1e-3 ", StopRule("train/kl", "<", 1e-3)),
        ("device_hours <= 2", StopRule("device_hours", "<=", 2.0)),
        ("eval/accuracy/two_object >= -1", StopRule("eval/accuracy/two_object", ">=", -1.0)),
    ],
)
def test_a_rule_is_a_metric_a_comparison_and_a_number(text: str, rule: StopRule) -> None:
    assert StopRule.parse(text) == rule
    assert StopRule.parse(str(rule)) == rule


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "expected a metric"),
        ("reward", "expected a metric"),
        ("reward == 1", "expected a metric"),
        ("reward >= 1 or True", "expected a metric"),
        ("__import__('os') >= 1", "expected a metric"),
        ("reward >= one", "got 'one', expected a finite number"),
        ("reward >= nan", "got 'nan', expected a finite number"),
        ("rewrd >= 1", "did you mean 'reward'?"),
        ("eval/ >= 1", "unknown metric 'eval/'"),
    ],
)
def test_anything_else_is_refused_with_what_is_allowed(text: str, part: str) -> None:
    with pytest.raises(InputError) as error:
        StopRule.parse(text)
    assert part in str(error.value)


def test_a_rule_is_fulfilled_by_a_line_that_has_the_metric_alone() -> None:
    rule = StopRule.parse("accuracy >= 0.5")
    assert rule.fulfilled({"epoch": 3, "eval/accuracy": 0.5}) == "eval/accuracy >= 0.5: 0.5 at epoch 3"
    assert rule.fulfilled({"epoch": 3, "eval/accuracy": 0.49}) == ""
    assert rule.fulfilled({"epoch": 3, "rollout/score": 0.9}) == ""
