"""The command line, from `ablate plan` to `ablate report`.

The one place that knows all packages; each command imports what it needs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ablate.plugins import allow_plugins, trust
from ablate.secrets import redacted
from ablate.source import InputError, choices, counted, disk_problem

if TYPE_CHECKING:
    from rich.console import Console

    from ablate.grid import Grid
    from ablate.plan import Cell, Plan
    from runners.mlflow_writer import SyncSummary
    from runners.preflight import Finding

app = typer.Typer(
    help="Which part of a reinforcement-learning recipe for diffusion models matters: objective, estimator or sampler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WIDE = 160  # columns of tables that go to a file or a pipe, where nothing tells how wide they may be

GridPath = Annotated[Path, typer.Argument(help="A grid file, e.g. grids/quickstart.yaml", metavar="GRID")]
GridOrResults = Annotated[
    str, typer.Argument(help="A grid's results, its name in --results, or its file", metavar="GRID|RESULTS")
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", help="A recipe field, e.g. --set kl.coef=1e-4", metavar="FIELD=VALUE")
]
Only = Annotated[
    list[str] | None, typer.Option("--only", help="Keep cells with e.g. objective=grpo", metavar="AXIS=VALUE")
]
Seeds = Annotated[str | None, typer.Option("--seeds", help="Keep these seeds, e.g. 0,1", metavar="N,N")]
Results = Annotated[Path, typer.Option("--results", help="Where results are kept", metavar="DIR")]
TrackingUri = Annotated[
    str | None, typer.Option(help="MLflow server or database; by default <results>/mlflow.db", metavar="URI")
]


def _allow_plugins(given: bool) -> None:
    if given:
        allow_plugins()


Plugins = Annotated[
    bool,
    typer.Option(
        "--allow-plugins",
        help="Import `module:Class` and `module:function` from the current folder and PYTHONPATH too",
        callback=_allow_plugins,
    ),
]
LauncherName = Annotated[
    str, typer.Option(help="Where cells run: local, inline (in this process), ray or slurm", metavar="NAME")
]
LauncherSettings = Annotated[
    list[str] | None,
    typer.Option(
        "--launcher-set", help="A setting of a cluster, e.g. partition=gpu or address=auto", metavar="NAME=VALUE"
    ),
]
Tracking = Annotated[bool, typer.Option(help="Mirror the results to MLflow")]
RESULTS = Path("results")


def main() -> None:
    """Run a command; bad input, or a disk that does not do its part, is one line per problem and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it recommends torchvision, which must not be installed
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # processes of cells import nothing from the folder they start in
    try:
        app()
    except InputError as error:
        print(redacted(str(error)), file=sys.stderr)
        raise SystemExit(2) from None
    except Exception as error:
        problem = disk_problem(error) if isinstance(error, OSError) else None
        if problem is None:  # a mistake of ours
            print(redacted(traceback.format_exc()), file=sys.stderr, end="")
            raise SystemExit(1) from None
        print(redacted(problem), file=sys.stderr)
        raise SystemExit(2) from None


@app.command()
def plan(
    grid: GridPath,
    settings: Settings = None,
    only: Only = None,
    seeds: Seeds = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output")] = False,
    rate: Annotated[
        float | None, typer.Option(help="Network calls per second and device, for the estimate of device-hours")
    ] = None,
    calibrate: Annotated[bool, typer.Option(help="Measure that rate here, on the grid's own model")] = False,
    bench: Annotated[
        Path | None, typer.Option(help="What `ablate bench --json` has printed, for hours and disk", metavar="FILE")
    ] = None,
    _plugins: Plugins = False,
) -> None:
    """Show a grid's cells, the combinations that are excluded and why, and what each cell costs."""
    from ablate.forecast import Speed, plan_json, plan_table, read_bench

    speeds = {"--rate": rate, "--calibrate": calibrate or None, "--bench": bench}
    given = [option for option, value in speeds.items() if value is not None]
    if len(given) > 1:
        raise InputError(f"{' and '.join(given)}: each gives the speed; expected one of them")
    _, _, planned = _planned(grid, settings, only, seeds)
    if rate is not None and not 0 < rate < float("inf"):
        raise InputError(f"--rate {rate:g}: expected more than 0 network calls per second")
    if calibrate:
        from runners.calibrate import calls_per_second

        rate = calls_per_second(planned.cells[0].recipe)
    speed = Speed(seconds_per_call=1 / rate) if rate is not None else read_bench(bench) if bench else None
    if as_json:
        typer.echo(json.dumps(plan_json(planned, speed), indent=1))
        return
    console = _console()
    console.print(plan_table(planned, speed, console.width))


