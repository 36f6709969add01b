"""What a user means by GRID or CELL: a grid file, its name, a results folder, a cell's folder, an id or the start of
one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ablate.grid import load_grid
from ablate.source import InputError, nearest


@dataclass(frozen=True)
class Chosen:
    """Cells of one grid."""

    results: Path  # of the grid
    cells: tuple[Path, ...]  # folders
    whole: bool  # all that the grid's results hold


def choose(what: str, results: Path) -> Chosen:
    """A grid, by its file, its name or its results, or a cell. Raises InputError if there is none, or several."""
    if folder := _grid(what, results):
        return Chosen(folder, tuple(sorted(path.parent for path in folder.glob("*/cell.json"))), whole=True)
    cell = _cell(what, results, f"no grid of {results} has this name, and no cell an id that starts with it")
    return Chosen(cell.parent, (cell,), whole=False)


def find_results(what: str, results: Path) -> Path:
    """The results of a grid, by its file, its name or the folder itself. Raises InputError if there are none."""
    folder = _grid(what, results) or Path(what)
    if not folder.is_dir():
        raise InputError(f"{what}: no grid of {results} has this name, and no folder{_near(what, _grids(results))}")
    return folder


def find_cell(what: str, results: Path) -> Path:
    """A cell's folder. Raises InputError if there is none, or several."""
    return _cell(what, results, f"no cell of {results} has this id, or one that starts with it")


def is_grid_file(what: str) -> bool:
    """Whether a grid's file is meant, be it there or not."""
    return Path(what).is_file() or Path(what).suffix in (".yaml", ".yml")


def _grid(what: str, results: Path) -> Path | None:
    """The results folder of a grid; None for what is none. Raises InputError for a grid file without results."""
    given = Path(what)
    if is_grid_file(what):
        given = results / load_grid(given).file.name
        if not (given / "plan.json").exists():
            raise InputError(f"{what}: it has no results in {given}; `ablate run {what}` writes them")
    return next((folder for folder in (given, results / what) if (folder / "plan.json").exists()), None)


def _cell(what: str, results: Path, missing: str) -> Path:
    if (Path(what) / "cell.json").exists():
        return Path(what)
    known = [path.parent for path in sorted(results.glob("*/*/cell.json"))]
    found = [folder for folder in known if folder.name == what] or [f for f in known if f.name.startswith(what)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InputError(f"{what}: {missing}{_near(what, [*_grids(results), *(folder.name for folder in known)])}")
    names = [str(folder) for folder in found]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    raise InputError(f"{what}: {len(names)} cells are meant: {', '.join(names[:5])}{more}")


def _grids(results: Path) -> list[str]:
    """Names of the grids that have results."""
    return [path.parent.name for path in sorted(results.glob("*/plan.json"))]


def _near(what: str, names: list[str]) -> str:
    """Of names that may be hundreds, the one that was probably meant."""
    near = nearest(what, names)
    return f"; did you mean {near!r}?" if near else "; `ablate status GRID` lists cells" if names else ""
