"""Code of a user's own, named `module:attribute`: whether it may be imported is decided here, and nowhere else.

Grids and results are data, and a folder that somebody has sent must not run code. A module is imported if it is
installed, or lies in a trusted folder: the grid's own, those of ABLATE_PLUGINS, and with --allow-plugins the current
folder and those of PYTHONPATH.
"""

from __future__ import annotations

import importlib
import json
import os
import site
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

from ablate.source import InputError

VARIABLE = "ABLATE_PLUGINS"  # trusted folders, separated as in PATH; processes of cells inherit it
OWN = ("ablate", "runners", "analysis")


def trust(*folders: Path) -> None:
    """Trust the modules of these folders, in this process and in those that it starts."""
    known = dict.fromkeys([*_listed(VARIABLE), *(str(folder.resolve()) for folder in folders)])
    os.environ[VARIABLE] = os.pathsep.join(known)


def allow_plugins() -> None:
    """What --allow-plugins does: trust the current folder, and those of PYTHONPATH."""
    trust(Path.cwd(), *map(Path, _listed("PYTHONPATH")))


def import_plugin(name: str) -> ModuleType:
    """The module of this name. Raises InputError if it may not be imported, or fails."""
    top = name.partition(".")[0]
    trusted = _listed(VARIABLE)
    sys.path += [folder for folder in trusted if folder not in sys.path]  # last: nothing of ours is replaced
    spec = _found(top)
    if spec is None:
        where = f" or lies in {' or '.join(trusted)}" if trusted else ""
        raise InputError(f"cannot be imported: no module {top!r} is installed{where}; {_remedy()}")
    if not spec.has_location or spec.origin is None:  # of Python itself, or whatever folders there are of this name
        raise InputError(f"cannot be imported: {top!r} is no module of a file, nor a package with __init__.py")
    if top not in OWN and not _lies_in(spec.origin, [*trusted, *_site_packages(), *_editable()]):
        raise InputError(
            f"must not be imported: {spec.origin} is not installed and does not lie beside the grid; {_remedy()}"
        )
    try:
        return importlib.import_module(name)
    except Exception as error:  # whatever the file of a user does when it is run
        raise InputError(f"cannot be imported: {type(error).__name__}: {error}") from None


def _remedy() -> str:
    return f"--allow-plugins trusts the current folder, {VARIABLE}=FOLDER another one"


def _listed(variable: str) -> list[str]:
    return [folder for folder in os.environ.get(variable, "").split(os.pathsep) if folder]


def _found(top: str) -> ModuleSpec | None:
    try:
        return find_spec(top)  # of a name without dots: nothing is imported
    except (ImportError, ValueError):
        return None


def _lies_in(file: str, folders: Iterable[str]) -> bool:
    path = Path(file).resolve()
    return any(path.is_relative_to(Path(folder).resolve()) for folder in folders)


def _site_packages() -> list[str]:
    return [*site.getsitepackages(), site.getusersitepackages()]


@cache
def _editable() -> tuple[str, ...]:
    """The folders of distributions that are installed as `pip install --editable` does it."""
    return tuple(_editable_folders())


def _editable_folders() -> Iterator[str]:
    for distribution in distributions():
        origin = json.loads(distribution.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            yield unquote(urlsplit(origin["url"]).path)