@app.command()
def run(
    grid: GridPath,
    settings: Settings = None,
    only: Only = None,
    seeds: Seeds = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Cells at a time, which share cores and GPUs; by default 1, on a cluster as many as it has room for",
        ),
    ] = None,
    launcher: LauncherName = "local",
    launcher_settings: LauncherSettings = None,
    attempts: Annotated[
        int, typer.Option(min=1, help="Failures of a cell until it is left to the next run; not all are tried again")
    ] = 3,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget-device-hours",
            help="Stop once all cells of the grid, --only or not, have spent them, lost time included",
        ),
    ] = None,
    stop_when: Annotated[
        str | None,
        typer.Option(help="End a cell as done once an epoch fulfils this, e.g. 'reward >= 0.95'", metavar="RULE"),
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(min=1, help="So often, only the better half of the configurations goes on to twice the budget"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop")] = False,
    only_freeze: Annotated[
        bool, typer.Option("--freeze", help="Write the cells' folders for `cell`, and stop")
    ] = False,
    results: Results = RESULTS,
    tracking_uri: TrackingUri = None,
    tracking: Tracking = True,
    _plugins: Plugins = False,
) -> None:
    """Train every cell that is not finished; the same command continues after an interruption."""
    from functools import partial

    from ablate.halving import check_choice
    from ablate.limits import Limits, limit
    from ablate.stop_rule import StopRule
    from runners.cell_state import state_of
    from runners.halving import run_within_limits
    from runners.launchers import make_launcher
    from runners.preflight import preflight
    from runners.stop_files import launcher_requests
    from runners.sweep import freeze, in_order, most_devices, run_cells
    from runners.tracking import Mirror

    loaded, whole, planned = _planned(grid, settings, only, seeds)
    console = _console()
    folder = results / planned.grid
    asked = launcher_requests(folder)  # from here on, and not from when the first cell starts
    if dry_run:
        for cell in in_order(planned.cells):
            typer.echo(f"{state_of(folder, cell).status:12} {cell.id}")
        return
    _check_ends(budget, halving, only_freeze=only_freeze)
    rule = str(StopRule.parse(stop_when)) if stop_when is not None else None
    check_choice(folder, halving, planned.cells)
    place = (
        None
        if only_freeze
        else make_launcher(  # frozen cells may be for another machine
            launcher,
            folder,
            workers=workers,
            devices=most_devices(planned.cells),
            settings=_launcher_settings(launcher_settings),
            attempts=attempts,
        )
    )
    _check_models(planned.cells)
    freeze(folder, whole, loaded.source.text)
    if place is None:
        limit(folder, planned.cells, Limits(stop_when=rule))
        typer.echo("\n".join(str(folder / cell.id) for cell in in_order(planned.cells)))
        return
    _print_findings(console, preflight(planned.cells, folder, workers=workers or 1))
    at_once = f"{workers or 1} at a time" if workers or launcher == "local" else f"by {launcher}"
    console.print(
        f"{counted(len(planned.cells), 'cell')} in {folder}, {at_once}; combinations excluded: {len(planned.excluded)}"
    )
    mirror = Mirror(folder, tracking_uri) if tracking else None
    if mirror:
        mirror.start()

    train = partial(
        run_cells, folder, console=console, launcher=place, attempts=attempts, device_hours=budget, asked=asked
    )

    try:
        run_within_limits(folder, planned.cells, train, console, halvings=halving, stop_when=rule)
    except KeyboardInterrupt:
        again = redacted(shlex.join(sys.argv[2:]))
        console.print(f"Stopped. Nothing is lost; continue with: ablate run {again}", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        place.close()
        if mirror:
            mirror.close()
    console.print(f"Figures and tables: ablate report {folder}")
    if mirror and mirror.summary:
        _print_links(console, folder, tracking_uri, mirror.summary)
    if not all(state_of(folder, cell).finished for cell in planned.cells):
        raise SystemExit(1)


@app.command()
def tune(
    grid: GridPath,
    trials: Annotated[int, typer.Option(min=1, help="Of each combination of objective, estimator and sampler")],
    space: Annotated[
        list[str],
        typer.Option(
            help="What may change, e.g. learning_rate=1e-5..1e-3:log, num_points=1..4:int or "
            "objective.clip_range=0.01|0.1; repeat it for more",
            metavar="NAME=VALUES",
        ),
    ],
    settings: Settings = None,
    only: Only = None,
    workers: Annotated[int, typer.Option(min=1, help="Trials at a time; cores and GPUs are shared between them")] = 1,
    launcher: LauncherName = "local",
    launcher_settings: LauncherSettings = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help="Optuna's: a journal file, or postgresql://...; by default in the results", metavar="STORAGE"
        ),
    ] = None,
    results: Results = RESULTS,
    _plugins: Plugins = False,
) -> None:
    """Search values for every combination with equal budgets, by development prompts; write GRID-tuned.yaml."""
    from ablate.space import parse_space
    from runners.launchers import make_launcher
    from runners.preflight import preflight
    from runners.studies import JOURNAL, Studies, open_storage
    from runners.sweep import most_devices
    from runners.trials import SUFFIX, families
    from runners.tuned_grid import check_target, write_tuned_grid
    from runners.tuning import ATTEMPTS, Tuning

    check_target(grid)
    dimensions = parse_space(space)
    loaded, _, planned = _planned(grid, settings, only, None)
    console, folder, found = _console(), results / (planned.grid + SUFFIX), families(planned, dimensions)
    bases = [family.base for family in found]
    _check_models(bases)
    studies = Studies(results=folder, families=found, storage=open_storage(storage or str(folder / JOURNAL)))
    each = f"{counted(len(found), 'combination')}, {counted(trials, 'trial')} each, in {folder}"
    if studies.complete(trials):
        console.print(f"{each}: all have ended, and nothing is left to train.")
    else:
        place = make_launcher(
            launcher,
            folder,
            workers=workers,
            devices=most_devices(bases),
            settings=_launcher_settings(launcher_settings),
            attempts=ATTEMPTS,
        )
        _print_findings(console, preflight(bases, folder, workers=workers))
        console.print(f"{each}, {workers} at a time")
        tuning = Tuning(
            studies=studies,
            grid_text=loaded.source.text,
            trials=trials,
            launcher=place,
            console=console,
            workers=workers,
        )
        try:
            complete = tuning.run()
        except KeyboardInterrupt:
            console.print("Stopped. Nothing is lost; the same command goes on.")
            raise SystemExit(130) from None
        if not complete:
            console.print("Not all trials have ended: the same command goes on, and writes the tuned grid then.")
            raise SystemExit(1)
    ended = {family.study: (family, studies.ended(family)) for family in found}
    typer.echo(write_tuned_grid(grid, ended, settings or ()))


