"""When a cell may end before its budget does: `reward >= 0.95`, a metric, a comparison and a number."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ablate.source import InputError, choices, finite_number

COMPARISONS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
SHORT = {"reward": "rollout/score", "accuracy": "eval/accuracy", "score": "eval/score"}
COUNTERS = ("epoch", "update", "device_hours", "nfe")
PHASES = ("rollout/", "train/", "eval/", "cost/")  # what other metrics are called after the slash depends on the reward
EXAMPLE = "a metric, one of >=, <=, >, < and a number, as in 'reward >= 0.95'"


@dataclass(frozen=True)
class StopRule:
    """A comparison of one logged metric with a number."""

    metric: str  # a key of metrics.jsonl
    comparison: str
    threshold: float

    @classmethod
    def parse(cls, text: str) -> StopRule:
        """Read a rule. Raises InputError for anything but a metric, a comparison and a finite number."""
        found = re.fullmatch(r"\s*([\w/.:-]+?)\s*(>=|<=|>|<)\s*(\S+)\s*", text)
        if not found:
            raise InputError(f"got the stop rule {text!r}, expected {EXAMPLE}")
        name, comparison, number = found.groups()
        threshold = finite_number(number)
        if threshold is None:
            raise InputError(f"stop rule {text!r}: got {number!r}, expected a finite number")
        metric = SHORT.get(name, name)
        if metric not in COUNTERS and not any(re.fullmatch(f"{phase}.+", metric) for phase in PHASES):
            named = [*SHORT, *COUNTERS]
            groups = [f"{phase}..." for phase in PHASES]
            raise InputError(
                f"stop rule {text!r}: unknown metric {name!r}{choices(name, named, [*named, *groups])} of metrics.jsonl"
            )
        return cls(metric, comparison, threshold)

    def __str__(self) -> str:
        return f"{self.metric} {self.comparison} {self.threshold:g}"

    def fulfilled(self, line: Mapping[str, Any]) -> str:
        """Why a line of metrics.jsonl fulfils the rule; empty where it does not, or has no such metric."""
        value = line.get(self.metric)
        if value is None or not COMPARISONS[self.comparison](value, self.threshold):
            return ""
        return f"{self}: {value:.4g} at epoch {line['epoch']}"
