"""Damage for files: what a crash, an editor, another tool or somebody's malice leaves in place of a valid one."""

from __future__ import annotations

import copy
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from hypothesis import strategies as st

Path = tuple[Any, ...]

HOSTILE = st.one_of(
    st.sampled_from(
        [
            *(None, True, False, 0, -1, 1, 3, 10**12, 10**30, -(10**400), 0.5, 1e308, 5e-324),
            *(float("nan"), float("inf"), -float("inf")),
            *("", "x", "x" * 5000, "../../etc", "/", "\x00", "[/red]", "os:system", "1", "nan", "a\nb"),
            *("\ud7ff", "\ud800", "é"),
            *([], {}, [[]], [None], {"": 1}, {"name": 1}, {"a": {"b": []}}, {"name": "os:system", "x": 1}),
            json.loads("[" * 500 + "]" * 500),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
SNIPPETS = st.sampled_from(
    [
        *(b"\xff", b"\x00", b"\xef\xbb\xbf", b"\r", b"\r\n", b"\n", b"\t", b"\x1b[2J", b"\x85", b"\xe2\x80\xa8"),
        *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"- ", b"? ", b"| ", b"> ", b"--- ", b"... ", b"%YAML 9"),
        *(b"&a ", b"*a", b"<<: *a", b"&a [*a, *a]", b"{<<: 1}", b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b".inf"),
        *(b"!!python/object/apply:os.system [x]", b"!!int x", b"!!binary x", b"!!set {a}", b"!!timestamp 1", b"!x "),
        *(b"2026-13-45", b"0x", b"0o9", b"1_0", b"{a: 1, a: 2}", b'{"a": 1, "a": 2}', b"[" * 3000, b'{"a":' * 3000),
        b"&a [1,1,1,1,1,1,1,1,1,1]\n" + b"".join(b"x%d: &a [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\n" % i for i in range(12)),
    ]
)


def damaged(valid: str, parse: Callable[[str], Any], dump: Callable[[Any], str]) -> st.SearchStrategy[bytes]:
    """Contents that are nearly `valid`, a document that `parse` reads and `dump` writes; or anything."""
    document = parse(valid)
    return st.one_of(
        st.lists(_changes(document), min_size=1, max_size=3)
        .map(lambda changes: dump(_applied(document, changes)))
        .map(lambda text: text.encode("utf-8", "replace")),
        _edited(valid.encode()),
        _edited(valid.encode()),
        st.binary(max_size=60),
    )


def damaged_checkpoint(valid: bytes) -> st.SearchStrategy[bytes]:
    """Nearly a checkpoint: with places overwritten or cut off, or other values; with the digest of that or not."""
    size = hashlib.sha256().digest_size
    state = torch.load(io.BytesIO(valid[:-size]), weights_only=True)

    def saved(change: tuple[str, Path, Any]) -> bytes:
        torch.save(_applied(state, [change]), file := io.BytesIO())
        return file.getvalue()

    changed = _changes(state).map(saved)
    signed = st.one_of(_edited(valid[:-size]), changed, changed)
    return st.one_of(signed.map(lambda content: content + hashlib.sha256(content).digest()), _edited(valid))


def damaged_text(valid: str) -> st.SearchStrategy[bytes]:
    """Nearly a text without any form."""
    return st.one_of(_edited(valid.encode()), st.binary(max_size=60))


def _changes(document: Any) -> st.SearchStrategy[tuple[str, Path, Any]]:
    places = list(_places(document, ()))
    return st.tuples(st.sampled_from(["set", "set", "remove", "add"]), st.sampled_from(places), HOSTILE)


def _places(value: Any, path: Path) -> Iterator[Path]:
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*path, key))


def _applied(document: Any, changes: list[tuple[str, Path, Any]]) -> Any:
    changed = copy.deepcopy(document)
    for kind, path, value in changes:
        if not path:
            changed = value if kind == "set" else changed
            continue
        try:
            inner = changed
            for step in path[:-1]:
                inner = inner[step]
            if kind == "set":
                inner[path[-1]] = value
            elif kind == "remove":
                del inner[path[-1]]
            elif isinstance(inner, dict):
                inner[f"{path[-1]}x"] = value
            else:
                inner.append(value)
        except (LookupError, TypeError, AttributeError):  # an earlier change has taken the place away
            continue
    return changed


def _edited(valid: bytes) -> st.SearchStrategy[bytes]:
    """Some places overwritten, inserted into or cut off."""
    edit = st.tuples(st.integers(0, len(valid)), st.integers(0, 20), st.one_of(SNIPPETS, st.just(b"")))

    def apply(edits: list[tuple[int, int, bytes]]) -> bytes:
        content = valid
        for place, length, snippet in edits:
            content = content[:place] + snippet + content[place + length :]
        return content

    whole = st.sampled_from([valid.replace(b"\n", b"\r\n"), b"\xef\xbb\xbf" + valid, valid + valid, b"", valid[::-1]])
    cut = st.integers(0, len(valid)).map(lambda place: valid[:place])
    return st.one_of(st.lists(edit, min_size=1, max_size=3).map(apply), whole, cut)