@app.command()
def cell(
    folder: Annotated[Path, typer.Argument(help="A cell's folder under results/")], _plugins: Plugins = False
) -> None:
    """Train the one cell whose folder this is, to its end; used by `run`, or by hand."""
    from runners.cell import run_cell
    from runners.distributed import is_main

    done = run_cell(folder)
    from runners.scoring import hung

    if is_main():
        typer.echo(f"{done.id} {done.status} {done.message}".strip())
    code = 0 if done.status.settled else 1
    if hung:  # its threads would keep the process from ending
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


@app.command()
def status(
    grid: GridOrResults,
    settings: Settings = None,
    only: Only = None,
    seeds: Seeds = None,
    results: Results = RESULTS,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again, until all cells are done")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output")] = False,
    _plugins: Plugins = False,
) -> None:
    """Show how far a grid's cells are; exit code 0 if all of them are done, else 1."""
    from runners.cell_state import planned_cells, state_of
    from runners.chosen import find_results, is_grid_file
    from runners.live import live_table
    from runners.live import watch as show_until_done

    if watch and as_json:
        raise InputError("--watch and --json: expected one of them")
    if is_grid_file(grid):
        _, whole, planned = _planned(Path(grid), settings, only, seeds)
        folder, cells, known = results / planned.grid, list(planned.cells), {cell.id for cell in whole.cells}
    elif settings or only or seeds is not None:
        raise InputError(f"{grid}: --set, --only and --seeds choose cells of a grid file, and this is none")
    else:
        folder = find_results(grid, results)
        cells = planned_cells(folder)
        known = {cell.id for cell in cells}
    console = _console()
    states = show_until_done(console, folder, cells) if watch else [state_of(folder, cell) for cell in cells]
    others = {path.parent.name for path in folder.glob("*/record.json")} - known
    done = all(state.finished for state in states)
    if as_json:
        found = {"folder": str(folder), "done": done, "cells": [state.to_json() for state in states]}
        typer.echo(json.dumps({**found, "others": sorted(others)}, indent=1))
    elif not watch:
        console.print(live_table(console, states, rows=None))
    if others and not as_json:
        why = "with other settings: repeat their --set, or the grid has changed"
        console.print(f"{len(others)} other cells in {folder} have run {why}.")
    raise SystemExit(0 if done else 1)


