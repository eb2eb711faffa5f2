"""Make docs/results/defenses.md: ``python benchmarks/results_defenses.py [--only selection]``.

Runs (or resumes) `scenarios/defenses.yaml` in parts of several defences, each in a run folder of
its own with the undefended control and the same attacks, and writes one page from their records;
nothing in it is typed by hand. Ids and seeds of a cell depend on nothing else in a scenario, so the
parts equal one long run; the images of attacks that know no defence are the same in all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import yaml

from redteam.catalog import find, load
from reports.marks import bare, failed
from reports.measure import Row, measure, row_of
from reports.metrics import summarise
from reports.statistics import wilson
from reports.store import RunStore

SCENARIO: Final = Path("scenarios/defenses.yaml")
PARTS: Final[Mapping[str, tuple[str, ...]]] = {
    "selection": ("translation_consensus", "rank_fusion", "hybrid", "random_floor", "oracle"),
    "views": ("score_smoothing", "sap", "rank_margin"),
    "input": (
        "resize_pad",
        "gaussian_vote",
        "art.JpegCompression",
        "art.FeatureSqueezing",
        "art.SpatialSmoothing",
    ),
    "decoding": ("beam", "vasparse", "vcd", "icd", "sid", "dola", "pai", "m3id", "opera"),
    "encoder": ("robust_encoder", "stack"),
}
"""Types of defences that run in one folder, with `none`."""
NOISE: Final = "noise"


@dataclass(slots=True)
class Cell:
    """What the page needs of one cell."""

    compression: str
    attack: str
    defense: str
    adaptive: bool
    spec: str
    rows: dict[str, Row] = field(default_factory=dict)
    clean_seconds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    draws: int | None = None


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenario", type=Path, default=SCENARIO)
    parser.add_argument("--runs", type=Path, default=Path("runs/defenses"))
    parser.add_argument(
        "--transferred",
        type=Path,
        default=Path("runs/transferred"),
        help="folders of runs with many defences and attacks that do not know them",
    )
    parser.add_argument("--page", type=Path, default=Path("docs/results/defenses.md"))
    parser.add_argument("--only", nargs="*", help=f"parts to run: {', '.join(PARTS)}")
    parser.add_argument("--only-page", action="store_true", help="do not run; use the folders")
    arguments = parser.parse_args()
    if not arguments.only_page:
        for name, part in split(arguments.scenario, arguments.runs).items():
            if not arguments.only or name in arguments.only:
                run(part)
    folders = sorted(one.parent for one in arguments.runs.glob("*/manifest.json"))
    if not folders:
        raise SystemExit(f"no part of {arguments.scenario} has run in {arguments.runs}")
    arguments.page.parent.mkdir(parents=True, exist_ok=True)
    text = page(folders, listed(arguments.scenario))
    others = sorted(one.parent for one in arguments.transferred.glob("*/manifest.json"))
    text += transferred(others) if others else ""
    arguments.page.write_text(text, encoding="utf-8")
    print(f"written: {arguments.page}")


def split(scenario: Path, runs: Path) -> dict[str, Path]:
    """One scenario for each part that the scenario has defences of, beside its folder."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    runs.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, kinds in PARTS.items():
        some = [one for one in whole["defenses"] if type_of(one) in kinds]
        if some:
            part = runs / f"{name}.yaml"
            text = yaml.safe_dump({**whole, "defenses": ["none", *some]}, sort_keys=False)
            part.write_text(text, encoding="utf-8")
            found[name] = part
    return found


def type_of(defense: Any) -> str:
    """The type of an entry of ``defenses:``."""
    if isinstance(defense, str):
        return defense
    return "stack" if "stack" in defense else str(defense["type"])


def absent(kinds: Sequence[str], lines: Mapping[tuple[str, str], Line]) -> list[str]:
    """Types of defences that no adaptive attack was measured on."""
    there = {
        json.loads(cell.spec)["type"]
        for line in lines.values()
        for cell in line.defense.values()
        if cell.adaptive or cell.defense == "none"
    }
    return [name for name in kinds if name not in there]


