"""YAML with positions, and errors that say what was got, what is allowed, the nearest match, file and line."""

from __future__ import annotations

import difflib
import errno
import json
import math
from collections.abc import Iterable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode
from ruamel.yaml.reader import ReaderError

Location = tuple[int | str, ...]
LONGEST = 2**20  # characters of a YAML file, which takes seconds to read
MOST_VALUES = 100_000  # of a YAML file
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)  # of a disk, whatever the file
LONGEST_LIST, FEW = 1000, 3  # characters of the allowed words in a message; how many are named of a longer list
M = TypeVar("M", bound=BaseModel)


class InputError(ValueError):
    """Something a user wrote that cannot be used; the message is complete, one line per problem."""


class FieldError(ValueError):
    """A recipe field with a value that the schema allows and the world does not hold, such as a missing file."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.location: Location = tuple(field.split("."))


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """The allowed word that was probably meant."""
    matches = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def choices(word: str, allowed: Iterable[str], listed: Iterable[str] | None = None) -> str:
    """What to say after an unknown word: `, did you mean 'x'? Allowed: x, y`. `listed` is shown in place of `allowed`
    where those are too many; of thousands of names, such as the ids of cells, the nearest are."""
    allowed = list(allowed)
    match = nearest(word, allowed)
    hint = f", did you mean {match!r}?" if match else "."
    names = allowed if listed is None else list(listed)
    if len(text := ", ".join(names)) > LONGEST_LIST:
        near = difflib.get_close_matches(word, names, n=FEW, cutoff=0.5) or names[:FEW]
        text = f"{', '.join(near)} and {len(names) - len(near)} more"
    return f"{hint} Allowed: {text or 'none'}"


def shown(value: object) -> str:
    """A value as the user wrote it, on one line."""
    return _short(repr(value) if isinstance(value, str) else json.dumps(value, default=str))


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


def finite_number(text: str) -> float | None:
    """The number that a text is; None for any other text, infinity and NaN."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def counted(number: int, noun: str) -> str:
    """`1 cell`, `3 cells`, `no cells`."""
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


def as_yaml(value: object) -> str:
    """A value of a field in words, as a grid would have it: null for nothing."""
    return "null" if value is None else str(value)


class Source:
    """A YAML document, and the line of each of its parts."""

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self.text = text
        if len(text) > LONGEST:
            raise InputError(f"{name}:1: got {len(text)} characters, expected at most {LONGEST}")
        yaml = YAML(typ="safe", pure=True)
        yaml.composer.warn_double_anchors = False  # the last one counts, as YAML says
        try:
            self._root: Node | None = yaml.compose(StringIO(text))
            self._check(self._root, ())
            self._check_size()
            self.data: Any = yaml.load(StringIO(text))
        except MarkedYAMLError as error:
            raise InputError(f"{name}:{_marked(error)}") from None
        except ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise InputError(f"{name}:{line}: not valid YAML: character {error.character!r}") from None
        except RecursionError:
            raise InputError(f"{name}:1: values are nested too deeply") from None
        except InputError:
            raise
        except Exception as error:  # of ruamel, at a value that its tag or form does not allow: 2026-13-45, !!int x
            line = _unreadable(yaml, self._root)
            raise InputError(f"{name}:{line}: not valid YAML: a value cannot be read: {_one_line(error)}") from None
        if not isinstance(self.data, dict):
            got = "an empty file" if self.data is None else shown(self.data)
            raise InputError(f"{name}:1: got {got}, expected a mapping of keys to values")

    @classmethod
    def read(cls, path: Path) -> Source:
        """Read a file. Raises InputError if it is not there, no text, or no YAML mapping."""
        return cls(str(path), read_text(path))

    def _check(self, node: Node | None, above: tuple[Node, ...], seen: set[int] | None = None) -> None:
        """Refuse what YAML can say and a grid cannot: keys that are no text, and values that hold themselves."""
        seen = set() if seen is None else seen
        if node in above:
            raise InputError(f"{self.name}:{node.start_mark.line + 1}: a value refers to itself")
        if node is None or id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, MappingNode):
            for key, value in node.value:
                if key.tag not in ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"):
                    got = key.value if isinstance(key.value, str) else "a collection"
                    raise InputError(f"{self.name}:{key.start_mark.line + 1}: got {got} as a key, expected a word")
                self._check(value, (*above, node), seen)
        if isinstance(node, SequenceNode):
            for value in node.value:
                self._check(value, (*above, node), seen)

    def _check_size(self) -> None:
        """Refuse aliases of aliases of aliases, a few lines that stand for billions of values."""
        sizes: dict[int, int] = {}

        def size(node: Node | None) -> int:
            if node is not None and id(node) not in sizes:
                inner = node.value if isinstance(node, SequenceNode) else []
                inner = [part for pair in node.value for part in pair] if isinstance(node, MappingNode) else inner
                sizes[id(node)] = 1 + sum(map(size, inner))
                if sizes[id(node)] > MOST_VALUES:
                    line = node.start_mark.line + 1
                    raise InputError(f"{self.name}:{line}: stands for more than {MOST_VALUES} values, with its aliases")
            return sizes.get(id(node), 0)

        size(self._root)

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
        return InputError(": ".join([self.at(location), *([dotted(location)] if location else []), message]))