CellName = Annotated[str, typer.Argument(help="A cell's id, the start of one, or its folder", metavar="CELL")]
GridOrCell = Annotated[
    str, typer.Argument(help="A grid's file, name or results, or a cell's id or folder", metavar="GRID|CELL")
]


@app.command()
def logs(
    cell: CellName,
    lines: Annotated[int | None, typer.Option(min=1, help="The last ones only", metavar="N")] = None,
    follow: Annotated[bool, typer.Option("--follow", help="Go on until the cell has ended")] = False,
    results: Results = RESULTS,
) -> None:
    """Print what a cell's processes have printed, and its traceback if it failed."""
    from runners.chosen import find_cell
    from runners.logs import read_log, why_empty

    folder, length = find_cell(cell, results), 0
    try:
        for text in read_log(folder, lines=lines, follow=follow):
            typer.echo(text, nl=False)
            length += len(text)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if not length:
        typer.echo(f"{folder.name}: {why_empty(folder)}", err=True)


@app.command()
def stop(what: GridOrCell, results: Results = RESULTS) -> None:
    """Ask running cells, on any machine, to save themselves and end after their epoch; of a grid, its `run` too."""
    from runners.chosen import choose
    from runners.stop_files import ask_cell, ask_launchers

    chosen = choose(what, results)
    if chosen.whole:
        ask_launchers(chosen.results)
    number = 0
    for folder in chosen.cells:
        if found := ask_cell(folder):
            number += 1
            typer.echo(f"{folder.name}: asked process {found['pid']} on {found['host']}")
    typer.echo(f"{counted(number, 'cell')} asked to stop" if number else f"{what}: no cell is running")
    if chosen.whole:
        typer.echo("An `ablate run` or `ablate tune` of it that is at work stops too.")


@app.command()
def retry(what: GridOrCell, results: Results = RESULTS) -> None:
    """Let failed cells start anew with the next `run`; what they had is kept beside, what they spent counts as lost.

    Without it, `run` continues failed cells from their checkpoints. A diverged cell starts anew only if it is named.
    """
    from ablate.lock import Taken
    from runners.anew import failed_cells, start_anew
    from runners.chosen import choose

    chosen = choose(what, results)
    failed = failed_cells(chosen.cells, diverged=not chosen.whole)
    for folder in failed:
        try:
            typer.echo(f"{folder.name}: starts anew with the next `ablate run`; it had {start_anew(folder)}")
        except Taken as error:
            typer.echo(str(error))
    if not failed:
        typer.echo(f"{what}: no cell has failed")


