"""The command line, from `ablate plan` to `ablate report`.

The one place that knows all packages; each command imports what it needs, so that `--help` is instant.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ablate.source import InputError, choices, counted

if TYPE_CHECKING:
    from rich.console import Console

    from ablate.grid import Grid
    from ablate.plan import Cell, Plan
    from runners.preflight import Finding

app = typer.Typer(
    help="Which part of a reinforcement-learning recipe for diffusion models matters: objective, estimator or sampler.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

WIDE = 160  # columns of tables that go to a file or a pipe, where nothing tells how wide they may be

GridPath = Annotated[Path, typer.Argument(help="A grid file, e.g. grids/quickstart.yaml", metavar="GRID")]
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
Tracking = Annotated[bool, typer.Option(help="Mirror the results to MLflow")]
RESULTS = Path("results")


def main() -> None:
    """Run a command; bad input is one line per problem and exit code 2."""
    sys.path.insert(0, "")  # components of the user's own are looked for where they stand
    try:
        app()
    except InputError as error:
        print(error, file=sys.stderr)
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
    workers: Annotated[int, typer.Option(min=1, help="Cells at a time; cores and GPUs are shared between them")] = 1,
    processes: Annotated[int, typer.Option(min=1, help="Processes per cell, one GPU each; the result is the same")] = 1,
    budget: Annotated[
        float | None,
        typer.Option(
            "--budget-device-hours",
            help="Stop once all cells of the grid, --only or not, have spent them, lost time included",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and stop")] = False,
    only_freeze: Annotated[
        bool, typer.Option("--freeze", help="Write the cells' folders for `cell`, and stop")
    ] = False,
    results: Results = RESULTS,
    tracking_uri: TrackingUri = None,
    tracking: Tracking = True,
) -> None:
    """Train every cell that is not finished; the same command continues after an interruption."""
    from ablate.geometry import check_devices
    from runners.cell_state import state_of
    from runners.hub import check_model
    from runners.preflight import preflight
    from runners.sweep import check_gpus, freeze, in_order, run_cells
    from runners.tracking import Mirror, compare_link, server_command

    loaded, whole, planned = _planned(grid, settings, only, seeds)
    console = _console()
    folder = results / planned.grid
    if dry_run:
        for cell in in_order(planned.cells):
            typer.echo(f"{state_of(folder, cell).status:12} {cell.id}")
        return
    for cell in planned.cells:
        check_devices(cell.recipe, processes)
    check_gpus(1 if only_freeze else processes)  # frozen cells may be for another machine
    for model in {cell.recipe.model.model_dump_json(): cell.recipe.model for cell in planned.cells}.values():
        check_model(model)
    freeze(folder, whole, loaded.source.text)
    if only_freeze:
        for cell in in_order(planned.cells):
            typer.echo(folder / cell.id)
        return
    _print_findings(console, preflight(planned.cells, folder, workers=workers, processes=processes))
    console.print(
        f"{counted(len(planned.cells), 'cell')} in {folder}, {workers} at a time; "
        f"combinations excluded: {len(planned.excluded)}"
    )
    mirror = Mirror(folder, tracking_uri) if tracking else None
    if mirror:
        mirror.start()
    try:
        states = run_cells(
            folder, planned.cells, console=console, workers=workers, processes=processes, device_hours=budget
        )
    except KeyboardInterrupt:
        console.print(f"Stopped. Nothing is lost; continue with: ablate run {shlex.join(sys.argv[2:])}", soft_wrap=True)
        raise SystemExit(130) from None
    finally:
        if mirror:
            mirror.close()
    console.print(f"Figures and tables: ablate report {folder}")
    if mirror and mirror.summary:
        link = compare_link(tracking_uri or "", mirror.summary.experiment_id, list(mirror.summary.runs.values()))
        console.print(f"Compare the runs:   {server_command(folder, tracking_uri)}", soft_wrap=True)
        console.print(f"                    {link}", soft_wrap=True, highlight=False)
    if any(state.status not in ("done", "diverged") for state in states):
        raise SystemExit(1)


@app.command()
def cell(folder: Annotated[Path, typer.Argument(help="A cell's folder under results/")]) -> None:
    """Train the one cell whose folder this is, to its end; used by `run`, or by hand."""
    from contextlib import nullcontext

    from ablate.lock import lock
    from ablate.record import read_cell, read_record
    from runners.distributed import is_main

    read_cell(folder)
    hung: list[str] = []
    with lock(folder) if is_main() else nullcontext():
        done = read_record(folder)
        if done is None or not done.status.final:
            from runners.scoring import hung
            from runners.train import train_cell

            done = train_cell(folder)
    if is_main():
        typer.echo(f"{done.id} {done.status} {done.message}".strip())
    code = 0 if done.status.final else 1
    if hung:  # its threads would keep the process from ending
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


@app.command()
def status(
    grid: GridPath, settings: Settings = None, only: Only = None, seeds: Seeds = None, results: Results = RESULTS
) -> None:
    """Show how far a grid's cells are."""
    from runners.live import live_table

    _, whole, planned = _planned(grid, settings, only, seeds)
    console, folder = _console(), results / planned.grid
    console.print(live_table(console, folder, planned.cells, rows=len(planned.cells)))
    others = {path.parent.name for path in folder.glob("*/record.json")} - {cell.id for cell in whole.cells}
    if others:
        console.print(f"{len(others)} other cells in {folder} have run with other settings (--set, or an older grid).")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="A grid's results, e.g. results/tiny")],
    out: Annotated[Path | None, typer.Option(help="Where to write; by default the folder report/ in it")] = None,
    target: Annotated[
        float | None, typer.Option(help="Held-out value that times are taken to; by default half of the best gain")
    ] = None,
) -> None:
    """Draw figures and tables from a grid's results; needs no GPU, torch or server."""
    from analysis.report import write_report

    for path in write_report(results, out, target):
        typer.echo(path)


