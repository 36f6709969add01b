"""What a user means by GRID or CELL: a grid file, a results folder, a cell's folder, an id or the start of one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ablate.grid import load_grid
from ablate.source import InputError, choices


@dataclass(frozen=True)
class Chosen:
    """Cells of one grid."""

    results: Path  # of the grid
    cells: tuple[Path, ...]  # folders
    whole: bool  # all that the grid's results hold


def choose(what: str, results: Path) -> Chosen:
    """A grid, by its file, its name or its results, or a cell. Raises InputError if there is none, or several."""
    given = Path(what)
    if given.is_file():
        given = results / load_grid(given).file.name
        if not (given / "plan.json").exists():
            raise InputError(f"{what}: it has no results in {given}; `ablate run {what}` writes them")
    for folder in (given, results / what):
        if (folder / "plan.json").exists():
            return Chosen(folder, tuple(sorted(path.parent for path in folder.glob("*/cell.json"))), whole=True)
    cell = find_cell(what, results)
    return Chosen(cell.parent, (cell,), whole=False)


def find_cell(what: str, results: Path) -> Path:
    """A cell's folder. Raises InputError if there is none, or several."""
    if (Path(what) / "cell.json").exists():
        return Path(what)
    known = [path.parent for path in sorted(results.glob("*/*/cell.json"))]
    found = [folder for folder in known if folder.name == what] or [f for f in known if f.name.startswith(what)]
    if len(found) == 1:
        return found[0]
    if not found:
        near = choices(what, [folder.name for folder in known]) if known else ""
        raise InputError(f"{what}: no cell in {results} has this id, or one that starts with it{near}")
    names = [str(folder) for folder in found]
    more = f", and {len(names) - 5} more" if len(names) > 5 else ""
    raise InputError(f"{what}: {len(names)} cells are meant: {', '.join(names[:5])}{more}")