def dotted(location: Location) -> str:
    """A place in a document as people write it: axes.objective.0."""
    return ".".join(_short(word if (word := str(step)).isprintable() else repr(word)) for step in location)


def read_text(path: Path) -> str:
    """The text of a file. Raises InputError if it is not there, or no UTF-8 text."""
    try:
        return text_of(path.read_bytes(), path)
    except FileNotFoundError:
        siblings = sorted(p.name for p in path.parent.glob(f"*{path.suffix}")) if path.suffix else []
        raise InputError(f"{_named(path)}: no such file{choices(path.name, siblings) if siblings else ''}") from None
    except IsADirectoryError:
        files = ", ".join(sorted(str(p) for p in path.glob("*.yaml")))
        raise InputError(
            f"{_named(path)}: is a folder, expected a file{f' such as {files}' if files else ''}"
        ) from None
    except OSError as error:
        raise InputError(f"{_named(path)}: cannot be read: {error.strerror}") from None


def disk_problem(error: OSError) -> str | None:
    """File and reason of what a disk refuses; None for what is wrong with none, such as a connection that ends.

    Writing to a file that is open does not say its name.
    """
    if isinstance(error.filename, str):
        return f"{_named(Path(error.filename))}: {error.strerror}"
    return f"a file cannot be written: {error.strerror}" if error.errno in FULL else None


def _named(path: Path) -> str:
    """A path on one line, whatever it is made of."""
    return _short(str(path) if str(path).isprintable() else repr(str(path)), 400)


def text_of(content: bytes, path: Path, first: int = 1) -> str:
    """The text of a file's content, or of its lines from `first` on. Raises InputError with file and line."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + first
        raise InputError(f"{path}:{line}: got the byte 0x{content[error.start]:02x}, expected UTF-8") from None


def parse_json(text: str, where: str, *, first: int = 1) -> dict[str, Any]:
    """A JSON object; `where` is its file, `first` its first line there. Raises InputError with file and line."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}:{first + error.lineno - 1}: cannot be read as JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{where}:{first}: cannot be read as JSON: values are nested too deeply") from None
    except ValueError as error:  # a number of thousands of digits
        raise InputError(f"{where}:{first}: cannot be read as JSON: {_one_line(error)}") from None
    if not isinstance(data, dict):
        raise InputError(f"{where}:{first}: got {shown(data)}, expected a JSON object")
    return data


def _one_line(error: Exception) -> str:
    return _short(" ".join(str(error).split()), 200) or type(error).__name__