@app.command()
def clean(
    what: GridOrCell,
    strays: Annotated[
        bool, typer.Option("--strays", help="Also the cells that the plan does not hold, with their results")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete it")] = False,
    results: Results = RESULTS,
) -> None:
    """Show what results no longer need, such as what `retry` has set aside; delete it with --yes."""
    from ablate.record import read_plan
    from runners.chosen import choose
    from runners.cleaning import leftovers, remove

    chosen = choose(what, results)
    planned = {cell.id for cell in read_plan(chosen.results).cells}
    found = leftovers(chosen.cells, [folder for folder in chosen.cells if strays and folder.name not in planned])
    described = {one: f"{one.size / 2**20:9.1f} MiB  {one.path} ({one.why})" for one in found}
    if not found:
        typer.echo(f"{what}: nothing is left over")
    elif yes:
        for one, deleted in remove(found):
            typer.echo(f"{'deleted' if deleted else 'stays, as its cell runs now:'} {described[one]}")
    else:
        typer.echo("\n".join([*described.values(), "Nothing was deleted; --yes deletes these."]))


@app.command()
def report(
    grid: GridOrResults,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default the folder report/ in it")] = None,
    target: Annotated[
        float | None, typer.Option(help="Held-out value that times are taken to; by default half of the best gain")
    ] = None,
    full: Annotated[
        bool | None,
        typer.Option("--full/--brief", help="All, or table and overview alone; by default brief above 500 cells"),
    ] = None,
    results: Results = RESULTS,
) -> None:
    """Draw figures and tables from a grid's results; needs no GPU, torch or server."""
    from analysis.report import write_report
    from runners.chosen import find_results

    for path in write_report(find_results(grid, results), out, target, brief=None if full is None else not full):
        typer.echo(path)


@app.command(name="eval")
def evaluate(
    grid: GridOrResults,
    rewards: Annotated[
        list[str] | None, typer.Option("--reward", help="Score with this reward; repeat for more")
    ] = None,
    guidance: Annotated[list[float] | None, typer.Option(help="Guidance scale; repeat for more")] = None,
    cells: Annotated[list[str] | None, typer.Option("--cell", help="This finished cell; repeat for more")] = None,
    checkpoints: Annotated[
        list[Path] | None,
        typer.Option(
            "--checkpoint",
            help="A cell that is not finished, by its folder (its newest checkpoint) or a file in its checkpoint/; "
            "repeat for more",
            metavar="FOLDER|FILE",
        ),
    ] = None,
    results: Results = RESULTS,
    _plugins: Plugins = False,
) -> None:
    """Score cells and their base models on the held-out prompts, with any rewards and guidance scales.

    All finished cells, unless --cell or --checkpoint name others.
    """
    from rich.table import Table

    from runners.cell_evaluation import evaluate_cells
    from runners.chosen import find_results

    console, folder = _console(), find_results(grid, results)
    rows = list(evaluate_cells(folder, rewards or [], guidance or [None], cells or [], checkpoints or [], console))
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "reward") else "right", overflow="fold")
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    console.print(f"Images and scores: {folder / 'evaluations'}", soft_wrap=True)