def run(part: Path) -> None:
    """Run or resume one part."""
    command = [
        sys.executable,
        "-m",
        "redteam",
        "run",
        str(part),
        "--out",
        str(part.with_suffix("")),
    ]
    result = subprocess.run(command, check=False)  # noqa: S603
    if result.returncode not in (0, 1, 4):
        print(f"{part.stem}: exit {result.returncode}")


def _json(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return found


def cells_of(folder: Path) -> list[Cell]:
    """The cells of a run folder with their rows; errors are left out."""
    store = RunStore.read(folder)
    attacks = store.manifest.scenario["attacks"]
    adaptive = {one["name"] for one in attacks if one.get("adaptive")}
    found = {
        cell.id: Cell(
            cell.compression,
            cell.attack,
            cell.defense,
            cell.attack in adaptive,
            json.dumps({**cell.spec["defense"], "name": ""}, sort_keys=True),
            draws=cell.spec["attack"].get("draws") if random(cell.spec["defense"]) else None,
        )
        for cell in store.manifest.cells
    }
    for trial in store.trials():
        if trial.answers is None or trial.demands is None:
            continue
        cell = found[trial.cell]
        cell.rows[trial.sample] = row_of(trial)
        cell.seconds.append(trial.demands.attacked_compressed.seconds)
        cell.clean_seconds.append(trial.demands.clean_compressed.seconds)
    return list(found.values())


def random(spec: Mapping[str, Any]) -> bool:
    """Whether a defence, by its resolved options, draws at random."""
    if "stack" in spec:
        return any(random(member) for member in spec["stack"])
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in spec.items()}
    made = load(find("defenses", str(options.pop("type"))))(**options)
    return bool(getattr(made, "draws", False))


@dataclass(frozen=True, slots=True)
class Line:
    """One defence on one compression, with its control.

    Attributes:
        defense: its cells, by attack.
        control: those of `none` in the same folder, by attack.
        badge: as the run printed it, or "".
    """

    defense: Mapping[str, Cell]
    control: Mapping[str, Cell]
    badge: str = ""


def lines_of(folder: Path) -> dict[tuple[str, str], Line]:
    """Compression and defence to what was measured of them; `none` too."""
    cells, store = cells_of(folder), RunStore.read(folder)
    badges = {
        (place["compression"], bare(one["defense"])): _badge(place)
        for one in summarise(store.manifest, store.trials()).get("defenses", ())
        for place in one["places"]
    }
    found = {}
    for name in dict.fromkeys((cell.compression, cell.defense) for cell in cells):
        here = {c.attack: c for c in cells if (c.compression, c.defense) == name and c.rows}
        control = {
            c.attack: c for c in cells if (c.compression, c.defense) == (name[0], "none") and c.rows
        }
        if here:
            found[name] = Line(here, control, badges.get((name[0], bare(name[1])), ""))
    return found


def joined(
    parts: Sequence[Mapping[tuple[str, str], Line]], kinds: Sequence[str]
) -> dict[tuple[str, str], Line]:
    """Lines of several folders: of each attack the cell that has most samples.

    The badge is that of the folder whose attacks know the defence, else of the fullest.
    """
    found: dict[tuple[str, str], Line] = {}
    labels: dict[str, str] = {}
    for part in parts:
        for (compression, label), line in part.items():
            # A mark in the middle of a label comes of options that tell two of a type apart.
            plain = bare(label).replace(" (unverified)", "")
            spec = next(iter(line.defense.values())).spec
            labels[spec] = max(labels.get(spec, ""), plain, key=len)
            known = found.get((compression, spec), line)
            adaptive = any(cell.adaptive for cell in line.defense.values())
            found[compression, spec] = Line(
                _fuller(known.defense, line.defense),
                _fuller(known.control, line.control),
                line.badge if adaptive or not known.badge else known.badge,
            )
    controls: dict[str, Mapping[str, Cell]] = {}
    for (compression, _), line in found.items():
        controls[compression] = _fuller(controls.get(compression, {}), line.control)
    named = {(place, labels[spec]): line for (place, spec), line in found.items()}
    return {
        name: replace(named[name], control=controls[name[0]], **_own(name, controls))
        for name in sorted(named, key=lambda name: place_of(name[1], kinds))
    }


