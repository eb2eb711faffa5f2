"""Commands on the verdict: decide again, compare two runs, plan how many samples a gate needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from reports.verdict import ExitCode, Inconclusive, shell_code

if TYPE_CHECKING:
    from reports import Built

OnInconclusive = Annotated[
    Inconclusive | None,
    typer.Option(
        "--inconclusive",
        help="What the shell gets where only samples are missing: fail 1, warn or pass 0. "
        "[default: 4]",
        show_default=False,
    ),
]
BaselineFolder = Annotated[
    Path | None,
    typer.Option("--baseline", metavar="RUN", help="Baseline instead of those the gates name."),
]
_RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder.")]
_AsJson = Annotated[bool, typer.Option("--json", help="Write JSON to standard output.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(gate)
    app.command()(compare)
    app.command()(power)


def shell(built: Built, policy: Inconclusive | None) -> ExitCode:
    """The exit code under a policy, with a warning where one is due."""
    return _shell(
        built.exit_code, policy, more_samples_decide=built.more_samples_decide, why=built.why
    )


def _shell(
    code: ExitCode, policy: Inconclusive | None, *, more_samples_decide: bool, why: str
) -> ExitCode:
    found = shell_code(code, policy, more_samples_decide=more_samples_decide)
    if code is ExitCode.INCONCLUSIVE and policy in (Inconclusive.WARN, Inconclusive.PASS):
        if found is code:
            typer.echo(
                f"! --inconclusive {policy.value} does not help: more samples alone would not "
                "decide. What was not measured, or is in doubt, never passes",
                err=True,
            )
        elif policy is Inconclusive.WARN:
            typer.echo(f"! inconclusive, passed with a warning: {why}", err=True)
    return found


def gate(
    run_folder: _RunFolder,
    gates: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Other gates than the run's: a scenario or its gates."),
    ] = None,
    baseline: BaselineFolder = None,
    inconclusive: OnInconclusive = None,
    as_json: _AsJson = False,
) -> None:
    """Decide a run again, also by other gates; writes nothing and needs no torch.

    Exit codes: as of `redteam run`; 2 also where the run states no gate and none are given.
    """
    from redteam.errors import UsageError
    from redteam.gates import read_gates
    from redteam.output_verdict import show_gates
    from reports.baseline import Baselines
    from reports.metrics import summarise
    from reports.store import RunStore

    store = RunStore.read(run_folder)
    manifest = store.manifest
    if gates is not None:
        chosen = read_gates(gates, manifest.cells)
        manifest = manifest.model_copy(update={"gates": chosen})
    if not manifest.gates:
        raise UsageError(
            f"{gates or run_folder} states no gates, so there is nothing to decide; give some with "
            "--gates FILE, such as: gates: [{metric: csfr, max: 0.1}]"
        )
    others = Baselines(manifest, baseline, run_folder)
    summary = summarise(manifest, store.trials(), store.calibrations(), others)
    code = _shell(
        ExitCode(summary["exit_code"]),
        inconclusive,
        more_samples_decide=summary["more_samples_decide"],
        why=summary["why"],
    )
    show_gates(run_folder, summary, code, as_json=as_json)
    raise typer.Exit(code)


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="Run folder of the baseline.")],
    run_folder: _RunFolder,
    as_json: _AsJson = False,
) -> None:
    """Compare two runs on the same samples: what broke, what was mended, what is chance.

    Exit codes: 0 nothing is shown to be worse, 1 a cell is worse, 2 the runs cannot be compared,
    4 a cell of BASE is missing or incomplete in RUN.
    """
    from redteam.output_verdict import show_comparison
    from reports.baseline import Baseline
    from reports.compare import compare as compare_runs

    found = compare_runs(Baseline.read(base), Baseline.read(run_folder))
    show_comparison(found, as_json=as_json)
    raise typer.Exit(found.exit_code)


def power(
    limit: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Limit of the gate, such as 0.1.")
    ] = 0.1,
    minimum: Annotated[
        bool, typer.Option("--min", help="The limit is a minimum, as of an accuracy.")
    ] = False,
    rate: Annotated[
        str | None, typer.Option(help="True rates to plan for, such as 0.02,0.05.")
    ] = None,
    confidence: Annotated[float, typer.Option(help="Of the gate, above 0.5 and below 1.")] = 0.95,
    wanted: Annotated[
        float, typer.Option("--power", help="Chance of a decision, above 0 and below 1.")
    ] = 0.8,
    decisions: Annotated[
        int, typer.Option(min=1, help="Decisions of the gate's family: gates × cells.")
    ] = 1,
    design_effect: Annotated[
        float, typer.Option(min=1.0, help="How many questions of shared images one is worth.")
    ] = 1.0,
    max_increase: Annotated[
        float | None, typer.Option(help="Plan a gate on the rise since a baseline instead.")
    ] = None,
    before: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Rate of the baseline, of such a gate.")
    ] = 0.1,
    newly: Annotated[float, typer.Option(help="Share with the event now and not before.")] = 0.02,
    no_longer: Annotated[float, typer.Option(help="Share with it before and not now.")] = 0.02,
    scenario: Annotated[
        str | None, typer.Option(help="Plan for the gates of a scenario.", show_default=False)
    ] = None,
    as_json: _AsJson = False,
) -> None:
    """Say how many samples a gate needs; exact, and needs no torch.

    Samples are those in the metric's denominator: of CSFR those answered right on the clean image
    with and without compression.
    """
    from redteam.output_verdict import show_power
    from redteam.powering import Wanted, for_change, for_rate, for_scenario

    asked = Wanted(confidence, wanted, decisions, design_effect)
    if scenario is not None:
        tables = for_scenario(scenario, asked)
    elif max_increase is not None:
        tables = [for_change(max_increase, before, newly, no_longer, asked)]
    else:
        tables = [for_rate(limit, rate, asked, minimum=minimum)]
    show_power(tables, as_json=as_json)