@app.command()
def probe(
    grid: GridPath,
    settings: Settings = None,
    only: Only = None,
    seeds: Seeds = None,
    points: Annotated[str, typer.Option(help="Evaluation points per sample", metavar="N,N")] = "1,2,5,10",
    draws: Annotated[int, typer.Option(help="Independent probes on the same rollouts")] = 2,
    groups: Annotated[int | None, typer.Option(help="Prompts of a rollout; by default an epoch's")] = None,
    bias: Annotated[bool, typer.Option(help="Compare with the true likelihood too")] = True,
    weights: Annotated[
        list[Path] | None,
        typer.Option(help="Beside the base: a cell's folder, or exported weights; repeat for more", metavar="FOLDER"),
    ] = None,
    results: Results = RESULTS,
    tracking_uri: TrackingUri = None,
    tracking: Tracking = True,
    _plugins: Plugins = False,
) -> None:
    """Measure what a grid's estimators are worth before any training: gradient variance, bias, cost of a signal."""
    from contextlib import suppress

    from analysis.probe import write_probe
    from runners.probe import probe as measure
    from runners.probe_tasks import Settings as ProbeSettings
    from runners.sweep import freeze
    from runners.tracking import Mirrored
    from runners.tracking import sync as synchronise

    numbers = _numbers("--points", points, "1,2,5,10")
    loaded, whole, planned = _planned(grid, settings, only, seeds)
    chosen = ProbeSettings(points=tuple(sorted(numbers)), draws=draws, groups=groups, bias=bias)
    _check_models(planned.cells)
    folder = results / planned.grid
    if not (folder / "plan.json").exists():  # what has been trained keeps its plan
        freeze(folder, whole, loaded.source.text)
    target = measure(planned.cells, folder, chosen, weights or [], _console())
    for path in write_probe(target):
        typer.echo(path)
    if tracking:
        with suppress(Mirrored):  # who mirrors the grid sends the probe too
            synchronise(folder, tracking_uri)


@app.command()
def bench(
    what: Annotated[
        str,
        typer.Argument(
            help="A grid file, or a model: `tiny`, a local pipeline, a hub id; with --random-weights sd3.5-medium or "
            "sd3.5-large",
            metavar="GRID|MODEL",
        ),
    ],
    settings: Settings = None,
    only: Only = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="SD 3.5 Medium or Large at its real size, without downloading it")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable, on standard output")] = False,
    _plugins: Plugins = False,
) -> None:
    """Measure an epoch of a grid's first cell, or of a model under the paper's recipe: time by phase, FLOP/s, and what
    the network alone would take."""
    from contextlib import nullcontext

    from runners.bench import bench as measure
    from runners.bench_model import grid_of, model_of
    from runners.distributed import this_device
    from runners.random_weights import random_policy

    model = model_of(what, random_weights=random_weights)
    with grid_of(model) if model else nullcontext(Path(what)) as grid:
        _, _, planned = _planned(grid, settings, only, None)
    first = planned.cells[0]
    if not random_weights:
        _check_models([first])
    found = measure(first, random_policy(first.recipe.model, this_device()) if random_weights else None)
    if as_json:
        typer.echo(found.model_dump_json(indent=1))
        return
    phases = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in found.phases.items())
    memory = "" if found.peak_memory is None else f"\nMemory: {found.peak_memory / 2**30:.1f} GiB at most"
    typer.echo(
        f"{found.cell} on {found.device}\n"
        f"Epoch of {found.images} images: {found.epoch:.2f} s ({phases}), {found.images_per_second:.2f} images/s\n"
        f"Network calls per image: {found.forwards_per_image:.4g} without and {found.backwards_per_image:.4g} with "
        f"gradient; {found.calls_per_second:.0f} per second, a backward counted as two more\n"
        f"FLOP: {found.flops_per_call:.3g} per call, {found.flops_per_backward:.3g} with gradient, "
        f"{found.flops_per_second:.3g} per second of the epoch\n"
        f"The network alone would take {found.bare:.2f} s: update efficiency {found.efficiency:.2f}{memory}\n"
        f"Forecast of a grid: ablate bench {what} --json > bench.json; ablate plan {'GRID' if model else what} --bench "
        "bench.json"
    )


@app.command()
def doctor(
    grid: GridPath,
    settings: Settings = None,
    only: Only = None,
    seeds: Seeds = None,
    results: Results = RESULTS,
    dry_run: Annotated[
        bool, typer.Option(help="Take the first cell through two small epochs, a restart and the export")
    ] = True,
    _plugins: Plugins = False,
) -> None:
    """Look for what stands between a grid and its first cell, each finding with its remedy."""
    from runners.doctor import examine

    console, (_, _, planned) = _console(), _planned(grid, settings, only, seeds)
    raise SystemExit(1 if _print_findings(console, examine(planned.cells, results, dry_run=dry_run)) else 0)