def _unreadable(yaml: YAML, node: Node | None) -> int:
    """The line of the first single value that its tag or form does not allow; 1 where there is none."""
    if isinstance(node, SequenceNode | MappingNode):
        parts = node.value if isinstance(node, SequenceNode) else [part for pair in node.value for part in pair]
        return next((line for part in parts if (line := _unreadable(yaml, part)) > 1), 1)
    try:
        yaml.constructor.construct_object(node)
    except Exception:
        return int(node.start_mark.line) + 1 if node else 1
    return 1


def _marked(error: MarkedYAMLError) -> str:
    """Line and problem; and where the part began that is not closed, say."""
    mark = error.problem_mark or error.context_mark
    problem = str(error.problem)
    if problem.startswith("but ") and error.context:
        problem = f"{error.context}, {problem}"
    elif mark and error.context_mark and error.context_mark.line != mark.line:
        problem += f" {error.context} that starts in line {error.context_mark.line + 1}"
    return f"{mark.line + 1 if mark else 1}: not valid YAML: {_short(' '.join(problem.split()), 300)}"


def _child(node: Node | None, step: int | str) -> tuple[Node, Node] | None:
    if isinstance(node, MappingNode):
        for key, value in node.value:
            if key.value == str(step):
                return key, value
    if isinstance(node, SequenceNode) and isinstance(step, int) and step < len(node.value):
        return node.value[step], node.value[step]
    return None


def validate(model: type[M], data: object) -> M:
    """`data`, read from YAML, as a model: a whole number is no text, and true is no number."""
    return model.model_validate_json(json.dumps(data, default=str), strict=True)


def problems(error: ValidationError, model: type[BaseModel]) -> list[tuple[Location, str]]:
    """pydantic's problems: where, and what was got and what is allowed."""
    found = [(tuple(problem["loc"]), problem) for problem in error.errors()]
    meant = {  # required keys that are there, misspelt
        (*location[:-1], nearest(str(location[-1]), _fields(model, location[:-1])))
        for location, problem in found
        if problem["type"] == "extra_forbidden"
    }
    return [
        (location, message(problem, model))
        for location, problem in found
        if problem["type"] != "missing" or location not in meant
    ]


def explain(error: ValidationError, model: type[BaseModel], source: Source) -> InputError:
    """pydantic's problems as lines with file, line, what was got and what is allowed."""
    return InputError("\n".join(str(source.error(*problem)) for problem in problems(error, model)))


_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "string": "text, in quotes if need be",
    "bool": "true or false",
    "list": "a list, as in [a, b]",
    "tuple": "a list, as in [a, b]",
    "dict": "a mapping of keys to values",
    "model": "a mapping of keys to values",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def message(problem: Any, model: type[BaseModel] | None = None) -> str:
    """One of pydantic's problems in words."""
    kind, location, context = problem["type"], problem["loc"], problem.get("ctx", {})
    got = f"got {shown(problem['input'])}"
    if kind == "extra_forbidden" and model:
        return f"unknown key{choices(str(location[-1]), _fields(model, location[:-1]))}"
    if kind == "missing":
        return f"{got}, expected more values" if isinstance(location[-1], int) else "is required"
    if kind == "too_long":
        return f"{got}, expected at most {context['max_length']} values"
    if kind == "literal_error":
        allowed = [word.strip("'") for word in context["expected"].replace(" or ", ", ").split(", ")]
        return got + choices(str(problem["input"]), allowed)
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        bound, words = _BOUNDS[kind]
        return f"{got}, expected {words} {context[bound]:g}"
    if expected := _KINDS.get(kind.split("_")[0]):
        return f"{got}, expected {expected}"
    return f"{got}: {problem['msg']}"


def _fields(model: type[BaseModel], location: Location) -> list[str]:
    for step in location:
        annotation = model.model_fields[step].annotation if step in model.model_fields else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


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