@app.command(name="eval")
def evaluate(
    results: Annotated[Path, typer.Argument(help="A grid's results, e.g. results/tiny")],
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
) -> None:
    """Score cells and their base models on the held-out prompts, with any rewards and guidance scales.

    All finished cells, unless --cell or --checkpoint name others.
    """
    from rich.table import Table

    from runners.cell_evaluation import evaluate_cells

    console = _console()
    rows = list(evaluate_cells(results, rewards or [], guidance or [None], cells or [], checkpoints or []))
    table = Table(box=None, pad_edge=False, header_style="bold")
    names = list(dict.fromkeys(name for row in rows for name in row))
    for name in names:
        table.add_column(name, justify="left" if name in ("model", "reward") else "right", overflow="fold")
    for row in rows:
        values = (row.get(name, "") for name in names)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values))
    console.print(table)
    console.print(f"Images and scores: {results / 'evaluations'}", soft_wrap=True)


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
) -> None:
    """Measure what a grid's estimators are worth before any training: gradient variance, bias, cost of a signal."""
    from analysis.probe import write_probe
    from runners.hub import check_model
    from runners.probe import probe as measure
    from runners.probe_tasks import Settings as ProbeSettings
    from runners.sweep import freeze
    from runners.tracking import sync as synchronise

    numbers = _numbers("--points", points, "1,2,5,10")
    loaded, whole, planned = _planned(grid, settings, only, seeds)
    chosen = ProbeSettings(points=tuple(sorted(numbers)), draws=draws, groups=groups, bias=bias)
    for model in {cell.recipe.model.model_dump_json(): cell.recipe.model for cell in planned.cells}.values():
        check_model(model)
    folder = results / planned.grid
    if not (folder / "plan.json").exists():  # what has been trained keeps its plan
        freeze(folder, whole, loaded.source.text)
    target = measure(planned.cells, folder, chosen, weights or [], _console())
    for path in write_probe(target):
        typer.echo(path)
    if tracking:
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
) -> None:
    """Measure an epoch of a grid's first cell, or of a model under the paper's recipe: time by phase, FLOP/s, and what
    the network alone would take."""
    from contextlib import nullcontext

    from runners.bench import bench as measure
    from runners.bench_model import grid_of, model_of
    from runners.distributed import this_device
    from runners.hub import check_model
    from runners.random_weights import random_policy

    model = model_of(what, random_weights=random_weights)
    with grid_of(model) if model else nullcontext(Path(what)) as grid:
        _, _, planned = _planned(grid, settings, only, None)
    first = planned.cells[0]
    if not random_weights:
        check_model(first.recipe.model)
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
        f"FLOP: {found.flops_per_call:.3g} per call, {found.flops_per_second:.3g} per second of the epoch\n"
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
) -> None:
    """Look for what stands between a grid and its first cell, each finding with its remedy."""
    from runners.doctor import examine

    console, (_, _, planned) = _console(), _planned(grid, settings, only, seeds)
    raise SystemExit(1 if _print_findings(console, examine(planned.cells, results, dry_run=dry_run)) else 0)


@app.command()
def sync(
    results: Annotated[Path, typer.Argument(help="A grid's results, e.g. results/tiny")],
    tracking_uri: TrackingUri = None,
) -> None:
    """Bring MLflow up to date with a grid's results, or rebuild it."""
    from runners.tracking import sync as synchronise

    summary = synchronise(results, tracking_uri)
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

    _console().print(check(name, parameters_of(_setting(text) for text in settings or ())))


def _console() -> Console:
    """A terminal as wide as it is; anything else as wide as tables need, unless COLUMNS says otherwise."""
    from rich.console import Console

    wide = not sys.stdout.isatty() and "COLUMNS" not in os.environ
    return Console(width=WIDE if wide else None)


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

    loaded = load_grid(path, dict(_setting(text) for text in settings or ()))
    whole = make_plan(loaded, identify)
    return loaded, whole, _kept(whole, loaded, only, seeds)


def _setting(text: str) -> tuple[str, Any]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, separator, value = text.partition("=")
    if not separator or not value:
        raise InputError(f"--set {text}: expected FIELD=VALUE")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise InputError(f"--set {text}: got {value!r}, which is not valid YAML") from None


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