def listed(scenario: Path) -> list[str]:
    """Types of the defences of a scenario, each once, in its order."""
    whole = yaml.safe_load(scenario.read_text(encoding="utf-8"))
    return list(dict.fromkeys(map(type_of, whole["defenses"])))


def place_of(label: str, kinds: Sequence[str]) -> int:
    """Where a scenario lists a defence, by its label."""
    kind = "stack" if " + " in label else label.split(" ")[0]
    return kinds.index(kind) if kind in kinds else len(kinds)


def _own(name: tuple[str, str], controls: Mapping[str, Mapping[str, Cell]]) -> dict[str, Any]:
    """Of the undefended line, that it is its own control."""
    return {"defense": controls[name[0]]} if name[1] == "none" else {}


def _fuller(one: Mapping[str, Cell], two: Mapping[str, Cell]) -> dict[str, Cell]:
    """Of each attack the cell with more samples."""
    found = dict(one)
    for name, cell in two.items():
        if name not in found or len(cell.rows) > len(found[name].rows):
            found[name] = cell
    return found


def _badge(place: Mapping[str, Any]) -> str:
    """A badge with the numbers of the rules that keep it from being better."""
    numbers = ", ".join(dict.fromkeys(str(rule["rule"]) for rule in failed(place)))
    return f"{place['badge']}: rules {numbers}" if numbers else str(place["badge"])


def worst(cells: Iterable[Cell]) -> tuple[int, int]:
    """Samples that some attack turned into a compression-specific failure, and all that count.

    Of those right on both clean paths; the worst case over attacks, sample by sample.
    """
    some = [cell for cell in cells if cell.attack != NOISE]
    names = set.intersection(*(set(cell.rows) for cell in some)) if some else set()
    eligible = [
        name
        for name in names
        if some[0].rows[name].full_clean and some[0].rows[name].compressed_clean
    ]
    broken = [name for name in eligible if any(cell.rows[name].failure for cell in some)]
    return len(broken), len(eligible)


def rate(count: int, total: int) -> str:
    """A rate with its Wilson interval."""
    found = wilson(count, total, 0.95)
    if found.value is None:
        return "–"
    return f"**{found.value:.2f}** [{found.low:.2f}, {found.high:.2f}] of {total}"


def accuracy(cell: Cell, name: str) -> float:
    """Share of right answers to clean pictures, in points."""
    rows = list(cell.rows.values())
    return 100 * sum(bool(getattr(row, name)) for row in rows) / len(rows)


def of_attack(cells: Mapping[str, Cell], name: str, metric: str) -> str:
    """A metric of one attack, or – where it was not run."""
    cell = cells.get(name)
    if cell is None:
        return "–"
    found = measure(list(cell.rows.values()), seed=0, names=(metric,))[metric].value
    return "–" if found is None else f"{found:.2f}"


def time_cost(line: Line) -> str:
    """Median over trials of what an answer through the compressor takes, against the control."""
    shared = line.defense.keys() & line.control.keys()
    mine = [one for name in shared for one in line.defense[name].seconds]
    theirs = [one for name in shared for one in line.control[name].seconds]
    if not mine or not theirs:
        return "–"
    return f"× {statistics.median(mine) / statistics.median(theirs):.2f}"


def halved(line: Line) -> str:
    """How much of the worst case is left, and whether the aim is met."""
    broken, total = worst(line.defense.values())
    # Against no defence an adaptive attack is the plain one, where that was run.
    same = {name.removesuffix(" adaptive") for name in line.defense} | set(line.defense)
    before, of = worst(cell for name, cell in line.control.items() if name in same)
    if not total or not before:
        return "–"
    return f"{(broken / total) / (before / of):.2f}"


