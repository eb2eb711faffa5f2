"""What commands print: verdict first, then the table, what to beware of, the files, what to do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from redteam.errors import RedteamError, UsageError, nearest
from reports.text import count, epsilon_text, plain
from reports.verdict import ExitCode, Verdict

if TYPE_CHECKING:
    from redteam.cache import Contents
    from redteam.catalog import Entry
    from redteam.doctor import Finding
    from redteam.plan import Plan
    from redteam.runner import Finished
    from redteam.scenario import Scenario
    from redteam.sharding import Shard
    from reports import Built
    from reports.measurement import Measurement
    from reports.merge import Merged
    from reports.terminal import Table as Rows

_WIDE: Final = 180
"""Columns where there is no terminal: nobody wants a wrapped table in a log."""
_STYLES: Final = {
    Verdict.PASS: "bold green",
    Verdict.FAIL: "bold red",
    Verdict.INCONCLUSIVE: "bold yellow",
    Verdict.NOT_GATED: "bold",
}


def stdout() -> Console:
    """Console for results."""
    return _console(stderr=False)


def stderr() -> Console:
    """Console for progress and messages."""
    return _console(stderr=True)


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr, highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(stderr=stderr, highlight=False, markup=False, width=_WIDE)
    return console


def write_json(data: object) -> None:
    """JSON to standard output, and nothing else."""
    text = json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False)
    stdout().file.write(text + "\n")


def show_run(
    finished: Finished, *, as_json: bool, profile: Mapping[str, Any] | None = None
) -> None:
    """The end of ``redteam run``."""
    if profile is not None:
        _show_profile(profile)
    if finished.built is None:
        _show_part(finished, as_json=as_json)
        return
    show_report(
        finished.folder,
        finished.built,
        as_json=as_json,
        interrupted=finished.interrupted,
        notes=finished.notes,
    )


def show_cache(contents: Contents | None, deleted: int, *, as_json: bool) -> None:
    """The end of ``redteam cache``."""
    if as_json:
        known = contents and {**asdict(contents), "folder": str(contents.folder)}
        write_json({"cache": known, "deleted": deleted})
        return
    console = stdout()
    if contents is None:
        console.print("the cache is switched off (REDTEAM_CACHE)")
        return
    if deleted:
        console.print(f"deleted  {count(deleted, 'image')}")
    size = f"{contents.size / 1024**2:,.1f} MiB of {contents.limit / 1024**2:,.0f}"
    console.print(f"holds    {count(contents.images, 'image')}, {size}")
    console.print(Text(f"folder   {contents.folder}"), soft_wrap=True)
    console.print(
        "next     REDTEAM_CACHE=DIR moves it, REDTEAM_CACHE=off switches it off, "
        "REDTEAM_CACHE_LIMIT=20GB sets its size; redteam run --no-cache makes every image",
        soft_wrap=True,
    )


def _show_profile(profile: Mapping[str, Any]) -> None:
    """Where the time went; on standard error, since standard output is for results."""
    console = stderr()
    console.print()
    workers = profile.get("workers")
    title = "where the time went" if workers is None else "where the workers' time went"
    console.print(_phases(title, profile["phases"]))
    overhead, whole = profile["overhead"], f"{profile['wall_seconds']:.1f} s in all"
    if workers is not None:
        console.print()
        console.print(_phases("where the driver's time went", profile["driver"]))
        whole = f"{profile['worker_seconds']:.1f} s of {count(workers, 'worker')}, {whole}"
    if overhead is not None:
        what = "harness, images and ledger" if workers is None else "harness, images and waiting"
        console.print(
            f"overhead {overhead:.1%}: {what}, of the time without loading and "
            f"report; {whole} on {profile['device']}",
            soft_wrap=True,
        )


def _phases(title: str, phases: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(title)
    for name in ("seconds", "share", "calls"):
        table.add_column(name, justify="right")
    for name, one in phases.items():
        calls = f"{one['calls']:,}" if one["calls"] else ""
        table.add_row(name, f"{one['seconds']:.2f}", f"{one['share']:.1%}", calls)
    return table


def _show_part(finished: Finished, *, as_json: bool) -> None:
    """The end of ``redteam run --shard``: nothing is judged."""
    state = "stopped" if finished.interrupted else "finished"
    if as_json:
        write_json(
            {
                "folder": str(finished.folder),
                "shard": str(finished.shard),
                "state": state,
                "trials": finished.trials,
                "notes": list(finished.notes),
            }
        )
        return
    console = stdout()
    console.print()
    console.print(f"Part {finished.shard} {state}: {count(finished.trials, 'trial')} recorded")
    for note in finished.notes:
        console.print(Text(f"! {note}", style="yellow"), soft_wrap=True)
    console.print(Text(f"data     {finished.folder}"), soft_wrap=True)
    after = (
        f"run the same command with --out {finished.folder} to continue"
        if finished.interrupted
        else "when all parts are there: redteam merge OUT RUN...   (one folder for each part)"
    )
    console.print(Text(f"next     {after}"), soft_wrap=True)


def show_merged(folder: Path, merged: Merged, built: Built, *, as_json: bool) -> None:
    """The end of ``redteam merge``."""
    notes = list(merged.notes)
    if merged.repeated:
        differently = f"; {merged.disagreeing:,} were answered differently there"
        notes.append(
            f"{count(merged.repeated, 'trial')} stood in several folders, the first measured counts"
            f"{differently if merged.disagreeing else ''}"
        )
    if merged.missing:
        notes.append(f"{count(merged.missing, 'trial')} stand in no folder: a part is missing")
    show_report(folder, built, as_json=as_json, notes=tuple(notes))


def show_report(
    folder: Path,
    built: Built,
    *,
    as_json: bool,
    interrupted: bool = False,
    notes: tuple[str, ...] = (),
) -> None:
    """Verdict, table, notes, files, and what to do next."""
    if as_json:
        code = ExitCode.INTERRUPTED if interrupted else built.exit_code
        write_json(
            {
                "folder": str(folder),
                "verdict": built.verdict.value,
                "exit_code": int(code),
                "headline": built.headline,
                "why": built.why,
                "notes": [*notes, *built.notes],
                "files": [
                    str(path)
                    for path in (
                        built.report,
                        built.markdown,
                        built.summary,
                        built.junit,
                        built.sarif,
                    )
                ],
                "summary": json.loads(built.summary.read_text(encoding="utf-8")),
            }
        )
        return
    console = stdout()
    console.print()
    console.print(Text(built.headline, style=_STYLES[built.verdict]))
    console.print(Text(built.why), soft_wrap=True)
    console.print()
    for table in filter(None, (built.table, built.defenses, built.draws, built.detectors)):
        console.print(_rich(table))
        console.print()
    for note in (*notes, *built.notes):
        console.print(Text(f"! {note}", style="yellow"), soft_wrap=True)
    for label, path in (
        ("report", built.report),
        ("summary", built.markdown),
        ("data", built.summary),
        ("junit", built.junit),
        ("sarif", built.sarif),
    ):
        console.print(Text(f"{label:8} {path}"), soft_wrap=True)
    console.print(Text(f"next     {_next(folder, built, interrupted)}"), soft_wrap=True)


def _rich(shown: Rows) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, numeric in zip(shown.columns, shown.numeric, strict=True):
        table.add_column(name, justify="right" if numeric else "left")
    for row in shown.rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def show_audit(folder: Path, summary: Mapping[str, Any], *, as_json: bool) -> ExitCode:
    """The end of ``redteam audit``: every rule on every defence.

    Returns:
        PASS if all defences are verified, INCONCLUSIVE if one is not, NOTHING_SELECTED without any.
    """
    from reports.marks import UNVERIFIED, bare

    defenses = summary["defenses"]
    code = ExitCode.NOTHING_SELECTED if not defenses else ExitCode.PASS
    if any(one["badge"] == UNVERIFIED for one in defenses):
        code = ExitCode.INCONCLUSIVE
    if as_json:
        write_json({"folder": str(folder), "exit_code": int(code), "defenses": defenses})
        return code
    console = stdout()
    if not defenses:
        console.print("this run has no defence to audit")
    for one in defenses:
        for place in one["places"]:
            where = f"{bare(one['defense'])} on {plain(place['target'])}, "
            console.print()
            console.print(
                Text(f"{where}{plain(place['compression'])}: ", style="bold")
                + Text(place["badge"], style=_BADGES[place["badge"] == UNVERIFIED])
            )
            console.print(_rules(place["rules"]))
    return code


_BADGES: Final = {True: "bold yellow", False: "bold green"}
_STATES: Final = {"passed": "green", "failed": "red", "not checked": "yellow"}


def _rules(rules: Sequence[Mapping[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rule", "what", "level", "state", "seen, and what to do"):
        table.add_column(name, justify="right" if name == "rule" else "left")
    for rule in rules:
        rest = f" — {rule['remedy']}" if rule["remedy"] else ""
        table.add_row(
            str(rule["rule"]),
            rule["title"],
            rule["level"],
            Text(rule["state"], style=_STATES.get(rule["state"], "dim")),
            Text(f"{plain(rule['message'])}{rest}"),
        )
    return table


def show_measurement(folder: Path, found: Measurement, *, as_json: bool) -> None:
    """The end of ``redteam measure``: a table for each target, files, and what to do next."""
    from reports.measurement import COLUMNS, FILE, rows, scores_text

    if as_json:
        write_json({"folder": str(folder), **found.model_dump(mode="json")})
        return
    console = stdout()
    for target in dict.fromkeys(one.target for one in found.settings):
        full = found.full(target)
        console.print()
        console.print(Text(f"{target}: {count(full.n, 'sample')}, clean", style="bold"))
        table = Table(box=None, pad_edge=False, header_style="bold")
        for index, name in enumerate(COLUMNS):
            table.add_column(name, justify="right" if index else "left")
        for row in rows(found, target):
            table.add_row(*(Text(cell) for cell in row))
        console.print(table)
        for one in found.of(target):
            own = scores_text(one)
            if own:
                console.print(Text(f"  {one.compression or 'all tokens'}: {own}"), soft_wrap=True)
        for method, _ in found.curves(target):
            best = found.practical(target, method)
            if best is None:
                console.print(
                    Text(f"! {method}: no budget keeps 80 % of the full accuracy", style="yellow")
                )
    for one in found.settings:
        if one.errors:
            message = f"! {one.compression}: {count(one.errors, 'error')}; first: {one.error}"
            console.print(Text(plain(message), style="yellow"), soft_wrap=True)
    console.print()
    for label, path in (("report", folder / "measurement.html"), ("data", folder / FILE)):
        console.print(Text(f"{label:8} {path}"), soft_wrap=True)
    console.print(
        Text("next     choose a setting, then attack it: redteam run with it under compressions"),
        soft_wrap=True,
    )


def _next(folder: Path, built: Built, interrupted: bool) -> str:
    if interrupted or built.exit_code is ExitCode.INCOMPLETE:
        return f"run the same command with --out {folder} to continue"
    if built.verdict is Verdict.INCONCLUSIVE and built.doubted:
        return (
            "follow the remedies of the self-checks and of redteam audit, then run again into "
            "another folder"
        )
    if built.verdict is Verdict.INCONCLUSIVE:
        return "raise dataset.samples: more samples narrow the intervals"
    if built.verdict is Verdict.NOT_GATED:
        return "open the report; to decide pass or fail add gates: redteam init --from ci-gate"
    return "open the report"


def show_valid(scenario: Scenario) -> None:
    """The end of ``redteam validate``."""
    budgets = sum(len(attack.epsilons) for attack in scenario.attacks)
    cells = len(scenario.targets) * len(scenario.compressions) * budgets * len(scenario.defenses)
    samples = scenario.dataset.options.get("samples")
    words = [
        count(len(scenario.targets), "target"),
        count(len(scenario.compressions), "compression"),
        count(len(scenario.attacks), "attack"),
        count(cells, "cell"),
        f"{'all' if samples is None else format(samples, ',')} samples",
        count(len(scenario.gates), "gate"),
    ]
    console = stdout()
    console.print(f"{scenario.path} is valid: {', '.join(words)} (hash {scenario.hash})")


def show_plan(plan: Plan, samples: int, shard: Shard | None = None, *, as_json: bool) -> None:
    """The end of ``redteam plan``."""
    from redteam.cost import estimate
    from redteam.progress import duration

    found = estimate(plan, samples)
    part = None if shard is None else _part(plan, samples, shard)
    if as_json:
        write_json(
            {
                "samples": found.samples,
                "images": found.images,
                "gradient_steps": found.gradients,
                "answers": found.answers,
                "rough_cpu_seconds": found.seconds,
                "cells": [cell.model_dump(mode="json") for cell in plan.cells],
                **({} if part is None else {"shard": part}),
            }
        )
        return
    console = stdout()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name, justify in (
        ("target", "left"),
        ("attack", "left"),
        ("ε", "right"),
        ("knows", "left"),
        ("gradient steps", "right"),
        ("evaluated on", "left"),
    ):
        table.add_column(name, justify="right" if justify == "right" else "left")
    for group in plan.groups:
        table.add_row(
            group.target.label,
            group.attack.label,
            epsilon_text(group.epsilon),
            group.cells[0].cell.knowledge,
            f"{group.gradients:,}",
            ", ".join(dict.fromkeys(one.compression.label for one in group.cells)),
        )
    console.print(table)
    console.print()
    console.print(
        f"{count(len(plan.cells), 'cell')} on {count(samples, 'sample')}: "
        f"{found.images:,} attacked images, {found.gradients:,} gradient steps, "
        f"{found.answers:,} answers"
    )
    if found.seconds is None:
        console.print("how long is not known for this target: try --limit 4 and multiply")
    else:
        console.print(f"roughly {duration(found.seconds)} on a CPU with two cores")
    if part is not None:
        units = count(len(part["units"]), "unit")
        share = f"{part['share_of_cost']:.0%} of the cost"
        console.print(f"part {shard}: {units}, {part['trials']:,} trials, about {share}")


def _part(plan: Plan, samples: int, shard: Shard) -> dict[str, Any]:
    """What one part of a run does."""
    from redteam.cost import unit_cost

    units = list(plan.units(samples))
    mine = shard.part(units)
    return {
        "shard": str(shard),
        "units": [unit.id for unit in mine],
        "trials": sum(len(unit.samples) * len(unit.group.cells) for unit in mine),
        "share_of_cost": sum(map(unit_cost, mine)) / (sum(map(unit_cost, units)) or 1.0),
    }


def show_listing(what: str, name: str | None, *, as_json: bool) -> None:
    """The end of ``redteam list``: all of a kind in a line each, or one with its options.

    Raises:
        UsageError: if there is none of that name.
    """
    rows = _metrics() if what == "metrics" else _methods(what)
    if name is not None:
        known = [row["name"] for row in rows]
        rows = [row for row in rows if row["name"] == name] or _of_library(what, name)
        if not rows:
            hint = nearest(name, known)
            raise UsageError(
                f"there is no {name!r} among {what}; known: {', '.join(known)}"
                + (f"; {hint}" if hint else "")
            )
    if as_json:
        write_json(rows)
        return
    console = stdout()
    width = max(len(row["name"]) for row in rows)
    knows = max(len(row.get("knowledge") or "") for row in rows)
    for row in rows:
        line = Text(f"{row['name']:{width}}", style="bold")
        if knows:
            line += Text(f"  {row.get('knowledge') or '':{knows}}", style="dim")
        console.print(line + Text(f"  {row['summary']}"), soft_wrap=True)
        if name is not None:
            _show_options(row)
    if name is None and any(row.get("options") for row in rows):
        console.print(f"options of one: redteam list {what} NAME", style="dim")


def _show_options(row: Mapping[str, Any]) -> None:
    console = stdout()
    for option in row.get("options", ()):
        default = "required" if option["required"] else f"default {_yaml(option['default'])}"
        line = f"    {option['name']}: {option['allowed']}; {default}"
        console.print(Text(line), soft_wrap=True)
        if option["help"]:
            console.print(Text(f"        {option['help']}", style="dim"), soft_wrap=True)


def _yaml(value: object) -> str:
    if isinstance(value, str) and value.isprintable() and value.strip():
        return value
    return str(json.dumps(value, ensure_ascii=False))


def _metrics() -> list[dict[str, Any]]:
    from reports.registry import METRICS

    return [
        {
            "name": one.name,
            "title": one.title,
            "summary": one.definition,
            "over": one.denominator,
            "better": one.better,
            "interval": one.kind,
            "source": one.source,
        }
        for one in METRICS.values()
    ]


def _methods(kind: str) -> list[dict[str, Any]]:
    from redteam.catalog import FAMILIES, KINDS, entries

    (found,) = (one for one in KINDS if one == kind)
    rows = [_row(entry) for entry in entries(found).values()]
    return rows + [_family(family, value) for family, value in FAMILIES.get(found, {}).items()]


def _row(entry: Entry) -> dict[str, Any]:
    from redteam.annotations import describe
    from redteam.signature import REQUIRED, signature

    read = signature(entry)
    return {
        "name": entry.name,
        "summary": read.summary,
        "class": entry.value,
        "package": entry.package or "redteam",
        "knowledge": read.facts.get("knowledge"),
        "options": [
            {
                "name": option.name,
                "allowed": describe(option.annotation),
                "required": option.default is REQUIRED,
                "default": None if option.default is REQUIRED else option.default,
                "help": option.help,
            }
            for option in read.options.values()
        ],
    }


def _family(family: str, value: str) -> dict[str, Any]:
    """A library's methods as one line; loads no library."""
    from attacks.library_names import LIBRARIES

    library = LIBRARIES[family]
    return {
        "name": f"{family}.*",
        "summary": f"{len(library.offered)} attacks of {library.title} {library.version} by name, "
        f"such as {family}.{next(iter(library.offered))}; all of them: redteam list attacks "
        f"{family}",
        "class": value,
        "package": library.title,
        "knowledge": None,
        "options": [],
    }


