"""Make docs/results/attacks.md: ``python benchmarks/results_attacks.py [--jobs 2] [--by budget]``.

Runs (or resumes) `scenarios/attacks.yaml` attack by attack (and, if asked, budget by budget or
compression by compression), each in a run folder of its own, and writes one page from their
``summary.json`` and ``manifest.json``; nothing in it is typed by hand. Ids and seeds of a cell
depend on nothing else in a scenario, so the parts equal one long run.

The whole table takes hours. With ``--update`` rows that have no run folder stay as they stand on
the page, if their attack has the same options there: measure what changed (``--only``), keep the
rest. Every row says when it was measured.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml
from results_scenes import arrow, diagnosis, interval

SCENARIO = Path("scenarios/attacks.yaml")
OURS = "margin_split"
NOT_PUBLISHED = frozenset({OURS, "suite", "minimal"})
CONTROLS = frozenset({"noise"})
Cell = dict[str, Any]
Row = dict[str, str]
"""Columns of a table by title, as they are printed."""
Key = tuple[str, str, str]
"""Compression, attack and ε·255 of a row."""
_SETTING = re.compile(r"^- (\S+): `(\{.*\})`$", re.MULTILINE)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--runs", type=Path, default=Path("runs/attacks"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/attacks.md"))
    parser.add_argument("--jobs", type=int, default=1, help="attacks run side by side")
    parser.add_argument("--only", nargs="*", help="attacks (or attack@part) to run")
    parser.add_argument("--by", choices=("budget", "compression"), help="run folders smaller still")
    parser.add_argument("--update", action="store_true", help="keep rows that were not run again")
    parser.add_argument("--only-page", action="store_true", help="do not run; use the folders")
    arguments = parser.parse_args()
    parts = split(arguments.scenario, arguments.runs, arguments.by)
    if not arguments.only_page:
        chosen = [part for label, part in parts.items() if wanted(label, arguments.only)]
        with ThreadPoolExecutor(arguments.jobs) as pool:
            list(pool.map(run, chosen))
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    arguments.page.write_text(_page_of(arguments), encoding="utf-8")
    print(f"written: {arguments.page}")


def _page_of(arguments: argparse.Namespace) -> str:
    """The page from the run folders there are and, if asked, from the page as it stands."""
    folders = list(_folders(arguments.scenario, arguments.runs))
    summaries = [_read(folder, "summary") for folder in folders]
    manifests = [_read(folder, "manifest") for folder in folders]
    if not folders:
        raise SystemExit(f"no part of {arguments.scenario} has run in {arguments.runs}")
    whole = yaml.safe_load(arguments.scenario.read_text(encoding="utf-8"))
    attacks = {label_of(attack): attack for attack in whole["attacks"]}
    rows: dict[Key, Row] = {}
    settings: dict[str, str] = {}
    if arguments.update and arguments.page.exists():
        rows, settings = carry(arguments.page.read_text(encoding="utf-8"), attacks)
    for folder, summary, manifest in zip(folders, summaries, manifests, strict=True):
        rows.update(measured(summary, manifest))
        if summary["progress"]["missing"]:
            print(f"stopped: {folder}; only what it finished counts, run it again to resume")
    absent = lacking(rows, whole)
    return page(summaries, manifests, _command(arguments), absent, rows, settings, list(attacks))


def lacking(rows: Iterable[Key], scenario: dict[str, Any]) -> list[str]:
    """Attacks and budgets of a scenario without a row for each of its compressions."""
    found = Counter((attack, epsilon) for _, attack, epsilon in rows)
    missing = []
    for attack in scenario["attacks"]:
        label = label_of(attack)
        budgets = attack.get("epsilons", scenario["epsilons"])
        without = [
            one
            for one in budgets
            if found[label, f"{float(Fraction(one)) * 255:g}"] < len(scenario["compressions"])
        ]
        if len(without) == len(budgets):
            missing.append(label)
        else:
            missing += [f"{label} at {one}" for one in without]
    return missing


def split(scenario: Path, runs: Path, by: str | None = None) -> dict[str, Path]:
    """One scenario for each attack, or each of its budgets or compressions, beside its folder."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    default = whole.pop("epsilons")
    runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for attack in whole["attacks"]:
        budgets, compressions = attack.get("epsilons", default), whole["compressions"]
        parts = [("", budgets, compressions)]
        if by == "budget":
            parts = [(f"@{one.partition('/')[0]}", [one], compressions) for one in budgets]
        elif by == "compression":
            parts = [(f"@{one['type']}", budgets, [one]) for one in compressions]
        for suffix, some, these in parts:
            part = runs / f"{label_of(attack)}{suffix}.yaml"
            one = {**whole, "compressions": these, "attacks": [{**attack, "epsilons": some}]}
            part.write_text(yaml.safe_dump(one, sort_keys=False), encoding="utf-8")
            found[part.stem] = part
    return found


