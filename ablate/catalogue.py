"""Every component with its formula, source and parameters, read from its docstring: `ablate list`, docs/methods.md.

A docstring begins with the formula and ends with a paragraph `Source: ...`.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

from ablate import kl
from ablate.estimators import ESTIMATORS
from ablate.objectives import OBJECTIVES
from ablate.samplers import SAMPLERS
from ablate.source import InputError, as_yaml, choices

TABLES: Mapping[str, Mapping[str, Callable[..., Any]]] = {
    "objectives": OBJECTIVES,
    "estimators": ESTIMATORS,
    "samplers": SAMPLERS,
}
REGULARISERS = "regularisers"
INTRODUCTION = """\
# Methods

<!-- Generated from the docstrings by `ablate list --markdown`; a test keeps it current. -->

What is built in, with formula, source and parameters. f is the log-prob of the current policy, f_old (q) that of the
rollout (reference) policy at the same points, r = exp(f - f_old), A the advantage, sg stops the gradient; b samples, k
points, D latent dimensions; s and s' are noise levels, dt = s' - s, v the velocity, x0 the predicted clean sample. All
losses are minimised. A mean without index is over samples and points. A preset named `released_*` is what a release
computes where that differs from its formula; other deviations are fields, each with its reason.

Presets of whole methods, with their recipe, are in `grids/recipes/`; `grids/baselines.yaml` runs them side by side.
"""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A component as its docstring describes it."""

    name: str
    formula: str
    notes: str
    source: str
    facts: Mapping[str, str]  # needs, level, ... in words
    parameters: Mapping[str, tuple[str, str]]  # default and what is allowed; without those that are as in `base`
    base: str | None  # the component that it is a preset of


def entries(table: Mapping[str, Callable[..., Any]]) -> Iterator[Entry]:
    """The components of a table, in its order."""
    for name, kind in table.items():
        formula, *notes, source = (inspect.getdoc(kind) or "").split("\n\n")
        base = next((other for other, of in table.items() if of in inspect.getmro(kind)[1:]), None)  # type: ignore[arg-type]
        inherited = _parameters(table[base]) if base else {}
        yield Entry(
            name=name,
            formula=_line(formula),
            notes="\n\n".join(notes),
            source=_line(source.removeprefix("Source: ")),
            facts=_facts(kind()),
            parameters={n: p for n, p in _parameters(kind).items() if inherited.get(n) != p},
            base=base,
        )


def listing(wanted: str | None = None) -> Table:
    """All tables for the terminal, or one. Raises InputError for a table that does not exist."""
    if wanted not in (None, *TABLES, REGULARISERS):
        raise InputError(f"unknown list {wanted!r}{choices(str(wanted), [*TABLES, REGULARISERS])}")
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column()
    for title, kinds in TABLES.items():
        if wanted not in (None, title):
            continue
        table.add_row(Text(title, style="bold"))
        for entry in entries(kinds):
            facts = [f"{key}: {value}" for key, value in entry.facts.items()]
            table.add_row(Text(entry.name, style="cyan"), Text(entry.formula))
            table.add_row("", Text("; ".join([*facts, entry.source]), style="dim"))
    if wanted in (None, REGULARISERS):
        table.add_row(Text(REGULARISERS, style="bold"))
        for name, kind in kl.KINDS.items():
            table.add_row(Text(name, style="cyan"), Text(_line(inspect.getdoc(kind) or "")))
    return table


def markdown() -> str:
    """docs/methods.md."""
    parts = [INTRODUCTION]
    for title, table in TABLES.items():
        parts.append(f"## {title.capitalize()}\n")
        parts += [_section(entry) for entry in entries(table)]
    parts.append("## Regularisers\n\n`kl.kind`, weighed by `kl.coef`, at the points of the probe.\n")
    parts.append("| kind | formula |\n|---|---|")
    parts += [f"| `{name}` | {_cell(inspect.getdoc(kind) or '')} |" for name, kind in kl.KINDS.items()]
    return "\n".join(parts) + "\n"


def _section(entry: Entry) -> str:
    lines = [f"### {entry.name}\n", _escaped(entry.formula) + "\n"]
    if entry.notes:
        lines.append(_escaped(entry.notes) + "\n")
    if entry.base:
        lines.append(f"Parameters as `{entry.base}`{', but:' if entry.parameters else '.'}\n")
    if entry.parameters:
        lines.append("| parameter | default | allowed |\n|---|---|---|")
        lines += [f"| `{n}` | `{default}` | {allowed} |" for n, (default, allowed) in entry.parameters.items()]
        lines.append("")
    facts = [f"{key.capitalize()}: {value}." for key, value in entry.facts.items()]
    lines.append(" ".join([*facts, f"Source: {_escaped(entry.source)}"]) + "\n")
    return "\n".join(lines)


def _facts(instance: Any) -> dict[str, str]:
    found = {}
    for key in ("needs", "level", "leaves"):
        value = getattr(instance, key, None)
        if isinstance(value, frozenset):
            value = (", ".join(sorted(value)) or "nothing") + (" by default" if _varies(instance, key) else "")
        if value is not None:
            found[key] = value
    if demands := getattr(instance, "demands", None):
        found["insists on"] = ", ".join(f"{path}: {as_yaml(value)}" for path, value in demands.items())
    return found


def _varies(instance: Any, key: str) -> bool:
    """Whether a declaration follows from the parameters: it is computed, not an attribute of the class."""
    owner = next(base for base in type(instance).__mro__ if key in vars(base))
    return isinstance(vars(owner)[key], property) and bool(dataclasses.fields(owner))


def _parameters(kind: Any) -> dict[str, tuple[str, str]]:
    hints = typing.get_type_hints(kind)
    return {f.name: (_shown(f.default), _allowed(hints[f.name])) for f in dataclasses.fields(kind)}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _allowed(hint: Any) -> str:
    """The values of a Literal; the kind of any other parameter."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{_shown(option)}`" for option in options)
    if type(None) in options:
        return ", ".join([*(_allowed(option) for option in options if option is not type(None)), "`null`"])
    return {bool: "true or false", int: "whole number", float: "number"}[hint]


def _line(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return _escaped(_line(text)).replace("|", r"\|")


def _escaped(text: str) -> str:
    """Asterisks of formulas are not emphasis; those of lists stay."""
    return "\n".join(
        line[:2] + line[2:].replace("*", r"\*") if line.startswith("* ") else line.replace("*", r"\*")
        for line in text.split("\n")
    )