@app.command()
def sync(
    grid: GridOrResults,
    tracking_uri: TrackingUri = None,
    results: Results = RESULTS,
) -> None:
    """Bring MLflow up to date with a grid's results, or rebuild it."""
    from runners.chosen import find_results
    from runners.tracking import sync as synchronise

    summary = synchronise(find_results(grid, results), tracking_uri)
    typer.echo(f"{len(summary.runs)} runs in experiment {summary.experiment!r}, {summary.num_points} new points")


@app.command(name="reward-server")
def reward_server(
    reward: Annotated[str, typer.Argument(help="A built-in reward, or module:function", metavar="REWARD")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A parameter of the reward, e.g. --set incompressible=true", metavar="FIELD=VALUE"),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; beyond loopback ABLATE_REWARD_TOKEN must be set")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one")] = 8400,
) -> None:
    """Score images for the reward `remote` of cells elsewhere, until Ctrl-C."""
    from ablate.recipe import RewardTerm
    from runners.distributed import this_device
    from runners.reward_server import serve, token_of_environment
    from runners.rewards import RewardUnavailable, load_term

    parameters = dict(_setting(text) for text in settings or ())
    allow_plugins()  # who names a module in a command has seen it
    try:
        serving = load_term(RewardTerm(**{**parameters, "name": reward}), "REWARD")
        token, device = token_of_environment(), str(this_device())
        serve(serving, host=host, port=port, token=token, device=device, announce=typer.echo)
    except RewardUnavailable as error:
        raise InputError(str(error)) from None
    except ValueError as error:  # of a reward that does not exist, or that refuses its parameters
        raise InputError(f"reward-server {reward}: {error}") if not isinstance(error, InputError) else error from None


@app.command(name="list")
def list_components(
    what: Annotated[str | None, typer.Argument(help="objectives, estimators, samplers or regularisers; all")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="The whole documentation, as in docs/methods.md")
    ] = False,
) -> None:
    """List objectives, estimators, samplers and regularisers with formula, needs, level and source."""
    from ablate import catalogue

    if markdown:
        typer.echo(catalogue.markdown(), nl=False)
    else:
        _console().print(catalogue.listing(what))


rewards_app = typer.Typer(help="Rewards: what there is, and whether one works here.", no_args_is_help=False)
app.add_typer(rewards_app, name="rewards")


@rewards_app.callback(invoke_without_command=True)
def rewards(context: typer.Context) -> None:
    """List rewards with their units, weights, licence, memory and source; `check NAME` tries one."""
    if context.invoked_subcommand is None:
        from runners.rewards.listing import listing

        _console().print(listing())


@rewards_app.command(name="check")
def check_reward(
    name: Annotated[str, typer.Argument(help="A reward, or 'module:function' of your own")],
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="A parameter, e.g. --set folder=weights/", metavar="NAME=VALUE")
    ] = None,
) -> None:
    """Find or download a reward's weights, let it check itself, and show what it says of three small images."""
    from runners.rewards.listing import check, parameters_of

    allow_plugins()  # who names a module in a command has seen it
    _console().print(check(name, parameters_of(_setting(text) for text in settings or ())))