def label_of(attack: dict[str, Any]) -> str:
    """What the attack is called in the table."""
    return str(attack.get("name", attack["type"]))


def run(part: Path) -> None:
    """Run or resume one part."""
    folder = part.with_suffix("")
    command = [sys.executable, "-m", "redteam", "run", str(part), "--out", str(folder)]
    with part.with_suffix(".log").open("a", encoding="utf-8") as log:
        result = subprocess.run(command, stdout=log, stderr=log, check=False)  # noqa: S603
    if result.returncode not in (0, 1, 4):
        print(f"{part.stem}: exit {result.returncode}, see {part.with_suffix('.log')}")


def wanted(label: str, only: Sequence[str] | None) -> bool:
    """Whether a part was asked for, by its label or its attack's."""
    return not only or label in only or label.partition("@")[0] in only


def _folders(scenario: Path, runs: Path) -> Iterable[Path]:
    """Run folders that have something to say, in the order of the scenario."""
    for label in split(scenario, runs):
        parts = [runs / f"{label}{suffix}" for suffix in ("", *_suffixes(scenario))]
        found = [one for one in parts if (one / "summary.json").exists()]
        if not found:
            print(f"missing: {parts[0]}")
        yield from found[:1] if parts[0] in found else found


def _suffixes(scenario: Path) -> Iterable[str]:
    """What `split` may add to an attack's label, in order."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    yield from (f"@{one['type']}" for one in whole["compressions"])
    yield from (f"@{one.partition('/')[0]}" for one in whole["epsilons"])


def _read(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _command(arguments: argparse.Namespace) -> str:
    words = ["python benchmarks/results_attacks.py"]
    if arguments.scenario != SCENARIO:
        words += [f"--scenario {arguments.scenario}", f"--page {arguments.page}"]
    return " ".join(words)


def page(
    summaries: list[dict[str, Any]],
    manifests: list[dict[str, Any]],
    command: str,
    absent: Sequence[str],
    carried: Mapping[Key, Row] | None = None,
    settings: Mapping[str, str] | None = None,
    order: Sequence[str] = (),
) -> str:
    """The whole page.

    Args:
        summaries: of the parts.
        manifests: of the parts.
        command: that makes it.
        absent: attacks of the scenario that were not run.
        carried: rows measured earlier, which stand where no part has a newer one.
        settings: options of the attacks of those rows, as written on a page.
        order: of the attacks.
    """
    rows = dict(carried or {})
    for summary, manifest in zip(summaries, manifests, strict=True):
        rows.update(measured(summary, manifest))
    places = {name: place for place, name in enumerate(order)}
    ordered = sorted(rows, key=lambda key: (places.get(key[1], len(places)), float(key[2])))
    rows = {key: rows[key] for key in ordered}
    compressions = list(dict.fromkeys(key[0] for key in rows))
    parts = [_head(rows, manifests, command, absent), _worst(rows)]
    parts += [_section(name, rows) for name in compressions]
    said = _settings_of(manifests, settings)
    parts.append(_settings({name: said[name] for name in [*order, *said] if name in said}))
    return "\n".join(parts)


def measured(summary: dict[str, Any], manifest: dict[str, Any]) -> dict[Key, Row]:
    """Rows of a part, by compression, attack and budget; of one that was stopped, what it ended."""
    rows = {}
    for cell in summary["cells"]:
        if summary["progress"]["missing"] and cell["n"] < len(manifest["samples"]):
            continue
        row = {title: show(cell) for title, show in COLUMNS}
        row["measured"] = str(manifest["created"])[:10]
        rows[cell["compression"], row["attack"], row["ε·255"]] = row
    return rows


def carry(
    text: str, attacks: Mapping[str, dict[str, Any]]
) -> tuple[dict[Key, Row], dict[str, str]]:
    """Rows of an earlier page whose attacks still have the same options, and those options.

    Args:
        text: the page.
        attacks: of the scenario as it is now, by label.
    """
    settings = dict(_SETTING.findall(text))
    same = [name for name, said in settings.items() if _agree(attacks.get(name), json.loads(said))]
    rows: dict[Key, Row] = {}
    day = re.search(r"\d{4}-\d\d-\d\d", text)
    compression, titles = "", list[str]()
    for line in text.splitlines():
        cells = [one.strip() for one in line.strip().strip("|").split("|")]
        if line.startswith("## "):
            compression, titles = line[3:].strip(), []
        elif line.startswith("| attack |"):
            titles = cells
        elif titles and line.startswith("| ") and cells[0] in same:
            row = dict(zip(titles, cells, strict=True))
            row.setdefault("measured", day.group() if day else "–")  # older pages say it once
            rows[compression, row["attack"], row["ε·255"]] = row
    return rows, {name: settings[name] for name in same}


def _agree(now: dict[str, Any] | None, then: dict[str, Any]) -> bool:
    """Whether options written in a scenario are among the resolved ones of an earlier run."""
    if now is None:
        return False
    asked = {key: one for key, one in now.items() if key not in ("name", "epsilons")}
    return all(key in then and _number(then[key]) == _number(one) for key, one in asked.items())


def _number(value: Any) -> Any:
    """``3/255`` as the number that a resolved scenario holds."""
    if isinstance(value, str) and re.fullmatch(r"\d+/\d+", value):
        return float(Fraction(value))
    return value


def _head(
    rows: Mapping[Key, Row],
    manifests: list[dict[str, Any]],
    command: str,
    absent: Sequence[str],
) -> str:
    lacking = f"\n**Not run yet: {', '.join(absent)}.**\n" if absent else ""
    first = manifests[0]
    identity = first["provenance"].get("identity", {})
    weights = json.dumps(identity.get("targets", {}), sort_keys=True)
    whole = max(int(row["n"]) for row in rows.values())
    fewer = {row["attack"]: row["n"] for row in rows.values() if int(row["n"]) < whole}
    short = "; ".join(f"{name} {count}" for name, count in fewer.items()) or "none"
    return f"""# Every attack on the scenes LVLM

