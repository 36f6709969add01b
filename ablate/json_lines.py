"""The line of a part of a JSON document, for messages; Python's parser does not say where a value began."""

from __future__ import annotations

import json
import re

from ablate.source import Location

_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def line_of(text: str, location: Location) -> int:
    """The line of the deepest part of `location` that a valid document holds."""
    place: int | None = _after_space(text, 0)
    start = 0
    for step in location:
        if place is None:
            break
        start, place = place, _part(text, place, step)
    return text.count("\n", 0, start if place is None else place) + 1


def _part(text: str, place: int, step: int | str) -> int | None:
    """Where a value of the object or array at `place` begins; None if it has none by that name or number."""
    if text[place] not in "{[":
        return None
    is_object, found, number = text[place] == "{", None, 0
    place = _after_space(text, place + 1)
    while text[place] not in "}]":
        name: int | str = number
        if is_object:
            name, end = _DECODER.raw_decode(text, place)
            place = _after_space(text, _after_space(text, end) + 1)  # over the colon
        if name == step:
            found = place  # the last of equal names counts
        _, end = _DECODER.raw_decode(text, place)
        place, number = _after_space(text, end), number + 1
        if text[place] == ",":
            place = _after_space(text, place + 1)
    return found


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    assert found
    return found.end()
