"""What ended cells before their budget did, in sentences: stop rules and successive halving. Results -> sentences."""

from __future__ import annotations

from fractions import Fraction

from ablate.halving import Halving, read_halving
from ablate.source import counted
from analysis.load import Results

BY_RULE = r"stopped by its rule (.+): "


def early_ends(results: Results) -> list[str]:
    """Sentences; none where every cell has spent its budget."""
    choice = read_halving(results.folder)
    return [*_rules(results), *(_halving(choice) if choice and choice.rungs else [])]


def _rules(results: Results) -> list[str]:
    done = results.cells[results.cells["status"] == "done"]
    rules = done["message"].str.extract(BY_RULE, expand=False).dropna()
    if rules.empty:
        return []
    named = ", ".join(f"{rule} by {counted(count, 'cell')}" for rule, count in rules.value_counts().items())
    cells = f"{len(rules)} of {counted(len(done), 'finished cell')}"
    return [
        f"Stop rules ended {cells} before the budget was spent ({named}): their last values are where they stopped, "
        "and costs are to be compared, not last values."
    ]


def _halving(choice: Halving) -> list[str]:
    first = choice.rungs[0]
    stops = [
        f"{sum(not judged.goes_on for judged in rung.configurations)} after {Fraction(rung.share)}"
        for rung in choice.rungs
    ]
    configurations = counted(len(first.configurations), "configuration")
    text = (
        f"Successive halving: of {configurations}, {', '.join(stops)} of the budget were stopped, judged by the mean "
        f"of {first.metric} over seeds on the {' and '.join(choice.splits)} prompts. Stopped cells are censored in "
        "times to target and in no mean of final values; what is said of axes holds for those that went on."
    )
    if "evaluation" in choice.splits:
        text += " Those were chosen by the prompts that they are reported on, which flatters them a little."
    return [text]