Made by `{command}` from the scenario it names (`{SCENARIO}` by default); do not edit.
{lacking}
{whole} samples of the held-out test split, one question a picture; seed {first["seed"]};
device {identity.get("device", "unknown")}; *measured* is the day of a row. Rows with fewer samples,
because trials ended in an error: {short}. 95 % intervals: Wilson for rates, paired bootstrap by
picture for CSG. Attack options were chosen on the validation split. What the columns mean:
[metrics.md](../metrics.md). *steps* are gradients taken for one image, measured; *queries* are
questions to the deployed target. The target is a tiny model of a drawn world; nothing here says
how a large model behaves.

<details><summary>Weights</summary>

`{weights}`

</details>
"""


def _worst(rows: Mapping[Key, Row]) -> str:
    """The strongest attack at each compressor and budget, and ours against the published ones."""
    lines = ["## The strongest attack, cell by cell", ""]
    lines += ["| compression | ε·255 | published attack | CSFR | UPR | ours | CSFR | UPR | ratio |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    places = sorted({(key[0], float(key[2])) for key in rows})
    order = {name: place for place, name in enumerate(dict.fromkeys(key[0] for key in rows))}
    for compression, epsilon in sorted(places, key=lambda one: (order[one[0]], one[1])):
        here = [
            row
            for key, row in rows.items()
            if key[0] == compression and float(key[2]) == epsilon and rate(row, "CSFR") is not None
        ]
        published = _strongest(row for row in here if kind(row) not in NOT_PUBLISHED | CONTROLS)
        own = _strongest(row for row in here if kind(row) == OURS)
        if published is None:
            continue
        line = [compression, f"{epsilon:g}", *_brief(published)]
        line += ["–"] * 4 if own is None else [*_brief(own), _ratio(own, published)]
        lines.append("| " + " | ".join(line) + " |")
    return "\n".join(lines) + "\n"


def _strongest(rows: Iterable[Row]) -> Row | None:
    return max(rows, key=lambda row: rate(row, "CSFR") or 0.0, default=None)


def _ratio(own: Row, published: Row) -> str:
    """Of the two rates as printed; none where the published one is 0."""
    above, below = rate(own, "CSFR") or 0.0, rate(published, "CSFR") or 0.0
    return f"{above / below:.2f}" if below else "–"


def rate(row: Row, title: str) -> float | None:
    """The value of a rate as printed; None where it is not defined."""
    found = re.match(r"\*\*(-?[\d.]+)\*\*", row[title])
    return None if found is None else float(found.group(1))


def bound(row: Row, title: str, side: int) -> float:
    """The lower (0) or upper (1) end of a rate's interval as printed."""
    found = re.search(r"\[(-?[\d.]+), (-?[\d.]+)\]", row[title])
    return float("-inf") if found is None else float(found.group(1 + side))


