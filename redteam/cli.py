"""The command line. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from redteam import cli_runs, cli_verdict
from redteam.cli_runs import AsJson, RunFolder, quieten
from redteam.cli_verdict import BaselineFolder, OnInconclusive
from redteam.errors import InterruptedRun, RedteamError
from reports.errors import LedgerError, ReportError
from reports.verdict import ExitCode

if TYPE_CHECKING:
    from redteam.scenario import Scenario

app = typer.Typer(
    name="redteam",
    help="Find out what visual-token compression does to a vision-language model's robustness.\n\n"
    "Start with: redteam run quickstart",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Listing(StrEnum):
    """What `redteam list` can list."""

    TARGETS = "targets"
    COMPRESSORS = "compressors"
    ATTACKS = "attacks"
    DEFENSES = "defenses"
    DATASETS = "datasets"
    METRICS = "metrics"


ScenarioName = Annotated[
    str, typer.Argument(metavar="SCENARIO", help="A YAML file, or a packaged one: quickstart …")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Change a key of the scenario, e.g. attacks.caa.steps=50; may be repeated.",
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Use at most so many samples.")]
Seed = Annotated[int | None, typer.Option(min=0, help="Seed instead of the scenario's.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
ShardOf = Annotated[
    str | None,
    typer.Option(
        "--shard",
        metavar="I/N",
        help="Only part I of N; put the folders together with redteam merge.",
        show_default=False,
    ),
]


def _version(wanted: bool) -> None:
    if wanted:
        from redteam import __version__

        typer.echo(f"redteam {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


@app.command()
def run(
    scenario: ScenarioName,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Run folder; one that holds this run already is continued. "
            "[default: runs/<name>-<time>-<hash>]"
        ),
    ] = None,
    overrides: Overrides = None,
    device: Device = None,
    limit: Limit = None,
    seed: Seed = None,
    shard: ShardOf = None,
    inconclusive: OnInconclusive = None,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="Measure trials again that ended in an error."),
    ] = False,
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="Make every attacked image, also known ones.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Say where the time went; a little slower.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a scenario and report the verdict; with --shard, run a part of it.

    Exit codes: 0 pass, 1 a gate failed, 2 usage or invalid scenario, 3 incomplete or internal
    error, 4 inconclusive, 5 nothing selected, 130 interrupted.
    """
    from redteam.output import stderr

    checked = _load(scenario, overrides, device=device, limit=limit, seed=seed)
    quieten()
    folder = out
    try:
        console = stderr()
        with console.status("loading …"):
            from redteam import runner
            from redteam.cache import ImageCache
            from redteam.output import show_run
            from redteam.profiling import Profile
            from redteam.progress import RunProgress
            from redteam.sharding import Shard

            part = None if shard is None else Shard.parse(shard)
        folder = out or runner.default_folder(checked, part)
        clocks = Profile() if profile else None
        cache = None if no_cache else ImageCache.of_environment()
        with RunProgress(console) as progress, clocks or nullcontext():
            finished = runner.run(
                checked, folder, progress, part, clocks, cache, retry_errors=retry_errors
            )
    except KeyboardInterrupt:
        again = f"; run again with --out {folder} to resume" if folder else ""
        raise InterruptedRun(f"stopped{again}") from None
    code, built = ExitCode.PASS, finished.built
    if built is not None:
        code = built.exit_code if finished.interrupted else cli_verdict.shell(built, inconclusive)
        finished = replace(finished, built=replace(built, exit_code=code))
    show_run(finished, as_json=as_json, profile=None if clocks is None else clocks.as_json())
    raise typer.Exit(ExitCode.INTERRUPTED if finished.interrupted else code)


@app.command()
def merge(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the whole run.")],
    parts: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders made with --shard.")
    ],
    inconclusive: OnInconclusive = None,
    as_json: AsJson = False,
) -> None:
    """Put the parts of one run together and report the verdict; needs no torch."""
    from redteam.output import show_merged
    from reports import build_reports
    from reports.merge import merge as put_together

    merged = put_together(parts, out)
    built = build_reports(out)
    code = cli_verdict.shell(built, inconclusive)
    show_merged(out, merged, replace(built, exit_code=code), as_json=as_json)
    raise typer.Exit(code)