def table(compression: str, lines: Mapping[tuple[str, str], Line]) -> str:
    """All defences on one compression."""
    here = {name[1]: line for name, line in lines.items() if name[0] == compression}
    widest = max((line.control for line in here.values()), key=len)
    plain = [name for name, cell in widest.items() if not cell.adaptive and name != NOISE]
    titles = ["defence", "badge", "n", "clean full", "clean compressed"]
    titles += [f"CSFR {name}" for name in plain]
    titles += ["CSFR adaptive", "CSFR worst case", "left of undefended"]
    titles += [f"CSG {name}" for name in plain]
    titles += ["CSG adaptive", "time"]
    text = [f"## {compression}", "", "| " + " | ".join(titles) + " |"]
    text.append("|" + "---|" * len(titles))
    for name, line in here.items():
        text.append("| " + " | ".join(_cells(name, line, plain)) + " |")
    return "\n".join(text) + "\n"


def _cells(name: str, line: Line, plain: Sequence[str]) -> list[str]:
    any_cell = next(iter(line.defense.values()))
    control = next(iter(line.control.values()))

    def clean(path: str) -> str:
        change = accuracy(any_cell, path) - accuracy(control, path)
        return f"{accuracy(any_cell, path):.1f}" + ("" if name == "none" else f" ({change:+.1f})")

    adaptive = {key: cell for key, cell in line.defense.items() if cell.adaptive}
    strongest = max(adaptive.values(), key=_failures, default=None)
    own = {} if strongest is None else {"strongest": strongest}
    known = strongest is not None and name != "none"
    draws = ""
    if known and strongest:
        many = f", {strongest.draws} draws" if strongest.draws else ""
        draws = f" ({strongest.attack}{many}, n = {len(strongest.rows)})"
    return [
        name,
        line.badge or ("control" if name == "none" else "UNVERIFIED (upper bound)"),
        str(min(len(cell.rows) for cell in line.defense.values())),
        clean("full_clean"),
        clean("compressed_clean"),
        *(of_attack(line.defense, attack, "csfr") for attack in plain),
        of_attack(own, "strongest", "csfr") + draws if own else "–",
        rate(*worst(line.defense.values())),
        "–" if name == "none" else halved(line),
        *(of_attack(line.defense, attack, "csg") for attack in plain),
        of_attack(own, "strongest", "csg") if own else "–",
        "× 1.00" if name == "none" else time_cost(line),
    ]


def _failures(cell: Cell) -> float:
    return sum(row.failure for row in cell.rows.values()) / len(cell.rows)


def page(folders: Sequence[Path], kinds: Sequence[str]) -> str:
    """The whole page, from run folders and the types of defences that should be in them."""
    manifests = [_json(folder, "manifest") for folder in folders]
    lines = joined([lines_of(folder) for folder in folders], kinds)
    missing = absent(kinds, lines)
    first = manifests[0]
    identity = first["provenance"].get("identity", {})
    compressions = list(dict.fromkeys(name[0] for name in lines))
    said = _settings(manifests)
    some = any("VERIFIED" in line.badge and "UN" not in line.badge for line in lines.values())
    unverified = "" if some else " No row is verified: read all of them as upper bounds."
    lacking = f"\n**No adaptive attack yet on: {', '.join(missing)}.**\n" if missing else ""
    measured = ", ".join(sorted({str(one["created"])[:10] for one in manifests}))
    epsilons = sorted({cell["epsilon"] * 255 for one in manifests for cell in one["cells"]})
    return f"""# Defences, against attacks that know them and attacks that do not

Made by `python benchmarks/results_defenses.py` from `{SCENARIO}`; do not edit.
{lacking}
{len(first["samples"])} samples of the held-out test split, one question a picture
(*n* is what the least measured attack of a row has; the others of that row may have more);
seed {first["seed"]}; device {identity.get("device", "unknown")};
ε·255 = {", ".join(f"{one:g}" for one in epsilons)}; measured {measured}. Read
[what a result is worth](../defenses.md#what-a-result-is-worth) first.

- *CSFR*: of the samples that are right on both clean paths, the share that the attack makes fail on
  the compressed path only. *adaptive*: the strongest attack that has the defence in its graph (its
  name, and the draws of a random defence in each call, behind it). *Worst case*: failures under any
  attack of the row, sample by sample, over the samples that all of them have; 95 % Wilson interval.
- *Badge*: the rules that fail are numbered as in the page named above.{unverified}
- *Left of undefended*: that worst case divided by the undefended one; under 0.50 it is halved.
- *Clean*: accuracy on clean pictures in points, and the change against no defence.
- *Time*: median time of an answer through the compressor divided by that without the defence, of
  batches of the run itself, on a machine that did other work too; a rough figure.
- Attack options were chosen on the validation split and are the same against all defences. Twenty
  steps are few: a defence may fall to more. Nothing here says how a large model behaves.

{chr(10).join(table(name, lines) for name in compressions)}
## Settings

{said}
"""