def _brief(row: Row) -> list[str]:
    return [
        row["attack"],
        row["CSFR"],
        "–" if rate(row, "UPR") is None else f"{rate(row, 'UPR'):.2f}",
    ]


def kind(row: Row) -> str:
    """Type of a row's attack, from its label."""
    return row["attack"].partition(" ")[0]


def _section(compression: str, rows: Mapping[Key, Row]) -> str:
    here = {key: row for key, row in rows.items() if key[0] == compression}
    noise = {key[2]: bound(row, "CSFR", 1) for key, row in here.items() if kind(row) in CONTROLS}
    titles = [title for title, _ in COLUMNS]
    lines = [
        f"## {compression}",
        "",
        "| " + " | ".join([*titles, "above noise", "measured"]) + " |",
        "|" + "---|" * (len(titles) + 2),
    ]
    for key, row in here.items():
        bar = noise.get(key[2])
        known = bar is not None and kind(row) not in CONTROLS
        above = ("yes" if bound(row, "CSFR", 0) > bar else "no") if known else ""
        lines.append(
            "| " + " | ".join([*(row[title] for title in titles), above, row["measured"]]) + " |"
        )
    return "\n".join(lines) + "\n"


def _settings_of(
    manifests: Iterable[dict[str, Any]], carried: Mapping[str, str] | None
) -> dict[str, str]:
    """Options of each attack, as JSON; parts of one attack say the same."""
    said = dict(carried or {})
    for manifest in manifests:
        for attack in manifest["scenario"]["attacks"]:
            options = {key: one for key, one in attack.items() if key not in ("name", "epsilons")}
            said[attack["name"]] = json.dumps(options)
    return said


def _settings(said: Mapping[str, str]) -> str:
    lines = [f"- {name}: `{options}`" for name, options in said.items()]
    return "\n".join(["## Settings\n", *lines]) + "\n"


def _effort(cell: Cell, name: str) -> str:
    found = cell.get("effort", {}).get(name)
    return "–" if found is None else f"{found:.4g}"


COLUMNS = (
    ("attack", lambda c: c["attack"]),
    ("knows", lambda c: c["knowledge"]),
    ("ε·255", lambda c: f"{c['epsilon'] * 255:g}"),
    ("n", lambda c: f"{c['n']}"),
    ("steps", lambda c: _effort(c, "backwards")),
    ("queries", lambda c: _effort(c, "queries")),
    ("full", lambda c: arrow(c, "full")),
    ("compressed", lambda c: arrow(c, "compressed")),
    ("UPR", lambda c: interval(c, "upr")),
    ("CAE", lambda c: interval(c, "cae")),
    ("CSG", lambda c: interval(c, "csg")),
    ("CSFR", lambda c: interval(c, "csfr")),
    ("CBR", lambda c: interval(c, "cbr")),
    ("full ASR", lambda c: interval(c, "full_asr")),
    ("diagnosis", diagnosis),
)


if __name__ == "__main__":
    main()