def _console() -> Console:
    """A terminal as wide as it is; anything else as wide as tables need, unless COLUMNS says otherwise."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDE if wide else None)


def _check_ends(budget: float | None, halving: int | None, *, only_freeze: bool) -> None:
    """Raises InputError for an end of a run that it could not come to."""
    if budget is not None and not 0 < budget < float("inf"):
        raise InputError(f"--budget-device-hours {budget:g}: expected a finite number above 0")
    if only_freeze and (budget is not None or halving is not None):
        raise InputError("--freeze starts nothing, so that --halving and --budget-device-hours mean nothing with it")


def _launcher_settings(given: Sequence[str] | None) -> dict[str, Any]:
    return dict(_setting(text, "--launcher-set", "NAME") for text in given or ())


def _check_models(cells: Iterable[Cell]) -> None:
    """Raises InputError for the first model of the cells that cannot be loaded here."""
    from runners.hub import check_model

    for model in {cell.recipe.model.model_dump_json(): cell.recipe.model for cell in cells}.values():
        check_model(model)


def _print_links(console: Console, results: Path, tracking_uri: str | None, summary: SyncSummary) -> None:
    """How to see the runs in MLflow."""
    from runners.tracking import compare_link, server_command

    link = compare_link(tracking_uri or "", summary.experiment_id, list(summary.runs.values()))
    console.print(f"Compare the runs:   {server_command(results, tracking_uri)}", soft_wrap=True)
    console.print(f"                    {link}", soft_wrap=True, highlight=False)


def _print_findings(console: Console, findings: Iterable[Finding]) -> int:
    """Print each as it comes; how many problems there are."""
    from rich.text import Text

    problems = 0
    for finding in findings:
        problems += finding.level == "problem"
        style = {"ok": "green", "warning": "yellow", "problem": "red"}[finding.level]
        remedy = f": {finding.remedy}" if finding.remedy else ""
        console.print(Text.assemble((f"{finding.level:8} ", style), finding.what, remedy))
    return problems


def _planned(
    path: Path, settings: list[str] | None, only: list[str] | None, seeds: str | None
) -> tuple[Grid, Plan, Plan]:
    """Load a grid and plan it; beside the whole plan, the cells that the options ask for."""
    from ablate.grid import load_grid
    from ablate.plan import make_plan
    from runners.identity import identify

    trust(path.parent)  # as documented: components and rewards may lie beside the grid
    loaded = load_grid(path, dict(_setting(text) for text in settings or ()))
    whole = make_plan(loaded, identify)
    return loaded, whole, _kept(whole, loaded, only, seeds)


def _setting(text: str, option: str = "--set", key_word: str = "FIELD") -> tuple[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, separator, value = text.partition("=")
    if not separator or not value:
        raise InputError(f"{option} {text}: expected {key_word}=VALUE")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise InputError(f"{option} {text}: got {value!r}, which is not valid YAML") from None


def _numbers(option: str, text: str, example: str) -> set[int]:
    try:
        return {int(n) for n in text.split(",")}
    except ValueError:
        raise InputError(f"{option} {text!r}: expected whole numbers separated by commas, as in {example}") from None


def _kept(plan: Plan, grid: Grid, only: list[str] | None, seeds: str | None) -> Plan:
    """The cells that --only and --seeds ask for."""
    from ablate.part import COMPONENT_AXES

    def values(cell: Cell, axis: str) -> list[str]:
        if axis == "id":
            return [cell.id]
        if axis in COMPONENT_AXES:  # by label or by name
            return [getattr(cell, axis), cell.components[axis].name]
        return [str(cell.axes[axis])]

    if not plan.cells:
        raise grid.source.error(("axes",) if grid.file.axes else ("cells",), plan.without_cells())
    wanted: dict[str, set[str]] = {}
    for text in only or ():
        axis, separator, value = text.partition("=")
        if not separator:
            raise InputError(f"--only {text}: expected AXIS=VALUE")
        if axis not in (axes := (*COMPONENT_AXES, *plan.cells[0].axes, "id")):
            raise InputError(f"--only {text}: unknown axis {axis!r}{choices(axis, axes)}")
        known = dict.fromkeys(v for cell in plan.cells for v in values(cell, axis))
        if value not in known:
            raise InputError(f"--only {text}: no cell has {axis} {value!r}{choices(value, known)}")
        wanted.setdefault(axis, set()).add(value)
    kept_seeds = set(grid.file.seeds)
    if seeds is not None:
        kept_seeds = _numbers("--seeds", seeds, "0,1")
        if missing := sorted(kept_seeds - set(grid.file.seeds)):
            allowed = ", ".join(map(str, grid.file.seeds))
            raise InputError(f"--seeds {seeds}: the grid has no seed {missing[0]}. Allowed: {allowed}")
    return plan.keep(
        lambda cell: (
            cell.seed in kept_seeds and all(chosen.intersection(values(cell, axis)) for axis, chosen in wanted.items())
        )
    )


if __name__ == "__main__":
    main()