def _of_library(kind: str, name: str) -> list[dict[str, Any]]:
    """The methods of a library, or one of them with its parameters; none for any other name."""
    from attacks.library_names import LIBRARIES
    from redteam.catalog import FAMILIES, KINDS, of_library

    (found,) = (one for one in KINDS if one == kind) if kind in KINDS else (None,)
    library = LIBRARIES.get(name)
    if found is None or name.partition(".")[0] not in FAMILIES.get(found, {}):
        return []
    if library is None:
        entry = of_library(found, name)
        return [] if entry is None else [_row(entry)]
    rows = [
        {"name": f"{name}.{one}", "summary": "see the library", "knowledge": needs.value}
        for one, needs in library.offered.items()
    ]
    return rows + [
        {"name": f"{name}.{one}", "summary": f"not offered: {why}", "knowledge": None}
        for one, why in library.unsuitable.items()
    ]


def show_findings(findings: list[Finding]) -> ExitCode:
    """The end of ``redteam doctor``; INCOMPLETE if something keeps redteam from running."""
    console = stdout()
    styles = {"ok": "green", "note": "yellow", "broken": "bold red"}
    for finding in findings:
        console.print(
            Text(f"{finding.state:7}", style=styles[finding.state])
            + Text(f"{finding.what}: {plain(finding.detail)}"),
            soft_wrap=True,
        )
        if finding.remedy:
            console.print(Text(f"       → {finding.remedy}"), soft_wrap=True)
    broken = any(finding.state == "broken" for finding in findings)
    return ExitCode.INCOMPLETE if broken else ExitCode.PASS


def write_template(path: Path, template: str, *, force: bool) -> None:
    """The end of ``redteam init``.

    Raises:
        RedteamError: if the file exists or cannot be written, or there is no such template.
    """
    from redteam.scenario import find_scenario

    text = find_scenario(template).read_text(encoding="utf-8")
    try:
        with path.open("w" if force else "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise RedteamError(f"{path} exists; give another name, or --force to overwrite") from error
    except OSError as error:
        raise RedteamError(f"{path} cannot be written: {error.strerror}") from error
    console = stdout()
    console.print(f"wrote {path}; next: redteam validate {path}, then: redteam run {path}")