@app.command()
def measure(
    scenario: ScenarioName,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results. [default: runs/measure-<name>-<time>]"),
    ] = None,
    retention: Annotated[
        str | None,
        typer.Option(help="Try every compression at these shares, e.g. 0.5,0.25,0.11."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=0, help="Timed batches each; 0 for none.")] = 3,
    evidence: Annotated[
        int, typer.Option(min=0, help="Make the evidence maps of so many samples.")
    ] = 0,
    layers: Annotated[str, typer.Option(help="Layers of the evidence maps, e.g. 0,2.")] = "0",
    horizon: Annotated[
        int, typer.Option(min=0, help="Look for the horizon on so many samples.")
    ] = 0,
    overrides: Overrides = None,
    device: Device = None,
    limit: Limit = None,
    seed: Seed = None,
    as_json: AsJson = False,
) -> None:
    """Measure what compression gives and costs on clean data; runs no attack."""
    from redteam.output import show_measurement, stderr

    checked = _load(scenario, overrides, device=device, limit=limit, seed=seed)
    shares, numbers = (
        numbers_of("--retention", retention or "", 0.0, 1.0),
        numbers_of("--layers", layers, -1, 1e4),
    )
    quieten()
    with stderr().status("loading …") as status:
        from redteam.measuring import Wanted, folder_of
        from redteam.measuring import measure as run_measure

        folder = out or folder_of(checked)
        wanted = Wanted(
            retentions=tuple(shares),
            repeats=repeats,
            evidence=evidence,
            layers=tuple(int(number) for number in numbers),
            horizon=horizon,
        )
        found = run_measure(
            checked,
            folder,
            wanted,
            lambda what, done: status.update(f"{100 * done:.0f} % · {what}"),
        )
    show_measurement(folder, found, as_json=as_json)


@app.command()
def validate(
    scenario: ScenarioName,
    overrides: Overrides = None,
    limit: Limit = None,
    seed: Seed = None,
) -> None:
    """Check a scenario without loading any model; at once."""
    from redteam.capabilities import cautions, mismatches
    from redteam.errors import ScenarioError
    from redteam.output import show_valid

    checked = _load(scenario, overrides, limit=limit, seed=seed)
    problems = mismatches(checked)
    if problems:
        raise ScenarioError(problems)
    for data in (checked.dataset, checked.calibration):
        paths = () if data is None else data.signature.facts.get("paths", ())
        if data is not None and paths and all(data.options[key] is not None for key in paths):
            data.create().open()
    show_valid(checked)
    _warn(cautions(checked))


@app.command()
def plan(
    scenario: ScenarioName,
    overrides: Overrides = None,
    limit: Limit = None,
    seed: Seed = None,
    shard: ShardOf = None,
    as_json: AsJson = False,
) -> None:
    """Show what would run and about how long it takes; loads no model."""
    from redteam.capabilities import cautions
    from redteam.output import show_plan
    from redteam.plan import make_plan
    from redteam.sharding import Shard

    checked = _load(scenario, overrides, limit=limit, seed=seed)
    part = None if shard is None else Shard.parse(shard)
    show_plan(make_plan(checked), _samples(checked), part, as_json=as_json)
    _warn(cautions(checked))


def _samples(scenario: Scenario) -> int:
    """How many samples there are; as many as are asked for, where the hub cannot be reached."""
    from redteam.errors import DatasetError

    options = scenario.dataset.options
    wanted = options.get("samples")
    try:
        return len(scenario.dataset.create().open())
    except DatasetError as error:
        if not isinstance(wanted, int) or "repo" not in options or options.get("path") is not None:
            raise
        typer.echo(f"note: planned with the {wanted} samples asked for; {error}", err=True)
        return wanted


@app.command("list")
def list_(
    what: Annotated[Listing, typer.Argument(help="What to list.")],
    name: Annotated[
        str | None, typer.Argument(help="Only this one, with its options.", show_default=False)
    ] = None,
    as_json: AsJson = False,
) -> None:
    """List what exists; of one, all options, bounds and defaults."""
    from redteam.output import show_listing

    show_listing(what.value, name, as_json=as_json)


@app.command()
def report(
    run_folder: RunFolder,
    baseline: BaselineFolder = None,
    inconclusive: OnInconclusive = None,
    as_json: AsJson = False,
) -> None:
    """Build the reports of a run folder again; needs no torch."""
    from redteam.output import show_report
    from reports import build_reports

    built = build_reports(run_folder, baseline)
    code = cli_verdict.shell(built, inconclusive)
    show_report(run_folder, replace(built, exit_code=code), as_json=as_json)
    raise typer.Exit(code)


