"""YAML with positions, and errors that say what was got, what is allowed, the nearest match, file and line."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Location = tuple[int | str, ...]


class InputError(ValueError):
    """Something a user wrote that cannot be used; the message is complete, one line per problem."""


def choices(word: str, allowed: Iterable[str]) -> str:
    """What to say after an unknown word: `, did you mean 'x'? Allowed: x, y`."""
    allowed = list(allowed)
    matches = difflib.get_close_matches(word, allowed, n=1, cutoff=0.5)
    hint = f", did you mean {matches[0]!r}?" if matches else "."
    return f"{hint} Allowed: {', '.join(allowed) or 'none'}"


class Source:
    """A YAML document, and the line of each of its parts."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        try:
            yaml = YAML(typ="safe", pure=True)
            self.data: Any = yaml.load(StringIO(text))
            self._root: Node | None = yaml.compose(StringIO(text))
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f"{name}:{mark.line + 1}" if mark else name
            raise InputError(f"{line}: not valid YAML: {error.problem}") from None
        if not isinstance(self.data, dict):
            raise InputError(f"{name}:1: expected a mapping of keys to values, got {_shown(self.data)}")

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a file. Raises InputError if it is not there, no text, or no YAML mapping."""
        try:
            return cls(str(path), path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            siblings = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
            hint = choices(path.name, siblings) if siblings else ""
            raise InputError(f"{path}: no such file{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot be read as text: {error}") from None

    def at(self, location: Location) -> str:
        """`file:line` of the deepest part of `location` that the document holds."""
        node, line = self._root, 1
        for step in location:
            found = _child(node, step)
            if found is None:
                break
            key, node = found
            line = key.start_mark.line + 1
        return f"{self.name}:{line}"

    def error(self, location: Location, message: str) -> InputError:
        """An InputError at a place of this document."""
        path = ".".join(map(str, location))
        return InputError(f"{self.at(location)}: {path}: {message}" if path else f"{self.at(location)}: {message}")


def _child(node: Node | None, step: int | str) -> tuple[Node, Node] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key, value
    if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    return None


def explain(error: ValidationError, model: type[BaseModel], source: Source, prefix: Location = ()) -> InputError:
    """pydantic's problems as lines with file, line, what was got and what is allowed."""
    lines = []
    for problem in error.errors():
        location: Location = tuple(problem["loc"])
        where = source.error(prefix + location, _message(problem, model, location))
        lines.append(str(where))
    return InputError("\n".join(lines))


def _message(problem: Any, model: type[BaseModel], location: Location) -> str:
    kind, got, context = problem["type"], _shown(problem["input"]), problem.get("ctx", {})
    if kind == "extra_forbidden":
        return f"unknown key{choices(str(location[-1]), _fields(model, location[:-1]))}"
    if kind == "missing":
        return "is required"
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return f"got {got}{choices(str(problem['input']), allowed)}"
    if kind == "value_error":
        return str(context["error"])
    return f"got {got}; {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _fields(model: type[BaseModel], location: Location) -> list[str]:
    for step in location:
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def _shown(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def set_path(data: dict[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested mappings with one value replaced: set_path(d, ["kl", "coef"], 1e-4)."""
    head, *rest = path
    inner = data.get(head)
    return {**data, head: set_path(inner if isinstance(inner, dict) else {}, rest, value) if rest else value}


def merge(base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `override`, mapping by mapping."""
    merged = dict(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