def transferred(folders: Sequence[Path]) -> str:
    """Every defence against images that were made without it: an upper bound of what it saves."""
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for folder in folders:
        for cell in cells_of(folder):
            # A mark in the middle of a label comes of options that tell two of a type apart.
            name = bare(cell.defense).replace(" (unverified)", "")
            here = found.setdefault((cell.compression, name), {})
            if not cell.adaptive and len(cell.rows) > len(here.get(cell.attack, _NOTHING).rows):
                here[cell.attack] = cell
    attacks = list(dict.fromkeys(name for here in found.values() for name in here if name != NOISE))
    text = ["", "# All defences, against images made without them", "", _where(folders), ""]
    for compression in dict.fromkeys(name[0] for name in found):
        text += [f"## {compression}", ""]
        titles = ["defence", "clean full", "clean compressed"]
        titles += [f"CSFR {name} (n)" for name in attacks] + ["worst case", "time"]
        text += ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
        control = found[compression, "none"]
        for (where, defense), here in found.items():
            if where == compression and here:
                text.append("| " + " | ".join(_transferred(defense, here, control, attacks)) + " |")
        text.append("")
    return "\n".join(text)


_NOTHING: Final = Cell("", "", "", adaptive=False, spec="")


def _transferred(
    defense: str, here: Mapping[str, Cell], control: Mapping[str, Cell], attacks: Sequence[str]
) -> list[str]:
    fullest = max(here.values(), key=lambda cell: len(cell.rows))
    base = control[fullest.attack]

    def clean(path: str) -> str:
        change = accuracy(fullest, path) - accuracy(base, path)
        return f"{accuracy(fullest, path):.1f}" + (f" ({change:+.1f})" if defense != "none" else "")

    def csfr(name: str) -> str:
        cell = here.get(name)
        return "–" if cell is None else f"{of_attack(here, name, 'csfr')} ({len(cell.rows)})"

    return [
        defense,
        clean("full_clean"),
        clean("compressed_clean"),
        *(csfr(name) for name in attacks),
        rate(*worst(here.values())),
        "× 1.00"
        if defense == "none"
        else time_cost(Line({fullest.attack: fullest}, {base.attack: base})),
    ]


def _where(folders: Sequence[Path]) -> str:
    """What was run on which device."""
    said = []
    for folder in folders:
        manifest = _json(folder, "manifest")
        hardware = manifest["provenance"].get("hardware", {})
        device = hardware.get("gpu", hardware.get("device", "unknown"))
        names = dict.fromkeys(one["name"] for one in manifest["scenario"]["attacks"])
        measured = {cell.attack for cell in cells_of(folder) if cell.rows}
        said.append(f"{', '.join(name for name in names if name in measured)} on {device}")
    return (
        "One image of an attack that knows no defence serves all of them, so these figures say "
        "what a defence saves **until somebody attacks it**: upper bounds, all of them. Of each "
        f"attack the run with the most samples counts ({'; '.join(said)}); worst case over the "
        "samples that all of a row's attacks have. Time is that of the first attack in the row, "
        "on a machine that did other work too. A defence that costs clean accuracy has a smaller "
        "denominator: read CSFR beside it."
    )


def _settings(manifests: Sequence[Mapping[str, Any]]) -> str:
    said: dict[str, str] = {}
    for manifest in manifests:
        for key in ("attacks", "defenses"):
            for one in manifest["scenario"][key]:
                options = {k: v for k, v in one.items() if k not in ("name", "epsilons")}
                said.setdefault(f"{key[:-1]} {one['name']}", json.dumps(options))
    return "\n".join(f"- {name}: `{options}`" for name, options in said.items())


if __name__ == "__main__":
    main()