@app.command()
def cache(
    clear: Annotated[bool, typer.Option("--clear", help="Delete all of it.")] = False,
    limit: Annotated[
        str | None, typer.Option(help="Delete what was used longest ago above this size: 20GB …")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Show or empty the cache of attacked images; needs no torch."""
    from redteam.cache import ImageCache, size_of
    from redteam.output import show_cache

    found = ImageCache.of_environment()
    deleted = 0
    if found is not None and (clear or limit is not None):
        deleted = found.prune(0 if clear else size_of(limit or ""))
    show_cache(None if found is None else found.contents(), deleted, as_json=as_json)


@app.command()
def audit(run_folder: RunFolder, as_json: AsJson = False) -> None:
    """Say rule by rule what a run's figures of its defences are worth; needs no torch.

    Exit codes: 0 all defences are ADAPTIVE-VERIFIED, 4 one or more are UNVERIFIED, 5 the run has
    no defence, 2 it is no run folder.
    """
    from redteam.output import show_audit
    from reports.metrics import summarise
    from reports.store import RunStore

    store = RunStore.read(run_folder)
    summary = summarise(store.manifest, store.trials())
    raise typer.Exit(show_audit(run_folder, summary, as_json=as_json))


@app.command()
def doctor(
    scenario: Annotated[
        str | None,
        typer.Argument(help="Also check what this scenario needs.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    device: Device = None,
) -> None:
    """Check this installation, or what a scenario needs, and say how to mend it."""
    from redteam.doctor import examine
    from redteam.output import show_findings

    quieten()
    if scenario is None:
        raise typer.Exit(show_findings(examine()))
    checked = _load(scenario, overrides, device=device)
    from redteam.doctor_scenario import examine_scenario

    raise typer.Exit(show_findings([*examine(), *examine_scenario(checked)]))


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("scenario.yaml"),
    template: Annotated[
        str, typer.Option("--from", help="Packaged scenario to start from.")
    ] = "quickstart",
    force: Annotated[bool, typer.Option("--force", help="Overwrite the file.")] = False,
) -> None:
    """Write a commented scenario to start from."""
    from redteam.output import write_template

    write_template(path, template, force=force)


cli_verdict.register(app)
cli_runs.register(app)


def _warn(cautions: tuple[str, ...]) -> None:
    """Say on standard error what is allowed but will come to nothing."""
    for caution in cautions:
        typer.echo(f"! {caution}", err=True)


def _load(
    scenario: str,
    overrides: list[str] | None,
    *,
    device: str | None = None,
    limit: int | None = None,
    seed: int | None = None,
) -> Scenario:
    from redteam.scenario import load_limited

    items = list(overrides or ())
    items += [] if device is None else [f"engine.device={device}"]
    items += [] if seed is None else [f"seed={seed}"]
    return load_limited(scenario, items, limit)


def numbers_of(option: str, text: str, low: float, high: float) -> list[float]:
    """Numbers of a comma-separated option, each in (low, high].

    Raises:
        UsageError: naming the option and the part that is none.
    """
    from redteam.errors import UsageError

    found = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        try:
            number = float(part)
        except ValueError:
            number = float("nan")
        if not low < number <= high:
            raise UsageError(
                f"{option}: {part!r} is not allowed; give numbers above {low:g} up to {high:g}, "
                "separated by commas"
            )
        found.append(number)
    return found


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"error: {message}\n")
    sys.exit(code)


def _code(error: ReportError) -> ExitCode:
    """A folder that cannot be used is a usage error; a disk that fails in a run is not."""
    broken = isinstance(error, LedgerError) or isinstance(error.__cause__, OSError)
    return ExitCode.INCOMPLETE if broken else ExitCode.USAGE


def main() -> None:
    """Entry point: errors the user can mend are one message on standard error."""
    from redteam.installation import check_packages

    try:
        check_packages()
        app()
    except RedteamError as error:
        _fail(str(error), error.exit_code)
    except ReportError as error:
        _fail(str(error), _code(error))
    except Exception:
        import traceback

        traceback.print_exc()
        _fail(
            "this is a fault of redteam, please report it with the lines above; "
            "what was measured is safe, run again with the same --out to resume",
            ExitCode.INCOMPLETE,
        )
